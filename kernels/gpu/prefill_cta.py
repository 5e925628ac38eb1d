"""What one CTA of prefill works with, and which items it has."""

from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax

from ..core.problem import Problem
from .blocks import Ring, divide, plgpu, remainder
from .plan import WARPGROUP_ROWS
from .prefill_list import Item
from .prefill_plan import CONSUMERS, PrefillPlan


class Inputs(NamedTuple):
    """Refs in device memory."""

    query: Any  # (num_tokens up to a multiple of ROW_GROUP, num_query_heads, head_dim)
    keys: Any  # (slices of the blocks of all layers, tokens, num_kv_heads, head_dim)
    values: Any
    table: Any  # int32 (batch, max_blocks_per_seq)
    items: Any  # see TileList
    num_items: Any
    layer: Any  # int32 (1,)
    slopes: Any  # float32 (num_query_heads,)


class Outputs(NamedTuple):
    """Refs in device memory."""

    out: Any  # as the query
    lse: Any  # float32 (num_query_heads, tokens of the query)


class Work(NamedTuple):
    """An item of the list, for some heads."""

    item: Item
    first_head: Any  # query head


class Cta(NamedTuple):
    """The problem, device memory and shared memory."""

    problem: Problem
    plan: PrefillPlan
    is_simulated: bool
    inputs: Inputs
    outputs: Outputs
    smem: dict[str, Any]

    @property
    def keys(self) -> Ring:
        return Ring(self.smem["key_smem"], self.smem["full"], self.smem["empty"])

    @property
    def values(self) -> Ring:
        barriers = self.smem["full"], self.smem["empty"]
        return Ring(self.smem["value_smem"], *barriers, first=self.plan.key_stages)

    def query(self, consumer: Any) -> Any:
        """A consumer's query rows."""
        return self.smem["query_smem"].at[self.held(consumer)]

    def held(self, index: Any) -> Any:
        """Where registers are few, an index that the compiler does not know: addresses made of one
        that it knows are computed before all loops, and stay in registers."""
        return lax.optimization_barrier(jnp.int32(index)) if self.plan.is_wide else index

    def query_full(self, consumer: Any) -> Any:
        return self.smem["signals"].at[consumer]

    def query_empty(self, consumer: Any) -> Any:
        return self.smem["query_empty"].at[consumer]

    def turn(self, consumer: Any) -> Any:
        """It may use the tensor core."""
        return self.smem["signals"].at[CONSUMERS + consumer]

    def meet(self, consumer: Any) -> None:
        """The consumers wait for each other."""
        place = lambda of: self.smem["signals"].at[2 * CONSUMERS + of]
        plgpu.barrier_arrive(place(CONSUMERS - 1 - consumer))
        plgpu.barrier_wait(place(consumer))

    @property
    def num_items(self) -> Any:
        """The number of this CTA's items: one of each round, in snake order, so that the longest of
        one round is followed by the shortest of the next."""
        total = self.inputs.num_items[0] * self.plan.parts
        rounds = lax.div(total, jnp.int32(self.plan.num_ctas))
        return rounds + (self._place(rounds) < total).astype(jnp.int32)

    def work(self, index: Any) -> Work:
        """Item `index` of this CTA; one without visits where there are fewer."""
        last = self.inputs.items.shape[0] * self.plan.parts - 1
        place = jnp.minimum(self._place(index), last)
        row, part = divide(place, self.plan.parts), remainder(place, self.plan.parts)
        item = Item(*(self.inputs.items[row, i] for i in range(len(Item._fields))))
        if self.problem.variant.left is None:
            item = item.without_window()
        return Work(item, part * self.plan.heads_per_item)

    def rows_of(self, consumer: Any, work: Work) -> tuple[Any, Any]:
        """A consumer's query head, and the row of the tile where its own begin."""
        if self.plan.heads_per_item == 1:
            return work.first_head, consumer * WARPGROUP_ROWS
        return work.first_head + consumer, jnp.int32(0)

    def _place(self, index: Any) -> Any:
        """Where item `index` of this CTA is among all."""
        cta, num_ctas = lax.axis_index("cta"), self.plan.num_ctas
        turned = jnp.where(remainder(index, 2) == 0, cta, num_ctas - 1 - cta)
        return index * num_ctas + turned
