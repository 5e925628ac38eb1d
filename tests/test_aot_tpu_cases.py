"""The named cases of benchmarks/cases.py compile for every generation of TPU."""

import pytest

from benchmarks import cases
from tools.tpu_schedule.chips import TOPOLOGIES
from tools.tpu_schedule.program import load
from tools.tpu_schedule.worker import compile_program

pytestmark = pytest.mark.aot

# kernels that differ most, on the chips with the least memory and the newest
SOME = [
    ("8b_b1_512", "v4:2x2x1"),
    ("70btp8_b64_8k_block128", "v5p:2x2x1"),
    ("ci_mixed", "tpu7x:2x2x1"),
]


def assert_compiles(name, topology):
    _, text, _ = compile_program(load(name), topology)
    assert "tpu_custom_call" in text


@pytest.mark.parametrize("name, topology", SOME)
def test_a_case_compiles(name, topology):
    assert_compiles(name, topology)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("topology", TOPOLOGIES)
@pytest.mark.parametrize("name", cases.CASES)
def test_every_case_compiles(name, topology):
    assert_compiles(name, topology)
