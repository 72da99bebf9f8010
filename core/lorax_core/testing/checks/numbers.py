"""The numbers are those of the reference: hidden rows, and what each head makes of them.

Decides what is compared with what, task by task. Knows nothing of batches of several inputs: each runs alone.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from lorax_core.modeling.config import Problem
from lorax_core.modeling.heads import EmbeddingHead
from lorax_core.plugins.spec import ArchitectureSpec
from lorax_core.testing.case import Case
from lorax_core.testing.check import Check
from lorax_core.testing.compare import Worst
from lorax_core.testing.packed import PackedAnswer
from lorax_core.testing.reference import Expected
from lorax_core.testing.result import CheckFailed, Measured, NotApplicable
from lorax_core.types import Pooling, Task


def _hidden(case: Case) -> Measured:
    worst = Worst(case.tolerance)
    for tokens, ours, theirs in zip(case.inputs, case.alone(case.main), case.expected(case.main), strict=True):
        worst.see("hidden rows", f"of an input of {len(tokens)} tokens", ours.hidden, theirs.hidden)
    return worst.measured()


def _head(case: Case, task: Task) -> Measured:
    if task not in case.tasks:
        raise NotApplicable(f"this variant has nothing to compare for {str(task)!r}")
    base = case.loaded(task)
    if task not in base.model.tasks:
        raise CheckFailed(
            f"{case.cases.references[task]} saves a checkpoint in which no head for {str(task)!r} is found; "
            f"found are heads for {', '.join(base.model.tasks)}"
        )
    if task is Task.EMBED:
        return _embeddings(case)
    worst = Worst(case.tolerance)
    # It decides softmax, sigmoid or neither, as transformers' problem_type does for its loss.
    problem = base.model.config.problem
    for tokens, ours, theirs in zip(case.inputs, case.alone(task), case.expected(task), strict=True):
        see_head(worst, task, f"of an input of {len(tokens)} tokens", ours, theirs, problem)
    return worst.measured()


def see_head(worst: Worst, task: Task, where: str, ours: PackedAnswer, theirs: Expected, problem: Problem) -> None:
    """Both what the head computes and what it answers: probabilities near 0 or 1 hide differences of logits."""
    if theirs.logits is None:
        raise CheckFailed(f"the reference for {str(task)!r} has no head: it gives no logits")
    if task is Task.GENERATE:
        worst.see("logits", where, ours.answers[task], theirs.logits)
        return
    # [tokens, labels] of tokens, [labels] of a whole input
    answer = theirs.logits.softmax(-1)
    if task is Task.SEQUENCE_CLASSIFICATION and problem is not Problem.SINGLE_LABEL:
        answer = theirs.logits.sigmoid() if problem is Problem.MULTI_LABEL else theirs.logits
    worst.see("answers", where, ours.answers[task], answer)
    worst.see("logits", where, ours.parts[task], theirs.logits)


def _embeddings(case: Case) -> Measured:
    """Each way of pooling, over rows that the reference pools by itself."""
    base = case.loaded(Task.EMBED)
    head = base.model.head(Task.EMBED)
    if not isinstance(head, EmbeddingHead):
        raise NotApplicable(f"{type(head).__name__} has its own way to a vector, which the kit does not know")
    bench, worst, usual = case.bench(base), Worst(case.tolerance), head.pooling
    try:
        for pooling in Pooling:
            head.pooling = pooling
            answers = bench.whole(case.inputs)
            for tokens, ours, theirs in zip(case.inputs, answers, case.expected(Task.EMBED), strict=True):
                where = f"of an input of {len(tokens)} tokens"
                worst.see(f"{pooling} vectors", where, ours.answers[Task.EMBED], _pooled(theirs.hidden, pooling))
    finally:
        # The model is shared with the checks that follow.
        head.pooling = usual
    return worst.measured()


def _pooled(hidden: Tensor, pooling: Pooling) -> Tensor:
    match pooling:
        case Pooling.CLS:
            # hidden is [tokens, hidden], of one input without padding, so the last row is the last token
            return hidden[0]
        case Pooling.LAST:
            return hidden[-1]
        case Pooling.MEAN:
            # The reference's own rounding must not count.
            return hidden.to(torch.float64).mean(0).float()


def _has(spec: ArchitectureSpec, task: Task) -> str | None:
    return None if task in spec.tasks else f"the architecture does not support {str(task)!r}"


CHECKS = (
    Check("numbers-hidden", "hidden rows are those of the reference", _hidden),
    *(
        Check(
            f"numbers-{task}",
            f"answers to {task} are those of the reference",
            partial(_head, task=task),
            partial(_has, task=task),
            sized=task is Task.GENERATE,
        )
        for task in Task
    ),
)
