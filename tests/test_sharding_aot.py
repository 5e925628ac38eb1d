"""Sharded ops compiled for TPUs and GPUs that are not here: who meets where, and no pool moves."""

import dataclasses
import functools

import aot_tpu
import hlo
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import paged_kv
from paged_kv.kernels.gpu import unsupported_version
from tools.gpu_compile import archs, compiler

pytestmark = pytest.mark.aot
needs_cuda = pytest.mark.skipif(
    bool(unsupported_version() or compiler.missing()),
    reason=f"{unsupported_version() or compiler.missing()}",
)

AUTO, EXPLICIT = AxisType.Auto, AxisType.Explicit
NUM_HEADS, KV_HEADS, HEAD_DIM, BLOCK_SIZE, NUM_BLOCKS, BATCH = 32, 8, 128, 64, 1 << 14, 8
NUM_TOKENS = 384  # of a packed step, all ranks together


@dataclasses.dataclass(frozen=True)
class Case:
    """An op over a mesh, `axes` from name to size."""

    target: str  # v5e and v6e: four chips; H100: eight
    axes: tuple[tuple[str, int], ...]
    kind: AxisType = AUTO
    is_packed: bool = False
    op: str = "append_and_attend"

    def __str__(self):
        axes = "-".join(f"{name}{size}" for name, size in self.axes)
        step = "packed" if self.is_packed else "decode"
        return f"{self.target}-{axes}-{self.kind.name}-{step}-{self.op}"

    def ranks(self, name):
        return dict(self.axes).get(name, 1)

    @functools.cached_property
    def mesh(self):
        names, shape = zip(*self.axes, strict=True)
        if self.target == "H100":
            devices = archs.devices("H100", 8)
        else:
            topology = aot_tpu.TOPOLOGIES[self.target]
            devices = topologies.get_topology_desc(topology, platform="tpu").devices
        return Mesh(np.array(devices).reshape(shape), names, axis_types=(self.kind,) * len(names))

    @property
    def names(self):
        return {name: name for name, _ in self.axes}

    def array(self, shape, dtype, *spec):
        spec = P(*(name if name in self.names else None for name in spec))
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(self.mesh, spec))

    @property
    def cache(self):
        cache = jax.eval_shape(
            lambda: paged_kv.init_paged_kv_cache(
                num_blocks=NUM_BLOCKS, block_size=BLOCK_SIZE, num_kv_heads=KV_HEADS,
                head_dim=HEAD_DIM, batch_size=BATCH, max_blocks_per_seq=64, dtype=jnp.bfloat16,
                num_layers=2,
            )
        )  # fmt: skip
        specs = paged_kv.cache_partition_specs(cache, **self.names)
        return jax.tree.map(lambda x, spec: self.array(x.shape, x.dtype, *spec), cache, specs)

    @property
    def num_tokens(self):
        return NUM_TOKENS if self.is_packed else BATCH

    @property
    def tokens(self):
        """query, keys, values, query_start_loc."""
        of = lambda heads: (self.num_tokens, heads, HEAD_DIM)
        query, new = (
            self.array(of(heads), jnp.bfloat16, "data", "tensor") for heads in (NUM_HEADS, KV_HEADS)
        )
        if not self.is_packed:
            return query, new, new, None
        shape = (self.ranks("data"), BATCH // self.ranks("data") + 1)
        shape = shape if "data" in self.names else shape[1:]
        return query, new, new, self.array(shape, jnp.int32, "data")

    def run(self, cache, query, keys, values, starts):
        same = {"query_start_loc": starts, "layer": 1, **self.names}
        if self.op == "append":
            return paged_kv.sharded_append_tokens(self.mesh, cache, keys, values, **same)
        if self.op == "attend":
            return paged_kv.sharded_paged_attention(self.mesh, query, cache, **same)
        return paged_kv.sharded_append_and_attend(self.mesh, query, keys, values, cache, **same)

    @property
    def merged(self):
        """The collectives there must be: the largest lse, then outputs and weights, summed."""
        if "context" not in self.names or self.op == "append":
            return []
        rows = self.num_tokens // self.ranks("data") * (NUM_HEADS // self.ranks("tensor"))
        return [("all-reduce", rows), ("all-reduce", rows * (HEAD_DIM + 1))]


def kernels_and_program(case):
    donated = () if case.op == "attend" else (0,)
    call, arguments = jax.jit(case.run, donate_argnums=donated), (case.cache, *case.tokens)
    if case.target == "H100":
        report = compiler.compile_for("H100", call, *arguments)
        return {kernel.kernel for kernel in report.kernels}, report.compiled
    compiled = call.lower(*arguments).compile()
    return aot_tpu.kernels_of(compiled), compiled


def assert_pools_stay(case):
    """Devices meet in what `merged` says, each works by kernels, and no pool is copied.

    Returns the names of the kernels.
    """
    kernels, compiled = kernels_and_program(case)
    assert hlo.collectives(compiled) == case.merged
    assert kernels and all(name.startswith("paged_") for name in kernels)
    pool_of_a_device = NUM_BLOCKS * BLOCK_SIZE * KV_HEADS * HEAD_DIM // case.mesh.size
    if case.op == "attend":
        assert hlo.large_copies(compiled, pool_of_a_device) == []
    else:
        hlo.assert_updated_in_place(compiled, pool_of_a_device)
    temporaries = compiled.memory_analysis().temp_size_in_bytes
    assert temporaries < pool_of_a_device, temporaries  # half of one, in bytes: no room for a copy
    return kernels


DATA_TENSOR, CONTEXT = (("data", 2), ("tensor", 2)), (("context", 4),)
ALL_THREE = (("data", 2), ("tensor", 2), ("context", 2))
FOUR_HEADS_EACH = (("data", 4), ("tensor", 2))


@pytest.mark.parametrize(
    "case",
    [
        Case("v5e", DATA_TENSOR, EXPLICIT, is_packed=True),
        Case("v6e", CONTEXT),
        pytest.param(Case("H100", ALL_THREE, EXPLICIT), marks=needs_cuda),
        pytest.param(Case("H100", FOUR_HEADS_EACH, is_packed=True), marks=needs_cuda),
    ],
    ids=str,
)
def test_no_pool_moves(case):
    kernels = assert_pools_stay(case)
    if case.target == "H100" and case.is_packed:  # the kernels that one device would take
        assert kernels >= {"paged_prefill", "paged_decode"}


FOUR = [
    (("tensor", 4),), (("data", 4),), CONTEXT, DATA_TENSOR,
    (("data", 2), ("context", 2)), (("tensor", 2), ("context", 2)),
]  # fmt: skip
EIGHT = [
    (("tensor", 8),), (("data", 8),), (("context", 8),), (("data", 2), ("tensor", 4)),
    (("data", 2), ("context", 4)), (("tensor", 2), ("context", 4)), ALL_THREE,
]  # fmt: skip
OPS = ("append", "attend", "append_and_attend")


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("is_packed", [False, True], ids=["decode", "packed"])
@pytest.mark.parametrize("kind", [AUTO, EXPLICIT], ids=["auto", "explicit"])
@pytest.mark.parametrize(
    ("target", "axes"),
    [
        *((target, axes) for target in ("v5e", "v6e") for axes in FOUR),
        *(pytest.param("H100", axes, marks=needs_cuda) for axes in EIGHT),
    ],
)
def test_no_pool_moves_over_any_axes(target, axes, kind, is_packed):
    for op in OPS:
        assert_pools_stay(Case(target, axes, kind, is_packed, op))
