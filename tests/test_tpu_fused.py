"""The TPU decode kernel that appends too, in the interpreter, against one after the other."""

import contextlib
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from bitwise import assert_same_bits
from kernel_checks import appended
from poison import poisoned_cache
from tolerances import of_output, tolerance
from tpu_interpreter import INTERPRETERS, MODES, no_races

import paged_kv
from paged_kv.kernels.tpu import decode_append
from paged_kv.kernels.tpu import decode_plan as plans

pytestmark = pytest.mark.usefixtures("quick_compiles")

BLOCK = 16
EDGES = (0, 1, BLOCK - 1, BLOCK, BLOCK + 1)
TILES = {"MAX_TILE_ROWS": 256, "STEP_ROWS": 256, "SMALL_STEP_ROWS": 256}


@dataclasses.dataclass(frozen=True)
class Case:
    """A decode step, advanced already; `wild` are entries (row, column) that lead nowhere."""

    lengths: tuple
    heads: tuple = (8, 4)
    limits: dict = dataclasses.field(default_factory=dict)
    options: dict = dataclasses.field(default_factory=dict)
    cache: dict = dataclasses.field(default_factory=dict)
    wild: tuple = ()


ONE_STEP = {"STEP_ROWS": 1024}
CASES = {
    # rows 5 and 6 have a wild entry, before the new token and its own; two programs of 8 rows
    "ragged": Case(
        (*EDGES, 40, 40, 64, 130, 17),
        limits={"QUERY_BYTES": 1},
        options={"local_window_size": (40, 0)},
        cache={"num_layers": 3},
        wild=((5, 0), (6, 2), (9, 0)),
    ),
    "all_keys": Case((*EDGES, 130, 64)),
    "window": Case(
        (200, 5, 90, 17, 64),
        heads=(8, 2),
        options={"local_window_size": (40, 0)},
        cache={"first_kept": (159, 0, 49, 0, 23)},
    ),
    "one_step": Case((40, 17, 0, 64), limits=ONE_STEP, wild=((1, 0),)),
    "two_rows_a_step": Case(
        (0, 64, *EDGES, 64, 40), limits={"STEP_ROWS": 512}, cache={"max_blocks_per_seq": 4}
    ),
    "one_kv_head": Case((*EDGES, 300), heads=(8, 1)),
    "one_full_step": Case((64, 64), limits=ONE_STEP, cache={"max_blocks_per_seq": 4}),
    "itself_alone": Case((33, 0, 1), options={"local_window_size": 0}),
    "eight_heads": Case((70, 16, 1), heads=(32, 8)),
    # a token is two units; row 1 has a wild entry before its new token
    "many_kv_heads": Case(
        (17, 40, 1), heads=(32, 32), limits={"MAX_TILE_ROWS": 512}, wild=((1, 0),)
    ),
    "blocks_of_128": Case((127, 129, 256), heads=(32, 8), cache={"block_size": 128}),
    "blocks_of_128_one_head": Case((127, 1, 128, 129), heads=(8, 1), cache={"block_size": 128}),
    "capped_with_slopes": Case(
        (70, 0, 130), options={"logits_soft_cap": 2.5, "alibi_slopes": True, "is_causal": False}
    ),
}


@contextlib.contextmanager
def plan_limits(limits):
    """Tiles of a few blocks, so that short sequences have many."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in (TILES | limits).items():
            patch.setattr(plans, name, value)
        jax.clear_caches()
        yield


def step_of(case, seed=0):
    """(query, keys, values, cache, layer, options); the slots of new tokens are poison still."""
    rng = np.random.default_rng(seed)
    fields = {"block_size": BLOCK, "dtype": jnp.bfloat16, "head_dim": 128} | case.cache
    before = np.maximum(np.array(case.lengths) - 1, 0)
    cache = poisoned_cache(
        rng, before, capacity=case.lengths, num_kv_heads=case.heads[1], **fields
    ).cache
    table = np.array(cache.block_table)
    for i, at in enumerate(case.wild):
        table[at] = (-1, cache.num_blocks, 2**31 - 1)[i % 3]
    cache = paged_kv.PagedKVCache(
        cache.key_pool, cache.value_pool, jnp.asarray(table), jnp.asarray(case.lengths, jnp.int32)
    )
    batch = len(case.lengths)
    normal = lambda heads: jnp.asarray(rng.standard_normal((batch, heads, 128)), jnp.bfloat16)
    options = dict(case.options)
    if options.pop("alibi_slopes", False):
        options["alibi_slopes"] = jnp.asarray(rng.random(case.heads[0]), jnp.float32)
    layer = jnp.int32(1) if "num_layers" in fields else None
    arrays = normal(case.heads[0]), normal(case.heads[1]), normal(case.heads[1])
    return *arrays, cache, layer, options


def run(step, schedule=None, **named):
    """((out, lse), cache) under jit, where entries may lead nowhere."""
    query, keys, values, cache, layer, options = step

    @jax.jit
    def both(query, keys, values, cache, layer, schedule):
        return paged_kv.append_and_attend(
            query, keys, values, cache, layer=layer, schedule=schedule, return_residual=True,
            **named, **options,
        )  # fmt: skip

    return jax.block_until_ready(both(query, keys, values, cache, layer, schedule))


def check(case, mode):
    step = step_of(case)
    with plan_limits(case.limits), no_races():
        named = {"implementation": "mosaic_tpu", "interpret": INTERPRETERS[mode]}
        (out, lse), after = run(step, **named)
    assert_same_bits((after.key_pool, after.value_pool), pools_after(step))
    (expected_out, expected_lse), _ = run(step, implementation="xla")
    out, expected_out = (np.asarray(x, np.float64) for x in (out, expected_out))
    np.testing.assert_allclose(out, expected_out, **of_output("kernel", "bfloat16", 2))
    np.testing.assert_allclose(lse, expected_lse, **tolerance("kernel float32"))


def pools_after(step):
    """What appending alone leaves in the pools."""
    _, keys, values, cache, layer, _ = step
    return appended(cache, keys, values, None, None if layer is None else int(layer))


QUICK = ("ragged", "one_step", "many_kv_heads")


@pytest.mark.timeout(300)
@pytest.mark.parametrize("name", QUICK)
def test_as_one_after_the_other(name):
    check(CASES[name], MODES[QUICK.index(name) % 2])


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", CASES)
def test_every_case_in_both_modes(name, mode):
    check(CASES[name], mode)


@pytest.mark.slow
def test_a_schedule_of_other_lengths_moves_no_write():
    """Under jit nobody notices; what is written goes where the lengths say, and is all there."""
    step = step_of(Case((20, 17, 40)))
    lengths = jnp.array([10, 17, 0], jnp.int32)
    other = dataclasses.replace(step[3], seq_lengths=lengths)
    schedule = paged_kv.make_schedule(other, num_query_heads=8)
    named = {"implementation": "mosaic_tpu", "interpret": INTERPRETERS["eager"]}
    with plan_limits(ONE_STEP), no_races():
        _, after = run(step, schedule, **named)
    assert_same_bits((after.key_pool, after.value_pool), pools_after(step))


@pytest.mark.slow
def test_a_missing_wait_shows(monkeypatch):
    """The interpreter can fail: a token that nobody waits for does not arrive."""
    monkeypatch.setattr(decode_append.TokenWriter, "wait", lambda *_: None)
    step = step_of(Case((33, 64)))
    named = {"implementation": "mosaic_tpu", "interpret": INTERPRETERS["on_wait"]}
    with plan_limits(ONE_STEP):
        _, after = run(step, **named)
    with pytest.raises(AssertionError, match="elements differ"):
        assert_same_bits((after.key_pool, after.value_pool), pools_after(step))
