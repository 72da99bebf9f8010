"""Documents as tests read them: their fenced blocks, the commands of a console block, and output that is shown in part."""

from __future__ import annotations

import re

FENCE = re.compile(r"^```(\w+)\n(.*?)^```$", re.DOTALL | re.MULTILINE)


def blocks(text: str) -> list[tuple[str, str]]:
    """Language and text of each fenced block, in order."""
    return FENCE.findall(text)


def matches(pattern: str, printed: str) -> bool:
    """Whether `printed` is what `pattern` shows: `...` stands for any text, and runs of blanks are alike."""
    pieces = [re.escape(" ".join(piece.split())) for piece in pattern.split("...")]
    return (
        re.fullmatch(r"\s*" + r".*".join(rf"\s*{piece}\s*" for piece in pieces), " ".join(printed.split())) is not None
    )


def console_steps(block: str) -> list[tuple[str, str]]:
    """Each command of a console block with the output that is shown for it."""
    return [(step.partition("\n")[0], step.partition("\n")[2]) for step in re.split(r"^\$ ", block, flags=re.M)[1:]]
