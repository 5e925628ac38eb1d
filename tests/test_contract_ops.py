"""The contract of the batched ops other than attention, one test per line of it.

Every op runs both eagerly and under jit, and pools are compared bitwise, poison included.
"""

import dataclasses
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from bitwise import assert_same_bits
from poison import poisoned_cache

import paged_kv

LENGTHS = [0, 1, 15, 16, 17, 40]
JIT = pytest.mark.parametrize("jit", [False, True], ids=["eager", "jit"])


def run(jit, op, *args, **kwargs):
    """The op on its arrays: under jit all positional arguments are traced, keywords closed over."""
    op = getattr(paged_kv, op)
    call = lambda *arrays: op(*arrays, **kwargs)
    return (jax.jit(call) if jit else call)(*args)


def ragged_cache(seed=0, **options):
    """LENGTHS tokens per sequence, and blocks for five more."""
    lengths = np.array(LENGTHS)
    options = {"num_kv_heads": 2, "head_dim": 8, "capacity": lengths + 5, **options}
    return poisoned_cache(np.random.default_rng(seed), lengths, **options)


def int32(values):
    return jnp.asarray(values, jnp.int32)


# --- advance, truncate, reset_sequences, set_block_table


@JIT
@pytest.mark.parametrize("count", [3, int32([0, 1, 2, 3, 4, 5])], ids=["int", "array"])
def test_advance_adds_to_the_lengths_alone(jit, count):
    cache = ragged_cache().cache
    after = run(jit, "advance", cache, count)
    expected = dataclasses.replace(cache, seq_lengths=cache.seq_lengths + count)
    assert_same_bits(after, expected)


@JIT
def test_truncate_rolls_lengths_back_and_keeps_the_blocks(jit):
    cache = ragged_cache().cache
    shorter = int32([0, 0, 3, 16, 16, 40])
    assert_same_bits(
        run(jit, "truncate", cache, shorter), dataclasses.replace(cache, seq_lengths=shorter)
    )


def test_truncate_under_jit_never_makes_a_sequence_longer():
    cache = ragged_cache().cache
    after = run(True, "truncate", cache, int32([5, 5, 5, -3, 99, 39]))
    np.testing.assert_array_equal(after.seq_lengths, [0, 1, 5, 0, 17, 39])


@JIT
def test_reset_empties_the_masked_rows_alone(jit):
    cache = ragged_cache().cache
    mask = np.array([False, True, False, False, True, False])
    after = run(jit, "reset_sequences", cache, mask)
    table = np.where(mask[:, None], -1, cache.block_table)
    lengths = np.where(mask, 0, cache.seq_lengths)
    expected = dataclasses.replace(cache, block_table=int32(table), seq_lengths=int32(lengths))
    assert_same_bits(after, expected)


@JIT
@pytest.mark.parametrize("mask", [None, np.array([True, False] * 3)], ids=["all", "masked"])
def test_set_block_table_replaces_rows_and_keeps_lengths(jit, mask):
    cache = ragged_cache().cache
    new = jnp.arange(cache.block_table.size, dtype=jnp.int32).reshape(cache.block_table.shape)
    after = run(jit, "set_block_table", cache, new, *([] if mask is None else [mask]))
    rows = True if mask is None else mask[:, None]
    expected = dataclasses.replace(cache, block_table=int32(np.where(rows, new, cache.block_table)))
    assert_same_bits(after, expected)


def test_set_block_table_shares_a_block_on_purpose():
    """Two sequences with one prefix block both see it."""
    poisoned = ragged_cache()
    table = np.array(poisoned.cache.block_table)
    table[4, 0] = table[5, 0]
    cache = paged_kv.set_block_table(poisoned.cache, int32(table))
    np.testing.assert_array_equal(paged_kv.gather_kv(cache, 4)[0][:16], poisoned.keys[5][:16])


# --- copy_blocks and scrub_blocks


@JIT
@pytest.mark.parametrize("num_layers", [None, 3])
def test_copy_copies_keys_and_values_of_all_layers(jit, num_layers):
    cache = ragged_cache(num_layers=num_layers).cache
    after = run(jit, "copy_blocks", cache, int32([2, 4]), int32([9, 7]))
    assert_same_bits(after, with_blocks(cache, lambda pool: pool[..., [2, 4], :, :, :], [9, 7]))


@JIT
def test_copy_reads_all_sources_before_it_writes(jit):
    cache = ragged_cache().cache
    after = run(jit, "copy_blocks", cache, int32([2, 4]), int32([4, 2]))
    assert_same_bits(after, with_blocks(cache, lambda pool: pool[[2, 4]], [4, 2]))


@JIT
@pytest.mark.parametrize(
    ("source", "target"), [([-1, 2], [3, -1]), ([-7, -(2**31)], [3, 4])], ids=["mixed", "source"]
)
def test_copy_skips_pairs_with_an_id_below_zero(jit, source, target):
    cache = ragged_cache().cache
    assert_same_bits(run(jit, "copy_blocks", cache, int32(source), int32(target)), cache)


@JIT
@pytest.mark.parametrize("num_layers", [None, 3])
def test_scrub_leaves_nothing_in_the_blocks_of_any_layer(jit, num_layers):
    cache = ragged_cache(num_layers=num_layers).cache
    after = run(jit, "scrub_blocks", cache, int32([0, 5]))
    assert_same_bits(after, with_blocks(cache, lambda pool: 0, [0, 5]))


@JIT
def test_scrub_skips_ids_below_zero(jit):
    cache = ragged_cache().cache
    assert_same_bits(run(jit, "scrub_blocks", cache, int32([-1, -7, -(2**31)])), cache)


@pytest.mark.parametrize("past", [0, 2**30])
def test_block_ids_past_the_pool_are_skipped_under_jit(past):
    cache = ragged_cache().cache
    wild = int32([cache.num_blocks + past])
    assert_same_bits(run(True, "scrub_blocks", cache, wild), cache)
    assert_same_bits(run(True, "copy_blocks", cache, wild, int32([1])), cache)
    assert_same_bits(run(True, "copy_blocks", cache, int32([1]), wild), cache)


def with_blocks(cache, read, target):
    """The cache with blocks `target` of both pools replaced by what `read` makes of the pool."""

    def replaced(pool):
        new = np.array(pool)
        new[..., target, :, :, :] = read(new)
        return jnp.asarray(new)

    return dataclasses.replace(
        cache, key_pool=replaced(cache.key_pool), value_pool=replaced(cache.value_pool)
    )


# --- slot_mapping


@JIT
@pytest.mark.parametrize("starts", [None, [0, 0, 1, 4, 4, 9, 11]], ids=["decode", "ragged"])
def test_slot_mapping_is_block_times_size_plus_offset(jit, starts):
    cache = ragged_cache().cache
    starts = None if starts is None else int32(starts)
    num_tokens = 6 if starts is None else 14
    call = lambda cache, starts: paged_kv.slot_mapping(
        cache, query_start_loc=starts, num_tokens=num_tokens
    )
    slots = (jax.jit(call) if jit else call)(cache, starts)
    assert slots.dtype == jnp.int32
    np.testing.assert_array_equal(slots, oracle_slots(cache, starts, num_tokens))
    assert (slots[0 if starts is None else 11 :][:1] == -1).all()


def oracle_slots(cache, starts, num_tokens):
    return oracle.slots(
        np.asarray(cache.block_table),
        np.asarray(cache.seq_lengths),
        cache.block_size,
        cache.num_blocks,
        starts,
        num_tokens,
    )


# --- append_tokens


def new_tokens(seed, count, dtype=jnp.float32):
    rng = np.random.default_rng(seed)
    shape = (count, 2, 8)
    return [jnp.asarray(rng.standard_normal(shape), dtype) for _ in range(2)]


def append(jit, cache, keys, values, starts=None, layer=None):
    call = lambda cache, keys, values, starts, layer: paged_kv.append_tokens(
        cache, keys, values, query_start_loc=starts, layer=layer
    )
    return (jax.jit(call) if jit else call)(cache, keys, values, starts, layer)


def appended(cache, keys, values, starts=None, layer=None):
    """What append_tokens is to return, by the oracle."""
    slots = oracle_slots(cache, starts, len(keys))

    def written(pool, rows):
        if layer is None:
            return jnp.asarray(oracle.append(pool, rows, slots))
        return pool.at[layer].set(oracle.append(pool[layer], rows, slots))

    return dataclasses.replace(
        cache,
        key_pool=written(cache.key_pool, keys),
        value_pool=written(cache.value_pool, values),
    )


@JIT
def test_append_without_starts_writes_one_token_per_sequence(jit):
    cache = paged_kv.advance(ragged_cache().cache, 1)
    new = new_tokens(1, 6)
    assert_same_bits(append(jit, cache, *new), appended(cache, *new))


@JIT
def test_append_drops_the_token_of_an_inactive_row(jit):
    """Row 0 has length 0: with query_start_loc=None it is inactive, and that is no error."""
    cache = ragged_cache().cache
    new = new_tokens(2, 6)
    after = append(jit, cache, *new)
    assert_same_bits(after, appended(cache, *new))
    assert oracle_slots(cache, None, 6)[0] == -1


@JIT
def test_append_writes_ragged_tokens_at_the_end_of_their_sequences(jit):
    cache = paged_kv.advance(ragged_cache().cache, int32([2, 0, 1, 5, 0, 3]))
    starts, new = int32([0, 2, 2, 3, 8, 8, 11]), new_tokens(3, 14)
    assert_same_bits(append(jit, cache, *new, starts), appended(cache, *new, starts))


@JIT
@pytest.mark.parametrize("layer", [0, 2, np.int32(1), jnp.int32(1)])
def test_append_writes_one_layer_of_a_stack(jit, layer):
    cache = paged_kv.advance(ragged_cache(num_layers=3).cache, 1)
    new = new_tokens(4, 6)
    assert_same_bits(append(jit, cache, *new, layer=layer), appended(cache, *new, layer=layer))


@JIT
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("pool_dtype", ["float32", "bfloat16", "float16"])
def test_append_casts_to_the_pools_dtype(jit, dtype, pool_dtype):
    cache = paged_kv.advance(ragged_cache(dtype=pool_dtype).cache, 1)
    new = new_tokens(5, 6, dtype)
    assert_same_bits(append(jit, cache, *new), appended(cache, *new))


@JIT
def test_append_does_not_advance(jit):
    cache = paged_kv.advance(ragged_cache().cache, 1)
    after = append(jit, cache, *new_tokens(6, 6))
    np.testing.assert_array_equal(after.seq_lengths, cache.seq_lengths)


def invalid_appends():
    """Caches one of whose tokens has no valid slot, by what is wrong with it."""
    cache = paged_kv.advance(ragged_cache().cache, 1)
    entry = lambda value: dataclasses.replace(
        cache, block_table=cache.block_table.at[5, 40 // 16].set(value)
    )
    longer = dataclasses.replace(  # every entry of its row is a block: only the length is wrong
        cache,
        block_table=cache.block_table.at[5].set(cache.block_table[5, 0]),
        seq_lengths=cache.seq_lengths.at[5].set(10_000),
    )
    return {
        "through_minus_one": entry(-1),
        "through_a_negative_id": entry(-7),
        "through_the_first_id_past_the_pool": entry(cache.num_blocks),
        "through_an_id_far_past_the_pool": entry(2**30),
        "past_max_blocks_per_seq": longer,
    }


INVALID = pytest.mark.parametrize("name", list(invalid_appends()))


@INVALID
def test_write_without_a_valid_slot_is_dropped_under_jit(name):
    """Pools bitwise as if the token were not there: never wrapped to the last block."""
    cache, new = invalid_appends()[name], new_tokens(7, 6)
    after = append(True, cache, *new)
    assert oracle_slots(cache, None, 6)[5] == -1
    assert_same_bits(after, appended(cache, *new))


@INVALID
def test_write_without_a_valid_slot_is_an_error_in_eager_use(name):
    cache, new = invalid_appends()[name], new_tokens(7, 6)
    before = jax.tree.map(np.array, cache)
    with pytest.raises(ValueError, match="sequence 5"):
        append(False, cache, *new)
    assert_same_bits(cache, before)


@INVALID
def test_only_invalid_writes_leave_the_pool_bitwise_unchanged(name):
    """A batch of which no write has a slot, under jit."""
    cache = invalid_appends()[name]
    alone = dataclasses.replace(
        cache, block_table=cache.block_table[5:], seq_lengths=cache.seq_lengths[5:]
    )
    assert_same_bits(append(True, alone, *new_tokens(8, 1)), alone)


@pytest.mark.parametrize("layer", [-1, 3, 2**30, -(2**31)])
def test_layer_outside_the_stack_is_dropped_under_jit(layer):
    """A negative one included: as an index, -1 would be the last layer."""
    cache = paged_kv.advance(ragged_cache(num_layers=3).cache, 1)
    assert_same_bits(append(True, cache, *new_tokens(9, 6), layer=int32(layer)), cache)


def test_more_new_tokens_than_a_sequence_has_are_dropped_under_jit():
    cache = ragged_cache().cache
    starts, new = int32([0, 2, 5, 5, 5, 5, 5]), new_tokens(10, 5)
    after = append(True, cache, *new, starts)
    np.testing.assert_array_equal(oracle_slots(cache, starts, 5)[:4], [-1] * 4)
    assert_same_bits(after, appended(cache, *new, starts))


# --- append_and_attend and make_schedule


ATTEND = {"scale": 0.3, "local_window_size": (9, 0), "logits_soft_cap": 20.0}


@JIT
@pytest.mark.parametrize("num_layers", [None, 3])
def test_append_and_attend_is_append_then_attention(jit, num_layers):
    cache = paged_kv.advance(ragged_cache(num_layers=num_layers).cache, int32([2, 0, 1, 5, 0, 3]))
    starts, (keys, values) = int32([0, 2, 2, 3, 8, 8, 11]), new_tokens(11, 14)
    query = jnp.repeat(new_tokens(12, 14)[0], 3, axis=1)
    layer = None if num_layers is None else int32(1)

    def both(query, keys, values, cache):
        return paged_kv.append_and_attend(
            query, keys, values, cache, query_start_loc=starts, layer=layer, **ATTEND
        )

    def in_turn(query, keys, values, cache):
        cache = append(False, cache, keys, values, starts, layer)
        out = paged_kv.paged_attention(query, cache, query_start_loc=starts, layer=layer, **ATTEND)
        return out, cache

    run = jax.jit if jit else lambda f: f
    actual, expected = (
        run(both)(query, keys, values, cache),
        run(in_turn)(query, keys, values, cache),
    )
    assert_same_bits(actual, expected)


def test_append_and_attend_returns_the_lse_too_when_asked():
    cache = paged_kv.advance(ragged_cache().cache, 1)
    keys, values = new_tokens(13, 6)
    out, lse, after = jax.tree.leaves(
        paged_kv.append_and_attend(keys, keys, values, cache, return_residual=True),
        is_leaf=lambda x: isinstance(x, paged_kv.PagedKVCache),
    )
    assert out.shape == keys.shape
    assert lse.shape == keys.shape[:2]
    assert_same_bits(after, appended(cache, keys, values))


@pytest.mark.parametrize(
    ("op", "expected"),
    [
        ("advance", ["cache", "num_new_tokens"]),
        ("append_tokens", ["cache", "keys", "values"]),
        ("append_and_attend", ["query", "keys", "values", "cache"]),
        ("paged_attention", ["query", "cache"]),
        ("make_schedule", ["cache"]),
        ("merge_attention_states", ["out_a", "lse_a", "out_b", "lse_b"]),
        ("apply_sinks", ["out", "lse", "sinks"]),
        ("truncate", ["cache", "seq_lengths"]),
        ("reset_sequences", ["cache", "mask"]),
        ("set_block_table", ["cache", "block_table", "mask"]),
        ("copy_blocks", ["cache", "source_ids", "target_ids"]),
        ("scrub_blocks", ["cache", "block_ids"]),
        ("slot_mapping", ["cache"]),
    ],
)
def test_names_and_order_of_positional_arguments_are_the_contracts(op, expected):
    parameters = inspect.signature(getattr(paged_kv, op)).parameters.values()
    assert [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD] == expected


KEYWORDS = {
    "query_start_loc": None,
    "layer": None,
    "scale": None,
    "is_causal": True,
    "local_window_size": None,
    "logits_soft_cap": None,
    "sinks": None,
    "alibi_slopes": None,
    "schedule": None,
    "return_residual": False,
    "implementation": None,
    "interpret": None,
}


def test_attention_keywords_and_defaults_are_the_contracts():
    parameters = inspect.signature(paged_kv.paged_attention).parameters.values()
    keywords = {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}
    assert keywords == KEYWORDS


def test_append_and_attend_takes_every_keyword_of_attention():
    cache = paged_kv.advance(ragged_cache().cache, 1)
    keys, values = new_tokens(14, 6)
    plain, _ = paged_kv.append_and_attend(keys, keys, values, cache)
    with_defaults, _ = paged_kv.append_and_attend(keys, keys, values, cache, **KEYWORDS)
    assert_same_bits(with_defaults, plain)


def test_make_schedule_keywords_and_defaults_are_the_contracts():
    parameters = inspect.signature(paged_kv.make_schedule).parameters.values()
    keywords = {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}
    assert keywords == {
        "num_query_heads": inspect.Parameter.empty,
        "query_start_loc": None,
        "local_window_size": None,
        "is_causal": True,
        "implementation": None,
    }
