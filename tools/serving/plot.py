"""A picture of runs over time, as a PNG; needs matplotlib."""

from pathlib import Path
from types import ModuleType

import numpy as np

from tools.serving.metrics import Record


def load() -> ModuleType:
    """matplotlib's figures, without a display.

    Raises:
      ModuleNotFoundError: it is not installed; says how to.
    """
    try:
        import matplotlib.figure as figures
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"{error}; install what --plot needs: pip install -e '.[bench]'"
        ) from error
    return figures


def save(runs: dict[str, Record], path: Path, unit: str) -> None:
    """Draws every run into each of six panels."""
    figure = load().Figure(figsize=(13, 7), layout="constrained")
    panels = list(figure.subplots(2, 3).flat)
    for name, run in runs.items():
        for panel, (title, label, x, y) in zip(panels, _curves(run, unit), strict=True):
            panel.step(x, y, where="post", label=name)
            panel.set(title=title, xlabel=label)
    for panel in panels:
        panel.set_ylim(bottom=0)
        panel.grid(alpha=0.3)
        panel.legend()
    figure.savefig(path, format="png", dpi=110)


def _curves(run: Record, unit: str):
    """(title, label of x, x, y) of each panel."""
    time, clock = run.column("time"), f"time, {unit}"
    asked, found = (run.column(name).cumsum() for name in ("asked", "found"))
    yield "tokens generated per second", clock, time, _rate(run)
    yield (
        "requests: running and waiting",
        clock,
        time,
        run.column("running") + run.column("waiting"),
    )
    yield "share of blocks in use", clock, time, run.column("used") / run.num_blocks
    yield "hit rate so far", clock, time, found / np.maximum(asked, 1)
    for title, times in (
        ("time to first token: share of requests", run.first_token_times),
        ("inter-token latency: share of tokens", run.inter_token_times),
    ):
        yield title, unit, np.sort(times), np.arange(1, len(times) + 1) / max(len(times), 1)


def _rate(run: Record, window: int = 8) -> np.ndarray:
    """Tokens generated per second of computing, over the last few steps."""
    tokens = np.cumsum(run.column("generated"))
    seconds = np.cumsum(run.column("seconds"))
    before = np.maximum(np.arange(len(tokens)) - window, -1)
    earlier = lambda sums: np.where(before >= 0, sums[before], 0)
    return (tokens - earlier(tokens)) / (seconds - earlier(seconds))
