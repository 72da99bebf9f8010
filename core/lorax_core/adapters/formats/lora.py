"""LoRA adapters as PEFT saves them.

Decides what an adapter is by its files: identity, task, ranks. Where its tensors go is decided in `binding`.
"""

from __future__ import annotations

from pathlib import Path

from lorax_core.adapters.base import Adapter, Bound
from lorax_core.adapters.formats.binding import bind_files
from lorax_core.adapters.formats.head import HeadRequest
from lorax_core.adapters.formats.peft import read_peft
from lorax_core.weights.loader import LoadedModel


class LoraAdapter(Adapter):
    """What PEFT's `save_pretrained` writes for LoRA: low-rank updates, magnitudes, biases, saved modules, token rows, heads.

    Reading checks the files; `check` and `bind` hold them against a model. `head` states what the files do not: the task, the
    labels.
    """

    kind = "lora"

    def __init__(self, path: str | Path, head: HeadRequest | None = None) -> None:
        self.files = read_peft(path)
        self.head_request = head or HeadRequest()
        self.identity = self.files.identity(self.head_request.settings)
        self.task = self.head_request.task or self.files.task
        self.ranks = self.files.ranks

    def bind(self, base: LoadedModel, *, meta: bool = False) -> Bound:
        return bind_files(self.files, self.head_request, self.task, base, meta)
