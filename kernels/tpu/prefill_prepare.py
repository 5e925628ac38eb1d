"""Raw tiles made ready: rows (token, kv head) to keys by head and to transposed values by head.

Two heads of one token share a word.  The words of even and of odd tokens are loaded with a stride,
and the halves of one head put together, as in JAX's ragged paged attention for TPU.
"""

from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from .blocks import row_bits, rows_of, words
from .plan import LANES
from .prefill_plan import PrefillPlan
from .prefill_visits import Programs, Visit, VisitCopies


@dataclass(frozen=True)
class Preparation:
    """From raw tiles of rows to what the products take."""

    plan: PrefillPlan
    programs: Programs
    copies: VisitCopies
    tiles: tuple[Any, Any]  # words, (slots, parts, heads, ...): keys, values
    is_interpreted: bool

    @property
    def pairs(self) -> int:
        """Pairs of heads that share words."""
        return max(self.plan.num_kv_heads // 2, 1)

    def arrived(self, *shares: tuple[int, Visit, Any]) -> None:
        """Waits for the raw rows of shares: keys (0) or values (1), a visit, and its share.

        Then zeros rows that hold no key of the sequence: NaN survives a weight of 0.
        """
        is_mixed = jnp.bool(False)
        for share in shares:
            self.copies.wait(*share)
            start, stop = self._valid(*share[1:])
            is_mixed |= (start > 0) | (stop < self.plan.share_keys)

        @pl.when(is_mixed)
        def _() -> None:
            for share in shares:
                self._clear(*share)

    def keys_of(self, visit: Visit, share: Any, pair: int, first: int) -> None:
        """Prepares keys [first, first + LANES) of a share."""
        key = share * self.plan.share_keys + first
        part, at = lax.div(key, self.plan.part_keys), lax.rem(key, self.plan.part_keys)
        at = pl.ds(pl.multiple_of(lax.div(at, 2), LANES // 2), LANES // 2)
        for head, rows in enumerate(self._rows(0, visit, share, pair, first), 2 * pair):
            self.tiles[0][visit.key_slot, part, head, at] = rows

    def values_of(self, visit: Visit, share: Any, pair: int, first: int) -> None:
        """Prepares values [first, first + LANES) of a share."""
        at = lax.div(share * self.plan.share_keys + first, LANES)
        n = self.plan.head_dim // 2
        for head, rows in enumerate(self._rows(1, visit, share, pair, first), 2 * pair):
            self.tiles[1][visit.slot, at, head, :n] = words(rows_of(rows).T)

    def _rows(self, kind: int, visit: Visit, share: Any, pair: int, first: int) -> list[Any]:
        """(LANES, head_dim) of each head of a pair, as words."""
        raw, heads, slot = self.copies.raw[kind], self.plan.num_kv_heads, visit.slot
        if heads == 1:
            n = self.plan.share_keys
            return [words(raw[slot, pl.ds(pl.multiple_of(share * n + first, LANES), LANES)])]
        word, per_token = first * heads // 2 + pair, heads // 2
        even, odd = (
            self._words(raw, slot, share, at, 2 * per_token) for at in (word, word + per_token)
        )
        return [
            (even & 0xFFFF) | (odd << 16),
            lax.shift_right_logical(even, 16) | (odd & -0x10000),
        ]

    def _words(self, raw: Any, slot: Any, share: Any, first: int, stride: int) -> Any:
        """Every `stride`-th word of a share from the first on, LANES // 2 of them."""
        if self.is_interpreted:  # it cannot load a part of a retyped buffer
            n = self.plan.share_rows
            rows = pltpu.bitcast(raw[slot, pl.ds(pl.multiple_of(share * n, n), n)], jnp.int32)
            return rows[first : first + LANES // 2 * stride : stride]
        n = self.plan.share_rows // 2
        rows = raw.bitcast(jnp.int32).at[slot, pl.ds(pl.multiple_of(share * n, n), n)]
        return rows[pl.ds(first, LANES // 2, stride=stride)]

    def _valid(self, visit: Visit, share: Any) -> tuple[Any, Any]:
        """Keys [start, stop) of a share are of the sequence, and some query sees them."""
        first = visit.tile * self.plan.tile_keys + share * self.plan.share_keys
        i = visit.program
        return self.programs.kv_start[i] - first, self.programs.seq_length[i] - first

    def _clear(self, kind: int, visit: Visit, share: Any) -> None:
        plan = self.plan
        raw, heads = self.copies.raw[kind].at[visit.slot], plan.num_kv_heads
        start, stop = self._valid(visit, share)

        def each(chunk: Any, _: None) -> None:
            row = chunk * LANES
            at = pl.ds(pl.multiple_of(share * plan.share_rows + row, LANES), LANES)
            row_start, row_stop = start * heads - row, stop * heads - row
            rows = raw[at]
            bits = row_bits(rows.shape, 2, lambda row: (row >= row_start) & (row < row_stop))
            raw[at] = pltpu.bitcast(words(rows) & bits, rows.dtype)

        lax.fori_loop(0, plan.share_rows // LANES, each, None)
