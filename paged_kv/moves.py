"""Which block goes where when a pool is defragmented."""

from collections.abc import Sequence


def plan_moves(order: Sequence[int], max_moves: int | None = None) -> dict[int, int]:
    """New ids for the blocks of `order`, so that they are 0, 1, 2 ... as far as the moves go.

    A block in the way changes places with the one that comes.  Every change is complete, so the
    plan may end after any of them: at `max_moves` moves, or one more.

    Returns:
      {block: new id}, for the blocks whose id changes.
    """
    used = set(order)
    new_id: dict[int, int] = {}  # block -> where it is
    found: dict[int, int] = {}  # place -> the block that is there
    for target, block in enumerate(order):
        if max_moves is not None and len(new_id) >= max_moves:
            break
        place = new_id.get(block, block)
        if place == target:
            continue
        other = found.get(target, target)
        found[target], found[place] = block, other
        new_id[block] = target
        if other in used:
            new_id[other] = place
    return {block: place for block, place in new_id.items() if block != place}
