"""A GPU's reading ceiling over cache blocks: the copies of decode, and no arithmetic.

Every CTA brings an equal share of the blocks that a table names through a ring in shared memory.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from paged_kv.kernels.core.problem import Cost

from .inputs import Inputs
from .workload import ATTEND, ITEM_BYTES, Case

ROWS = 64  # (token, head) rows of a copy at most
RING_BYTES = 131072  # in flight; half of that is enough
LANES = 128


class Plan(NamedTuple):
    rows: int  # of a copy
    copies_per_block: int
    copies_per_step: int
    stages: int
    num_ctas: int


def unsupported(case: Case) -> str | None:
    """Why a case has no stream, or None."""
    rows = case.block_size * case.num_kv_heads
    if case.op != ATTEND or case.query_lengths is not None:
        return "only decode has a stream"
    if case.local_window_size is not None:
        return "a window does not read all blocks"
    if (rows % ROWS and ROWS % rows) or case.head_dim % 64:
        return f"{rows} rows of {case.head_dim} in a block are not copied evenly"
    return None


def make_plan(case: Case, num_ctas: int) -> Plan:
    rows = case.block_size * case.num_kv_heads
    step = min(rows, ROWS), -(-rows // ROWS), max(1, ROWS // rows)
    step_bytes = 2 * ROWS * case.head_dim * ITEM_BYTES[case.dtype]
    return Plan(*step, max(2, RING_BYTES // step_bytes), num_ctas)


def make(
    case: Case, inputs: Inputs, num_ctas: int, interpret: Any = None
) -> Callable[[int], jax.Array]:
    """`run(i)` reads all blocks of copy `i`."""
    plan = make_plan(case, num_ctas)
    rows = case.block_size * case.num_kv_heads
    pools = [pool.reshape(-1, rows, case.head_dim) for pool in (inputs.key_pool, inputs.value_pool)]
    lists = [_block_list(np.asarray(table), plan, pools[0].shape[0]) for table in inputs.tables]
    call = jax.jit(_kernel(case, plan, len(lists[0]), interpret))
    return lambda index: call(lists[index % len(lists)], *pools)


def _block_list(table: np.ndarray, plan: Plan, nowhere: int) -> jax.Array:
    """The used blocks in the order of the sequences, filled up to whole steps."""
    used = table[table >= 0]
    return jnp.asarray(
        np.pad(used, (0, -len(used) % plan.copies_per_step), constant_values=nowhere)
    )


def _kernel(case: Case, plan: Plan, num_blocks: int, interpret: Any) -> Callable[..., jax.Array]:
    from paged_kv.kernels.gpu import blocks
    from paged_kv.kernels.gpu.plan import Barriers, Buffer, swizzle_bytes

    shape = plan.stages, plan.rows * plan.copies_per_step, case.head_dim
    tile = Buffer(shape, case.dtype, swizzle_bytes(case.head_dim, case.dtype))
    num_steps = num_blocks * plan.copies_per_block // plan.copies_per_step
    return blocks.kernel(
        partial(_body, plan=plan, num_steps=num_steps),
        name="stream",
        cost=Cost(0, num_blocks * case.block_size * case.token_bytes, 0),
        out_type=jax.ShapeDtypeStruct((plan.num_ctas, LANES), jnp.float32),
        grid=(plan.num_ctas,),
        grid_names=("cta",),
        num_threads=1,
        scratch_types=blocks.allocate(
            {
                "key_smem": tile,
                "value_smem": tile,
                "full": Barriers(plan.stages, 2 * plan.copies_per_step),
            }
        ),
        interpret=interpret,
    )


def _body(
    blocks_ref: Any,  # int32 (blocks,)
    key_pool_ref: Any,  # (num_blocks, rows, head_dim)
    value_pool_ref: Any,
    out_ref: Any,  # float32 (num_ctas, LANES), so that the kernel has a result
    *,
    plan: Plan,
    num_steps: int,
    key_smem: Any,
    value_smem: Any,
    full: Any,
) -> None:
    from paged_kv.kernels.gpu.blocks import pl, plgpu

    cta = lax.axis_index("cta")
    bound = lambda i: lax.div(i * num_steps, jnp.int32(plan.num_ctas))
    first, count = bound(cta), bound(cta + 1) - bound(cta)
    slot_of = lambda step: lax.rem(step, jnp.int32(plan.stages))

    def blocks_of(step):
        """Of the copies of a step; of the last one, past it."""
        index = (first + jnp.minimum(step, jnp.maximum(count - 1, 0))) * plan.copies_per_step
        block = lambda copy: blocks_ref[lax.div(index + copy, jnp.int32(plan.copies_per_block))]
        return tuple(map(block, range(plan.copies_per_step)))

    def issue(step, blocks):
        """Starts the copies of a step, and reads the blocks of the next meanwhile."""
        slot = slot_of(step)
        for copy, block in enumerate(blocks):
            index = (first + step) * plan.copies_per_step + copy
            row = lax.rem(index, jnp.int32(plan.copies_per_block)) * plan.rows
            source = block, pl.ds(pl.multiple_of(row, plan.rows), plan.rows)
            target = slot, pl.ds(copy * plan.rows, plan.rows)
            for pool, smem in ((key_pool_ref, key_smem), (value_pool_ref, value_smem)):
                plgpu.copy_gmem_to_smem(pool.at[source], smem.at[target], full.at[slot])
        return blocks_of(step + 1)

    def refill(step, blocks):
        plgpu.barrier_wait(full.at[slot_of(step - plan.stages)])
        return issue(step, blocks)

    ahead = jnp.minimum(count, plan.stages)
    blocks = lax.fori_loop(0, ahead, issue, blocks_of(jnp.int32(0)))
    lax.fori_loop(ahead, count, refill, blocks)

    @pl.loop(count - ahead, count)
    def _(step):
        plgpu.barrier_wait(full.at[slot_of(step)])

    layout = plgpu.Layout.WG_STRIDED((LANES,), 1)
    out_ref[cta] = plgpu.layout_cast(jnp.full((LANES,), 1.0, jnp.float32), layout)
