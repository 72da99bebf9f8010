"""A configuration means what it means to the reference, however much of it a `config.json` leaves out or spells otherwise.

Decides which files are tried. Checkpoints that the reference saves state every key, so nothing else would read a default.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

from pydantic import BaseModel

from lorax_core.errors import LoraxError, listed
from lorax_core.modeling.config import ModelConfig
from lorax_core.plugins.resolve import load_class
from lorax_core.testing import reference
from lorax_core.testing.case import BASE, Case
from lorax_core.testing.check import Check
from lorax_core.testing.checks.numbers import see_head
from lorax_core.testing.compare import Worst
from lorax_core.testing.result import CheckFailed, Measured
from lorax_core.testing.spelling import Spellings
from lorax_core.types import Task


def _defaults(case: Case) -> Measured:
    ours, worst = _config_class(case), Worst(case.tolerance)
    removed = 0
    for task in case.chosen:
        spellings = _spellings(case, task)
        for key, config in spellings.without_one():
            _compare(ours, spellings, config, f"without {key!r}", absent=(key,))
        if case.variant == BASE and task is case.main:
            _compare_defaults(ours, spellings)
        shortest = spellings.shortest()
        gone = [key for key in spellings.full if key not in shortest]
        _see_loaded(case, worst, task, shortest, f"without {listed(gone, limit=40)}")
        removed += len(gone)
    return worst.measured(f"{removed} keys removed")


def _spelt(case: Case) -> Measured:
    ours, worst, count = _config_class(case), Worst(case.tolerance), 0
    for task in case.chosen:
        spellings = _spellings(case, task)
        stated = {key: spellings.full[key] for key in ("model_type", "architectures")}
        own = {**stated, **reference.fields(task, case.config)}
        for config, how in ((own, "as the cases spell it"), (spellings.old(), "in older spellings")):
            # What the reference makes of the cases is saved, and may be more than a file with the same keys says.
            if spellings.is_same(config):
                _compare(ours, spellings, config, how)
                _see_loaded(case, worst, task, config, how)
                count += 1
        for how, config in spellings.twice():
            _compare(ours, spellings, config, how)
    return worst.measured(f"{count} files")


def _compare(
    ours: type[ModelConfig], spellings: Spellings, config: Mapping[str, Any], how: str, absent: tuple[str, ...] = ()
) -> None:
    """The fields that our class reads from a file must be those that it reads from the whole file of the reference.

    A file that lacks one of the `absent` keys may be refused by the name of the key: that is no wrong answer.
    """
    meant = spellings.read(config)
    if meant is None:
        return
    try:
        right = _fields(ours.parse(meant))
    except LoraxError:
        return  # what it cannot compute it refuses, whether stated or by default
    try:
        found = _fields(ours.parse(config))
    except LoraxError as error:
        if any(key in error.message for key in absent):
            return
        raise CheckFailed(f"a config.json {how} is refused, and the reference takes it: {error.message}") from error
    differ = [
        f"{name} is {found[name]!r:.60} where the reference has {right[name]!r:.60}"
        for name in right
        if found[name] != right[name]
    ]
    if differ:
        raise CheckFailed(f"a config.json {how} is read otherwise than the reference reads it: {'; '.join(differ)}")


def _compare_defaults(ours: type[ModelConfig], spellings: Spellings) -> None:
    """Of a file that states nothing but what our class insists on, in the sizes of the reference's defaults."""
    stated = {"model_type": spellings.full["model_type"]}
    whole = spellings.read(stated) or {}
    needed = [key for key in whole if key != "model_type" and _insists(ours, whole, key)]
    config = {**stated, **{key: whole[key] for key in needed}}
    _compare(ours, spellings, config, f"with nothing but {listed(config, limit=40)}")


def _insists(ours: type[ModelConfig], whole: Mapping[str, Any], key: str) -> bool:
    try:
        ours.parse({name: value for name, value in whole.items() if name != key})
    except LoraxError as error:
        return key in error.message
    return False


def _fields(config: ModelConfig) -> dict[str, Any]:
    """All fields by name, those of a nested model by dotted names."""
    found: dict[str, Any] = {"labels": config.labels}
    for name, value in config:
        if isinstance(value, BaseModel):
            found |= {f"{name}.{inner}": one for inner, one in value}
        # Labels have three spellings, which `labels` makes one; the class is stated in every file.
        elif name not in ("architectures", "id2label", "num_labels"):
            found[name] = value
    return found


def _see_loaded(case: Case, worst: Worst, task: Task, config: Mapping[str, Any], how: str) -> None:
    """The numbers of the task's checkpoint under another `config.json` are those of the reference."""
    try:
        base = case.respelt(task, config)
    except LoraxError as error:
        raise CheckFailed(f"a config.json {how} is refused, and the reference takes it: {error.message}") from error
    if task not in base.model.tasks:
        raise CheckFailed(f"a config.json {how} has no head for {str(task)!r}, and the reference's has")
    answers = case.bench(base).whole(case.inputs)
    for tokens, mine, theirs in zip(case.inputs, answers, case.expected(task), strict=True):
        where = f"of an input of {len(tokens)} tokens, {how}"
        worst.see("hidden rows", where, mine.hidden, theirs.hidden)
        if theirs.logits is not None:
            see_head(worst, task, where, mine, theirs, base.model.config.problem)


def _spellings(case: Case, task: Task) -> Spellings:
    config_class = reference.reference_class(case.cases, task).config_class
    ours = _config_class(case)
    return Spellings(config_class, case.stated(task), {**ours.aliases, **ours.own_keys})


def _config_class(case: Case) -> type[ModelConfig]:
    owner = case.host.owner(case.spec.model_type)
    return cast("type[ModelConfig]", load_class(case.spec.config, owner if owner.module else None))


CHECKS = (
    Check(
        "config-defaults",
        "a key that config.json leaves out means what it means to the reference",
        _defaults,
        sized=False,
    ),
    Check("config-spellings", "older spellings that the reference takes mean the same", _spelt, sized=False),
)
