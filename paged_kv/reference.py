"""Paged attention and append in plain JAX: runs everywhere, and defines the answer.

Packed queries are cut into tiles of one sequence each; all tiles walk over their keys together, a
tile of keys at a time, so memory grows with queries and never with the length of the table.  The
backward pass walks the same way and recomputes the weights from `lse` (FlashAttention's).  Masks,
positions and the softmax are written out here once more, on purpose: nothing is shared with the
kernels, so that one catches the other's mistakes.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

MAX_TILE_TOKENS = 64
TILE_ELEMENTS = 1 << 22  # of keys gathered at a time
MAX_TILE_KEYS = 256

_einsum = partial(jnp.einsum, precision=lax.Precision.HIGHEST, preferred_element_type=jnp.float32)


@dataclass(frozen=True)
class Scoring:
    """How scores are made and masked, all static; `left` and `right` None mean without end."""

    scale: float
    left: int | None
    right: int | None
    soft_cap: float | None
    num_ranks: int = 1  # that share each block's slots, see `Part`


class Part(NamedTuple):
    """What one of several ranks attends to: its share of the slots of every block."""

    rank: Array  # int32 scalar: holds slots [rank * block_size, (rank + 1) * block_size)
    first_key: Array  # (batch,) keys before this position are attended to elsewhere


class _Cache(NamedTuple):
    key_pool: Array  # (num_layers, num_blocks, block_size, num_kv_heads, head_dim)
    value_pool: Array
    layer: Array
    block_table: Array
    part: Part | None = None  # None: the whole of every block is here


class _Tiles(NamedTuple):
    sequence: Array  # (tiles,)
    token: Array  # (tiles, tokens) packed index, in range
    is_real: Array  # (tiles, tokens)
    position: Array  # (tiles, tokens)
    start: Array  # (tiles,) first key here that a token of the tile sees
    stop: Array  # (tiles,) one past the last


class _Keys(NamedTuple):
    """A tile of keys for each tile of queries."""

    position: Array  # (tiles, keys) in the sequence
    is_live: Array  # (tiles, keys) within the tile's range
    block: Array  # (tiles, keys), num_blocks where no key of the tile's range is
    offset: Array
    key: Array  # (tiles, keys, num_kv_heads, head_dim) float32, 0 outside the range
    value: Array


def attend(
    scoring: Scoring,
    is_packed: bool,
    query: Array,
    key_pool: Array,
    value_pool: Array,
    slopes: Array | None,
    block_table: Array,
    seq_lengths: Array,
    query_start_loc: Array,
    layer: Array,
    part: Part | None = None,
) -> tuple[Array, Array]:
    """(out, lse) of packed queries; pools have a leading layer axis."""
    cache = _Cache(key_pool, value_pool, layer, block_table, part)
    tiles = _query_tiles(scoring, is_packed, query.shape[0], cache, seq_lengths, query_start_loc)
    q = _by_kv_head(query, tiles, key_pool.shape[3])  # (n, t, k, g, d)
    n, t, k, g, d = q.shape
    num_keys = _tile_keys(q, cache)

    def body(i: Array, state: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        m, l, acc = state
        kv = _gather(scoring, cache, tiles, i, num_keys)
        scores, seen = _scores(scoring, q, kv, tiles, slopes)
        scores = jnp.where(seen, scores, -jnp.inf)
        top = jnp.maximum(m, scores.max(-1))
        base = jnp.where(top == -jnp.inf, 0.0, top)
        weights = jnp.exp(scores - base[..., None])
        decay = jnp.exp(m - base)
        acc = acc * decay[..., None] + _einsum("nkgtc,nckd->nkgtd", weights, kv.value)
        return top, l * decay + weights.sum(-1), acc

    zero = _zeros((n, k, g, t), like=q)
    state = (zero - jnp.inf, zero, _zeros((n, k, g, t, d), like=q))
    m, l, acc = lax.fori_loop(0, _num_steps(tiles, num_keys), body, state)
    total = jnp.where(l > 0, l, 1.0)
    out = (acc / total[..., None]).astype(query.dtype)
    lse = jnp.where(l > 0, m + jnp.log(total), -jnp.inf)
    packed = partial(_packed, tiles=tiles, num_tokens=query.shape[0])
    out = packed(jnp.zeros((), query.dtype), out.transpose(0, 3, 1, 2, 4))
    lse = packed(jnp.float32(-jnp.inf), lse.transpose(0, 3, 1, 2))
    return out.reshape(query.shape), lse.reshape(query.shape[:2])


def attend_transposed(
    scoring: Scoring,
    is_packed: bool,
    residuals: tuple[Any, ...],
    out: Array,
    lse: Array,
    d_out: Array,
    d_lse: Array,
) -> tuple[Array, Array, Array, Array | None]:
    """Cotangents of query, both pools and slopes; `residuals` are `attend`'s array arguments."""
    query, key_pool, value_pool, slopes, block_table, seq_lengths, starts, layer, *part = residuals
    cache = _Cache(key_pool, value_pool, layer, block_table, *part)
    tiles = _query_tiles(scoring, is_packed, query.shape[0], cache, seq_lengths, starts)
    kv_heads = key_pool.shape[3]
    by_row = lambda x: _by_kv_head(x, tiles, kv_heads).transpose(0, 2, 3, 1, 4)
    q = _by_kv_head(query, tiles, kv_heads)
    num_keys = _tile_keys(q, cache)
    d_out = by_row(d_out)  # (n, k, g, t, d)
    d_sum = jnp.sum(d_out * by_row(out), -1) - by_row(d_lse[..., None])[..., 0]
    lse = by_row(lse[..., None])[..., 0]
    is_seen_row = lse > -jnp.inf
    lse = jnp.where(is_seen_row, lse, 0.0)

    def body(i: Array, grads: tuple) -> tuple:
        d_query, d_keys, d_values, d_slopes = grads
        kv = _gather(scoring, cache, tiles, i, num_keys)
        make = lambda q, key, slopes: _scores(scoring, q, kv._replace(key=key), tiles, slopes)
        scores, transpose, seen = jax.vjp(make, q, kv.key, slopes, has_aux=True)
        seen &= is_seen_row[..., None]
        weights = jnp.where(seen, jnp.exp(jnp.where(seen, scores - lse[..., None], 0.0)), 0.0)
        d_value = _einsum("nkgtc,nkgtd->nckd", weights, d_out)
        d_weights = _einsum("nkgtd,nckd->nkgtc", d_out, kv.value)
        dq, d_key, ds = transpose(weights * (d_weights - d_sum[..., None]))
        put = lambda pool, new: pool.at[layer, kv.block, kv.offset].add(new, mode="drop")
        d_slopes = None if slopes is None else d_slopes + ds.astype(jnp.float32)
        return d_query + dq, put(d_keys, d_key), put(d_values, d_value), d_slopes

    arrays = (q, key_pool, value_pool, slopes)
    grads = tuple(None if x is None else _zeros(x.shape, like=q) for x in arrays)
    grads = lax.fori_loop(0, _num_steps(tiles, num_keys), body, grads)
    d_query = _packed(jnp.float32(0), grads[0], tiles=tiles, num_tokens=query.shape[0])
    d_query = d_query.reshape(query.shape).astype(query.dtype)
    d_slopes = None if slopes is None else grads[3].astype(slopes.dtype)
    return d_query, grads[1].astype(key_pool.dtype), grads[2].astype(value_pool.dtype), d_slopes


def append(
    keys: Array,
    values: Array,
    key_pool: Array,
    value_pool: Array,
    block_table: Array,
    seq_lengths: Array,
    query_start_loc: Array,
    layer: Array,
) -> tuple[Array, Array]:
    """Both pools with the new tokens in their slots; tokens without a slot are dropped."""
    at = _new_slots(keys.shape[0], key_pool, block_table, seq_lengths, query_start_loc, layer)
    write = lambda pool, new: pool.at[at].set(new.astype(pool.dtype), mode="drop")
    return write(key_pool, keys), write(value_pool, values)


def append_transposed(
    num_tokens: int,
    d_key_pool: Array,
    d_value_pool: Array,
    block_table: Array,
    seq_lengths: Array,
    query_start_loc: Array,
    layer: Array,
) -> tuple[Array, Array, Array, Array]:
    """Cotangents of keys, values and the old pools, whose slots were overwritten."""
    at = _new_slots(num_tokens, d_key_pool, block_table, seq_lengths, query_start_loc, layer)
    read = lambda pool: pool.at[at].get(mode="fill", fill_value=0)
    wipe = lambda pool: pool.at[at].set(jnp.zeros((), pool.dtype), mode="drop")
    return read(d_key_pool), read(d_value_pool), wipe(d_key_pool), wipe(d_value_pool)


def _new_slots(
    num_tokens: int,
    pool: Array,
    block_table: Array,
    seq_lengths: Array,
    query_start_loc: Array,
    layer: Array,
) -> tuple[Array, Array, Array]:
    """(layer, block, offset) of each new token; past the pool where it has no slot."""
    num_layers, num_blocks, block_size = pool.shape[:3]
    batch, max_blocks = block_table.shape
    token = jnp.arange(num_tokens, dtype=jnp.int32)
    sequence = _sequence_of(token, query_start_loc)
    is_real = sequence < batch
    sequence = jnp.minimum(sequence, batch - 1)
    position = seq_lengths[sequence] - query_start_loc[sequence + 1] + token
    index = position // block_size
    is_real &= (position >= 0) & (index < max_blocks) & (layer >= 0) & (layer < num_layers)
    block = block_table[sequence, jnp.clip(index, 0, max_blocks - 1)]
    # an index of -1 would write the last block: what has no slot goes past the end and is dropped
    return layer, jnp.where(is_real & (block >= 0), block, num_blocks), position % block_size


# ---- tiles of queries ----------------------------------------------------------------------------


def _sequence_of(token: Array, query_start_loc: Array) -> Array:
    """Sequence of each packed token; batch for padding."""
    ends = query_start_loc[1:]
    return jnp.sum(token[:, None] >= ends[None, :], axis=1, dtype=jnp.int32)


def _tile_tokens(num_tokens: int, batch: int) -> int:
    """Tokens of a tile: about what a sequence has, a power of two."""
    return min(MAX_TILE_TOKENS, 1 << (-(-num_tokens // batch) - 1).bit_length())


def _query_tiles(
    scoring: Scoring,
    is_packed: bool,
    num_tokens: int,
    cache: _Cache,
    seq_lengths: Array,
    starts: Array,
) -> _Tiles:
    batch = seq_lengths.shape[0]
    size = _tile_tokens(num_tokens, batch) if is_packed else 1
    num_tiles = min(num_tokens, num_tokens // size + batch) if is_packed else batch
    counts = starts[1:] - starts[:-1]
    per_sequence = -(-counts // size)
    last_tile = jnp.cumsum(per_sequence, dtype=jnp.int32)
    tile = jnp.arange(num_tiles, dtype=jnp.int32)
    sequence = _sequence_of(tile, jnp.pad(last_tile, (1, 0)))
    is_real = sequence < batch
    sequence = jnp.minimum(sequence, batch - 1)
    first = (tile - (last_tile - per_sequence)[sequence]) * size
    index = first[:, None] + jnp.arange(size, dtype=jnp.int32)[None, :]
    count, length = counts[sequence][:, None], seq_lengths[sequence][:, None]
    position = length - count + index
    is_real = is_real[:, None] & (index < count)
    token = jnp.where(is_real, starts[sequence][:, None] + index, 0)

    is_attending = _has_its_blocks(scoring, cache, seq_lengths, counts)[sequence]
    is_real_query = is_real & (position >= 0) & is_attending[:, None]
    start, stop = _span(scoring, position, length)
    if cache.part is not None:
        start = jnp.maximum(start, cache.part.first_key[sequence][:, None])
        start, stop = (_held(scoring, cache, x) for x in (start, stop))
    start = jnp.where(is_real_query, start, jnp.iinfo(jnp.int32).max).min(1)
    stop = jnp.where(is_real_query, stop, 0).max(1)
    return _Tiles(sequence, token, is_real, position, jnp.minimum(start, stop), stop)


def _span(scoring: Scoring, position: Array, length: Array) -> tuple[Array, Array]:
    """First key a query at a position sees, and one past the last."""
    start = jnp.zeros_like(position)
    if scoring.left is not None:
        start = jnp.maximum(position - scoring.left, 0)
    stop = jnp.broadcast_to(length, position.shape)
    if scoring.right is not None:
        stop = jnp.minimum(position + scoring.right + 1, length)
    return start, stop


def _held(scoring: Scoring, cache: _Cache, count: Array) -> Array:
    """How many of a sequence's first `count` tokens are here."""
    assert cache.part is not None
    size = cache.key_pool.shape[2]
    blocks, rest = count // (size * scoring.num_ranks), count % (size * scoring.num_ranks)
    return blocks * size + jnp.clip(rest - cache.part.rank * size, 0, size)


def _has_its_blocks(scoring: Scoring, cache: _Cache, seq_lengths: Array, counts: Array) -> Array:
    """Whether all entries that a sequence's queries reach are in the pool: else it sees no key."""
    num_blocks, block_size = cache.key_pool.shape[1], cache.key_pool.shape[2] * scoring.num_ranks
    start, _ = _span(scoring, jnp.maximum(seq_lengths - counts, 0), seq_lengths)
    first_key = jnp.arange(cache.block_table.shape[1], dtype=jnp.int32) * block_size
    is_used = first_key[None, :] < seq_lengths[:, None]
    is_used &= first_key[None, :] + block_size > start[:, None]
    is_in_pool = (cache.block_table >= 0) & (cache.block_table < num_blocks)
    is_layer = (cache.layer >= 0) & (cache.layer < cache.key_pool.shape[0])
    fits = seq_lengths <= cache.block_table.shape[1] * block_size
    return jnp.all(is_in_pool | ~is_used, axis=1) & fits & is_layer


def _by_kv_head(packed: Array, tiles: _Tiles, num_kv_heads: int) -> Array:
    """(num_tokens, heads, d) to float32 (tiles, tokens, kv heads, group, d), 0 where none."""
    x = packed[tiles.token].astype(jnp.float32)
    x = jnp.where(tiles.is_real[:, :, None, None], x, 0.0)
    n, t, heads, d = x.shape
    return x.reshape(n, t, num_kv_heads, heads // num_kv_heads, d)


def _packed(empty: Array, tiled: Array, *, tiles: _Tiles, num_tokens: int) -> Array:
    """(tiles, tokens, ...) to (num_tokens, ...), `empty` for padding tokens."""
    full = empty + _zeros((num_tokens, *tiled.shape[2:]), like=tiled).astype(tiled.dtype)
    return full.at[jnp.where(tiles.is_real, tiles.token, num_tokens)].set(tiled, mode="drop")


def _zeros(shape: tuple[int, ...], like: Array) -> Array:
    """float32 zeros that vary over the axes of a `shard_map` that `like` varies over."""
    axes = tuple(sorted(jax.typeof(like).manual_axis_type.varying))
    zeros = jnp.zeros(shape, jnp.float32)
    return lax.pcast(zeros, axes, to="varying") if axes else zeros


# ---- tiles of keys -------------------------------------------------------------------------------


def _tile_keys(q: Array, cache: _Cache) -> int:
    """Keys of a tile, a power of two."""
    n, _, k, _, d = q.shape
    longest = cache.block_table.shape[1] * cache.key_pool.shape[2]
    size = min(max(TILE_ELEMENTS // max(n * k * d, 1), 16), MAX_TILE_KEYS, longest)
    return 1 << (size.bit_length() - 1)


def _num_steps(tiles: _Tiles, num_keys: int) -> Array:
    """Key tiles that the longest walk takes."""
    return (jnp.max(tiles.stop - tiles.start, initial=0) + num_keys - 1) // num_keys


def _gather(scoring: Scoring, cache: _Cache, tiles: _Tiles, i: Array, num_keys: int) -> _Keys:
    """The i-th tile of keys and values of each tile of queries."""
    num_layers, num_blocks, block_size = cache.key_pool.shape[:3]
    position = (tiles.start + i * num_keys)[:, None]
    position = position + jnp.arange(num_keys, dtype=jnp.int32)[None, :]
    is_live = position < tiles.stop[:, None]
    index = jnp.where(is_live, position // block_size, 0)
    block = cache.block_table[tiles.sequence[:, None], index]
    block, offset = jnp.where(is_live, block, num_blocks), position % block_size
    layer = jnp.clip(cache.layer, 0, num_layers - 1)

    def read(pool: Array) -> Array:
        rows = pool.at[layer, block, offset].get(mode="fill", fill_value=0).astype(jnp.float32)
        # unowned slots may hold NaN, and 0 * NaN is NaN
        return jnp.where(is_live[:, :, None, None], rows, 0.0)

    if cache.part is not None:
        size = block_size * scoring.num_ranks
        position = position // block_size * size + cache.part.rank * block_size + offset
    return _Keys(position, is_live, block, offset, read(cache.key_pool), read(cache.value_pool))


def _scores(
    scoring: Scoring, q: Array, kv: _Keys, tiles: _Tiles, slopes: Array | None
) -> tuple[Array, Array]:
    """Scores (tiles, kv heads, group, tokens, keys), and which of them count."""
    scores = _einsum("ntkgd,nckd->nkgtc", q, kv.key) * scoring.scale
    if scoring.soft_cap is not None:
        scores = scoring.soft_cap * jnp.tanh(scores / scoring.soft_cap)
    query_at, key_at = tiles.position[:, :, None], kv.position[:, None, :]  # (n, t, 1), (n, 1, c)
    if slopes is not None:
        distance = jnp.abs(query_at - key_at).astype(jnp.float32)[:, None, None]
        slope = slopes.astype(jnp.float32).reshape(1, *q.shape[2:4], 1, 1)
        scores = scores - slope * distance
    seen = kv.is_live[:, None, :] & (query_at >= 0) & tiles.is_real[:, :, None]
    if scoring.right is not None:
        seen &= key_at <= query_at + scoring.right
    if scoring.left is not None:
        seen &= key_at >= query_at - scoring.left
    return scores, jnp.broadcast_to(seen[:, None, None], scores.shape)
