"""The work beside a visit of the prefill kernel, share by share, for the two visits that follow.

Keys and values of the next visit are made ready, keys a share ahead, and the copies of the one
after it are started.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax

from .plan import LANES
from .prefill_program import Kernel
from .prefill_visits import Visit, following

Chore = Callable[[], None]
BLOCKS_AT_ONCE = 2  # whose copies are started one after the other


class Beside(NamedTuple):
    """The work beside a visit, share by share, for the two visits that follow."""

    kernel: Kernel
    second: Visit
    third: Visit

    def wait(self, share: Any) -> None:
        self.kernel.preparation.arrived(*self._shares(share))

    def chores(self, share: Any) -> list[Chore]:
        """Makes keys and values ready and starts copies, the share having been waited for."""
        return _mixed(self.preparing(share), copying(self.kernel, self.third, share))

    def preparing(self, share: Any) -> list[Chore]:
        shares = self._shares(share)
        return [chore for share in shares for chore in making(self.kernel, *share)]

    def do(self, start: Any) -> None:
        """The shares from `start` on, beside nothing."""

        def each(share: Any, _: None) -> None:
            self.wait(share)
            do_all(self.chores(share))

        lax.fori_loop(start, self.kernel.plan.num_shares, each, None)

    def _shares(self, share: Any) -> list[tuple[int, Visit, Any]]:
        """What is made ready together: values (1) of a share, keys (0) of the one after it."""
        plan, second, third = self.kernel.plan, self.second, self.third
        if not plan.key_lead:
            return [(1, second, share), (0, second, share)]
        is_last = share + 1 == plan.num_shares
        visit = Visit(*(jnp.where(is_last, a, b) for a, b in zip(third, second, strict=True)))
        return [(1, second, share), (0, visit, jnp.where(is_last, 0, share + 1))]


def beside_of(kernel: Kernel, visit: Visit) -> Beside:
    second = following(kernel.programs, visit)
    return Beside(kernel, second, following(kernel.programs, second))


def do_all(chores: Sequence[Chore]) -> None:
    for action in chores:
        action()


def making(kernel: Kernel, kind: int, visit: Visit, share: Any) -> list[Chore]:
    """Makes a share's keys (0) or values (1) ready, once their rows are there."""
    ready = kernel.preparation
    make = ready.values_of if kind else ready.keys_of
    keys = range(0, kernel.plan.share_keys, LANES)
    return [
        partial(make, visit, share, pair, first) for first in keys for pair in range(ready.pairs)
    ]


def copying(kernel: Kernel, visit: Visit, share: Any) -> list[Chore]:
    """Starts the copies of a share's blocks, a few at a time."""
    blocks = range(kernel.plan.share_blocks)

    def some(first: int) -> None:
        for block in blocks[first : first + BLOCKS_AT_ONCE]:
            kernel.copies.start(visit, share, block)

    return [partial(some, first) for first in blocks[::BLOCKS_AT_ONCE]]


def _mixed(some: list[Chore], others: list[Chore]) -> list[Chore]:
    """Both lists in order, evenly mixed: what is done in the same memory keeps that order."""
    placed = [((i + 0.5) / len(x), chore) for x in (some, others) for i, chore in enumerate(x)]
    return [chore for _, chore in sorted(placed, key=lambda pair: pair[0])]
