"""From scores to labels and entities.

Decides which tokens are reported, and how neighbouring B-/I- labels make entities. Knows nothing of models.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from lorax_core.serving.text import Encoded, TextFront
from lorax_core.types import Classification, Entity, Relevance, Usage


def sequence_labels(scores: NDArray[np.float32], labels: Sequence[str], encoded: Encoded) -> Classification:
    """Every label of an input, by falling score: scores `[labels]`."""
    # Stable: of equal scores, the label with the lower index is first on every machine.
    order = np.argsort(-scores, kind="stable")
    return Classification(
        labels=[labels[at] for at in order],
        scores=[float(scores[at]) for at in order],
        usage=Usage(len(encoded.ids)),
        truncated=encoded.truncated,
    )


def relevance(logits: NDArray[np.float32], encoded: Encoded, *, normalize: bool) -> Relevance:
    """The score of a pair from its one logit `[1]`: its sigmoid when normalised."""
    logit = float(logits[0])
    # In float64, where a sigmoid tells logits of 35 apart; in this form nothing grows without end.
    share = math.exp(-abs(logit))
    score = (1.0 if logit >= 0 else share) / (1.0 + share) if normalize else logit
    return Relevance(score, Usage(len(encoded.ids)), encoded.truncated)


def token_labels(
    scores: NDArray[np.float32], labels: Sequence[str], encoded: Encoded, source: object, text: TextFront
) -> Classification:
    """The best label of each token that is not special: scores `[tokens, labels]`. `source` is what the user gave."""
    special = encoded.special or (False,) * len(encoded.ids)
    kept = [at for at, mark in enumerate(special) if not mark]
    best = scores[kept].argmax(-1) if kept else np.zeros(0, np.int64)  # [kept]
    names = [labels[at] for at in best]
    found = [float(scores[row, at]) for row, at in zip(kept, best, strict=True)]
    offsets = [encoded.offsets[at] for at in kept] if encoded.offsets else None
    entities = None
    # Labels of another scheme (part-of-speech tags, say) make no entities: None, and not an empty list.
    if offsets is not None and any(label.startswith(("B-", "I-")) for label in labels):
        parts = source if isinstance(source, tuple) else (source,)
        second = [encoded.second[at] if encoded.second else False for at in kept]
        entities = _entities(names, found, offsets, second, [str(part) for part in parts])
    return Classification(
        labels=names,
        scores=found,
        usage=Usage(len(encoded.ids)),
        tokens=text.tokens([encoded.ids[at] for at in kept]) or None,
        offsets=offsets,
        entities=entities,
        truncated=encoded.truncated,
    )


def _entities(
    names: list[str], scores: list[float], offsets: list[tuple[int, int]], second: list[bool], texts: list[str]
) -> list[Entity]:
    """Runs of one kind: a B- begins one, an I- goes on with its own kind or begins one, anything else ends it.

    `texts` are the strings, of which tokens marked `second` are in the second.
    """
    entities: list[Entity] = []
    run: list[int] = []

    def close() -> None:
        if run:
            start, end = offsets[run[0]][0], offsets[run[-1]][1]
            score = sum(scores[at] for at in run) / len(run)
            entities.append(Entity(names[run[0]][2:], score, texts[second[run[0]]][start:end], start, end))
            run.clear()

    for at, name in enumerate(names):
        inside = name.startswith(("B-", "I-"))
        # An entity must not run from the first of a pair into the second.
        goes_on = bool(run) and name == f"I-{names[run[0]][2:]}" and second[at] == second[run[0]]
        if not goes_on:
            close()
        if inside:
            run.append(at)
    close()
    return entities
