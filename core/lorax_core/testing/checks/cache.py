"""The paged cache does not change results: chunks, single tokens and any order of pages give what one pass gives.

Decides how sequences are cut and where their pages are. Compares the model with itself.
"""

from __future__ import annotations

from collections.abc import Sequence

from lorax_core.plugins.spec import ArchitectureSpec
from lorax_core.testing.case import Case
from lorax_core.testing.check import Check
from lorax_core.testing.checks.packing import see_answers
from lorax_core.testing.compare import Worst
from lorax_core.testing.inputs import Input
from lorax_core.testing.result import Measured, NotApplicable

_DECODED = 12
# Sizes of chunks, one for each input in turn and the largest for the longest: prompts and single tokens meet in one batch.
_CHUNKS = ((64, 1, 2, 5, 16, 7), (33, 2, 1, 4, 3, 19))


def _decode(case: Case) -> Measured:
    """Prompts first, then one token a step, all inputs side by side."""
    worst = Worst(case.tolerance)
    _see_pieces(worst, case, [_steps(tokens) for tokens in case.inputs], "token by token")
    return worst.measured()


def _chunks(case: Case) -> Measured:
    worst = Worst(case.tolerance)
    for sizes in _CHUNKS:
        chosen = [sizes[at % len(sizes)] for at in range(len(case.inputs) - 1)]
        cuts = [_cuts(tokens, size) for tokens, size in zip(case.inputs, [*chosen, max(sizes)], strict=True)]
        _see_pieces(worst, case, cuts, "in chunks")
    return worst.measured()


def _pages(case: Case) -> Measured:
    """Every page size that the backend takes; pages are shuffled, and memory that was not written holds numbers far off."""
    _needs_cache(case)
    base = case.loaded(case.main)
    sizes = case.page_sizes(base.model)
    # The longest three: shorter ones fit on one page of most sizes.
    inputs, alone = case.inputs[-3:], case.alone(case.main)[-3:]
    cuts = [sorted({max(1, len(tokens) // 2), len(tokens)}) for tokens in inputs]
    worst = Worst(case.tolerance)
    for size in sizes:
        answers = case.bench(base, size, inputs).stepwise(inputs, cuts, shuffle=size)
        for tokens, ours, theirs in zip(inputs, answers, alone, strict=True):
            see_answers(worst, f"of an input of {len(tokens)} tokens on shuffled pages of {size}", ours, theirs)
    return worst.measured(f"page sizes {', '.join(map(str, sizes))}")


def _see_pieces(worst: Worst, case: Case, cuts: Sequence[Sequence[int]], how: str) -> None:
    _needs_cache(case)
    answers = case.bench(case.loaded(case.main)).stepwise(case.inputs, cuts, shuffle=1)
    for tokens, ours, theirs in zip(case.inputs, answers, case.alone(case.main), strict=True):
        see_answers(worst, f"of an input of {len(tokens)} tokens {how}", ours, theirs)


def _needs_cache(case: Case) -> None:
    if not case.loaded(case.main).model.needs_kv_cache:
        raise NotApplicable("this variant attends in both directions and has no cache")


def _steps(tokens: Input) -> list[int]:
    # The prompt ends at the first of these, and every further one is a step of one token.
    return list(range(max(1, len(tokens) - _DECODED), len(tokens) + 1))


def _cuts(tokens: Input, size: int) -> list[int]:
    return [*range(size, len(tokens), size), len(tokens)]


def _causal(spec: ArchitectureSpec) -> str | None:
    return None if spec.causal else "bidirectional models have no cache"


CHECKS = (
    Check("cache-decode", "a prompt and then token by token gives what the whole input gives", _decode, _causal),
    Check("cache-chunks", "the sizes of chunks do not matter", _chunks, _causal),
    Check("cache-pages", "neither the size of pages nor their order matters", _pages, _causal),
)
