"""Answers to the prompts of a file, on stdout or in a file.

Decides how long an answer is by default, and how many prompts are answered together. Knows nothing of how a prompt becomes a
request.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import lorax_core
from lorax_core.cli.completions import answers_json, blocks, show_text
from lorax_core.cli.files import file_answers, job_of, refuse_same, write_answers
from lorax_core.cli.loading import Loading
from lorax_core.cli.records import Bounds, RecordFile, TextRecord
from lorax_core.cli.render import json_line
from lorax_core.cli.resuming import NoHead, PartFile

if TYPE_CHECKING:
    from lorax_core.serving.engine import Engine
    from lorax_core.types import Completion

DEFAULT_TOKENS: Final = 128
"""Of an answer, unless --max-tokens says otherwise, or the model has room for less."""
LINES: Final = ".jsonl"
WINDOW: Final = Bounds(records=64)
"""Answers take longer than vectors: fewer at a time are lost by an interruption, and shown sooner."""


def with_room(engine: Engine, request: lorax_core.GenerateRequest) -> lorax_core.GenerateRequest:
    """A request whose answer ends by itself, or after `DEFAULT_TOKENS`."""
    if request.max_tokens is not None:
        return request
    # A default must not refuse what was asked for: it only shortens.
    room = engine.info().max_tokens - engine.count_tokens(request.prompt, adapter=request.adapter)
    most = max(min(max(DEFAULT_TOKENS, request.min_tokens), room), 1)
    return lorax_core.GenerateRequest(**{**request.model_dump(), "max_tokens": most})


@dataclass(frozen=True, slots=True)
class PromptFile:
    """A model, a file of prompts, and how one becomes a request."""

    loading: Loading
    path: str
    given: RecordFile
    ask: Callable[[str], lorax_core.GenerateRequest]

    def show(self, *, json: bool) -> None:
        """Answers to stdout, in order."""
        with self.loading.engine(self.path) as engine:
            for window, found in file_answers(engine, self.given, self._asking(engine)):
                show_text(_shown(engine, window.records, found, json=json))

    def write(self, out: Path, about: Mapping[str, Any], *, overwrite: bool, restart: bool) -> None:
        """Answers to a file, which is continued when `about` is the same."""
        refuse_same(self.given, out)
        job = {**job_of(self.loading, self.path, self.given, **about), "form of --out": out.suffix}
        part = PartFile(out, job, overwrite=overwrite, restart=restart)
        with self.loading.engine(self.path) as engine:

            def encode(records: list[TextRecord], found: list[Completion]) -> bytes:
                return _shown(engine, records, found, json=out.suffix == LINES).encode()

            write_answers(engine, self.given, self._asking(engine), part, NoHead(), encode)

    def _asking(self, engine: Engine) -> Callable[[TextRecord], lorax_core.GenerateRequest]:
        return lambda record: with_room(engine, self.ask(record.text))


def _shown(engine: Engine, records: list[TextRecord], found: list[Completion], *, json: bool) -> str:
    """Answers as lines of JSON, or as texts below headings."""
    lines: list[str] = []
    for record, completion in zip(records, found, strict=True):
        answers = [completion, *completion.alternatives]
        if json:
            id = {"id": record.id} if record.id is not None else {}
            lines.append(json_line({"index": record.line - 1, **id, **answers_json(engine, answers)}))
        else:
            lines += blocks(answers, f"line {record.line}")
    return "".join(f"{line}\n" for line in lines)
