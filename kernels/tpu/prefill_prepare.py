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

from .blocks import row_bits, words
from .plan import LANES
from .prefill_plan import PrefillPlan
from .prefill_visits import Programs, Visit


@dataclass(frozen=True)
class Preparation:
    """From raw tiles of rows to what the products take."""

    plan: PrefillPlan
    raw: tuple[Any, Any]  # (2, tile rows, head_dim): keys, values
    keys: Any  # (heads, tile keys, head_dim)
    values: Any  # (heads, value rows, tile keys)
    is_interpreted: bool

    def keys_of(self, visit: Visit, part: Any, head: int, first: int) -> None:
        """Prepares keys [first, first + LANES) of a part."""
        at = self._columns(part, first)
        self.keys[head, at] = self._rows(self.raw[0], visit, part, head, first)

    def values_of(self, visit: Visit, part: Any, head: int, first: int) -> None:
        """Prepares values [first, first + LANES) of a part."""
        at = self._columns(part, first)
        rows = self._rows(self.raw[1], visit, part, head, first)
        self.values[head, : self.plan.head_dim, at] = rows.T

    def _columns(self, part: Any, first: int) -> Any:
        return pl.ds(pl.multiple_of(part * self.plan.part_keys + first, LANES), LANES)

    def _rows(self, raw: Any, visit: Visit, part: Any, head: int, first: int) -> Any:
        """(LANES, head_dim) of one head."""
        heads, slot = self.plan.num_kv_heads, visit.slot
        if heads == 1:
            return raw[slot, self._columns(part, first)]
        word, per_token = first * heads // 2 + head // 2, heads // 2
        even, odd = (
            self._words(raw, slot, part, at, 2 * per_token) for at in (word, word + per_token)
        )
        if head % 2:
            both = (even >> 16) | (odd & jnp.uint32(0xFFFF0000))
        else:
            both = (even & jnp.uint32(0xFFFF)) | (odd << 16)
        return pltpu.bitcast(both, jnp.bfloat16)

    def _words(self, raw: Any, slot: Any, part: Any, first: int, stride: int) -> Any:
        """Every `stride`-th word of a part from the first on, LANES // 2 of them."""
        if self.is_interpreted:  # it cannot load a part of a retyped buffer
            n = self.plan.part_rows
            rows = pltpu.bitcast(raw[slot, pl.ds(pl.multiple_of(part * n, n), n)], jnp.uint32)
            return rows[first : first + LANES // 2 * stride : stride]
        n = self.plan.part_rows // 2
        rows = raw.bitcast(jnp.uint32).at[slot, pl.ds(pl.multiple_of(part * n, n), n)]
        return rows[pl.ds(first, LANES // 2, stride=stride)]

    def clear(self, programs: Programs, visit: Visit) -> None:
        """Zeros raw rows that hold no key of the sequence: NaN survives a weight of 0.

        Only parts that hold both kinds need it; parts without a key are not looked at.
        """
        plan, i = self.plan, visit.program
        first = visit.tile * plan.tile_keys
        start, stop = programs.kv_start[i] - first, programs.seq_length[i] - first

        def each(part: Any, _: None) -> None:
            low = part * plan.part_keys
            high = low + plan.part_keys
            is_mixed = ((low < start) & (start < high)) | ((low < stop) & (stop < high))

            @pl.when(is_mixed)
            def _() -> None:
                for raw in self.raw:
                    self._clear_part(raw.at[visit.slot], low, start, stop)

        lax.fori_loop(0, plan.num_parts, each, None)

    def _clear_part(self, raw: Any, low: Any, start: Any, stop: Any) -> None:
        heads = self.plan.num_kv_heads
        first = low * heads

        def each(chunk: Any, _: None) -> None:
            at = pl.multiple_of(first + chunk * LANES, LANES)
            row_start, row_stop = start * heads - at, stop * heads - at
            rows = raw[pl.ds(at, LANES)]
            bits = row_bits(rows.shape, 2, lambda row: (row >= row_start) & (row < row_stop))
            raw[pl.ds(at, LANES)] = pltpu.bitcast(words(rows) & bits, rows.dtype)

        lax.fori_loop(0, self.plan.part_rows // LANES, each, None)
