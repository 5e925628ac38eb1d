"""A decode call whose items fit one step: nothing comes before or after to hide behind."""

from functools import partial

from jax import lax

from .decode_append import KEYS, VALUES
from .decode_copies import Paced, clear_pads
from .pipeline import ScoreStage, SoftmaxStage, Step, ValueStage
from .worklist import Item


def run(step: Step, items: list[Item]) -> None:
    """All of a call."""
    copies, slot = step.copies, 0
    clear_pads(step.plan, (copies.keys, copies.values))
    for stream in (copies.keys, copies.values):
        copies.start_slices(slot, stream, items)
    copies.wait_slices(slot)
    is_whole = copies.work.are_whole(items)
    lax.cond(is_whole, partial(_once_full, step, items), partial(_once_cut, step, items))


def _once_full(step: Step, items: list[Item]) -> None:
    """Nothing but full tiles: one block of code.  Values are fetched beside the first scores."""
    copies, slot = step.copies, 0
    keys, values = (
        copies.listed(slot, stream, items, slot, 1) for stream in (copies.keys, copies.values)
    )
    some = len(values) // 4  # so that memory has work while the others are started
    for start in keys + values[:some]:
        start()
    copies.wait_whole(copies.keys, slot)
    step.new.put(KEYS, items, copies.keys.buffers[slot])
    pace = Paced(values[some:], len(step.plan.chunks), 0.25)
    _score_and_weigh(step, items, pace)
    copies.wait_whole(copies.values, slot)
    step.new.put(VALUES, items, copies.values.buffers[slot])
    _take(step, items)
    step.new.wait(items, items)


def _once_cut(step: Step, items: list[Item]) -> None:
    copies, slot = step.copies, 0
    for stream in (copies.keys, copies.values):
        copies.start(slot, stream, items, slot)
    copies.wait(copies.keys, items, slot)
    step.new.put(KEYS, items, copies.keys.buffers[slot])
    _score_and_weigh(step, items, None)
    copies.wait(copies.values, items, slot)
    step.new.put(VALUES, items, copies.values.buffers[slot])
    copies.clear(items, slot)
    _take(step, items)
    step.new.wait(items, items)


def _score_and_weigh(step: Step, items: list[Item], values: Paced | None) -> None:
    filling = None if values is None else step.copies.values.buffers[0]
    score = ScoreStage(step, 0, items, are_full=values is not None, filling=filling)
    for i, chunk in enumerate(step.plan.chunks):
        score.chunk(*chunk)
        if values is not None:
            values.after(i)
    weigh = SoftmaxStage(step, 0, items)
    for chunk in step.plan.chunks:
        weigh.chunk(*chunk, None)


def _take(step: Step, items: list[Item]) -> None:
    take = ValueStage(step, 0, items, None)
    for chunk in step.plan.chunks:
        take.chunk(*chunk)
