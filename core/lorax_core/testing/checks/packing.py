"""The result of a sequence does not depend on the other sequences in its batch.

Decides which batches must agree. Compares the model with itself; `numbers` compares it with the reference.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

import torch

from lorax_core.testing.case import Case
from lorax_core.testing.check import Check
from lorax_core.testing.compare import Worst
from lorax_core.testing.inputs import Input
from lorax_core.testing.packed import PackedAnswer, Share
from lorax_core.testing.result import CheckFailed, Measured


def see_answers(worst: Worst, where: str, ours: PackedAnswer, theirs: PackedAnswer) -> None:
    """Compare two ways to the same answers: hidden rows, and the parts and answers of each head."""
    worst.see("hidden rows", where, ours.hidden, theirs.hidden)
    for task, answer in theirs.answers.items():
        worst.see(f"answers to {task}", where, ours.answers[task], answer)
        worst.see(f"numbers behind {task}", where, ours.parts[task], theirs.parts[task])


def _together(case: Case) -> Measured:
    worst = Worst(case.tolerance)
    for task in case.chosen:
        bench = case.bench(case.loaded(task))
        _see_all(worst, "in one batch", case.inputs, bench.whole(case.inputs), case.alone(task))
    return worst.measured()


def _order(case: Case) -> Measured:
    worst = Worst(case.tolerance)
    bench = case.bench(case.loaded(case.main))
    # Seeded: an order that fails must fail again.
    for seed in range(2):
        order = random.Random(seed).sample(range(len(case.inputs)), len(case.inputs))
        inputs = [case.inputs[at] for at in order]
        alone = [case.alone(case.main)[at] for at in order]
        lengths = ", ".join(str(len(tokens)) for tokens in inputs)
        _see_all(worst, f"in the order {lengths}", inputs, bench.whole(inputs), alone)
    return worst.measured()


def _see_all(
    worst: Worst, how: str, inputs: Sequence[Input], ours: Sequence[PackedAnswer], theirs: Sequence[PackedAnswer]
) -> None:
    for tokens, one, other in zip(inputs, ours, theirs, strict=True):
        see_answers(worst, f"of an input of {len(tokens)} tokens {how}", one, other)


def _repeat(case: Case) -> Measured:
    worst = Worst(case.tolerance)
    bench = case.bench(case.loaded(case.main))
    pages = bench.give_pages(case.inputs)
    shares = [Share(tokens, 0, len(tokens), given) for tokens, given in zip(case.inputs, pages, strict=True)]
    batch = bench.batch(shares)
    fields = ("input_ids", "position_ids", "token_type_ids", "slots")
    # A model that writes into its inputs may still give the right numbers the first time.
    before = {name: value.clone() for name in fields if (value := getattr(batch, name)) is not None}
    first = bench.run(batch)
    # The same batch: its keys and values are written to the same slots once more.
    second = bench.run(batch)
    for tokens, one, other in zip(case.inputs, second, first, strict=True):
        worst.see("hidden rows", f"of an input of {len(tokens)} tokens, the second time", one.hidden, other.hidden)
    changed = [name for name, value in before.items() if not torch.equal(getattr(batch, name), value)]
    measured = worst.measured(f"the model changed the batch's {', '.join(changed)} in place" if changed else "")
    if changed and measured.ok:
        raise CheckFailed(measured.note)
    return measured


CHECKS = (
    Check("packing-together", "an input gets the same alone and in a batch with others", _together),
    Check("packing-order", "the order of a batch does not matter", _order),
    Check("packing-repeat", "a forward pass is pure: the same batch twice gives the same", _repeat),
)
