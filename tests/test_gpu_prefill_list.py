"""The query tiles of GPU prefill: every row once, with the keys it sees, longest first."""

import functools
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from paged_kv.kernels.core import schedule
from paged_kv.kernels.core.problem import CacheShape, Problem
from paged_kv.kernels.core.variant import Variant
from paged_kv.kernels.gpu import plan, prefill_list, prefill_plan
from paged_kv.kernels.gpu.prefill_list import Item

pytestmark = pytest.mark.usefixtures("quick_compiles")

BATCH, NUM_TOKENS = 3, 600
CACHE = CacheShape(1, 64, 16, 2, 128, "bfloat16", BATCH, 32)
VARIANTS = [
    Variant(1.0),
    Variant(1.0, is_causal=False),
    Variant(1.0, window=(100, 0)),
    Variant(1.0, is_causal=False, window=(40, 70)),
]
IDS = ["causal", "full", "sliding", "two_sided"]


def problem(cache=CACHE, num_tokens=NUM_TOKENS, group=4, query_dtype="bfloat16", **variant):
    heads = cache.num_kv_heads * group
    return Problem(cache, num_tokens, heads, query_dtype, True, Variant(1.0, **variant))


@functools.partial(jax.jit, static_argnums=(0, 1))
def lists(cut, variant, lengths, starts):
    made_for = schedule.MadeFor.of(CACHE, 8, True, variant)
    return prefill_list.make(cut, variant, schedule.Schedule(lengths, starts, made_for))


def batches():
    """(lengths, query tokens) of batches: edges of tiles, blocks and row groups."""
    rng = np.random.default_rng(0)
    yield [0, 0, 0], [0, 0, 0]
    yield [512, 64, 7], [448, 64, 7]
    yield [3, 130, 400], [9, 130, 1]  # more queries than tokens
    for _ in range(4):
        counts = rng.multinomial(rng.integers(1, NUM_TOKENS + 1), [0.1, 0.3, 0.6])
        lengths = np.minimum(counts + rng.integers(0, 200, BATCH), 512)
        yield lengths, np.minimum(counts, lengths)


@pytest.mark.parametrize("group", [1, 2])
@pytest.mark.parametrize("variant", VARIANTS, ids=IDS)
def test_list_holds_every_row_once_with_the_tiles_it_sees(variant, group):
    cut = prefill_plan.cut_of(CACHE, CACHE.num_kv_heads * group, NUM_TOKENS)
    for lengths, counts in batches():
        starts = np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)
        made = lists(cut, variant, jnp.asarray(lengths, jnp.int32), starts)
        items = [Item(*row) for row in np.asarray(made.items).tolist()]
        items, unused = items[: int(made.num_items[0])], items[int(made.num_items[0]) :]
        assert unused, "the kernel ends at an item without visits"
        assert all(item.num_visits == item.tile_stop == 0 for item in unused)
        rows = [row for item in items for row in range(*rows_of(item))]
        assert sorted(rows) == list(range(NUM_TOKENS))  # the padding too
        visits = [item.num_visits for item in items]
        assert visits == sorted(visits, reverse=True)
        for item in items:
            check_visits(variant, cut.keys, item)


def rows_of(item):
    base = item.row_group * prefill_plan.ROW_GROUP
    return base + item.row_start, base + item.row_stop


def check_visits(variant, keys, item):
    """Every tile that is seen is visited once, and those without a mask are seen by every row."""
    position = item.first_position + np.arange(item.row_start, item.row_stop)[:, None]
    tiles = [int(item.visited(i)) for i in range(item.num_visits)]
    seen = np.asarray(variant.keep(position, np.arange(512)[None], item.seq_length))
    needed = {key // keys.rows for key in np.flatnonzero(seen.any(axis=0))}
    assert needed <= set(tiles)
    assert len(set(tiles)) == len(tiles)
    assert len(tiles) <= max(len(needed), 1)
    assert 1 <= item.edge_visits <= item.full_visits <= item.num_visits
    for tile in tiles[item.edge_visits : item.full_visits]:
        assert seen[:, tile * keys.rows : (tile + 1) * keys.rows].all()
    blocks = {key // keys.block_size for key in np.flatnonzero(seen.any(axis=0))}
    assert blocks <= set(range(item.block_start, item.block_stop))
    # values of the first tile past the end of the sequence, in a block that is partly used
    past = range(item.seq_length, -(-item.seq_length // keys.block_size) * keys.block_size)
    cleared = range(tiles[0] * keys.rows + item.valid_rows, (tiles[0] + 1) * keys.rows)
    in_first = {key for key in past if key // keys.rows == tiles[0]}
    assert in_first <= set(cleared)
    assert all(key >= item.seq_length for key in cleared)


def test_a_list_without_tokens_still_names_every_row():
    cut = prefill_plan.cut_of(CACHE, 4, NUM_TOKENS)
    made = lists(cut, Variant(1.0), jnp.full(BATCH, 200, jnp.int32), np.int32([0, 200, 400, 560]))
    none = made.only_if(jnp.asarray(False))
    before, after = (Item(*np.asarray(x.items).T) for x in (made, none))
    for name in ("row_group", "row_start", "row_stop"):
        np.testing.assert_array_equal(getattr(before, name), getattr(after, name))
    assert np.asarray(before.seq_length).any()
    assert not np.asarray(after.seq_length).any()
    assert (after.block_stop == after.block_start).all()
    assert (after.edge_visits == after.num_visits).all()
    np.testing.assert_array_equal(after.num_visits, np.minimum(before.num_visits, 1))


@pytest.mark.parametrize("head_dim", plan.HEAD_DIMS)
@pytest.mark.parametrize("has_alibi", [False, True])
def test_every_plan_fits_shared_memory(head_dim, has_alibi):
    for block_size, group, dtype in ((8, 1, "float32"), (16, 8, "bfloat16"), (128, 3, "float16")):
        cache = replace(CACHE, head_dim=head_dim, block_size=block_size)
        asked = problem(cache, group=group, query_dtype=dtype, has_alibi=has_alibi)
        made = prefill_plan.plan_of(asked)
        assert made.is_wide == (head_dim > prefill_plan.MAX_NARROW)
        assert made.value_stages > 1 or not made.is_wide
        assert plan.smem_bytes(prefill_plan.scratch(asked, made)) <= plan.SMEM_BYTES


@pytest.mark.parametrize("head_dim", [128, 256])
def test_blocks_of_any_size_fill_tiles(head_dim):
    """In slices: no row of a tile is left over, whatever part of a block it ends with."""
    for block_size in range(8, 400, 8):
        made = prefill_plan.plan_of(
            problem(replace(CACHE, block_size=block_size, head_dim=head_dim))
        )
        assert made.keys.rows == (128 if head_dim == 128 else 64)
        assert made.keys.blocks_per_tile * made.keys.block_size == made.keys.rows
        assert made.keys.block_size * made.slices_per_block(block_size) == block_size


def test_values_have_a_third_slot_where_two_leave_room():
    """They are in use until the second product is done, keys until the first one is."""
    made = prefill_plan.plan_of(problem())
    assert (made.key_stages, made.value_stages) == (2, 3)
    made = prefill_plan.plan_of(problem(replace(CACHE, head_dim=64)))
    assert (made.key_stages, made.value_stages) == (4, 4)


@pytest.mark.parametrize(
    "asked",
    [
        problem(num_tokens=64 * BATCH - 1),  # too few tokens for their tiles
        replace(problem(), is_packed=False),
    ],
    ids=["short", "decode"],
)
def test_what_another_kernel_takes(asked):
    assert prefill_plan.plan_of(asked) is None
    assert prefill_plan.plan_of(problem()) is not None


@pytest.mark.parametrize("head_dim", [128, 256])
def test_warpgroups_hold_no_more_registers_than_a_cta_has(head_dim):
    made = prefill_plan.plan_of(problem(replace(CACHE, head_dim=head_dim)))
    held = made.consumer_registers * prefill_plan.CONSUMERS + made.producer_registers
    given = 65536 // (128 * (prefill_plan.CONSUMERS + 1)) // 8 * 8
    assert held <= given * (prefill_plan.CONSUMERS + 1)
