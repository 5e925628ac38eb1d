"""The schedule tool counts what a kernel would run: on hand-made schedules, and on real ones."""

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tpu_kernels
from jax import lax
from jax.experimental import pallas as pl

from benchmarks import cases
from tools.tpu_schedule import __main__ as command
from tools.tpu_schedule import dump, operands, paths, program
from tools.tpu_schedule.chips import CHIPS, TOPOLOGIES, chip_of
from tools.tpu_schedule.figures import Call, Ways, figures
from tools.tpu_schedule.machine import Block, Copy, Machine, Trace, Visit
from tools.tpu_schedule.measure import CompileError, measure

KEYS = [
    *("case", "topology", "sched_per_kib", "hbm_per_kib", "ratio", "sequence_ratio"),
    *("cycles_per_block_copy", "hot_loop_spills", "spills", "vmem_bytes", "mxu_share"),
    "compile_seconds",
]
CHIP = CHIPS["v5e"]
HERE = Path(__file__).parent

# A loop of operand 0 [0] trips, four delay slots behind a branch.  A trip below operand 0 [1] goes
# the way with two copies and two vector spills, any other the way with one of each.
LOOP = (HERE / "tpu_loop.txt").read_text()
SLOTS = "# utilization\nMXU, VSTORE:SPILL\n2 1\n\n" + "1 0\n" * 21


def followed(text, *numbers, counted=(1,)):
    """The way of a kernel that is given the numbers as operand 0."""
    machine = Machine(
        CHIP, dump.parse_bundles(text), [np.array(numbers, np.int32), None], frozenset(counted)
    )
    return machine.run()


def loop_dump():
    return dump.Dump("loop", dump.parse_bundles(LOOP), dump.parse_slots(SLOTS), 4096)


def test_bundles_keep_operations_and_lose_comments():
    bundles = dump.parse_bundles(LOOP)
    assert len(bundles) == 21
    assert bundles[9] == ()
    assert bundles[2] == ("%4 = dma.hbm_to_smem  %s1_s0,  1,  %s3_s2,  [#allocation1]",)
    assert bundles[1] == ("%s3_s2 = smov [#allocation5]",)


def test_a_missing_bundle_is_noticed():
    with pytest.raises(ValueError, match="bundle 0x5 stands where 0x4 should"):
        dump.parse_bundles(LOOP.replace("   0x4 LB:", "   unread"))


def test_memory_in_use_is_from_the_first_buffer_to_the_last():
    text = """
  #allocation3 [shape = 'f32[8,128]', space=vmem, size = 0x1000, offset = 0x200, scoped, tag = 'a']
    #allocation4_spill [shape = 'f32[8,128]', space=vmem, size = 0x800, offset = 0x1200, scoped]
  #allocation5 [shape = 's32[8]', space=smem, size = 0x9000, offset = 0x9000, scoped, tag = 'b']
  #allocation6 [shape = 'u32[]', space=vmem, size = 0x4, offset = 0xf0000, fixed_abs, tag = 'c']
"""
    assert dump.vmem_bytes(text) == 0x1800


def test_a_dump_without_a_kernel_is_an_error(tmp_path):
    (tmp_path / "123-some.1-01-packed-bundles-post-ra.txt").write_text(LOOP)
    with pytest.raises(ValueError, match=r"left no pre-delay.* and no post-delay.*'some.1'"):
        dump.read(tmp_path, ["some.1"])


def test_a_dump_whose_files_differ_in_length_is_an_error(tmp_path):
    for name, text in ((dump.BUNDLES, LOOP), (dump.SLOTS, SLOTS + "1 0\n"), (dump.MEMORY, "")):
        (tmp_path / f"123-some.1-01-{name}.txt").write_text(text)
    with pytest.raises(ValueError, match=r"some\.1: 22 rows of slots, 21 bundles"):
        dump.read(tmp_path, ["some.1"])


@pytest.mark.parametrize(("trips", "limit"), [(1, 0), (5, 0), (5, 3), (4, 9)])
def test_a_loop_is_followed_as_often_as_its_numbers_say(trips, limit):
    trace = followed(LOOP, trips, limit)
    short = max(0, trips - limit)  # bundles 4 to 0xb, then 0xe to 0x13
    assert trace.is_whole
    assert trace.cycles == 4 + 16 * trips - 2 * short + 1
    copies = [copy for visit in trace.visits for copy in visit.copies]
    expected = []
    for trip in range(trips):
        expected += [Copy(1, 4 * trip, 4)] + [Copy(1, 4 * trip, 8)] * (trip < limit)
    assert copies == expected


def test_an_endless_loop_is_left():
    trace = Machine(
        CHIP, dump.parse_bundles(LOOP), [np.array([2**31 - 1, 0], np.int32)], frozenset()
    ).run(max_cycles=1000)
    assert not trace.is_whole
    assert trace.cycles < 1100


@pytest.mark.parametrize(
    ("limit", "spills", "cycles", "copies"), [(0, 1, 14, 1), (100, 2, 16, 2), (30, 1, 14, 1)]
)
def test_the_hot_loop_is_measured_on_the_way_most_of_its_time_takes(limit, spills, cycles, copies):
    kernel = loop_dump()
    path = paths.hot_path(kernel, followed(LOOP, 100, limit))
    assert (path.cycles, path.copies, path.granules) == (cycles, copies, 4 + 8 * (copies - 1))
    assert kernel.spills(path.passes) == spills
    assert path.iterations == (100 - limit if limit < 50 else 100)


def test_when_no_way_takes_half_of_the_time_all_are_measured_together():
    head, tail = Block(0, 4, None, int), Block(10, 12, 0, int)
    ways = [Block(4, 5, None, int), Block(5, 7, None, int), Block(7, 10, None, int)]
    copy = (Copy(1, 0, 3),)
    visits = [
        visit
        for way in ways
        for _ in range(10)
        for visit in (Visit(head, copy), Visit(way, ()), Visit(tail, ()))
    ]
    trace = Trace((*visits, Visit(Block(12, 13, None, int), ())), is_whole=True)
    kernel = dump.Dump("kernel", ((),) * 13, dump.Slots((), (), ()), 0)
    path = paths.hot_path(kernel, trace)
    assert (path.iterations, path.cycles, path.copies, path.granules) == (30, 8, 1, 3)
    assert path.passes[3] == 1
    assert path.passes[9] == pytest.approx(1 / 3)


def test_without_a_hot_loop_the_whole_kernel_is_measured():
    kernel, trace = loop_dump(), followed(LOOP, 1, 0)
    no_copies = paths.hot_path(kernel, followed(LOOP, 50, 0, counted=()))
    assert (no_copies.iterations, no_copies.cycles) == (1, 4 + 50 * 14 + 1)
    assert paths.hot_path(kernel, trace).cycles == 14


def double(x_ref, out_ref):
    out_ref[...] = x_ref[...] + x_ref[...]


def kernel(name, *arrays):
    """A kernel that updates its last array in place."""
    return pl.pallas_call(
        lambda *refs: double(refs[-2], refs[-1]),
        out_shape=arrays[-1],
        input_output_aliases={len(arrays) - 1: 0},
        name=name,
    )(*arrays)


def tensor(name, *shape):
    return operands.Tensor(shape, jnp.float32, frozenset({name}))


def test_kernels_are_given_the_numbers_of_the_run():
    @jax.custom_vjp
    def attend(lengths, pool):
        short, long = (lambda p, n=n: kernel(n, lengths * 2, p) for n in ("short", "long"))
        return lax.cond(lengths.max() > 10, long, short, pool)

    attend.defvjp(lambda *args: (attend(*args), None), lambda *_: (None, None))

    def step(lengths, pool, query):
        pool = jax.jit(lambda p: kernel("append", lengths, p.reshape(4, 8, 128)))(pool)
        return attend(lengths + 1, pool.reshape(32, 128)), query

    shape = jax.ShapeDtypeStruct
    lengths = np.array([3, 4], np.int32)
    traced = jax.make_jaxpr(step)(
        shape((2,), jnp.int32), shape((32, 128), jnp.float32), shape((32, 128), jnp.float32)
    )
    given = tensor("pool", 32, 128), tensor("query", 32, 128)
    calls = operands.kernel_calls(traced, [lengths, *given])
    assert [call.name for call in calls] == ["append", "short"]
    np.testing.assert_array_equal(calls[0].operands[0], [3, 4])
    np.testing.assert_array_equal(calls[1].operands[0], [8, 10])
    assert calls[0].pools(frozenset({"pool"}), 32 * 128) == {1, 2}
    assert calls[0].pools(frozenset({"query"}), 32 * 128) == frozenset()
    calls = operands.kernel_calls(traced, [lengths + 10, *given])
    assert [call.name for call in calls] == ["append", "long"]


def test_a_kernel_that_only_data_can_choose_is_an_error():
    def step(pool):
        return lax.cond(pool[0, 0] > 0, lambda p: kernel("some", p), lambda p: p, pool)

    traced = jax.make_jaxpr(step)(jax.ShapeDtypeStruct((8, 128), jnp.float32))
    with pytest.raises(ValueError, match="which kernels run inside `cond` is not known"):
        operands.kernel_calls(traced, [tensor("pool", 8, 128)])


def test_operands_lie_in_memory_as_the_compiler_says():
    flat = np.arange(2000, dtype=np.int32)
    np.testing.assert_array_equal(operands.in_memory(flat, "{0:T(1024)}"), flat)
    table = flat[:30].reshape(3, 10)
    np.testing.assert_array_equal(operands.in_memory(table, "{1,0}"), flat[:30])
    np.testing.assert_array_equal(operands.in_memory(table, "{0,1}"), table.T.ravel())
    tiled = operands.in_memory(table, "{1,0:T(2,4)}")
    assert tiled is not None
    np.testing.assert_array_equal(tiled[:8], [0, 1, 2, 3, 10, 11, 12, 13])
    np.testing.assert_array_equal(tiled[16:24], [8, 9, 0, 0, 18, 19, 0, 0])
    assert tiled.size == 4 * 12
    assert operands.in_memory(tensor("pool", 8), "{0}") is None
    assert operands.in_memory(np.zeros(4, np.int8), "{0}") is None


def test_a_case_is_compiled_with_the_pool_of_a_server():
    case = cases.find("8b_b1_512")
    made = program.of_case(case)
    pool = made.arguments["key_pool"]
    assert 2 * np.prod(pool.shape) * 2 == program.POOL_BYTES
    assert made.context is None
    np.testing.assert_array_equal(made.run.numbers["seq_lengths"], [512])
    assert made.run.num_bytes == 512 * case.token_bytes


def test_a_length_replaces_those_of_the_case():
    made = program.of_case(cases.find("8b_prefill_4x4k"), kv_len=100)
    np.testing.assert_array_equal(made.run.numbers["seq_lengths"], [100] * 4)
    np.testing.assert_array_equal(made.run.numbers["query_start_loc"], [0, 100, 200, 300, 400])
    assert made.run.useful_flops == 4 * 4 * 32 * 128 * 100 * 101 // 2
    assert made.context is None


@pytest.mark.parametrize("name", ["8b_prefill_1x4k", "8b_chunk_4x2k_at_8k"])
def test_context_adds_full_tiles_and_no_query(name):
    case = cases.find(name)
    context = program.of_case(case).context
    assert context is not None
    less, more = context
    starts = less.numbers["query_start_loc"]
    np.testing.assert_array_equal(starts, more.numbers["query_start_loc"])
    added = more.numbers["seq_lengths"] - less.numbers["seq_lengths"]
    pairs = int((np.diff(starts) * added).sum())
    assert pairs > 0
    assert more.useful_flops - less.useful_flops == 4 * 32 * 128 * pairs
    assert more.numbers["block_table"].shape == (case.batch, case.max_blocks_per_seq)


@pytest.mark.parametrize("name", ["8b_b64_4k", "8b_prefill_1x16k_window", "8b_mixed_60x4k_4x1k"])
def test_a_case_without_chunks_of_full_tiles_has_no_context(name):
    assert program.of_case(cases.find(name)).context is None


def test_figures_of_a_loop():
    kernel = loop_dump()
    ways = lambda trips: Ways((Call(kernel, followed(LOOP, trips, 0)),), 128 * trips, 10**6 * trips)
    given = CHIP, {"loop": kernel}, ways(100)
    found = figures(*given, (ways(10), ways(20)), is_whole=False, asks_sequence=False)
    assert found["sched_per_kib"] == 14 * 8  # 4 granules of 32 bytes an iteration
    assert found["hbm_per_kib"] == pytest.approx(1.875, abs=1e-3)
    assert found["ratio"] == pytest.approx(14 * 8 / 1.875, rel=1e-3)
    assert found["sequence_ratio"] is None
    assert found["cycles_per_block_copy"] == 14
    assert (found["hot_loop_spills"], found["spills"], found["vmem_bytes"]) == (1, 2, 4096)
    assert found["mxu_share"] == pytest.approx(10**7 / 140 / CHIP.flops_per_cycle, abs=1e-3)
    found = figures(*given, None, is_whole=True, asks_sequence=True)
    assert found["sched_per_kib"] == pytest.approx(1405 * 8 / 100, abs=1e-3)
    assert found["sequence_ratio"] == found["ratio"]
    assert found["mxu_share"] == pytest.approx(10**8 / 1405 / CHIP.flops_per_cycle, abs=1e-3)


def test_an_unknown_topology_or_case_is_refused(capsys):
    with pytest.raises(ValueError, match=r"no chip 'v9'.*v5e:2x2"):
        chip_of("v9:2x2")
    assert command.main(["8b_b64_4q", "--topology", "v5e:2x2"]) == 1
    assert "no case '8b_b64_4q', perhaps 8b_b64_4k" in capsys.readouterr().err


def test_without_a_compiler_the_way_to_one_is_told(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(CompileError, match=r"pip install -e '.\[aot\]'"):
        measure("8b_b64_4k", "v5e:2x2")


def test_a_target_that_is_no_python_file_is_refused(tmp_path):
    with pytest.raises(ValueError, match="is not a Python file"):
        program.load(f"{tmp_path / 'some.txt'}:case")


@pytest.mark.aot
def test_the_slope_of_a_product_is_the_peak():
    small, large = (
        measure(f"{HERE / 'tpu_kernels.py'}:{name}_product", "v6e:2x2").hot.path
        for name in ("small", "large")
    )
    assert small.iterations == large.iterations == tpu_kernels.TRIPS
    slope = (large.cycles - small.cycles) / (tpu_kernels.LARGE - tpu_kernels.SMALL)
    flops = 2 * 512 * 512 / slope
    assert flops == pytest.approx(CHIPS["v6e"].flops_per_cycle, rel=0.02)


@pytest.mark.aot
@pytest.mark.parametrize("topology", TOPOLOGIES)
def test_scalars_of_a_compiled_kernel_are_carried_out(topology):
    measured = measure(f"{HERE / 'tpu_kernels.py'}:arithmetic", topology)
    trips = tpu_kernels.trips_of(tpu_kernels.NUMBERS)
    found = [0] * len(trips)
    for visit in measured.hot.call.trace.visits:
        for copy in visit.copies:
            found[copy.size * chip_of(topology).granule // (8 * 512) - 1] += 1
    assert found == trips


@pytest.mark.aot
def test_a_decode_brings_in_the_blocks_of_its_table_and_twice_the_same():
    first, second = (measure("ci_hd128", "v5e:2x2") for _ in range(2))
    assert list(first.record) == KEYS
    differing = {key for key in KEYS if first.record[key] != second.record[key]}
    assert differing <= {"compile_seconds"}
    case = cases.find("ci_hd128")
    (table,) = case.block_tables()
    used = sorted(table[table >= 0].tolist())
    granules = case.block_size * case.token_bytes // 2 // CHIP.granule
    copies = [copy for visit in first.hot.call.trace.visits for copy in visit.copies]
    for operand in {copy.operand for copy in copies}:
        blocks = set()
        for copy in copies:
            if copy.operand == operand:
                blocks.update(range(copy.offset, copy.offset + copy.size))
        assert sorted({place // granules for place in blocks}) == used


@pytest.mark.aot
def test_two_measurements_at_once_write_their_records(tmp_path):
    files = [tmp_path / "fused.json", tmp_path / "append.json"]
    runs = [
        ["ci_fused", "--topology", "v6e:2x2", "--kv-len", "40", "--json", str(files[0])],
        ["ci_append", "--topology", "v5e:2x2", "--json", str(files[1])],
    ]
    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(command.main, runs)) == [0, 0]
    (fused,), (append,) = (json.loads(file.read_text()) for file in files)
    assert list(fused) == list(append) == KEYS
    assert fused["sequence_ratio"] == fused["ratio"] > 0
    assert append["sequence_ratio"] is append["mxu_share"] is None


@pytest.mark.aot
def test_what_the_compiler_refuses_is_told(tmp_path):
    broken = tmp_path / "broken.py"
    broken.write_text("def case():\n    raise NotImplementedError('no such tile')\n")
    with pytest.raises(CompileError, match=r"broken\.py:case on v5e:2x2: .*no such tile"):
        measure(f"{broken}:case", "v5e:2x2")
