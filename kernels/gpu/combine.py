"""The second kernel of decode: sequences cut into pieces get their result, the others have it.

A warpgroup joins the pieces of one head; it reads several at once, for it waits for nothing else.

Source: the second kernel of Flash-Decoding (Dao et al., 2023).
"""

import operator
from functools import partial, reduce
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from ..core import softmax
from ..core.problem import Cost, Problem
from . import blocks
from .blocks import divide, pl, plgpu, remainder
from .decode_plan import DecodePlan, partial_width
from .plan import MAX_SIMULATED_CTAS, Barriers, Buffer, Union
from .worklist import NUM_SHARED, Pieces

MANY_PIECES = 8  # per sequence: from here on four warpgroups share a head
READS, SIMULATED_READS = 8, 2  # pieces read at once


class Plan(NamedTuple):
    """Sizes of a call."""

    num_heads: int
    warpgroups: int  # that share the pieces of a head
    reads: int
    heads_per_cta: int
    num_items: int  # (sequence, some heads)
    num_ctas: int

    @property
    def items_per_sequence(self) -> int:
        return -(-self.num_heads // self.heads_per_cta)


class Inputs(NamedTuple):
    """Refs in device memory; the first two are written in place."""

    out: Any  # (batch, row_groups, query_rows, head_dim)
    lse: Any  # float32 (batch, row_groups, rows)
    piece_out: Any  # float32 (places, row_groups, query_rows, partial_width)
    piece_lse: Any  # float32 (places, row_groups, rows)
    work: Any  # the rows of a WorkList


def make_plan(problem: Problem, decode: DecodePlan, *, is_simulated: bool) -> Plan:
    heads, batch = problem.num_query_heads, problem.cache.batch
    is_cut_often = decode.line.num_ctas >= MANY_PIECES * batch
    # most sequences of a large batch have one piece: their CTAs should be few
    heads_per_cta = 4 if decode.line.num_ctas <= batch else 1
    num_items = batch * -(-heads // heads_per_cta)
    num_ctas = min(num_items, MAX_SIMULATED_CTAS) if is_simulated else num_items
    reads = SIMULATED_READS if is_simulated else READS
    return Plan(heads, 4 if is_cut_often else 1, reads, heads_per_cta, num_items, num_ctas)


def scratch(plan: Plan, problem: Problem) -> dict[str, Buffer | Union | Barriers]:
    width = partial_width(problem.cache.head_dim)
    return {
        "out_smem": Buffer((width,), problem.query_dtype),
        "acc_smem": Buffer((plan.warpgroups, width), "float32"),
        "m_smem": Buffer((plan.warpgroups,), "float32"),
        "l_smem": Buffer((plan.warpgroups,), "float32"),
        "all_here": Barriers(1, plan.warpgroups),
    }


def complete(
    decode: DecodePlan, problem: Problem, outputs: Any, work: jax.Array, *, interpret: Any
) -> tuple[jax.Array, jax.Array]:
    """(out, lse) of the main kernel, with the sequences it cut, and those without keys."""
    plan = make_plan(problem, decode, is_simulated=interpret is not None)
    call = blocks.kernel(
        partial(_body, plan=plan, query_rows=decode.query_rows),
        name="paged_combine",
        cost=Cost(0, outputs.piece_out.size * 4, 0),
        out_type=(),
        grid=(plan.num_ctas,),
        grid_names=("cta",),
        num_threads=plan.warpgroups,
        scratch_types=blocks.allocate(scratch(plan, problem)),
        interpret=interpret,
    )
    out, lse = jax.new_ref(outputs.out), jax.new_ref(outputs.lse)
    call(out, lse, outputs.piece_out, outputs.piece_lse, work)
    return jax.freeze(out), jax.freeze(lse)


def _body(*refs: Any, plan: Plan, query_rows: int, **smem: Any) -> None:
    inputs, cta = Inputs(*refs), lax.axis_index("cta")

    @pl.loop(0, divide(plan.num_items - 1 - cta, plan.num_ctas) + 1)
    def _(index):
        item = cta + index * plan.num_ctas
        sequence = divide(item, plan.items_per_sequence)
        first_head = remainder(item, plan.items_per_sequence) * plan.heads_per_cta
        columns = range(NUM_SHARED, NUM_SHARED + len(Pieces._fields))
        first, count = Pieces(*(inputs.work[sequence, i] for i in columns))

        @pl.when(count != 1)
        def _():
            for offset in range(plan.heads_per_cta):
                # a head past the last one is the last one again
                head = jnp.minimum(first_head + offset, plan.num_heads - 1)
                row = divide(head, query_rows), remainder(head, query_rows)
                _join(inputs, plan, smem, sequence, row, first, count)


def _join(
    inputs: Inputs, plan: Plan, smem: dict, sequence: Any, row: tuple, first: Any, count: Any
) -> None:
    """The result of one head."""
    warpgroup = lax.axis_index("warpgroup")
    width = inputs.piece_out.shape[-1]
    layout = plgpu.Layout.WG_STRIDED((width,), width // 128)
    spread = lambda x: plgpu.layout_cast(lax.broadcast_in_dim(x, (width,), ()), layout)

    def several(i, state):
        m, l, acc = state
        start = (i * plan.warpgroups + warpgroup) * plan.reads
        places = [first + jnp.minimum(start + u, count - 1) for u in range(plan.reads)]
        outs = [plgpu.load(inputs.piece_out.at[place, *row], layout=layout) for place in places]
        none = jnp.float32(-jnp.inf)
        lses = [
            jnp.where(start + u < count, inputs.piece_lse[place, *row], none)
            for u, place in enumerate(places)
        ]
        top = reduce(jnp.maximum, lses, m)
        decay = jnp.exp(m - top)
        l, acc = l * decay, acc * decay
        for out, lse in zip(outs, lses, strict=True):
            weight = jnp.exp(lse - top)
            l, acc = l + weight, acc + out * weight
        return top, l, acc

    rounds = divide(count + (plan.reads * plan.warpgroups - 1), plan.reads * plan.warpgroups)
    state = jnp.float32(softmax.FLOOR), jnp.float32(0), spread(jnp.float32(0))
    m, l, acc = lax.fori_loop(0, rounds, several, state)
    if plan.warpgroups == 1:
        _store(inputs, smem, sequence, row, (m, l, acc))
        return
    smem["acc_smem"][warpgroup] = acc
    smem["m_smem"][warpgroup] = m
    smem["l_smem"][warpgroup] = l
    _meet(smem)

    @pl.when(warpgroup == 0)
    def _():
        others = range(plan.warpgroups)
        ms, ls = ([smem[name][w] for w in others] for name in ("m_smem", "l_smem"))
        accs = [plgpu.load(smem["acc_smem"].at[w], layout=layout) for w in others]
        top = reduce(jnp.maximum, ms)
        decays = [jnp.exp(m - top) for m in ms]
        l = reduce(operator.add, [l * decay for l, decay in zip(ls, decays, strict=True)])
        acc = reduce(operator.add, [acc * decay for acc, decay in zip(accs, decays, strict=True)])
        _store(inputs, smem, sequence, row, (top, l, acc))

    _meet(smem)  # before the states of the next head


def _meet(smem: dict) -> None:
    """All warpgroups wait for each other."""
    plgpu.barrier_arrive(smem["all_here"])
    plgpu.barrier_wait(smem["all_here"])


def _store(inputs: Inputs, smem: dict, sequence: Any, row: tuple, state: tuple) -> None:
    """Through shared memory: a copy may take less than what a warpgroup holds."""
    m, l, acc = state
    seen = l > 0
    total = jnp.where(seen, l, jnp.float32(1))
    head_dim = inputs.out.shape[-1]
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
    smem["out_smem"][...] = (acc * (1.0 / total)).astype(inputs.out.dtype)
    plgpu.commit_smem()
    target = inputs.out.at[sequence, *row]
    plgpu.copy_smem_to_gmem(smem["out_smem"].at[pl.ds(0, head_dim)], target)
    inputs.lse[sequence, *row] = jnp.where(seen, m + jnp.log(total), jnp.float32(-jnp.inf))
    plgpu.wait_smem_to_gmem(0)
