"""Instructions of the scalar unit do what they do on the chip, or say that they are not known."""

import numpy as np
import pytest

from tools.tpu_schedule import dump
from tools.tpu_schedule.chips import CHIPS
from tools.tpu_schedule.machine import Machine
from tools.tpu_schedule.values import UnknownValueError

OPERATIONS = {
    "sadd.s32 %s1_s1, %s2_s2": lambda a, b: np.add(a, b),
    "ssub.s32 5, %s2_s2": lambda a, b: np.subtract(np.int32(5), b),
    "smul.u32 %s1_s1, %s2_s2": lambda a, b: np.multiply(a, b),
    "smulhi.u32 %s1_s1, %s2_s2": lambda a, b: np.uint64(np.uint32(a)) * np.uint32(b) >> 32,
    "sshll.u32 %s1_s1, 7": lambda a, b: np.left_shift(a, 7),
    "sshra.s32 %s1_s1, 7": lambda a, b: np.right_shift(a, 7),
    "sshrl.u32 %s1_s1, 7": lambda a, b: np.uint32(a) >> 7,
    "sand.u32 4294967288, %s1_s1": lambda a, b: a & ~7,
    "sor.u32 %s1_s1, %s2_s2": lambda a, b: a | b,
    "sxor.u32 %s1_s1, %s2_s2": lambda a, b: a ^ b,
    "smin.u32 %s1_s1, %s2_s2": lambda a, b: min(np.uint32(a), np.uint32(b)),
    "smax.s32 %s1_s1, %s2_s2": lambda a, b: max(a, b),
    "smov (!%p3_p1, %s1_s1), %s2_s2": lambda a, b: a if a < b else b,
    "smov (%p3_p1, %s1_s1), %s2_s2": lambda a, b: b if a < b else a,
    "scalar_select %p3_p1, %s1_s1, 9": lambda a, b: a if a < b else 9,
    "scalar_select %p4_p2, %s1_s1, 9": lambda a, b: a if np.uint32(a) >= np.uint32(b) else 9,
    "scalar_select %p5_p3, 1, 0": lambda a, b: not (a < b and np.uint32(a) >= np.uint32(b)),
    "scalar_select %p6_p4, 1, 0": lambda a, b: a < b or a != b,
    "sld [smem:[#allocation5 + %s9_s9]]": lambda a, b: b,
    "sld [smem:[#allocation8 + $0x3]]": lambda a, b: a,
}
SETUP = (
    "%s0_s0 = inlined_call_operand.hbm [shape: s32[8], index: 0, kind: input] ;; %s9_s9 = smov 1",
    "%7 = dma.hbm_to_smem %s0_s0, 1, [#allocation5], [#allocation1]",
    "%6 = dma.hbm_to_smem %s0_s0, 1, [#allocation6 + $0x8], [#allocation1], 4, 4, 1",
    "%s1_s1 = sld [smem:[#allocation5]] ;; %s2_s2 = sld [smem:[#allocation5 + $0x1]]",
    "%p3_p1 = scmp.lt.s32.totalorder %s1_s1, %s2_s2",
    "%p4_p2 = scmp.ge.u32.totalorder %s1_s1, %s2_s2",
    "%p10_p5 = scmp.ne.s32.totalorder %s1_s1, %s2_s2",
    "%p5_p3 = pnand %p3_p1, %p4_p2 ;; %p6_p4 = por %p3_p1, %p10_p5",
    "%8 = sst [smem:[#allocation8 + $0x3]] %s1_s1",
    "%11 = sdivrem.u32 %s1_s1, 7 /* kDiv */ ;; %12 = sdivrem.u32 %s1_s1, %s2_s2 /* kRem */",
    "%13 = sdivrem.u32 %s2_s2, %s1_s1",
)
# the result is the size of the one copy that is counted
RESULT = (
    "%s31_s8 = inlined_call_operand.hbm [shape: f32[8,128], index: 1, kind: input]",
    "%22 = dma.hbm_to_vmem [thread:$0] %s31_s8, %s30_s7, %s9_s9, [#allocation1]",
)


def schedule(*bundles):
    return "\n".join(f" {at:#x} : {{ {operations} }}" for at, operations in enumerate(bundles))


def followed(text, *numbers):
    """The way of a kernel that is given the numbers as operand 0; copies of operand 1 count."""
    bundles = dump.parse_bundles(text)
    return Machine(CHIPS["v5e"], bundles, [np.array(numbers, np.int32), None], frozenset({1})).run()


@pytest.mark.parametrize("operands", [(3, 5), (-7, 100), (2**31 - 1, -(2**31)), (-1, -2), (6, 6)])
@pytest.mark.parametrize(
    ("operation", "value"),
    [
        *OPERATIONS.items(),
        ("spop.drf %11", lambda a, b: np.uint32(a) // np.uint32(7)),
        ("spop.drf %12", lambda a, b: np.uint32(a) % np.uint32(b)),
    ],
)
def test_a_scalar_operation_does_what_32_bits_do(operation, value, operands):
    trace = followed(schedule(*SETUP, f"%s30_s7 = {operation}", *RESULT), *operands)
    with np.errstate(over="ignore"):
        expected = np.array(value(*map(np.int32, operands))).astype(np.int64).astype(np.int32)
    assert [copy.size for visit in trace.visits for copy in visit.copies] == [expected]


def test_a_division_without_a_choice_leaves_quotient_and_remainder():
    for index, result in enumerate((33, 1)):
        pops = [f"%s{30 - at}_s7 = spop.drf %13" for at in range(index, -1, -1)]
        trace = followed(schedule(*SETUP, *pops, *RESULT), 3, 100)
        assert [copy.size for visit in trace.visits for copy in visit.copies] == [result]


@pytest.mark.parametrize(
    ("operation", "source"),
    [
        ("sld [smem:[#allocation6]]", "a word that nothing wrote"),
        ("scvt.s32.f32 %s1_s1", "scvt.s32.f32"),
        ("smov %s77_s7", "value 77, which nothing"),
        ("sadd.s32 1, %s76_s7", "value 76, which nothing"),
        ("sand.u32 %s0_s0, 1", "the number of an address"),
        ("sld [smem:[#allocation5 + $0x9]]", "a word that nothing wrote"),
        ("sld [smem:[#allocation6 + $0x8]]", "a copy with strides"),
    ],
)
def test_a_branch_on_something_unknown_says_on_what(operation, source):
    text = schedule(
        *SETUP,
        f"%s30_s7 = {operation}",
        "%p31_p1 = scmp.gt.s32.totalorder %s30_s7, 0",
        "%32 = sbr.rel (%p31_p1) target bundleno = 0 (0x0), region = 1",
    )
    with pytest.raises(UnknownValueError, match=f"depends on .*{source}"):
        followed(text, 1, 2)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (" 0 : { %1 = sbr.rel (%p2_p1) target nowhere }", "a branch to nowhere"),
        (" 0 : { %s1_s1 = sphi %s2_s1, %s3_s2 }", "join in different registers"),
        (" 0 : { 17 }", "not an operation: 17"),
        (
            " 0 : { %1 = sbr.rel target bundleno = 2 (0x2), region = 1 }\n 0x1 : {}\n 0x2 : {}",
            "bundle 0x2 is the target of a branch and behind another",
        ),
        (" 0 : { %1 = sst [smem:[#allocation2 + %s3_s3]] 4 }", "stored at an unknown place"),
        (" 0 : { %1 = dma.hbm_to_smem %s2_s2, %s3_s3, [#allocation1], 0 }", "size of a copy"),
    ],
)
def test_a_schedule_that_makes_no_sense_is_an_error(text, message):
    with pytest.raises(ValueError, match=message):
        followed(text, 1)
