"""The campaigns by name. Each makes an `Attempt` of a case's `Random`."""

from __future__ import annotations

from collections.abc import Callable
from random import Random

from fuzz.campaigns import adapters, checkpoints, constraints, options, requests, templates, tokenizers
from fuzz.house import House
from fuzz.judge import Attempt

CAMPAIGNS: dict[str, Callable[[House, Random], Attempt]] = {
    "config": checkpoints.config,
    "generation": checkpoints.generation,
    "tokenizer": tokenizers.tokenizer,
    "sentence": tokenizers.sentence,
    "tensors": checkpoints.tensors,
    "index": checkpoints.index,
    "adapter": adapters.adapter,
    "medusa": adapters.medusa,
    "source": adapters.source,
    "merge": adapters.merge,
    "request": requests.request,
    "text": requests.text,
    "api": requests.api,
    "options": options.options,
    "template": templates.template,
    "constraint": constraints.constraint,
}
# How often a campaign has its turn: as much as there is to find.
SHARES = {"config": 5, "adapter": 4, "request": 4, "tensors": 2, "tokenizer": 2, "constraint": 2}


def make(campaign: str, seed: int, case: int, house: House) -> Attempt:
    """The attempt of a case; the same in every process."""
    return CAMPAIGNS[campaign](house, Random(f"{campaign} {seed} {case}"))


def schedule(names: list[str], cases: int) -> list[tuple[str, int]]:
    """Campaigns and numbers of cases: in turns by their shares, so that the first few hundred are of every kind."""
    turn = [name for step in range(max(SHARES.values())) for name in names if SHARES.get(name, 1) > step]
    counts = dict.fromkeys(names, 0)
    made = []
    for at in range(cases):
        name = turn[at % len(turn)]
        made.append((name, counts[name]))
        counts[name] += 1
    return made
