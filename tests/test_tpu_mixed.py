"""Mixed batches on TPU: which kernels run, and that every row gets its own result."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import problems
import pytest
from poison import poisoned_cache
from tolerances import of_output, tolerance
from tpu_interpreter import INTERPRETERS, no_races

import paged_kv
from paged_kv.kernels.tpu import decode_plan
from tools.tpu_schedule import operands

pytestmark = pytest.mark.usefixtures("quick_compiles")

PLAIN = {
    "kind": "mixed", "query_dtype": "bfloat16", "pool_dtype": "bfloat16", "scale": None,
    "is_causal": True, "local_window_size": None, "logits_soft_cap": None, "has_sinks": False,
    "has_slopes": False, "num_layers": None, "num_kv_heads": 4, "group": 2, "head_dim": 128,
    "block_size": 16,
}  # fmt: skip
LENGTHS, QUERIES = (40, 17, 0, 70, 1, 33), (1, 5, 0, 1, 1, 17)
PADDING = 3


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    for name in ("MAX_TILE_ROWS", "STEP_ROWS", "SMALL_STEP_ROWS"):
        monkeypatch.setattr(decode_plan, name, 256)
    jax.clear_caches()


def make_problem(lengths=LENGTHS, queries=QUERIES, **options):
    form = dataclasses.replace(problems.random_form(0), **PLAIN | options)
    rng = np.random.default_rng(5)
    window = problems.first_keys_seen(np.array(lengths), np.array(queries), form.local_window_size)
    fields = {"block_size": form.block_size, "num_kv_heads": form.num_kv_heads, "head_dim": 128}
    poisoned = poisoned_cache(
        rng, lengths, dtype=jnp.bfloat16, num_layers=form.num_layers, first_kept=window, **fields
    )
    heads = form.num_query_heads
    query = jnp.asarray(rng.standard_normal((sum(queries) + PADDING, heads, 128)), jnp.bfloat16)
    slopes = jnp.asarray(rng.random(heads), jnp.float32) if form.has_slopes else None
    starts = jnp.asarray(np.concatenate([[0], np.cumsum(queries)]), jnp.int32)
    layer = None if form.num_layers is None else jnp.int32(1)
    return problems.Problem("mixed", form, query, poisoned, starts, layer, None, slopes)


def check(problem, mode):
    options = {"implementation": "mosaic_tpu", "interpret": INTERPRETERS[mode]}
    with no_races():
        out, lse = jax.block_until_ready(problems.attend(problem, **options))
    expected_out, expected_lse = problem.expected()
    out = np.asarray(out, np.float64)
    np.testing.assert_allclose(out, expected_out, **of_output("kernel", "bfloat16"))
    np.testing.assert_allclose(lse, expected_lse, **tolerance("kernel float32"))
    assert not out[-PADDING:].any()
    assert np.all(np.asarray(lse[-PADDING:]) == -np.inf)


def test_every_row_has_its_own_result():
    check(make_problem(), "on_wait")


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        {"local_window_size": (20, 0), "has_slopes": True},
        {"is_causal": False, "logits_soft_cap": 2.5},
        {"num_layers": 3, "num_kv_heads": 1, "group": 8},
    ],
    ids=str,
)
def test_variants(options):
    check(make_problem(**options), "eager")


@pytest.mark.slow
@pytest.mark.parametrize("queries", [(1, 1, 0, 1, 1, 1), (3, 5, 0, 2, 0, 17)], ids=str)
def test_batches_of_one_kind(queries):
    check(make_problem(queries=queries), "eager")


DECODE, OTHERS = "paged_decode", "paged_attention"
LAUNCHED = [
    # query tokens, lengths, kernels
    ((1, 5, 0), (40, 17, 3), [DECODE, OTHERS]),
    ((1, 1, 1), (40, 17, 3), [DECODE]),
    ((2, 5, 0), (40, 17, 3), [OTHERS]),
    ((1, 5, 1), (0, 17, 0), [OTHERS]),  # rows with nothing to see
    ((0, 0, 0), (40, 17, 3), []),
]


def test_a_kernel_without_rows_is_not_launched():
    """The program is one; which of its kernels run is read from the numbers it is given."""
    cache = paged_kv.init_paged_kv_cache(
        num_blocks=16, block_size=16, num_kv_heads=4, head_dim=128, batch_size=3,
        max_blocks_per_seq=4, dtype=jnp.bfloat16,
    )  # fmt: skip

    def attend(query, keys, values, table, lengths, starts):
        cache = paged_kv.PagedKVCache(keys, values, table, lengths)
        named = {"query_start_loc": starts, "implementation": "mosaic_tpu"}
        return paged_kv.paged_attention(query, cache, **named)

    tensors = jnp.zeros((8, 8, 128), jnp.bfloat16), cache.key_pool, cache.value_pool
    table = np.arange(12, dtype=np.int32).reshape(3, 4)
    program = jax.jit(attend).trace(*tensors, table, table[0, :3], table[0]).jaxpr
    given = [operands.Tensor(x.shape, x.dtype, frozenset()) for x in tensors]
    for queries, lengths, kernels in LAUNCHED:
        starts = np.concatenate([[0], np.cumsum(queries)]).astype(np.int32)
        numbers = table, np.array(lengths, np.int32), starts
        calls = operands.kernel_calls(program, [*given, *numbers])
        assert [call.name for call in calls] == kernels, (queries, lengths)
