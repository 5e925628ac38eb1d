"""The kernel of decode: one query token per sequence, KV cut so that every SM gets as much.

The roles are those of FlashAttention-3 (Shah et al., 2024), the cut is that of worklist.py.

    CTA c walks its share of the line of tiles, piece after piece

    producer    table -> block ids, one tile ahead -> TMA: query, K tile, V tile ... into rings
    consumers   take turns with the tiles of a piece, each with a state of its own:
                wait K | S = Q K' | free K | softmax | wait V | O += P V | free V
                after the piece: one hands its state to the other through shared memory, and that
                one stores (O, lse) -> shared memory -> TMA
                    a sequence that is whole in this CTA: the result
                    part of one: float32, for combine.py

Where a token has more than 64 heads, each consumer has 64 of them and meets every tile.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from ..core import softmax
from ..core.arrays import AttentionArrays, NewTokens
from ..core.problem import Problem
from . import blocks, combine, decode_append, step_work, tile, worklist
from .blocks import Ring, divide, pl, plgpu
from .decode_plan import DecodePlan, partial_width, result_name, scratch
from .plan import WARPGROUP_ROWS
from .tile import Rows, Sharing, Tiles
from .worklist import Part, Share, Stretch


class Inputs(NamedTuple):
    """Refs in device memory."""

    query: Any  # (batch, row_groups, query_rows, head_dim)
    keys: Any  # (num_layers * num_blocks, rows_per_block, head_dim)
    values: Any
    table: Any  # int32 (batch, max_blocks_per_seq)
    work: Any  # the rows of a WorkList
    layer: Any  # int32 (1,)
    slopes: Any  # float32 (row_groups, WARPGROUP_ROWS), of ALiBi
    new: NewTokens | None  # to be written to the pools


class Outputs(NamedTuple):
    """Refs in device memory: results of whole sequences, and of pieces."""

    out: Any  # (batch, row_groups, query_rows, head_dim)
    lse: Any  # float32 (batch, row_groups, query_rows)
    piece_out: Any  # float32 (places, row_groups, query_rows, partial_width)
    piece_lse: Any  # float32 (places, row_groups, query_rows)


class Piece(NamedTuple):
    """Tiles of one sequence in one CTA."""

    index: Any  # of the CTA's pieces
    part: Part
    following: Any  # the next piece's part, if known; past the last one of no use but harmless
    seq_length: Any
    steps: Any  # tiles of all pieces before
    place: Any
    is_whole: Any  # the sequence has no other piece
    has_end: Any  # of the sequence


class Cta(NamedTuple):
    """What one CTA works with: the problem, device memory and shared memory."""

    problem: Problem
    plan: DecodePlan
    is_simulated: bool
    inputs: Inputs
    outputs: Outputs
    smem: dict[str, Any]

    def ring(self, name: str) -> Ring:
        return Ring(*(self.smem[f"{name}_{part}"] for part in ("smem", "full", "empty")))

    def share(self) -> tuple[Share, Stretch]:
        """This CTA's, and the stretch that it begins with."""
        row, columns = self.problem.cache.batch + lax.axis_index("cta"), range(len(Share._fields))
        share = Share(*(self.inputs.work[row, worklist.NUM_SHARED + i] for i in columns))
        return share, self._stretch(row)

    def loop(self, visit: Any, carry: Any, *, is_ahead: bool) -> tuple[Any, Any, Any]:
        """`carry = visit(piece, carry)` for each piece: (pieces, tiles, carry).

        is_ahead: the next piece is known in a visit, which takes registers, and read after it
          otherwise.
        """
        share, stretch = self.share()

        def body(state):
            index, steps, sequence, stretch, carry = state
            part = stretch.part(sequence, share.num_tiles - steps)
            steps_after = steps + part.num_visits
            read = partial(self._stretch, stretch.next)
            next_stretch, following = None, None
            if is_ahead:
                next_stretch = read()
                following = next_stretch.part(stretch.next, share.num_tiles - steps_after)
            piece = Piece(
                index,
                part,
                following,
                stretch.seq_length,
                steps,
                lax.axis_index("cta") + sequence,
                stretch.is_whole(part),
                part.tile_stop == stretch.tile_stop,
            )
            carry = visit(piece, carry)
            return index + 1, steps_after, stretch.next, next_stretch or read(), carry

        state = (jnp.int32(0), jnp.int32(0), share.sequence, stretch, carry)
        state = lax.while_loop(lambda state: state[1] < share.num_tiles, body, state)
        return state[0], state[1], state[-1]

    def _stretch(self, row: Any) -> Stretch:
        return Stretch(*(self.inputs.work[row, i] for i in range(worklist.NUM_SHARED)))


def attend(
    problem: Problem,
    plan: DecodePlan,
    arrays: AttentionArrays,
    new: NewTokens | None = None,
    *,
    interpret: Any,
) -> tuple[jax.Array, ...]:
    """(out, lse), as `attention.attend`, and with `new` tokens both pools after them.

    interpret: None, or the interpreter's parameters.
    """
    cache, heads = problem.cache, problem.num_query_heads
    work = step_work.decode_list(plan.line, problem.variant, arrays.schedule)
    pool_rows = (cache.num_layers * cache.num_blocks, cache.rows_per_block, cache.head_dim)
    padding = plan.rows - heads
    query = jnp.pad(arrays.query.astype(cache.dtype), ((0, 0), (0, padding), (0, 0)))
    inputs = Inputs(
        query=query.reshape(-1, plan.row_groups, plan.query_rows, cache.head_dim),
        keys=arrays.key_pool.reshape(pool_rows),
        values=arrays.value_pool.reshape(pool_rows),
        table=arrays.block_table,
        work=work.rows,
        layer=arrays.layer.reshape(1),
        slopes=_slope_of_rows(plan, heads, arrays.alibi_slopes),
        new=new,
    )
    out, lse, *pools = blocks.run_locally(partial(_attend, problem, plan, interpret), inputs)
    out = out.reshape(-1, plan.rows, cache.head_dim)[:, :heads]
    lse = lse.reshape(-1, plan.rows)[:, :heads]
    return out, lse, *(pool.reshape(arrays.key_pool.shape) for pool in pools)


def _attend(
    problem: Problem, plan: DecodePlan, interpret: Any, inputs: Inputs
) -> tuple[jax.Array, ...]:
    *arrays, new = inputs
    pools: Any = ()
    if new is not None:  # the pools are written in place
        pools = jax.new_ref(inputs.keys), jax.new_ref(inputs.values)
        *arrays, _ = inputs._replace(keys=pools[0], values=pools[1])
    outputs = Outputs(*_main(problem, plan, interpret)(*arrays, *(new or ())))
    result = combine.complete(plan, problem, outputs, inputs.work, interpret=interpret)
    return *result, *map(jax.freeze, pools)


def _slope_of_rows(plan: DecodePlan, heads: int, slopes: jax.Array | None) -> jax.Array:
    if slopes is None:
        return jnp.zeros((1, 1), jnp.float32)  # never read; more of them would be a launch
    padding = plan.row_groups * WARPGROUP_ROWS - heads
    return jnp.pad(slopes.astype(jnp.float32), (0, padding)).reshape(-1, WARPGROUP_ROWS)


def _main(problem: Problem, plan: DecodePlan, interpret: Any) -> Any:
    """The kernel, as a function of `Inputs` that returns `Outputs`."""
    batch, head_dim = problem.cache.batch, problem.cache.head_dim
    places = batch + plan.line.num_ctas
    rows = plan.row_groups, plan.query_rows
    array = jax.ShapeDtypeStruct
    return blocks.kernel(
        partial(_body, problem=problem, plan=plan, is_simulated=interpret is not None),
        name="paged_decode",
        cost=problem.cost,
        out_type=Outputs(
            array((batch, *rows, head_dim), problem.query_dtype),
            array((batch, *rows), jnp.float32),
            array((places, *rows, partial_width(head_dim)), jnp.float32),
            array((places, *rows), jnp.float32),
        ),
        grid=(plan.line.num_ctas,),
        grid_names=("cta",),
        num_threads=plan.consumers + 1,
        scratch_types=blocks.allocate(scratch(problem, plan)),
        interpret=interpret,
    )


def _body(*refs: Any, problem: Problem, plan: DecodePlan, is_simulated: bool, **smem: Any) -> None:
    num_arrays, first_output = len(Inputs._fields) - 1, len(refs) - len(Outputs._fields)
    new = NewTokens(*refs[num_arrays:first_output]) if plan.appends else None
    inputs, outputs = Inputs(*refs[:num_arrays], new=new), Outputs(*refs[first_output:])
    cta = Cta(problem, plan, is_simulated, inputs, outputs, smem)
    warpgroup = lax.axis_index("warpgroup")
    of_producer, of_consumer = plan.registers

    @pl.when(warpgroup == plan.consumers)
    def _():
        plgpu.set_max_registers(of_producer, action="decrease")
        _produce(cta)

    @pl.when(warpgroup < plan.consumers)
    def _():
        plgpu.set_max_registers(of_consumer, action="increase")
        _consume(cta, warpgroup)


def _produce(cta: Cta) -> None:
    """Brings the query and the tiles of every piece, in the order of the visits.

    Block ids are read while the tile before is waited for, also those of the next piece.
    """
    plan, inputs = cta.plan, cta.inputs
    query, keys, values = (cta.ring(name) for name in ("query", "key", "value"))
    first_block = inputs.layer[0] * cta.problem.cache.num_blocks
    if plan.keys.padding_rows:
        tile.zero_padding(plan.keys, values, inputs.values, cta.smem["padding_full"])
    ids_of = partial(blocks.block_ids, plan.keys, inputs.table, first_block, inputs.keys.shape[0])

    def visit(piece: Piece, ids: Any) -> Any:
        part, following = piece.part, piece.following
        query.await_empty(piece.index)
        slot = query.slot(piece.index)
        for group in range(plan.row_groups):
            rows = query.slots.at[slot, group, pl.ds(0, plan.query_rows)]
            source = inputs.query.at[part.sequence, group]
            plgpu.copy_gmem_to_smem(source, rows, query.full.at[slot])
        if plan.appends:
            new = partial(decode_append.write, cta.problem, inputs, cta.smem, part.sequence)
            pl.when(piece.has_end)(new)

        def ids_after(i):
            if not plan.reads_ahead:
                return ()
            is_last = i + 1 >= part.num_visits
            either = lambda a, b: jnp.where(is_last, b, a)
            after = Part(*map(either, part, following))
            return ids_of(after, either(part.visited(i + 1), following.visited(0)))

        def step(i, ids):
            ids, next_ids = ids or ids_of(part, part.visited(i)), ids_after(i)
            for ring, pool in ((keys, inputs.keys), (values, inputs.values)):
                ring.await_empty(piece.steps + i)
                blocks.copy_blocks(pool, ring, piece.steps + i, plan.keys, part.visited(i), ids)
            return next_ids

        return lax.fori_loop(0, part.num_visits, step, ids)

    share, stretch = cta.share()
    first = stretch.part(share.sequence, share.num_tiles)
    ids = ids_of(first, first.visited(0)) if plan.reads_ahead else ()
    num_pieces, num_tiles, _ = cta.loop(visit, ids, is_ahead=plan.reads_ahead)
    if plan.appends:
        num_ctas = plan.line.num_ctas
        decode_append.write_rows_without_tiles(cta.problem, inputs, cta.smem, num_ctas)
    keys.drain(num_tiles)
    values.drain(num_tiles)
    query.drain(num_pieces)


def _consume(cta: Cta, warpgroup: Any) -> None:
    """Attends with this warpgroup's heads to its tiles of every piece."""
    plan, problem = cta.plan, cta.problem
    turn = warpgroup if plan.turns > 1 else jnp.int32(0)
    group = warpgroup if plan.row_groups > 1 else jnp.int32(0)
    query, keys, values = (cta.ring(name) for name in ("query", "key", "value"))
    tiles = Tiles(problem, plan.keys, keys, values, cta.is_simulated)
    sharing = Sharing(group, plan.row_groups, cta.smem["tail_clear"])

    def visit(piece: Piece, _: Any) -> tuple[()]:
        part = piece.part
        rows = _rows_of(cta, group, piece.seq_length)
        query.await_full(piece.index)
        query_rows = query.slots.at[query.slot(piece.index), group]
        # this consumer's visits are first, first + turns, ...
        first = blocks.remainder(turn + piece.steps, plan.turns)
        count = lambda stop: divide(jnp.maximum(stop - first, 0) + (plan.turns - 1), plan.turns)

        def step(n, state, *, is_edge):
            i = first + n * plan.turns
            return tile.attend(
                tiles, rows, sharing, query_rows, part.visited(i), piece.steps + i, state,
                is_edge=is_edge,
            )  # fmt: skip

        num_masked = count(part.num_edges if plan.has_maskless_loop else part.num_visits)
        state = tile.empty_state(problem.cache.head_dim)
        state = lax.fori_loop(0, num_masked, partial(step, is_edge=True), state)
        if plan.has_maskless_loop:
            masked_too = partial(step, is_edge=False)
            state = lax.fori_loop(num_masked, count(part.num_visits), masked_too, state)
        query.release(piece.index)
        if plan.turns > 1:
            _exchange(cta, turn, piece, state)
        else:
            _store(cta, group, piece, state)
        return ()

    num_pieces, _, _ = cta.loop(visit, (), is_ahead=False)
    plgpu.wait_smem_to_gmem(0)
    if plan.turns > 1:

        @pl.when((turn == 1) & (num_pieces > 0))
        def _():
            plgpu.barrier_wait(cta.smem["exchange_empty"])


def _rows_of(cta: Cta, group: Any, seq_length: Any) -> Rows:
    row = plgpu.broadcasted_iota(jnp.int32, (WARPGROUP_ROWS,), 0, layout=blocks.PER_ROW)
    slope = None
    if cta.problem.variant.has_alibi:
        source = cta.inputs.slopes.at[group]
        slope = plgpu.load(source, layout=blocks.PER_ROW, optimized=False)
    return Rows(
        # of all rows; derived from them, for it has their layout then
        query_position=seq_length - 1 + divide(row, WARPGROUP_ROWS),
        kv_head=divide(row + group * WARPGROUP_ROWS, cta.problem.group),
        slope=slope,
        seq_length=seq_length,
    )


def _exchange(cta: Cta, turn: Any, piece: Piece, state: softmax.State) -> None:
    """The second consumer hands its state over, the first one stores both together."""
    smem = cta.smem
    acc_smem, statistics_smem = smem["exchange_smem"], smem["statistics_smem"]

    @pl.when(turn == 1)
    def _():
        pl.when(piece.index > 0)(lambda: plgpu.barrier_wait(smem["exchange_empty"]))
        acc_smem[...] = state.acc
        statistics_smem[0] = state.m
        statistics_smem[1] = state.l
        plgpu.barrier_arrive(smem["exchange_full"])

    @pl.when(turn == 0)
    def _():
        plgpu.barrier_wait(smem["exchange_full"])
        per_row = lambda i: plgpu.load(statistics_smem.at[i], layout=blocks.PER_ROW)
        acc = plgpu.load(acc_smem, layout=blocks.WGMMA)
        other = softmax.State(per_row(0), per_row(1), acc)
        plgpu.barrier_arrive(smem["exchange_empty"])
        _store(cta, jnp.int32(0), piece, softmax.join(blocks.ROWS, state, other))


def _store(cta: Cta, group: Any, piece: Piece, state: softmax.State) -> None:
    """Through shared memory, whose last contents must have left it."""
    out, lse = softmax.finish(blocks.ROWS, state)
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
    cta.smem["lse_smem"][group] = lse
    for number in range(cta.plan.row_groups):
        store = partial(_copy_out, cta, number, piece, out)
        store() if cta.plan.row_groups == 1 else pl.when(group == number)(store)


def _copy_out(cta: Cta, group: int, piece: Piece, out: Any) -> None:
    """The result of a whole sequence, or that of a piece."""
    plan, outputs, head_dim = cta.plan, cta.outputs, cta.problem.cache.head_dim
    result_smem, piece_smem = cta.smem[result_name(group)]
    heads = pl.ds(0, plan.query_rows)
    lse_smem = cta.smem["lse_smem"].at[group, heads]

    @pl.when(piece.is_whole)
    def _():
        result_smem[...] = out.astype(result_smem.dtype)
        plgpu.commit_smem()
        sequence = piece.part.sequence
        plgpu.copy_smem_to_gmem(result_smem.at[heads], outputs.out.at[sequence, group])
        plgpu.copy_smem_to_gmem(lse_smem, outputs.lse.at[sequence, group])

    @pl.when(jnp.logical_not(piece.is_whole))
    def _():
        piece_smem[...] = out
        plgpu.commit_smem()
        place = outputs.piece_out.at[piece.place, group, :, pl.ds(0, head_dim)]
        plgpu.copy_smem_to_gmem(piece_smem.at[heads], place)
        plgpu.copy_smem_to_gmem(lse_smem, outputs.piece_lse.at[piece.place, group])
