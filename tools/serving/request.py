"""A request: what was asked, what was answered, and how much of it the cache holds."""

import dataclasses
from collections.abc import Sequence

import paged_kv


class RequestError(ValueError):
    """A request that could never run to its end."""


@dataclasses.dataclass(frozen=True)
class Arrival:
    """What a client sends, and when, in the unit of the engine's clock."""

    number: int
    time: float
    prompt: Sequence[int]
    max_tokens: int


@dataclasses.dataclass(eq=False)
class Request:
    """An arrival on its way through the engine.

    It always has `remaining` tokens to compute: many at first, one at decode, and many again where
    preemption dropped what it had.  Once they are computed, the next token can be sampled.
    """

    arrival: Arrival
    tokens: list[int]  # the prompt, then what was generated
    cached: int = 0  # tokens in the cache
    furthest: int = 0  # tokens that were ever in the cache: those below are computed again
    host_blocks: paged_kv.HostBlocks | None = None  # where they are, while it is swapped out
    token_times: list[float] = dataclasses.field(default_factory=list)  # when each was generated

    @classmethod
    def of(cls, arrival: Arrival) -> "Request":
        return cls(arrival, list(arrival.prompt))

    @property
    def number(self) -> int:
        return self.arrival.number

    @property
    def remaining(self) -> int:
        """Tokens to compute before the next can be sampled."""
        return len(self.tokens) - self.cached

    @property
    def generated(self) -> list[int]:
        return self.tokens[len(self.arrival.prompt) :]

    @property
    def max_cached(self) -> int:
        """Tokens in the cache at its end: the last one generated is never cached."""
        return len(self.arrival.prompt) + self.arrival.max_tokens - 1
