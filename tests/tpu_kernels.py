"""Programs for the schedule tool whose loops can be counted by hand."""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from tools.tpu_schedule.program import Program, Run

TRIPS = 6
SMALL = 512  # rows of a product of 512 x 512; past the fill, the matrix unit is the limit
LARGE = 1536
NUMBERS = np.array([7, 1000, -13, 3, 60, 2, 5, 0], np.int32)


def product(rows):
    """TRIPS times (rows, 512) x (512, 512), in a loop that also brings in a block of a pool."""

    def kernel(trips, a, b, pool, out, block, arrived):
        def body(i, _):
            copy = pltpu.make_async_copy(pool.at[i], block, arrived)
            copy.start()
            copy.wait()
            out[...] += jnp.dot(a[...], b[...], preferred_element_type=jnp.float32)

        out[...] = jnp.zeros_like(out)
        lax.fori_loop(0, trips[0], body, None)

    whole = lambda *shape: pl.BlockSpec(shape, lambda *_: (0, 0))
    call = pl.pallas_call(
        kernel,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(1,),
            in_specs=[whole(rows, 512), whole(512, 512), pl.BlockSpec(memory_space=pltpu.HBM)],
            out_specs=whole(rows, 512),
            scratch_shapes=[pltpu.VMEM((16, 128), jnp.float32), pltpu.SemaphoreType.DMA(())],
        ),
        out_shape=jax.ShapeDtypeStruct((rows, 512), jnp.float32),
        name="product",
    )
    shape = jax.ShapeDtypeStruct
    flops = 2 * rows * 512 * 512 * TRIPS
    return Program(
        function=call,
        arguments={
            "trips": shape((1,), jnp.int32),
            "a": shape((rows, 512), jnp.bfloat16),
            "b": shape((512, 512), jnp.bfloat16),
            "pool": shape((1 << 17, 16, 128), jnp.float32),
        },
        pools=("pool",),
        run=Run({"trips": np.array([TRIPS], np.int32)}, TRIPS * 8192, flops),
    )


def small_product():
    return product(SMALL)


def large_product():
    return product(LARGE)


def trips_of(numbers):
    """What the kernel of `arithmetic` does with its numbers: the trips of each of its loops."""
    n = [int(x) for x in numbers]
    return [
        n[1] // n[0] % 11,
        (n[1] * n[4] ^ n[3]) % n[0],
        min(n[0], max(n[2], n[3])),
        lax.shift_right_logical(np.int32(n[2]), np.int32(28)).item(),
        abs(n[2] >> 1) if n[2] < n[3] else 99,
        (n[1] & 12) | 1,
    ]


def arithmetic():
    """Loops whose trips are computed from numbers; each brings in a block of its own size."""

    def kernel(n, pool, out, block, arrived):
        trips = [
            n[1] // n[0] % 11,
            (n[1] * n[4] ^ n[3]) % n[0],
            jnp.minimum(n[0], jnp.maximum(n[2], n[3])),
            lax.shift_right_logical(n[2], 28),
            jnp.where(n[2] < n[3], jnp.abs(n[2] >> 1), 99),
            (n[1] & 12) | 1,
        ]
        for index, count in enumerate(trips):
            rows = pl.ds(0, 8 * (index + 1))

            def body(i, _, rows=rows):
                copy = pltpu.make_async_copy(pool.at[i, rows], block.at[rows], arrived)
                copy.start()
                copy.wait()

            lax.fori_loop(0, count, body, None)
        out[...] = block[...]

    rows = 8 * len(trips_of(NUMBERS))
    call = pl.pallas_call(
        kernel,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(1,),
            in_specs=[pl.BlockSpec(memory_space=pltpu.HBM)],
            out_specs=pl.BlockSpec((rows, 128), lambda *_: (0, 0)),
            scratch_shapes=[pltpu.VMEM((rows, 128), jnp.float32), pltpu.SemaphoreType.DMA(())],
        ),
        out_shape=jax.ShapeDtypeStruct((rows, 128), jnp.float32),
        name="arithmetic",
    )
    shape = jax.ShapeDtypeStruct
    return Program(
        function=call,
        arguments={
            "numbers": shape(NUMBERS.shape, jnp.int32),
            "pool": shape((1 << 15, rows, 128), jnp.float32),
        },
        pools=("pool",),
        run=Run({"numbers": NUMBERS}, 1, 0),
    )
