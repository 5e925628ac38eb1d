"""The GPU plan: tiles cover what they say, shared memory holds them, and the rest is refused."""

import dataclasses
import itertools

import jax.numpy as jnp
import numpy as np
import pytest
from gpu_interpreter import NEEDS_JAX

from paged_kv.kernels.core.problem import AppendProblem, CacheShape, Problem
from paged_kv.kernels.core.schedule import QueryTiles
from paged_kv.kernels.core.variant import Variant
from paged_kv.kernels.gpu import decode_plan, device, plan
from paged_kv.kernels.gpu.plan import KeyTiles

GEOMETRIES = [
    KeyTiles.of_rows(block_size, heads, rows)
    for block_size, heads, rows in [
        (16, 8, 128), (16, 8, 64), (8, 1, 64), (8, 3, 128), (24, 7, 128), (136, 1, 128),
        (8, 64, 64), (8, 66, 128), (128, 2, 64), (40, 5, 64),
    ]
]  # fmt: skip


def cache(**changes):
    base = CacheShape(1, 64, 16, 8, 128, "bfloat16", 4, 8)
    return dataclasses.replace(base, **changes)


def problem(num_tokens=4, num_query_heads=32, is_packed=False, query_dtype="bfloat16", **changes):
    return Problem(
        cache(**changes), num_tokens, num_query_heads, query_dtype, is_packed, Variant(1.0)
    )


def rows_of(keys, tile):
    """The (token, head) of each row of a tile that belongs to a slot, row by row."""
    token, first = (int(x) for x in keys.origin(jnp.int32(tile)))
    count = keys.blocks_per_tile * keys.block_rows
    rows = [first + row for row in range(keys.rows) if first + row < count]
    return [(token + row // keys.num_heads, row % keys.num_heads) for row in rows]


def num_tiles(keys, blocks):
    return -(-blocks // keys.blocks_per_tile) * keys.tiles_per_block


@pytest.mark.parametrize("keys", GEOMETRIES, ids=str)
def test_tiles_hold_every_row_once_and_in_order(keys):
    blocks = 2 * keys.blocks_per_tile
    found = [row for tile in range(num_tiles(keys, blocks)) for row in rows_of(keys, tile)]
    tokens = range(blocks * keys.block_size)
    assert found == list(itertools.product(tokens, range(keys.num_heads)))


@pytest.mark.parametrize("keys", GEOMETRIES, ids=str)
def test_copies_fill_what_is_no_padding(keys):
    assert keys.blocks_per_tile * keys.copy_rows + keys.padding_rows == keys.rows
    assert keys.copy_rows % 8 == keys.padding_rows % 8 == 0
    tile = rows_of(keys, 0)
    assert keys.is_exact == all(
        len(rows_of(keys, t)) == keys.rows for t in range(keys.tiles_per_block)
    )
    assert len(tile) <= keys.rows


@pytest.mark.parametrize("keys", GEOMETRIES, ids=str)
def test_whole_before_and_covering_count_tiles(keys):
    tiles = [rows_of(keys, tile) for tile in range(num_tiles(keys, 2 * keys.blocks_per_tile))]
    for token in range(2 * keys.blocks_per_tile * keys.block_size):
        whole = int(keys.whole_before(jnp.int32(token)))
        covering = int(keys.covering(jnp.int32(token)))
        assert whole == sum(all(row[0] < token for row in tile) for tile in tiles)
        assert covering == sum(any(row[0] < token for row in tile) for tile in tiles)


VARIANTS = [
    Variant(1.0),
    Variant(1.0, is_causal=False),
    Variant(1.0, window=(9, 0)),
    Variant(1.0, is_causal=False, window=(5, 3)),
    Variant(1.0, window=(100, 0)),
]


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
@pytest.mark.parametrize("keys", GEOMETRIES[::3], ids=str)
def test_an_item_visits_every_tile_that_is_seen_once_and_masks_the_edges(keys, variant):
    rng = np.random.default_rng(1)
    for _ in range(12):
        length = int(rng.integers(1, 300))
        first = int(rng.integers(-2, length))
        count = int(rng.integers(1, min(9, length - first) + 1))
        start, stop = variant.kv_range(first, first + count - 1, length)
        tile = QueryTiles(*(jnp.int32([x]) for x in (0, 0, count, first, length, start, stop)))
        item = plan.Item(*(int(x[0]) for x in plan.work_list(tile, variant, keys)))
        visits = [int(item.visited(i)) for i in range(item.num_visits)]
        seen = {
            (q, k)
            for q in range(first, first + count)
            for k in range(length)
            if variant.keep(q, k, length)
        }
        needed = {t for t in range(num_tiles(keys, 1 + length // keys.block_size))
                  if {k for _, k in seen} & {k for k, _ in rows_of(keys, t)}}  # fmt: skip
        assert len(visits) == len(set(visits))
        assert needed <= set(visits)
        for visited in visits[item.num_edges :]:
            tokens = {k for k, _ in rows_of(keys, visited)}
            assert all((q, k) in seen for q in range(first, first + count) for k in tokens)
        blocks = {k // keys.block_size for _, k in seen}
        assert blocks <= set(range(item.block_start, item.block_stop))


HEADS = [(1, 1), (1, 8), (3, 9), (5, 5), (8, 32), (8, 64), (64, 64), (32, 128), (66, 132)]


@pytest.mark.parametrize("head_dim", plan.HEAD_DIMS)
@pytest.mark.parametrize("heads", HEADS, ids=str)
def test_every_plan_fits_shared_memory(head_dim, heads):
    for block_size, query_dtype, tokens in itertools.product(
        (8, 16, 24, 64, 128, 256), plan.QUERY_DTYPES, (None, 4, 4096)
    ):
        asked = problem(
            tokens or 4,
            heads[1],
            tokens is not None,
            query_dtype,
            head_dim=head_dim,
            block_size=block_size,
            num_kv_heads=heads[0],
        )
        assert plan.unsupported(asked) is None
        made = plan.make_plan(asked)
        assert plan.smem_bytes(plan.scratch(asked, made)) <= plan.SMEM_BYTES
        assert made.stages >= 2
        assert made.parts * made.consumers * plan.WARPGROUP_ROWS >= made.tile_tokens * heads[1]
        assert made.num_ctas <= device.H100_SMS


def given_registers(consumers):
    """Per thread; a launch gives whole groups of 8, and one thread 248 at most."""
    return min(248, 65536 // (128 * (consumers + 1)) // 8 * 8)


def test_warpgroups_hold_no_more_registers_than_a_cta_has():
    """They would wait for each other for ever."""
    for consumers, registers in plan.CONSUMER_REGISTERS.items():
        held = consumers * registers + plan.PRODUCER_REGISTERS
        assert held <= (consumers + 1) * given_registers(consumers)


@pytest.mark.parametrize(
    ("head_dim", "block_size", "heads"),
    [(256, 16, (8, 32)), (128, 16, (8, 32)), (64, 8, (1, 8)), (64, 16, (66, 66))],
)
def test_warpgroups_of_decode_hold_no_more_registers_than_a_cta_has(head_dim, block_size, heads):
    sizes = {"num_kv_heads": heads[0], "head_dim": head_dim, "block_size": block_size}
    made = decode_plan.plan_of(problem(4, heads[1], **sizes))
    assert made is not None
    of_producer, of_consumer = made.registers
    held = made.consumers * of_consumer + of_producer
    assert held <= (made.consumers + 1) * given_registers(made.consumers)


def test_a_simulated_plan_has_four_ctas_at_most():
    made = plan.make_plan(problem(512, is_packed=True), is_simulated=True)
    assert made.num_items > made.num_ctas == plan.MAX_SIMULATED_CTAS


def test_plans_are_equal_and_hashable():
    assert len({plan.make_plan(problem()), plan.make_plan(problem())}) == 1


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"dtype": "float32"}, "pools of float32 are none of bfloat16, float16; use impl"),
        ({"query_dtype": "float64"}, "a query of float64 is none of .* cast it, or use impl"),
        ({"head_dim": 72}, "head_dim=72 is none of .* pad query and cache, or use impl"),
        ({"block_size": 12}, "block_size=12 must be a multiple of 8; choose another, or use impl"),
        ({"num_blocks": 2**31}, r"num_blocks=2147483648 must be below 2\*\*31; use one cache per"),
    ],
)
def test_attention_says_what_it_does_not_support(changes, reason):
    text = plan.unsupported(problem(**changes))
    assert text is not None
    with pytest.raises(NotImplementedError, match=reason):
        raise NotImplementedError(text)


@NEEDS_JAX
@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"head_dim": 12}, "head_dim=12 in bfloat16 must be a multiple of 16 bytes; pad head_dim"),
        ({"head_dim": 264}, "num_kv_heads=8 and head_dim=264 must be at most 256"),
        ({"num_kv_heads": 256, "head_dim": 256}, "262144 bytes, must fit 232448 bytes of shared"),
        ({"num_blocks": 2**27}, r"1 x 134217728 x 16 slots of the pool must be fewer than 2\*\*31"),
        ({}, None),
        ({"dtype": "float32", "block_size": 5, "num_kv_heads": 3, "head_dim": 20}, None),
    ],
)
def test_append_says_what_it_does_not_support(changes, reason):
    from paged_kv.kernels.gpu import append

    text = append.unsupported(AppendProblem(cache(**changes), 4, False))
    if reason is None:
        assert text is None
        return
    with pytest.raises(NotImplementedError, match=reason):
        raise NotImplementedError(text)


@pytest.mark.parametrize("keys", GEOMETRIES, ids=str)
def test_tokens_are_whole_where_no_two_tiles_have_rows_of_one(keys):
    tiles = [{token for token, _ in rows_of(keys, i)} for i in range(num_tiles(keys, 2))]
    shared = any(a & b for a, b in itertools.pairwise(tiles))
    assert keys.has_whole_tokens == (not shared)


@pytest.mark.parametrize(("heads", "is_fused"), [(8, True), (4, True), (5, False), (66, False)])
def test_a_step_is_fused_where_one_cta_reads_the_new_token(heads, is_fused):
    """One of several whose tiles have rows of the token would read it before it is there."""
    asked = problem(num_query_heads=heads, num_kv_heads=heads, head_dim=64, block_size=32)
    assert decode_plan.plan_of(asked) is not None
    assert (decode_plan.plan_of(asked, appends=True) is not None) == is_fused


@NEEDS_JAX
@pytest.mark.parametrize("num_sms", [114, 132])
def test_plans_are_for_the_sms_of_the_device(monkeypatch, num_sms):
    """An H100 has 132 of them, as a card for PCIe 114."""
    from paged_kv.kernels.gpu import append

    monkeypatch.setattr(device, "num_sms", lambda: num_sms)
    assert decode_plan.Line.of(cache()).num_ctas == num_sms
    assert plan.make_plan(problem(4096, is_packed=True)).num_ctas == num_sms
    chunk = lambda tokens, **sizes: (
        append.make_plan(AppendProblem(cache(**sizes), tokens, True)).chunk_tokens
    )
    assert [chunk(64 * num_sms - 1), chunk(64 * num_sms)] == [1, 2]
    small = {"num_kv_heads": 1, "head_dim": 64}  # through shared memory
    assert [chunk(3 * num_sms, **small), chunk(3 * num_sms + 1, **small)] == [3, 4]
