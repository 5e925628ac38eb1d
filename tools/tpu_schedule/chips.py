"""The chips a schedule can be made for, as one TensorCore of each.

Bandwidth is the published one (v4 and v5p: half of their chip's).  Flops per cycle are those of
bfloat16 products; they are what the slope of a large product's cycles over its rows says, and the
clock is the published peak over them.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Chip:
    """One TensorCore.

    branch_delay: bundles after a branch that run before it is taken.
    granule: bytes of the unit that copies are counted in.
    """

    clock_ghz: float
    hbm_gbps: float
    flops_per_cycle: int
    branch_delay: int = 4
    granule: int = 32

    def hbm_cycles(self, num_bytes: float) -> float:
        """Cycles that memory needs for so many bytes."""
        return num_bytes * self.clock_ghz / self.hbm_gbps


CHIPS = {
    "v4": Chip(1.05, 614, 131072, branch_delay=1, granule=512),
    "v5e": Chip(1.50, 819, 131072),
    "v5p": Chip(1.75, 1382, 131072),
    "v6e": Chip(1.75, 1638, 524288),
    "tpu7x": Chip(2.20, 3686, 524288, branch_delay=6),
}
TOPOLOGIES = ("v4:2x2x1", "v5e:2x2", "v5p:2x2x1", "v6e:2x2", "tpu7x:2x2x1")


def chip_of(topology: str) -> Chip:
    """The chip of a topology such as `v5e:2x2`."""
    name = topology.partition(":")[0]
    if name not in CHIPS:
        raise ValueError(f"no chip {name!r} in {topology=}; there are {', '.join(TOPOLOGIES)}")
    return CHIPS[name]
