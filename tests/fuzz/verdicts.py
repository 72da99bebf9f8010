"""What became of a case, and how that travels from a worker to the report."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from enum import StrEnum
from typing import Any


class Kind(StrEnum):
    """The four ends of a case; the package's docstring defines them."""

    REFUSED = "refused"
    EQUAL = "equal"
    WEAK = "weak"
    FINDING = "finding"


class Finding(StrEnum):
    """What can be wrong."""

    BARE = "bare exception"
    NO_HINT = "no hint"
    HANG = "hang"
    MEMORY = "memory"
    DIED = "process died"
    BROKEN = "engine broken after"
    WRONG = "wrong answer"
    NOT_FINITE = "answer not finite"
    UNSTEADY = "answer not deterministic"
    ACCEPTED = "accepted what must be refused"
    OVERSTRICT = "refused what changes nothing"
    LEAK = "secret or listing in an error"
    CODE = "ran code of a checkpoint"
    OUTSIDE = "wrote outside of its folder"


@dataclass(frozen=True)
class Verdict:
    """One case's end. `error` is an exception's type, `where` the innermost function of ours that it came through."""

    campaign: str
    seed: int
    case: int
    kind: Kind
    finding: Finding | None = None
    error: str = ""
    where: str = ""
    detail: str = ""
    changes: list[str] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def command(self) -> str:
        """What repeats this case."""
        return f"PYTHONPATH=tests python -m fuzz --campaign {self.campaign} --seed {self.seed} --case {self.case}"

    @property
    def group(self) -> tuple[str, str, str]:
        """Findings of one cause, as far as that can be told from outside."""
        return (str(self.finding or ""), self.error, self.where or self.campaign)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, found: dict[str, Any]) -> Verdict:
        finding = Finding(found["finding"]) if found["finding"] else None
        return cls(**{**found, "kind": Kind(found["kind"]), "finding": finding})
