"""LoRA adapters as PEFT saves them.

Decides what is kept of one: the files, what was read of them, and what a model was given. Where its tensors go is decided in
`binding`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from lorax_core.adapters.base import Delta, FileAdapter
from lorax_core.adapters.deltas import Dora, EmbeddingLowRank, LowRank, TokenLogits, TokenRows
from lorax_core.adapters.formats.binding import Binding
from lorax_core.adapters.formats.head import HeadRequest, drop_numbers, head_bytes, take_numbers
from lorax_core.adapters.formats.peft import PeftFiles, read_peft
from lorax_core.errors import AdapterError
from lorax_core.modeling.heads import Head
from lorax_core.types import Task
from lorax_core.weights.loader import LoadedModel


class LoraAdapter(FileAdapter):
    """What PEFT's `save_pretrained` writes for LoRA: low-rank updates, magnitudes, biases, saved modules, token rows, heads.

    Reading checks the files; `bind` checks them against a model. `head` says what the files do not: the task, the labels.
    What was read is kept until `forget_files`; it is read again when needed, and must be the same then.
    """

    kind = "lora"

    def __init__(self, path: str | Path, head: HeadRequest | None = None) -> None:
        self._wanted = head or HeadRequest()
        self.path = Path(path)
        self._files: PeftFiles | None = read_peft(path)
        self._identity = self._files.identity(self._wanted.settings)
        self._task = self._wanted.task or self._files.task
        ranks = (piece.a if piece.a is not None else piece.embedding_a for piece in self._files.pieces.values())
        self._ranks = tuple(sorted({tensor.shape[0] for tensor in ranks if tensor is not None}))
        self._targets: tuple[str, ...] = ()
        self._not_a_sum: str | None = None
        self._deltas: dict[str, list[Delta]] | None = None  # while bound
        self._head: Head | None = None  # its numbers are there while bound, its labels always

    @property
    def files(self) -> PeftFiles:
        """What the folder holds; raises AdapterError when that is not what it was."""
        files = self._files
        if files is None:
            files = read_peft(self.path)
            if files.identity(self._wanted.settings) != self._identity:
                raise AdapterError(
                    f"the files in {self.path} are not those that were loaded",
                    hint="load the adapter again, under its name",
                )
            self._files = files
        return files

    def forget_files(self) -> None:
        self._files = None

    @property
    def holds_files(self) -> bool:
        return self._files is not None

    @property
    def ranks(self) -> tuple[int, ...]:
        return self._ranks

    @property
    def not_a_sum(self) -> str | None:
        return self._not_a_sum

    @property
    def identity(self) -> str:
        return self._identity

    @property
    def targets(self) -> tuple[str, ...]:
        return self._targets

    @property
    def is_bound(self) -> bool:
        return self._deltas is not None

    @property
    def nbytes(self) -> int:
        if self._deltas is None:
            return 0
        head = head_bytes(self._head) if self._head is not None else 0
        return head + sum(delta.nbytes for deltas in self._deltas.values() for delta in deltas)

    @property
    def deltas(self) -> Mapping[str, Sequence[Delta]]:
        if self._deltas is None:  # no deltas at all would pass for the base, silently
            raise AdapterError(f"{self.path} is not bound to a model any more", hint="load the adapter again")
        return self._deltas

    @property
    def task(self) -> Task | None:
        return self._task

    @property
    def head(self) -> Head | None:
        return self._head

    def deltas_for(self, base: LoadedModel) -> Mapping[str, Sequence[Delta]]:
        return self._deltas if self._deltas is not None else self._made(base)[0]

    def bind(self, base: LoadedModel) -> None:
        deltas, head = self._made(base)
        if head is not None and self._head is not None:
            take_numbers(self._head, head)  # sequences that wait hold the head that they were made for
            head = self._head
        self._targets = tuple(deltas)
        self._not_a_sum = "a head" if head is not None else _not_a_sum(deltas)
        self._deltas, self._head = deltas, head

    def unbind(self) -> None:
        self._deltas = None
        if self._head is not None:
            drop_numbers(self._head)

    def _made(self, base: LoadedModel) -> tuple[dict[str, list[Delta]], Head | None]:
        return Binding(self.files, self._wanted, self._task, base).made()


def _not_a_sum(deltas: Mapping[str, Sequence[Delta]]) -> str | None:
    """The first delta that does more than add a product, in words; None when all of them add."""
    for path, made in deltas.items():
        for delta in made:
            match delta:
                case LowRank() | EmbeddingLowRank(gain=None):
                    continue
                case Dora() | EmbeddingLowRank():
                    return f"a magnitude (DoRA) at {path!r}"
                case TokenRows() | TokenLogits():
                    return f"trained tokens at {path!r}"
                case _:
                    return f"a replaced weight or bias at {path!r}"
    return None
