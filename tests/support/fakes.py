"""Honest stand-ins: real implementations of our interfaces that do something simple, or fail when told to.

Class paths such as `fakes:AbsentBackend` can be declared as a plugin would declare its own.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from lorax_core.attention.torch import TorchBackend
from lorax_core.engine.runner import Answer
from lorax_core.engine.sampler import Picked
from lorax_core.engine.scheduler import Chunk, StepPlan
from lorax_core.engine.sequence import Sequence
from lorax_core.modeling import Attention, Batch
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

    def supports(self, spec, page_size, dtype, device):
        return None if spec.window is None else f"no window of {spec.window}"


class NoBackend:
    """A class that is no backend at all."""


class FlakyBackend(TorchBackend):
    """The torch backend with a fuse: in a step for which `blows` says so of the step's token ids, it raises or, when it is
    `silent`, gives NaN for the rows of the sequences that hold such ids.
    """

    name = "flaky"

    def __init__(self, blows: Callable[[list[int]], bool] = lambda ids: False, *, silent: bool = False) -> None:
        self.blows = blows
        self.silent = silent

    def attend(self, q: Tensor, layer: Attention, batch: Batch) -> Tensor:
        out = super().attend(q, layer, batch)
        for rows, ids in zip(out.split(batch.lengths), batch.input_ids.split(batch.lengths), strict=True):
            if self.blows(ids.tolist()):
                if not self.silent:
                    raise RuntimeError(f"a kernel broke over {ids.tolist()}")
                rows.fill_(float("nan"))
        return out


class StumblingBackend(FlakyBackend):
    """A backend that an engine can be loaded with by name: every step over token 13 breaks."""

    name = "stumbling"

    def __init__(self) -> None:
        super().__init__(lambda ids: 13 in ids)


class PagedEcho:
    """A runner without a model: its cache holds token ids by slot, and the token after a row is a digest of what the
    sequence reads back through its pages up to there. A page lost, shared or overwritten changes the answer.
    """

    def __init__(self, page_size: int, vocab: int = 50) -> None:
        self.page_size = page_size
        self.vocab = vocab
        self.slots: dict[tuple[int, int], int] = {}
        self.plans: list[StepPlan] = []

    def run(self, plan: StepPlan) -> dict[Sequence, Answer]:
        self.plans.append(plan)
        self.clear(list(plan.clears))
        for old, new in plan.copies:
            for offset in range(self.page_size):
                self.slots[new, offset] = self.slots.get((old, offset), -1)
        for chunk in plan.chunks:
            tokens = chunk.sequence.tokens(chunk.start, chunk.stop)
            for at, token in zip(range(chunk.start, chunk.stop), tokens, strict=True):
                self.slots[self._slot(chunk.sequence, at)] = token
        return {chunk.sequence: Answer(picked=self._picked(chunk)) for chunk in plan.chunks if chunk.final}

    def clear(self, pages: list[int]) -> None:
        self.slots = {slot: token for slot, token in self.slots.items() if slot[0] not in pages}

    def _picked(self, chunk: Chunk) -> tuple[Picked, ...]:
        """The token after the newest row and, as long as guesses are right, after each of them."""
        sequence, newest = chunk.sequence, chunk.stop - chunk.drafted
        picked = [self._next(sequence, newest)]
        while len(picked) <= chunk.drafted and sequence.draft[len(picked) - 1] == picked[-1]:
            picked.append(self._next(sequence, newest + len(picked)))
        return tuple(Picked(token) for token in picked)

    def _slot(self, sequence: Sequence, at: int) -> tuple[int, int]:
        return sequence.pages[at // self.page_size], at % self.page_size

    def _next(self, sequence: Sequence, count: int) -> int:
        read = [self.slots[self._slot(sequence, at)] for at in range(count)]
        return digest(read, self.vocab, sequence.sampling.choice)


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


def make_backend_spec(name: str, cls: str, **changes: object) -> BackendSpec:
    """A declaration of one of the backends here."""
    fields = {"name": name, "summary": "One of the tests' own.", "backend": f"fakes:{cls}", "device_types": ("cpu",)}
    return BackendSpec(**{**fields, **changes})


def with_backends(host: PluginHost, *specs: BackendSpec) -> PluginHost:
    """The installed plugins and one more, which brings these backends."""
    record = PluginRecord("fakes", "lorax-fakes", "1.0", "fakes", PluginStatus.READY, backends=specs)
    return PluginHost([*host.records, record])
