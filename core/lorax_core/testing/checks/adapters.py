"""Adapters work on every layer, alone and beside others, with the numbers of a merged model and of PEFT.

Decides which adapters are tried and what they are compared with. Knows nothing of how adapters are applied.
"""

from __future__ import annotations

import copy
import importlib.util
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from torch import nn

from lorax_core.adapters.base import Bound
from lorax_core.adapters.formats.lora import LoraAdapter
from lorax_core.errors import listed
from lorax_core.modeling.linear import Linear
from lorax_core.testing import reference
from lorax_core.testing.case import BASE, Case
from lorax_core.testing.check import Check
from lorax_core.testing.checks.packing import see_answers
from lorax_core.testing.compare import Worst, tolerance
from lorax_core.testing.inputs import Input
from lorax_core.testing.lora import LoraOptions, linear_layers, merged, replaceable, trained_with_peft, write_adapter
from lorax_core.testing.packed import PackedAnswer
from lorax_core.testing.result import CheckFailed, Measured, NotApplicable
from lorax_core.types import Task
from lorax_core.weights.loader import LoadedModel

_ZERO = LoraOptions(rank=2, alpha=16, zero=True)
# Ranks differ, since they seed the numbers and name the folders; the scales are 2 and, by rslora, about 1.4.
_FULL = LoraOptions(rank=4, alpha=8)
_SPARSE = LoraOptions(rank=8, alpha=4, rslora=True, every=2)


def _identity(case: Case) -> Measured:
    """An adapter of every layer with B at zero binds, reaches them all, and changes nothing."""
    worst, reached = Worst(case.tolerance), 0
    for task in case.chosen:
        base = case.loaded(task)
        adapter = _bound(case, task, _ZERO)
        linear = {path for path, site in base.model.sites.items() if isinstance(site, Linear)}
        missed = linear & {path for path, _ in base.model.backbone.named_modules()} - set(adapter.targets)
        if missed:
            raise CheckFailed(
                f"an adapter of every linear layer of the reference does not reach {listed(sorted(missed))}"
            )
        _see(worst, task, _inputs(case), _answers(case, base, adapter), _answers(case, base, None))
        reached += len(adapter.targets)
    return worst.measured(f"{reached} layers reached")


def _merged(case: Case) -> Measured:
    worst = Worst(2 * case.tolerance)  # merging rounds every weight once more
    for task in case.chosen:
        for options in _options(case):
            folder = case.folder / f"merged-{task}-{options.rank}"
            if not folder.exists():
                with reference.quiet():
                    whole = merged(case.reference(task), _adapter(case, task, options), options)
                    whole.save_pretrained(folder)  # type: ignore[operator]
            base = case.load(folder)
            unmerged = _answers(case, case.loaded(task), _bound(case, task, options))
            _see(worst, task, _inputs(case), unmerged, _answers(case, base, None))
    return worst.measured()


def _peft(case: Case) -> Measured:
    _needs_peft()
    from peft import PeftModel

    compared = []
    for task in case.chosen:
        for options in _options(case):
            folder = _adapter(case, task, options)
            with reference.blamed("PEFT on it"), reference.quiet():
                # A copy: PEFT puts its layers into the model that it is given.
                oracle = PeftModel.from_pretrained(copy.deepcopy(case.reference(task)), folder)
            compared.append((task, folder, cast("nn.Module", oracle.eval().base_model.model)))
    return _see_oracles(case, compared)


def _replaced(case: Case) -> Measured:
    """Norms, tables and heads that an adapter saves as a whole, all in one."""

    def settings(task: Task) -> dict[str, Any]:
        return {"modules_to_save": replaceable(case.reference(task), case.account(task).ignored)}

    return _see_trained(case, "replaced", settings)


def _tokens(case: Case) -> Measured:
    """New rows for some tokens of the inputs."""
    if any(_has_tied_bias(case.reference(task)) for task in case.chosen):
        raise NotApplicable("PEFT leaves out the bias of a head whose table it trains tokens of")
    ids = sorted({*case.inputs[2].ids[1:], *case.inputs[-2].ids[:4]})

    def settings(task: Task) -> dict[str, Any]:
        table = case.reference(task).get_input_embeddings()
        name = next(name for name, module in case.reference(task).named_modules() if module is table)
        return {"trainable_token_indices": {name: ids}}

    return _see_trained(case, "tokens", settings)


def _has_tied_bias(oracle: Any) -> bool:
    head = oracle.get_output_embeddings()
    return head is not None and head.bias is not None and head.weight is oracle.get_input_embeddings().weight


def _see_trained(case: Case, kind: str, settings: Callable[[Task], Mapping[str, Any]]) -> Measured:
    """Adapters that PEFT makes and writes, beside an update of one layer, which PEFT does not do without."""
    _needs_peft()
    compared = []
    for task in case.chosen:
        folder = case.folder / f"{kind}-{task}"
        # Of the backbone: a head may be among the modules that are saved whole, which PEFT updates by nothing else.
        inside = set(cast("nn.Module", case.reference(task).base_model).modules())
        layers = linear_layers(case.reference(task), case.account(task).ignored)
        layer = next(name for name, module in layers.items() if module in inside)
        chosen = {"target_modules": [layer], **settings(task)}
        with reference.blamed("PEFT on it"), reference.quiet():
            compared.append((task, folder, trained_with_peft(case.reference(task), chosen, folder, seed=1)))
    return _see_oracles(case, compared)


def _see_oracles(case: Case, compared: Sequence[tuple[Task, Path, nn.Module]]) -> Measured:
    """Our answers under the adapters in some folders, beside those of the oracles that PEFT made of the same files."""
    judged = [case.judge(oracle, _inputs(case)) for _, _, oracle in compared]
    worst = Worst(tolerance(case.dtype, max(case.loss, *(loss for _, loss in judged))))
    for (task, folder, _), (exact, _) in zip(compared, judged, strict=True):
        base = case.loaded(task)
        ours = _answers(case, base, _bind(folder, base))
        for tokens, mine, theirs in zip(_inputs(case), ours, exact, strict=True):
            where = f"of an input of {len(tokens)} tokens"
            worst.see("hidden rows", f"{where} ({task} checkpoint)", mine.hidden, theirs.hidden)
            if theirs.logits is not None:
                worst.see(f"logits to {task}", where, mine.parts[task], theirs.logits)
    return worst.measured()


def _needs_peft() -> None:
    if importlib.util.find_spec("peft") is None:
        raise NotApplicable("peft is not installed; `pip install peft` adds it as an oracle")


def _mixed(case: Case) -> Measured:
    """Inputs under the base and under two adapters in one batch, in no order."""
    worst = Worst(case.tolerance)
    for task in case.chosen:
        base = case.loaded(task)
        kinds = [None, _bound(case, task, _FULL), _bound(case, task, _SPARSE)]
        inputs = [tokens for tokens in case.inputs[:-1] for _ in range(2)]
        # Mixed, in runs of one and of two: rows of one adapter stand alone, and side by side.
        adapters = [kinds[(at * 2 + at // 3) % 3] for at in range(len(inputs))]
        bench = case.bench(base, inputs=inputs)
        together = bench.whole(inputs, adapters)
        for tokens, adapter, ours in zip(inputs, adapters, together, strict=True):
            name = "the base" if adapter is None else f"adapter {kinds.index(adapter)}"
            alone = bench.whole([tokens], [adapter])[0]
            see_answers(worst, f"of an input of {len(tokens)} tokens under {name}", ours, alone)
    return worst.measured("the base and two adapters in one batch")


def _see(
    worst: Worst, task: Task, inputs: Sequence[Input], ours: Sequence[PackedAnswer], theirs: Sequence[PackedAnswer]
) -> None:
    for tokens, one, other in zip(inputs, ours, theirs, strict=True):
        see_answers(worst, f"of an input of {len(tokens)} tokens ({task} checkpoint)", one, other)


def _options(case: Case) -> tuple[LoraOptions, ...]:
    # How the scale is made does not depend on the variant, so the others try one.
    return (_FULL, _SPARSE) if case.variant == BASE else (_FULL,)


def _inputs(case: Case) -> list[Input]:
    # A single token, a few, and the longest but one: every answer is computed several times here.
    return [case.inputs[0], case.inputs[2], case.inputs[-2]]


def _answers(case: Case, base: LoadedModel, adapter: Bound | None) -> list[PackedAnswer]:
    inputs = _inputs(case)
    return case.bench(base, inputs=inputs).whole(inputs, [adapter] * len(inputs))


def _bound(case: Case, task: Task, options: LoraOptions) -> Bound:
    return _bind(_adapter(case, task, options), case.loaded(task))


def _bind(folder: Path, base: LoadedModel) -> Bound:
    """An adapter of layers that the reference computes with: none of them may be of no use to the model."""
    bound = LoraAdapter(folder).bind(base)
    if bound.unread:
        raise CheckFailed(
            f"an adapter of {listed(bound.unread)} reaches no layer; are they torch's own and not core's?"
        )
    return bound


def _adapter(case: Case, task: Task, options: LoraOptions) -> Path:
    folder = case.folder / f"adapter-{task}-{options.rank}"
    if folder.exists():
        return folder
    layers = linear_layers(case.reference(task), case.account(task).ignored)
    return write_adapter(layers, options, folder, seed=options.rank)


CHECKS = (
    Check("adapter-identity", "an adapter of every linear layer, with B at zero, binds and changes nothing", _identity),
    Check("adapter-merged", "an adapter in the batch is the adapter merged into the weights", _merged),
    Check("adapter-peft", "an adapter gives what it gives in PEFT", _peft),
    Check(
        "adapter-replaced",
        "norms, embeddings and heads that an adapter replaces are those of PEFT",
        _replaced,
        sized=False,
    ),
    Check("adapter-tokens", "tokens that an adapter trained are those of PEFT", _tokens, sized=False),
    Check("adapter-mixed", "the base and several adapters in one batch get what each gets alone", _mixed),
)
