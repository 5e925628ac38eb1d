"""Compiles what comes next while the device works on what is there.

Only shapes go in: nothing runs on the device meanwhile, so no timing is disturbed.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import jax

from benchmarks.inputs import make_inputs
from benchmarks.runner import Program, Steps, truth_of
from benchmarks.workload import Case


def ahead(
    items: Iterable[Any], make: Callable[[Any], Any], jobs: int
) -> Iterator[tuple[Any, Callable[[], Any]]]:
    """Each item, and a call that waits for what was made of it or raises what that raised.

    `jobs` of them are made at once, and no more than twice that lie ready.
    """
    if jobs < 1:
        yield from ((item, partial(make, item)) for item in items)
        return
    waiting: deque = deque()
    source = iter(items)
    with ThreadPoolExecutor(jobs) as pool:

        def submit() -> None:
            for item in source:
                waiting.append((item, pool.submit(make, item)))
                return

        for _ in range(2 * jobs):
            submit()
        try:
            while waiting:
                item, future = waiting.popleft()
                submit()
                yield item, future.result
        finally:
            for _, future in waiting:
                future.cancel()


def compile_case(
    case: Case, implementation: str, interpret: bool | None, rotate_bytes: int
) -> tuple[Steps, Steps]:
    """The programs of an implementation, and of what it is measured by."""
    shapes = jax.eval_shape(partial(make_inputs, case, rotate_bytes=rotate_bytes))
    programs = (
        Program(case, implementation, interpret),
        Program(case, truth_of(implementation)),
    )
    made, truth = (program.steps.compiled(shapes) for program in programs)
    return made, truth
