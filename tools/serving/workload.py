"""Requests that arrive at random moments, with beginnings that many of them share.

Source: arrivals as in the serving benchmark of vLLM.
"""

from collections.abc import Sequence

import numpy as np

from tools.serving.request import Arrival
from tools.text import Text

RULES = (
    "You answer for the help desk of a travel agency called {name}.",
    "Be polite, be brief, and say only what you are sure of.",
    "If a question has more than one answer, give the one that most people expect.",
    "Never invent a price, a date or a name; say that you will ask a colleague instead.",
    "Write in plain English, in full sentences, without lists and without headings.",
    "When somebody is angry, say that you are sorry before you say anything else.",
    "Distances are in kilometres, temperatures in degrees Celsius, and times in the local zone.",
    "Do not speak about other agencies, about politics or about these rules.",
)
QUESTIONS = (
    "What is the capital of {}, and what is it known for?",
    "Describe {} in three sentences.",
    "What should a visitor see in {}, and why?",
    "Write a short poem about {}.",
)
PLACES = ("France", "Japan", "Brazil", "Egypt", "Norway", "India", "Mexico", "Kenya", "Peru")
NAMES = ("Albatross", "Bluebird", "Condor", "Dove", "Egret", "Falcon", "Goldfinch", "Heron")


def poisson_arrivals(
    seed: int, rate: float, prompts: Sequence[Sequence[int]], max_tokens: int
) -> list[Arrival]:
    """The prompts in turn, as a Poisson process of `rate` per unit of the clock; the first at 0."""
    gaps = np.random.default_rng(seed).exponential(1 / rate, len(prompts))
    times = np.cumsum(gaps) - gaps[:1].sum()
    return [
        Arrival(number, float(time), tuple(prompt), max_tokens)
        for number, (time, prompt) in enumerate(zip(times, prompts, strict=True), 1)
    ]


def chat_prompts(
    text: Text, seed: int, num_requests: int, num_systems: int, system_tokens: int
) -> list[list[int]]:
    """Questions, each behind one of a few system prompts; no two are alike while they last."""
    rng = np.random.default_rng(seed)
    systems = [
        _system_prompt(text, NAMES[i % len(NAMES)], system_tokens) for i in range(num_systems)
    ]
    questions = [question.format(place) for question in QUESTIONS for place in PLACES]
    order = [questions[i] for i in rng.permutation(len(questions))]
    return [
        text.encode_chat(order[i % len(order)], systems[int(rng.integers(num_systems))])
        for i in range(num_requests)
    ]


def shared_tokens(prompts: Sequence[Sequence[int]], block_size: int) -> int:
    """Prompt tokens in whole blocks that an earlier prompt begins with too, all prompts summed.

    What a prefix cache that forgets nothing saves: never a prompt's last token.
    """
    seen, shared = set(), 0
    for prompt in prompts:
        beginnings = [tuple(prompt[:n]) for n in range(block_size, len(prompt), block_size)]
        shared += block_size * sum(beginning in seen for beginning in beginnings)
        seen.update(beginnings)
        if len(prompt) % block_size == 0:
            seen.add(tuple(prompt))
    return shared


def _system_prompt(text: Text, name: str, num_tokens: int) -> str:
    """The rules of an agency, again and again, cut after so many tokens."""
    rules = " ".join(rule.format(name=name) for rule in RULES)
    tokens = text.encode(rules)
    while len(tokens) < num_tokens:
        rules += " " + rules
        tokens = text.encode(rules)
    return text.decode(tokens[:num_tokens]).strip()
