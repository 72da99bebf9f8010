"""Honest stand-ins: real implementations of our interfaces that do something simple, or fail when told to.

Class paths such as `fakes:AbsentBackend` can be declared as a plugin would declare its own.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from lorax_core.attention.base import CacheLayout, StepAttention
from lorax_core.attention.torch import TorchBackend
from lorax_core.engine.runner import Answer
from lorax_core.engine.sampler import SampledToken
from lorax_core.engine.step_input import ChunkInput, StepInput
from lorax_core.plugins.host import PluginHost
from lorax_core.plugins.record import PluginRecord, PluginStatus
from lorax_core.plugins.spec import BackendSpec


class AbsentBackend(TorchBackend):
    """A backend whose library is not there."""

    name = "absent"

    @classmethod
    def is_available(cls):
        return False, "its library is not installed"


class WindowlessBackend(TorchBackend):
    """A backend that has no windows."""

    name = "windowless"

    def layout(self, specs, dtype, kv_dtype, device, page_size=None):
        windows = [spec.window for spec in specs if spec.window is not None]
        return f"no window of {windows[0]}" if windows else super().layout(specs, dtype, kv_dtype, device, page_size)


class LargePages(TorchBackend):
    """A backend with pages of 256 tokens, that computes in 16 bit and cannot store 8."""

    name = "large-pages"

    def layout(self, specs, dtype, kv_dtype, device, page_size=None):
        if dtype is torch.float32:
            return "computes in 16 bit, not in torch.float32"
        if kv_dtype.itemsize == 1:
            return f"stores 16 bit, not {kv_dtype}"
        if page_size not in (None, 256):
            return f"pages of 256 tokens, not {page_size}"
        return CacheLayout(256, kv_dtype)


class WidePages(TorchBackend):
    """A backend with pages of 64 tokens."""

    name = "wide"

    def layout(self, specs, dtype, kv_dtype, device, page_size=None):
        return CacheLayout(64, kv_dtype)


class NoBackend:
    """A class that is no backend at all."""


class FlakyBackend(TorchBackend):
    """The torch backend with a fuse: in a step for which `blows` says so of the step's token ids, it raises or, when it is
    `silent`, gives NaN for the rows of the sequences that hold such ids.
    """

    name = "flaky"

    def __init__(self, blows: Callable[[list[int]], bool] = lambda ids: False, *, silent: bool = False) -> None:
        super().__init__()
        self.blows = blows
        self.silent = silent

    def plan(self, rows):
        return FlakyStep(self, super().plan(rows), rows)


class FlakyStep(StepAttention):
    """A step of `FlakyBackend`."""

    def __init__(self, backend, step, batch) -> None:
        self.backend, self.step, self.batch = backend, step, batch

    def write(self, layer, k, v) -> None:
        self.step.write(layer, k, v)

    def encode(self, layer, q, k, v) -> Tensor:
        return self.step.encode(layer, q, k, v)

    def attend(self, layer, q) -> Tensor:
        out = self.step.attend(layer, q)
        for rows, ids in zip(
            out.split(self.batch.lengths), self.batch.input_ids.split(self.batch.lengths), strict=True
        ):
            if self.backend.blows(ids.tolist()):
                if not self.backend.silent:
                    raise RuntimeError(f"a kernel broke over {ids.tolist()}")
                rows.fill_(float("nan"))
        return out


class StumblingBackend(FlakyBackend):
    """A backend that an engine can be loaded with by name: every step over token 13 breaks."""

    name = "stumbling"

    def __init__(self) -> None:
        super().__init__(lambda ids: 13 in ids)


class ObservedBackend(FlakyBackend):
    """A backend that an engine can be loaded with by name: `during` is called in the middle of every step, with its token
    ids; what it gives says whether the step breaks.
    """

    name = "observed"
    during: Callable[[list[int]], bool] = staticmethod(lambda ids: False)

    def __init__(self) -> None:
        super().__init__(lambda ids: ObservedBackend.during(ids))


class PagedEcho:
    """A runner without a model: its cache holds token ids by slot, and the token after a row is a digest of what the
    sequence reads back through its pages up to there. A page lost, shared or overwritten changes the answer.
    """

    def __init__(self, page_size: int, vocab: int = 50) -> None:
        self.page_size = page_size
        self.vocab = vocab
        self.slots: dict[tuple[int, int], int] = {}
        self.steps: list[StepInput] = []

    def launch(self, step: StepInput) -> EchoedStep:
        self.steps.append(step)
        self.slots = {slot: token for slot, token in self.slots.items() if slot[0] not in step.zeros}
        for old, new in step.copies:
            for offset in range(self.page_size):
                self.slots[new, offset] = self.slots.get((old, offset), -1)
        for chunk in step.chunks:
            for at, token in enumerate(chunk.tokens, start=chunk.start):
                self.slots[self._slot(chunk, at)] = token
        return EchoedStep({c.sequence: Answer(sampled=self._sampled(c)) for c in step.chunks if c.sampled})

    def _sampled(self, chunk: ChunkInput) -> tuple[SampledToken, ...]:
        """The token after the newest row and, as long as draft tokens are right, after each of them."""
        newest = chunk.start + len(chunk.tokens) - chunk.drafts
        draft = chunk.tokens[len(chunk.tokens) - chunk.drafts :]
        sampled = [self._next(chunk, newest)]
        while len(sampled) <= chunk.drafts and draft[len(sampled) - 1] == sampled[-1]:
            sampled.append(self._next(chunk, newest + len(sampled)))
        return tuple(SampledToken(token) for token in sampled)

    def _slot(self, chunk: ChunkInput, at: int) -> tuple[int, int]:
        return chunk.pages[at // self.page_size], at % self.page_size

    def _next(self, chunk: ChunkInput, count: int) -> int:
        read = [self.slots[self._slot(chunk, at)] for at in range(count)]
        return digest(read, self.vocab, chunk.sampled[0].sampling.choice)


class EchoedStep:
    """A step of `PagedEcho`, whose answers are there already."""

    graph = ""
    revised = False

    def __init__(self, answers: dict[int, Answer]) -> None:
        self._answers = answers

    def result(self) -> dict[int, Answer]:
        return self._answers


def digest(tokens: list[int], vocab: int = 50, choice: int = 0) -> int:
    """A token that depends on every token before it, on their order, and on which answer to the prompt it is for."""
    state = 17 + choice
    for token in tokens:
        state = (state * 31 + token + 7) % 1_000_003
    return state % vocab


def echoed(prompt: list[int], count: int, vocab: int = 50, choice: int = 0) -> list[int]:
    """What `PagedEcho` answers to a prompt that has the cache to itself."""
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(digest(tokens, vocab, choice))
    return tokens[len(prompt) :]


class Illiterate:
    """A decoder that gives up on one token."""

    def __init__(self, token: int) -> None:
        self.token = token

    def decode(self, ids: list[int]) -> str:
        if self.token in ids:
            raise ValueError(f"token {self.token} cannot be read")
        return "x" * len(ids)


def make_backend_spec(name: str, cls: str, **changes: object) -> BackendSpec:
    """A declaration of one of the backends here."""
    fields = {"name": name, "summary": "One of the tests' own.", "backend": f"fakes:{cls}", "device_types": ("cpu",)}
    return BackendSpec(**{**fields, **changes})


def with_backends(host: PluginHost, *specs: BackendSpec) -> PluginHost:
    """The installed plugins and one more, which brings these backends."""
    record = PluginRecord("fakes", "lorax-fakes", "1.0", "fakes", PluginStatus.READY, backends=specs)
    return PluginHost([*host.records, record])
