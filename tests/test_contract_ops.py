"""The contract of append, and of append and attention at once, one test per line of it.

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
from ragged import cache_of, int32, slots_of

import paged_kv

pytestmark = pytest.mark.usefixtures("quick_compiles")

JIT = pytest.mark.parametrize("jit", [False, True], ids=["eager", "jit"])


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
    slots = slots_of(cache, starts, len(keys))

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
    cache = paged_kv.advance(cache_of(room=5).cache, 1)
    new = new_tokens(1, 6)
    assert_same_bits(append(jit, cache, *new), appended(cache, *new))


@JIT
def test_append_drops_the_token_of_an_inactive_row(jit):
    """Row 0 has length 0: with query_start_loc=None it is inactive, and that is no error."""
    cache = cache_of(room=5).cache
    new = new_tokens(2, 6)
    after = append(jit, cache, *new)
    assert_same_bits(after, appended(cache, *new))
    assert slots_of(cache, None, 6)[0] == -1


@JIT
def test_append_writes_ragged_tokens_at_the_end_of_their_sequences(jit):
    cache = paged_kv.advance(cache_of(room=5).cache, int32([2, 0, 1, 5, 0, 3]))
    starts, new = int32([0, 2, 2, 3, 8, 8, 11]), new_tokens(3, 14)
    assert_same_bits(append(jit, cache, *new, starts), appended(cache, *new, starts))


@JIT
@pytest.mark.parametrize("layer", [0, 2, np.int32(1), jnp.int32(1)])
def test_append_writes_one_layer_of_a_stack(jit, layer):
    cache = paged_kv.advance(cache_of(room=5, num_layers=3).cache, 1)
    new = new_tokens(4, 6)
    assert_same_bits(append(jit, cache, *new, layer=layer), appended(cache, *new, layer=layer))


@JIT
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("pool_dtype", ["float32", "bfloat16", "float16"])
def test_append_casts_to_the_pools_dtype(jit, dtype, pool_dtype):
    cache = paged_kv.advance(cache_of(room=5, dtype=pool_dtype).cache, 1)
    new = new_tokens(5, 6, dtype)
    assert_same_bits(append(jit, cache, *new), appended(cache, *new))


@JIT
def test_append_does_not_advance(jit):
    cache = paged_kv.advance(cache_of(room=5).cache, 1)
    after = append(jit, cache, *new_tokens(6, 6))
    np.testing.assert_array_equal(after.seq_lengths, cache.seq_lengths)


def invalid_appends():
    """Caches one of whose tokens has no valid slot, by what is wrong with it."""
    cache = paged_kv.advance(cache_of(room=5).cache, 1)
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
    assert slots_of(cache, None, 6)[5] == -1
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
    cache = paged_kv.advance(cache_of(room=5, num_layers=3).cache, 1)
    assert_same_bits(append(True, cache, *new_tokens(9, 6), layer=int32(layer)), cache)


def test_more_new_tokens_than_a_sequence_has_are_dropped_under_jit():
    cache = cache_of(room=5).cache
    starts, new = int32([0, 2, 5, 5, 5, 5, 5]), new_tokens(10, 5)
    after = append(True, cache, *new, starts)
    np.testing.assert_array_equal(slots_of(cache, starts, 5)[:4], [-1] * 4)
    assert_same_bits(after, appended(cache, *new, starts))


# --- append_and_attend and make_schedule


ATTEND = {"scale": 0.3, "local_window_size": (9, 0), "logits_soft_cap": 20.0}


@JIT
@pytest.mark.parametrize("num_layers", [None, 3])
def test_append_and_attend_is_append_then_attention(jit, num_layers):
    cache = paged_kv.advance(
        cache_of(room=5, num_layers=num_layers).cache, int32([2, 0, 1, 5, 0, 3])
    )
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
    cache = paged_kv.advance(cache_of(room=5).cache, 1)
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
    cache = paged_kv.advance(cache_of(room=5).cache, 1)
    keys, values = new_tokens(14, 6)
    plain, _ = paged_kv.append_and_attend(keys, keys, values, cache)
    with_defaults, _ = paged_kv.append_and_attend(keys, keys, values, cache, **KEYWORDS)
    assert_same_bits(with_defaults, plain)


def test_make_schedule_keywords_and_defaults_are_the_contracts_and_num_tokens():
    parameters = inspect.signature(paged_kv.make_schedule).parameters.values()
    keywords = {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}
    assert keywords == {
        "num_query_heads": inspect.Parameter.empty,
        "query_start_loc": None,
        "local_window_size": None,
        "is_causal": True,
        "implementation": None,
        "num_tokens": None,
    }
