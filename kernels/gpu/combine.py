"""The second kernel of decode: sequences cut into pieces get their result, the others have it.

A warpgroup reads several pieces at once, for it waits for nothing else: of one head, where the
warpgroups of a CTA share the pieces of a sequence that was cut often, or a few of each of several
heads, where sequences have few pieces and CTAs should be few.

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
READS, SIMULATED_READS = 8, 4  # pieces read at once


class Plan(NamedTuple):
    """Sizes of a call."""

    num_heads: int
    warpgroups: int  # that share the pieces of a head
    reads: int  # of pieces of a head at once
    heads_per_cta: int
    num_items: int  # (sequence, some heads)
    num_ctas: int

    @property
    def items_per_sequence(self) -> int:
        return self.num_heads // self.heads_per_cta


class Inputs(NamedTuple):
    """Refs in device memory; the first two are written in place."""

    out: Any  # (batch, row_groups, query_rows, head_dim)
    lse: Any  # float32 (batch, row_groups, rows)
    piece_out: Any  # float32 (places, row_groups, query_rows, partial_width)
    piece_lse: Any  # float32 (places, row_groups, rows)
    work: Any  # the rows of a WorkList


def make_plan(problem: Problem, decode: DecodePlan, *, is_simulated: bool) -> Plan:
    heads, batch = problem.num_query_heads, problem.cache.batch
    line_ctas = decode.line.num_ctas
    is_cut_often = line_ctas >= MANY_PIECES * batch
    # as many pieces of a head are read at once as a sequence of usual length has, or more
    fits = lambda n, cuts: heads % n == 0 and line_ctas <= cuts * batch
    heads_per_cta = 4 if fits(4, 1) else 2 if fits(2, 3) else 1
    num_items = batch * (heads // heads_per_cta)
    num_ctas = min(num_items, MAX_SIMULATED_CTAS) if is_simulated else num_items
    reads = (SIMULATED_READS if is_simulated else READS) // heads_per_cta
    return Plan(heads, 4 if is_cut_often else 1, reads, heads_per_cta, num_items, num_ctas)


def scratch(plan: Plan, problem: Problem) -> dict[str, Buffer | Union | Barriers]:
    width, parts = partial_width(problem.cache.head_dim), {}
    if width > problem.cache.head_dim:
        parts["out_smem"] = Buffer((plan.heads_per_cta, width), problem.query_dtype)
    if plan.warpgroups > 1:
        parts |= {
            "acc_smem": Buffer((plan.warpgroups, width), "float32"),
            "m_smem": Buffer((plan.warpgroups,), "float32"),
            "l_smem": Buffer((plan.warpgroups,), "float32"),
            "all_here": Barriers(1, plan.warpgroups),
        }
    return parts


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
            heads = [first_head + i for i in range(plan.heads_per_cta)]
            rows = [(divide(head, query_rows), remainder(head, query_rows)) for head in heads]
            states = _join(inputs, plan, smem, rows, first, count)
            if plan.warpgroups == 1:
                _store(inputs, smem, sequence, rows, states)
                return
            pl.when(lax.axis_index("warpgroup") == 0)(
                lambda: _store(inputs, smem, sequence, rows, [_of_all(inputs, plan, smem)])
            )
            _meet(smem)  # before the states of the next head


def _join(inputs: Inputs, plan: Plan, smem: dict, rows: list, first: Any, count: Any) -> list:
    """The state of each head after this warpgroup's share of the pieces; in `smem` if it is one of
    several."""
    warpgroup = lax.axis_index("warpgroup") if plan.warpgroups > 1 else 0
    layout, width = _layout(inputs), inputs.piece_out.shape[-1]
    spread = lambda x: plgpu.layout_cast(lax.broadcast_in_dim(x, (width,), ()), layout)

    def several(i, states):
        start = (i * plan.warpgroups + warpgroup) * plan.reads
        numbers = [start + u for u in range(plan.reads)]
        places = [first + jnp.minimum(number, count - 1) for number in numbers]
        load = partial(plgpu.load, layout=layout)
        outs = [[load(inputs.piece_out.at[place, *row]) for place in places] for row in rows]
        lses = [[inputs.piece_lse[place, *row] for place in places] for row in rows]
        joined = []
        for (m, l, acc), outs_of, lses_of in zip(states, outs, lses, strict=True):
            lses_of = [
                jnp.where(number < count, lse, jnp.float32(-jnp.inf))
                for number, lse in zip(numbers, lses_of, strict=True)
            ]
            top = reduce(jnp.maximum, lses_of, m)
            decay = jnp.exp(m - top)
            l, acc = l * decay, acc * decay
            for out, lse in zip(outs_of, lses_of, strict=True):
                weight = jnp.exp(lse - top)
                l, acc = l + weight, acc + out * weight
            joined.append((top, l, acc))
        return joined

    rounds = divide(count + (plan.reads * plan.warpgroups - 1), plan.reads * plan.warpgroups)
    state = jnp.float32(softmax.FLOOR), jnp.float32(0), spread(jnp.float32(0))
    states = lax.fori_loop(0, rounds, several, [state] * len(rows))
    if plan.warpgroups > 1:
        for name, value in zip(("m_smem", "l_smem", "acc_smem"), states[0], strict=True):
            smem[name][warpgroup] = value
        _meet(smem)
    return states


def _of_all(inputs: Inputs, plan: Plan, smem: dict) -> tuple:
    """The state of a head after all warpgroups' shares."""
    layout, others = _layout(inputs), range(plan.warpgroups)
    ms, ls = ([smem[name][w] for w in others] for name in ("m_smem", "l_smem"))
    accs = [plgpu.load(smem["acc_smem"].at[w], layout=layout) for w in others]
    top = reduce(jnp.maximum, ms)
    decays = [jnp.exp(m - top) for m in ms]
    l = reduce(operator.add, [l * decay for l, decay in zip(ls, decays, strict=True)])
    return top, l, reduce(operator.add, [x * decay for x, decay in zip(accs, decays, strict=True)])


def _layout(inputs: Inputs) -> Any:
    width = inputs.piece_out.shape[-1]
    return plgpu.Layout.WG_STRIDED((width,), width // 128)


def _meet(smem: dict) -> None:
    """All warpgroups wait for each other."""
    plgpu.barrier_arrive(smem["all_here"])
    plgpu.barrier_wait(smem["all_here"])


def _store(inputs: Inputs, smem: dict, sequence: Any, rows: list, states: list) -> None:
    """The results of heads; through shared memory where they are narrower than a warpgroup."""
    outs = []
    for row, (m, l, acc) in zip(rows, states, strict=True):
        seen = l > 0
        total = jnp.where(seen, l, jnp.float32(1))
        outs.append((acc * (1.0 / total)).astype(inputs.out.dtype))
        inputs.lse[sequence, *row] = jnp.where(seen, m + jnp.log(total), jnp.float32(-jnp.inf))
    if "out_smem" not in smem:
        for row, out in zip(rows, outs, strict=True):
            inputs.out[sequence, *row] = out
        return
    staged, own_columns = smem["out_smem"], pl.ds(0, inputs.out.shape[-1])
    for i, out in enumerate(outs):
        staged[i] = out
    plgpu.commit_smem()
    for i, row in enumerate(rows):
        plgpu.copy_smem_to_gmem(staged.at[i, own_columns], inputs.out.at[sequence, *row])
    plgpu.wait_smem_to_gmem(0)
