"""Attention masks: which rows change when a token changes.

Decides by experiment, on the reference and on the model: a token in the future of a row, or outside its window, must not
change it. Only whether a row changes counts; `numbers` compares by how much.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from lorax_core.plugins.spec import ArchitectureSpec
from lorax_core.testing.case import Case
from lorax_core.testing.check import Check
from lorax_core.testing.inputs import Input
from lorax_core.testing.result import CheckFailed, Measured, NotApplicable

# A change of the reference's row that is large enough to ask for one of ours, and the least that ours must then be.
_CLEAR, _LEAST = 1e-2, 1e-3


def _rows(case: Case) -> Measured:
    tokens = next(tokens for tokens in reversed(case.inputs) if len(tokens) <= 40)
    # First, middle and last: a causal row must not see the last, and every row the first.
    probes = sorted({0, len(tokens) // 2, len(tokens) - 1})
    return _judged(case, _probe(case, tokens, probes), "backwards only" if _causal(case) else "both ways")


def _window(case: Case) -> Measured:
    windows = {spec.window for spec in case.loaded(case.main).model.attention_specs if spec.window}
    # The reference's own too: ours may have forgotten the window altogether.
    widest = max(windows | _stated(case), default=None)
    if widest is None:
        raise NotApplicable("this variant has no window")
    tokens = case.long_input
    if len(tokens) <= widest:
        raise CheckFailed(
            f"the window of {widest} tokens is never left: the longest input has {len(tokens)}; use a smaller one here"
        )
    changes = _probe(case, tokens, [0, len(tokens) // 3])
    # Causal rows before the probe are blind to it, window or not.
    if not any((rows[probe if _causal(case) else 0 :] == 0).any() for probe, *both in changes for rows in both):
        raise NotApplicable("a layer of this variant sees everything, so no row shows the edge of a window")
    return _judged(case, changes, f"windows of the model: {sorted(windows)}")


def _stated(case: Case) -> set[int]:
    """The window of the reference's configuration, where it says that some layer uses it."""
    config = case.reference(case.main).config
    window, layers = getattr(config, "sliding_window", None), getattr(config, "layer_types", None)
    return {window} if window and (layers is None or "sliding_attention" in layers) else set()


def _causal(case: Case) -> bool:
    return case.loaded(case.main).model.needs_kv_cache


def _probe(case: Case, tokens: Input, probes: Sequence[int]) -> list[tuple[int, Tensor, Tensor]]:
    """Of each place whose token is changed, by how much each row of ours and of the reference's changes `[rows]`."""
    bench, oracle = case.bench(case.loaded(case.main)), case.exact(case.main)
    # [tokens, hidden], as is theirs
    ours = bench.whole([tokens])[0].hidden
    theirs = case.expect(oracle, [tokens])[0].hidden
    found = []
    for probe in probes:
        changed = tokens.with_id(probe, _other(tokens.ids[probe], case))
        mine = _change(bench.whole([changed])[0].hidden, ours)
        found.append((probe, mine, _change(case.expect(oracle, [changed])[0].hidden, theirs)))
    return found


def _judged(case: Case, changes: Sequence[tuple[int, Tensor, Tensor]], note: str) -> Measured:
    worst, where = 0.0, ""
    for probe, mine, right in changes:
        for row, error in enumerate(_errors(mine, right).tolist()):
            if not error <= worst:
                # Below _CLEAR only rows that the reference left alone can be in error.
                verb = "attends to" if right[row] < _CLEAR else "does not attend to"
                worst, where = error, f"row {row} {verb} token {probe}, unlike the reference's"
    return Measured(worst, case.tolerance, "; ".join(filter(None, (where if worst > case.tolerance else "", note))))


def _change(after: Tensor, before: Tensor) -> Tensor:
    """How much each row changed `[rows]`, as a share of the largest number."""
    return (after - before).double().abs().amax(1) / before.double().abs().max()


def _errors(ours: Tensor, theirs: Tensor) -> Tensor:
    """`[rows]`: our change where the reference's row did not change at all, its change where ours should and did not."""
    blind = torch.where(theirs == 0, ours, 0.0)
    unmoved = torch.where((theirs > _CLEAR) & (ours < _LEAST), theirs, 0.0)
    # NaN compares as neither larger nor smaller, so the next finite error would replace it.
    return torch.maximum(blind, unmoved).nan_to_num(nan=math.inf)


def _other(token: int, case: Case) -> int:
    """Another token, neither the same nor padding, which some architectures give no position."""
    config = case.reference(case.main).config
    padding = getattr(config, "pad_token_id", None)
    return next(other for other in range(config.vocab_size) if other not in (token, padding))


def _windowed(spec: ArchitectureSpec) -> str | None:
    return None if "sliding_window" in spec.features else "features does not name 'sliding_window'"


CHECKS = (
    Check("masking", "a row attends to the tokens that the reference's row attends to", _rows),
    Check("masking-window", "the edge of a window is where the reference has it", _window, _windowed),
)
