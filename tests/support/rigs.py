"""Parts of the runtime put together for a test: a model driven chunk by chunk, a step loop, a call with a time limit.

Decides nothing that the runtime decides; it only spares tests the wiring.
"""

from __future__ import annotations

import itertools
import random
import threading
from array import array
from collections import ChainMap
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from lorax_core.adapters.base import Bound
from lorax_core.adapters.bound import BoundAdapters
from lorax_core.adapters.lora_kernels.select import AutoKernel
from lorax_core.adapters.residency.handle import AdapterHandle
from lorax_core.adapters.residency.store import AdapterStore
from lorax_core.attention.base import AttentionBackend
from lorax_core.attention.torch import TorchBackend
from lorax_core.engine.batcher import Batcher
from lorax_core.engine.detokenizer import TextDecoder
from lorax_core.engine.loop import EngineLoop
from lorax_core.engine.plan import Chunk, StepPlan
from lorax_core.engine.runner import Runner
from lorax_core.engine.scheduler import Scheduler
from lorax_core.engine.sequence import Sampling, Sequence, SequenceUpdate
from lorax_core.engine.step_input import step_input
from lorax_core.engine.stopping import StopRule
from lorax_core.kvcache.allocator import PageAllocator
from lorax_core.kvcache.pool import KVPool
from lorax_core.linear_methods.select import LinearPolicy
from lorax_core.modeling.model import Model
from lorax_core.plugins.host import PluginHost
from lorax_core.settings import Settings
from lorax_core.types import Task
from lorax_core.weights.checkpoint import Checkpoint
from lorax_core.weights.loader import LoadedModel, load_model

T = TypeVar("T")
PAGE = 16


def make_loaded(folder: Path, host: PluginHost, **options: object) -> LoadedModel:
    """The model of a checkpoint folder."""
    return load_model(Checkpoint(folder), host, **options)


def make_capturable(folder: Path, host: PluginHost, **options: object) -> LoadedModel:
    """The model of a checkpoint folder, whose every product is an operator of torch, which a tape can record."""
    return make_loaded(folder, host, linear_policy=LinearPolicy({"*": "plain"}), **options)


def make_adapters(base: LoadedModel, **folders: Path) -> AdapterStore:
    """A store with the adapters of these folders, by name."""
    store = AdapterStore(base, Settings.from_env())
    _bound.setdefault(base.model, []).append(store.bound)
    for name, folder in folders.items():
        store.load(name, folder)
    return store


_bound: WeakKeyDictionary[Model, list[BoundAdapters]] = WeakKeyDictionary()


def bound_to(base: LoadedModel) -> Mapping[str, Bound]:
    """What all stores of `make_adapters` have bound to a base, now and later."""
    found: ChainMap[str, Bound] = ChainMap()
    found.maps = _bound.setdefault(base.model, [])  # type: ignore[assignment]
    return found


def kernel_for(base: LoadedModel) -> AutoKernel:
    """The kernel of low-rank products that an engine of this base would have."""
    return AutoKernel(base.model.dtype, base.model.device, Settings.from_env())


def make_pool(base: LoadedModel, pages: int, page_size: int = PAGE) -> KVPool | None:
    """A cache of this many pages beside the scratch page; None for models without."""
    model = base.model
    if not model.needs_kv_cache:
        return None
    spec = model.attention_specs[0]
    return KVPool(
        layers=len(model.attention_layers),
        pages=pages + 1,
        page_size=page_size,
        kv_heads=spec.kv_heads,
        head_dim=spec.head_dim,
        dtype=model.dtype,
        device=model.device,
    )


class Bench:
    """A model with a cache that gives hidden rows and logits of chosen chunks. Pages are handed out in random order."""

    def __init__(
        self, base: LoadedModel, pages: int = 64, page_size: int = PAGE, backend: AttentionBackend | None = None
    ) -> None:
        self.model = base.model
        self.pool = make_pool(base, pages, page_size)
        self.page_size = page_size
        self._free = random.Random(5).sample(range(1, pages + 1), pages)
        self._batcher = Batcher(base.model, page_size if self.pool else None, bound_to(base), kernel_for(base))
        self._backend = backend or TorchBackend()
        self._backend.bind(base.model.attention_specs, base.model.dtype, self.pool)
        self._ids = itertools.count(1)

    def sequence(
        self, ids: list[int], adapter: AdapterHandle | None = None, types: list[int] | None = None
    ) -> Sequence:
        """A sequence that holds pages for all of its tokens."""
        generates = Task.GENERATE in self.model.tasks
        made = Sequence(
            task=Task.GENERATE if generates else self.model.tasks[0],
            prompt=list(ids),
            token_types=types,
            adapter=adapter,
            stop=StopRule(max_tokens=1) if generates else None,
            span=None if generates else range(len(ids)),
            id=next(self._ids),
        )
        made.pages = array("i", [self._free.pop() for _ in range(-(-len(ids) // self.page_size))] if self.pool else [])
        return made

    @torch.inference_mode()
    def hidden(self, *parts: tuple[Sequence, int, int]) -> list[Tensor]:
        """Hidden rows of tokens `start` to `stop` of each sequence, computed together in one batch."""
        return self._rows(parts, lambda hidden, batch: hidden)

    @torch.inference_mode()
    def logits(self, *parts: tuple[Sequence, int, int]) -> list[Tensor]:
        """Logits of the same rows."""
        return self._rows(parts, lambda hidden, batch: self.model.head(Task.GENERATE).lm_head(hidden, batch))

    def _rows(self, parts: Iterable[tuple[Sequence, int, int]], answer: Callable[..., Tensor]) -> list[Tensor]:
        chunks = tuple(Chunk(sequence, start, stop - start) for sequence, start, stop in parts)
        step = step_input(StepPlan(chunks))
        batch = self._batcher.pack(step)
        batch.attention = self._backend.plan(batch)
        rows = answer(self.model.backbone(batch), batch).float()
        found = dict(zip((chunk.sequence for chunk in step.chunks), rows.split(batch.lengths), strict=True))
        return [found[chunk.sequence.id] for chunk in chunks]


def all_logits(
    base: LoadedModel, prompts: list[list[int]], adapters: list[AdapterHandle | None] | None = None
) -> list[Tensor]:
    """Logits of every token of every prompt, in one batch."""
    bench = Bench(base, pages=sum(-(-len(ids) // PAGE) for ids in prompts))
    sequences = [
        bench.sequence(ids, adapter) for ids, adapter in zip(prompts, adapters or [None] * len(prompts), strict=True)
    ]
    return bench.logits(*((sequence, 0, len(sequence)) for sequence in sequences))


def make_loop(
    base: LoadedModel,
    *,
    pages: int = 32,
    page_size: int = PAGE,
    max_tokens: int = 64,
    max_rows: int = 16,
    backend: AttentionBackend | None = None,
    decoder: TextDecoder | None = None,
    adapters: AdapterStore | None = None,
) -> EngineLoop:
    """The step loop of a model."""
    pool = make_pool(base, pages, page_size)
    allocator = PageAllocator(pages + 1, page_size) if pool is not None else None
    scheduler = Scheduler(
        max_tokens=max_tokens, max_rows=max_rows, allocator=allocator, window=base.model.widest_window
    )
    bound = adapters.bound if adapters is not None else bound_to(base)
    runner = Runner(base.model, backend or TorchBackend(), pool, bound, kernel_for(base))
    return EngineLoop(scheduler, runner, decoder)


class Inbox:
    """What a sequence told its caller."""

    def __init__(self) -> None:
        self.updates: list[SequenceUpdate] = []
        self.finished = threading.Event()

    def __call__(self, update: SequenceUpdate) -> None:
        self.updates.append(update)
        if update.last:
            self.finished.set()

    @property
    def tokens(self) -> list[int]:
        return [token for update in self.updates for token in update.token_ids]

    @property
    def text(self) -> str:
        return "".join(update.text for update in self.updates)

    @property
    def error(self) -> Exception | None:
        return self.updates[-1].error if self.updates else None


def make_sequence(
    prompt: Iterable[int],
    max_tokens: int = 8,
    *,
    adapter: AdapterHandle | None = None,
    sampling: Sampling | None = None,
    stop: Iterable[str] = (),
    eos: Iterable[int] = (),
) -> Sequence:
    """A generating sequence with an inbox."""
    return Sequence(
        task=Task.GENERATE,
        prompt=list(prompt),
        adapter=adapter,
        sampling=sampling or Sampling(),
        stop=StopRule(max_tokens=max_tokens, token_ids=frozenset(eos), strings=tuple(stop)),
        sink=Inbox(),
    )


def finish(loop: EngineLoop, *sequences: Sequence, steps: int = 10_000) -> list[list[int]]:
    """Adds sequences, steps until nothing is left, checks the books after each step; gives each sequence's tokens."""
    for sequence in sequences:
        loop.add(sequence)
    for _ in range(steps):
        if not loop.busy:
            return [sequence.output for sequence in sequences]
        loop.step()
        loop.scheduler.check()
    raise AssertionError(f"after {steps} steps sequences are still alive")


def within(seconds: float, call: Callable[[], T]) -> T:
    """The result of a call that must not hang; a limit far from anything measured."""
    # Apart, as an exception may also be the result.
    results: list[T] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            results.append(call())
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    assert not thread.is_alive(), f"still waiting after {seconds} s"
    if errors:
        raise errors[0]
    return results[0]
