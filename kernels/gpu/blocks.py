"""What the kernels of this folder share: copies of cache blocks, rings of tiles, matrix products.

The one gate to Pallas Mosaic GPU: importing this on a JAX that is too old says so.

`matmul` computes otherwise in the interpreter, which knows no race of a wgmma; what else it does
not see is listed in tests/gpu_interpreter.py.
"""

import inspect
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.core import ShapedArray
from jax.extend.core import Primitive
from jax.interpreters import mlir

from . import unsupported_version

if (_reason := unsupported_version()) is not None:
    raise ImportError(_reason)

from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from ..core.problem import Cost
from ..core.softmax import Rows
from .plan import Barriers, Buffer, Item, KeyTiles, Union, divide, remainder

__all__ = ["divide", "remainder"]

WGMMA = plgpu.Layout.WGMMA
PER_ROW, PER_COLUMN = WGMMA.reduce(1), WGMMA.reduce(0)

ROWS = Rows(
    reduce=lambda op, tile: op(tile, axis=1),
    expand=lambda row, shape: lax.broadcast_in_dim(row, shape, (0,)),
)

_TAKES_COST = "cost_estimate" in inspect.signature(plgpu.kernel).parameters


def interpreter(interpret: Any) -> Any:
    """None to compile, or the interpreter's parameters; `interpret` is a bool, those, or None."""
    if interpret is True:
        return plgpu.InterpretGPUParams()
    return interpret or None


def kernel(body: Any, *, name: str, cost: Cost, **options: Any) -> Any:
    """`plgpu.kernel` with the settings all kernels here share."""
    if _TAKES_COST:
        options["cost_estimate"] = pl.CostEstimate(**cost._asdict())
    return plgpu.kernel(
        body,
        kernel_name=name,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(
            approx_math=True,
            # a barrier before every copy otherwise; the kernels place their own
            unsafe_no_auto_barriers=True,
            reduction_scratch_bytes=0,
        ),
        **options,
    )


# Inside a `shard_map` that checks which axes values vary over, a kernel writes no ref that varies.
# What one shard does to its own memory concerns no other, so the kernel sees plain arrays.
_forget_varying_axes = Primitive("forget_varying_axes")
_forget_varying_axes.def_impl(lambda x: x)
_forget_varying_axes.def_abstract_eval(lambda x: ShapedArray(x.shape, x.dtype))
mlir.register_lowering(_forget_varying_axes, lambda context, x: [x])


def run_locally(call: Any, *arrays: Any) -> Any:
    """`call(*arrays)` of a function that writes arrays in place, inside a `shard_map` too."""
    varying = lambda x: jax.typeof(x).manual_axis_type.varying
    leaves = jax.tree.leaves(arrays)
    axes = tuple(sorted(frozenset().union(*map(varying, leaves))))
    local = lambda x: _forget_varying_axes.bind(x) if varying(x) else x
    results = call(*jax.tree.map(local, arrays))
    return lax.pcast(results, axes, to="varying") if axes else results


def allocate(parts: dict[str, Buffer | Union | Barriers]) -> dict[str, Any]:
    """The scratch of a plan as Pallas types."""
    return {name: _allocate(part) for name, part in parts.items()}


def _allocate(part: Buffer | Union | Barriers) -> Any:
    if isinstance(part, Union):
        return plgpu.RefUnion(*map(_allocate, part))
    if isinstance(part, Barriers):
        return plgpu.Barrier(num_barriers=part.num_barriers, num_arrivals=part.arrivals)
    transforms = ()
    if part.swizzle:
        width = part.swizzle // jnp.dtype(part.dtype).itemsize
        transforms = (plgpu.TilingTransform((8, width)), plgpu.SwizzleTransform(part.swizzle))
    return plgpu.SMEM(part.shape, jnp.dtype(part.dtype), transforms=transforms)


class Ring(NamedTuple):
    """Slots of shared memory that the producer fills and the consumers empty, in turn.

    Step s uses slot s % stages.  A barrier completes once per use of its slot: `full` when every
    copy has landed, `empty` when every consumer is done.
    """

    slots: Any  # (stages, ...)
    full: Any
    empty: Any
    first: int = 0  # where this ring's barriers begin, if it shares arrays of them with others

    @property
    def stages(self) -> int:
        return self.slots.shape[0]

    def slot(self, step: Any) -> Any:
        return lax.rem(step, jnp.int32(self.stages))

    def barrier(self, step: Any) -> Any:
        """The number of this step's barriers."""
        slot = self.slot(step)
        return self.first + slot if self.first else slot

    def await_empty(self, step: Any) -> None:
        """Producer: until the slot of this step may be filled."""

        @pl.when(step >= self.stages)
        def _():
            plgpu.barrier_wait(self.empty.at[self.barrier(step)])

    def await_full(self, step: Any) -> None:
        """Consumer: until the slot of this step is filled."""
        plgpu.barrier_wait(self.full.at[self.barrier(step)])

    def release(self, step: Any) -> None:
        """Consumer: no more reads of the slot of this step."""
        plgpu.barrier_arrive(self.empty.at[self.barrier(step)])

    def drain(self, steps: Any) -> None:
        """Producer, last: every completion is waited for."""
        left = jnp.minimum(steps, self.stages)

        @pl.loop(0, left)
        def _(i):
            plgpu.barrier_wait(self.empty.at[self.barrier(steps - left + i)])


def copy_tile(
    pool_ref: Any,
    ring: Ring,
    step: Any,
    *,
    keys: KeyTiles,
    table_ref: Any,
    item: Item,
    tile: Any,
    first_block: Any,
    count: Any,
) -> None:
    """Starts one TMA copy per cache block of a key tile into the slot of `step`.

    pool_ref: (blocks of all layers, rows_per_block, head_dim); `first_block` is the layer's first.
    count: blocks_per_tile as a number that the compiler does not know; it would unroll the loop,
      and that takes more registers than a producer has.
    A block that no query of the item can see is read outside the pool, which brings zeros: its
    table entry is no address.
    """
    slot, nowhere = ring.slot(step), pool_ref.shape[0]
    if keys.tiles_per_block > 1:
        block = first_block + table_ref[item.sequence, divide(tile, keys.tiles_per_block)]
        rows = pl.ds(pl.multiple_of(keys.origin(tile)[1], 8), keys.rows)
        plgpu.copy_gmem_to_smem(pool_ref.at[block, rows], ring.slots.at[slot], ring.full.at[slot])
        return

    def block_of(i):
        index = tile * keys.blocks_per_tile + i
        is_seen = (index >= item.block_start) & (index < item.block_stop)
        # read within the row, also where there is nothing to see
        entry = table_ref[item.sequence, jnp.clip(index, item.block_start, item.block_stop - 1)]
        return jnp.where(is_seen, first_block + entry, nowhere)

    def copy(i, block):
        rows = pl.ds(pl.multiple_of(i * keys.copy_rows, 8), keys.copy_rows)
        plgpu.copy_gmem_to_smem(pool_ref.at[block], ring.slots.at[slot, rows], ring.full.at[slot])
        return block_of(i + 1)  # read while the copy is on its way

    lax.fori_loop(0, count, copy, block_of(0))


def block_ids(
    keys: KeyTiles, table_ref: Any, first_block: Any, nowhere: Any, part: Any, tile: Any
) -> tuple[Any, ...]:
    """The blocks of a tile of a part of a sequence, in the pool of all layers.

    One that no query can see is `nowhere`, outside of the pool, which brings zeros: its
    table entry is no address.
    """
    # read within the row, also where there is nothing to see
    last = jnp.maximum(part.block_stop - 1, part.block_start)
    entry = lambda index: table_ref[part.sequence, jnp.clip(index, part.block_start, last)]
    if keys.tiles_per_block > 1:
        return (first_block + entry(divide(tile, keys.tiles_per_block)),)
    ids = []
    for i in range(keys.blocks_per_tile):
        index = tile * keys.blocks_per_tile + i
        is_seen = (index >= part.block_start) & (index < part.block_stop)
        ids.append(jnp.where(is_seen, first_block + entry(index), nowhere))
    return tuple(ids)


def copy_blocks(
    pool_ref: Any, ring: Ring, step: Any, keys: KeyTiles, tile: Any, ids: tuple[Any, ...]
) -> None:
    """Starts one TMA copy for each of a tile's blocks into the slot of `step`.

    pool_ref: (blocks of all layers, rows_per_block, head_dim).
    """
    slot = ring.slot(step)
    for i, block in enumerate(ids):
        source, target = pool_ref.at[block], ring.slots.at[slot]
        if keys.tiles_per_block > 1:
            source = pool_ref.at[block, pl.ds(pl.multiple_of(keys.origin(tile)[1], 8), keys.rows)]
        elif keys.copy_rows < keys.rows:
            target = ring.slots.at[slot, pl.ds(i * keys.copy_rows, keys.copy_rows)]
        plgpu.copy_gmem_to_smem(source, target, ring.full.at[slot])


def matmul(a: Any, b_ref: Any, acc: Any = None, *, is_transposed: bool, is_simulated: bool) -> Any:
    """`acc + a @ b` in float32 on the tensor core, finished on return.

    a: a ref in shared memory, or an array in registers.
    b_ref: a ref in shared memory, (n, k) if `is_transposed`, (k, n) otherwise.
    """
    if is_simulated:
        a = a if isinstance(a, jax.Array) else a[...]
        contract = ((1,), (1 if is_transposed else 0,))
        product = lax.dot_general(
            a, b_ref[...], (contract, ((), ())), preferred_element_type=jnp.float32
        )
        plgpu.commit_smem()
        return product if acc is None else acc + product
    b_ref = b_ref.transpose((1, 0)) if is_transposed else b_ref
    if acc is not None:
        return pl.run_state(lambda ref: plgpu.wgmma(ref, a, b_ref))(plgpu.ACC.init(acc))

    def multiply(acc_ref):
        plgpu.wgmma(acc_ref, a, b_ref)
        return acc_ref[...]

    return pl.run_scoped(multiply, plgpu.ACC((a.shape[0], b_ref.shape[1]), jnp.float32))
