"""Decoding steps as captured graphs.

Decides which steps can be replayed, which memory a captured step reads, and in which order that memory is brought up to date.
A step is replayed whole, from token ids to logits; sampling stays outside. What no graph takes runs eagerly, and the reason is
given, so that it can be counted.
"""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Final

import torch
from torch import Tensor

from lorax_core.adapters.lora_kernels.base import GraphLora, LoraKernel, Segment
from lorax_core.attention.base import AttentionBackend, GraphAttention
from lorax_core.engine.static_inputs import StaticInputs
from lorax_core.engine.step_input import ChunkInput
from lorax_core.kvcache.pool import KVPool
from lorax_core.modeling.batch import Batch, HeadRows
from lorax_core.modeling.linear import Linear
from lorax_core.modeling.model import Model
from lorax_core.modeling.site import AdapterRows, NoAdapters, Site
from lorax_core.types import Task

_log = logging.getLogger(__name__)

REPLAYED: Final = "replayed"
"""How a step was computed that a graph took; of any other step, the reason why none did."""
OFF: Final = "graphs are off"


class Graph(ABC):
    """Work of the device that is captured once and replayed on the same memory."""

    @abstractmethod
    def capture(self, compute: Callable[[], None]) -> None:
        """Keep what `compute` launches. It runs once before, so that what is made at first use exists."""

    @abstractmethod
    def replay(self) -> None:
        """Launch it all again. Does not wait for the device."""


class CudaGraph(Graph):
    """A CUDA graph. Those of one pool share their memory, as no two of them run at the same time.

    `cuda` is `torch.cuda`, or what stands for it where no GPU is.
    """

    def __init__(self, pool: Any, stream: torch.cuda.Stream, cuda: Any = torch.cuda) -> None:
        self._pool = pool
        self._stream = stream
        self._cuda = cuda
        self._graph = cuda.CUDAGraph()

    def capture(self, compute: Callable[[], None]) -> None:
        current = self._cuda.current_stream(self._stream.device)
        self._stream.wait_stream(current)
        with self._cuda.stream(self._stream):
            compute()
        current.wait_stream(self._stream)
        # thread_local: other threads copy adapters to the device meanwhile, which a capture of the whole process refuses.
        with self._cuda.graph(self._graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
            compute()

    def replay(self) -> None:
        self._graph.replay()


def cuda_graphs(device: torch.device, cuda: Any = torch.cuda) -> Callable[[], Graph]:
    """Makes graphs of a device, all in one pool."""
    pool, stream = cuda.graph_pool_handle(), cuda.Stream(device)
    return lambda: CudaGraph(pool, stream, cuda)


def decode_graphs(
    model: Model, backend: AttentionBackend, pool: KVPool | None, kernel: LoraKernel | None, max_rows: int
) -> DecodeGraphs | str:
    """The graphs of an engine; else why it has none."""
    if model.device.type != "cuda":
        return f"graphs need a GPU, and the model is on {model.device.type!r}"
    if pool is None or Task.GENERATE not in model.tasks:
        return "graphs are for models that generate"
    return DecodeGraphs(model, backend, pool, kernel, max_rows, cuda_graphs(model.device))


def why_eager(chunks: Sequence[ChunkInput]) -> str | None:
    """Why a step is none of decoding alone; None when it is: one row a sequence, from which one token is sampled."""
    for chunk in chunks:
        if chunk.task is not Task.GENERATE or len(chunk.reads) != 1 or chunk.own_head:
            # A prompt that is not complete reads no row.
            return "prompt tokens" if chunk.task is Task.GENERATE and not chunk.reads else "another head"
        if chunk.reads[0].speculates or chunk.reads[0].own_head:
            return "an adapter that drafts" if chunk.reads[0].speculates else "another head"
        if chunk.drafts:
            return "draft tokens"
        if len(chunk.tokens) != 1 or len(chunk.sampled) != 1 or chunk.scored:
            return "prompt tokens"
    return None


class DecodeGraphs:
    """The decoding steps of one model, captured by number of rows: 1, 2, 4 and so on up to `max_rows`.

    Captured twice, without adapters and with them, each when first needed or `prepare` is called. Adapters come and go
    without another capture. `backend` is bound already; `make` gives an empty graph.
    """

    inputs: ClassVar[type[StaticInputs]] = StaticInputs

    def __init__(
        self,
        model: Model,
        backend: AttentionBackend,
        pool: KVPool,
        kernel: LoraKernel | None,
        max_rows: int,
        make: Callable[[], Graph],
    ) -> None:
        self._model = model
        self._backend = backend
        self._kernel = kernel
        self._make = make
        self._max_rows = max_rows
        self._page_size = pool.page_size
        # No sequence is longer than the model allows, nor than the whole pool without its scratch page.
        self._width = min(-(-model.max_tokens // pool.page_size), max(pool.pages - 1, 1))
        self._inputs: StaticInputs | None = None
        self._logits: Tensor | None = None
        self._sets: dict[bool, list[_Captured] | str] = {}

    @property
    def nbytes(self) -> int:
        """Memory of what every graph reads and writes; that of their pool is not counted."""
        return (self._inputs.nbytes if self._inputs else 0) + (self._logits.nbytes if self._logits is not None else 0)

    @torch.inference_mode()
    def prepare(self, *, adapted: bool) -> str | None:
        """Capture the steps with or without adapters, if that has not been done; the reason when they cannot be captured."""
        if adapted not in self._sets:
            try:
                self._sets[adapted] = self._capture_all(adapted)
            except Exception as error:  # whatever fails in a capture would not fail in an eager step
                self._sets[adapted] = f"the capture failed: {type(error).__name__}: {error}"
                _log.warning("decoding runs without graphs: %s", self._sets[adapted], exc_info=error)
        found = self._sets[adapted]
        return found if isinstance(found, str) else None

    @torch.inference_mode()
    def run(
        self, chunks: Sequence[ChunkInput], segments: Sequence[Segment], fill_awaited: Callable[[Tensor], None]
    ) -> Tensor | str:
        """Logits `[chunks, vocab]` of a step that `why_eager` lets pass, valid until the next one; else why no graph takes it.

        `segments` are its rows with adapters; `fill_awaited` puts token ids in place that the device alone knows.
        """
        reason = self.prepare(adapted=bool(segments))
        if reason is not None:
            return reason
        captured = next((one for one in self._captured(bool(segments)) if one.rows >= len(chunks)), None)
        if captured is None:
            return "more rows than were captured"
        if max(len(chunk.pages) for chunk in chunks) > self._width:
            return "more pages than were captured"
        if captured.lora is not None:
            reason = captured.lora.fits(segments)
            if reason is not None:
                return reason
        assert self._inputs is not None
        assert self._logits is not None
        self._inputs.fill(chunks, self._page_size)
        fill_awaited(captured.batch.input_ids)
        # Every time, whatever changed since the last replay: what a kernel was told of an older step it would do again.
        captured.attention.replan(captured.batch)
        if captured.lora is not None:
            captured.lora.set(segments)
        captured.graph.replay()
        return self._logits[: len(chunks)]

    def _captured(self, adapted: bool) -> list[_Captured]:
        found = self._sets[adapted]
        assert not isinstance(found, str)
        return found

    def _capture_all(self, adapted: bool) -> list[_Captured] | str:
        """All sizes, the smallest first; else why they cannot be captured."""
        if self._inputs is None:
            device, vocab = self._model.device, self._model.config.vocab_size
            self._inputs = self.inputs(self._max_rows, self._width, device)
            self._logits = torch.zeros(self._max_rows, vocab, dtype=torch.float32, device=device)
        made: list[_Captured] = []
        # The largest first: the memory of the pool that it takes is enough for all others.
        for rows in reversed(sizes(self._max_rows)):
            captured = self._capture(rows, adapted)
            if isinstance(captured, str):
                return captured
            made.append(captured)
        return made[::-1]

    def _capture(self, rows: int, adapted: bool) -> _Captured | str:
        """A step of so many rows."""
        assert self._inputs is not None
        assert self._logits is not None
        self._inputs.fill((), self._page_size)  # padding alone: a capture writes to the scratch page and nowhere else
        batch = self._inputs.batch(rows)
        attention = self._backend.plan_graph(batch)
        if isinstance(attention, str):
            return attention
        lora: GraphLora | None = None
        if adapted:
            found = self._plan_lora(rows)
            if isinstance(found, str):
                return found
            lora = found
        adapters: AdapterRows = NoAdapters() if lora is None else _GraphAdapters(lora, self._sites())
        batch.attention, batch.adapters = attention, adapters
        every = torch.arange(rows, device=self._model.device)
        batch.head_rows = (HeadRows(Task.GENERATE, tuple(range(rows)), (1,) * rows, every, adapters),)
        logits = self._logits[:rows]

        def compute() -> None:
            logits.copy_(self._model(batch).answers[0])

        attention.replan(batch)
        if lora is not None:
            lora.set(())
        graph = self._make()
        graph.capture(compute)
        batch.start_pass()  # the angles are memory of the pool, which the graphs to come use as well
        return _Captured(rows, batch, attention, lora, graph)

    def _plan_lora(self, rows: int) -> GraphLora | str:
        if self._kernel is None:
            return "no LoRA kernel that can be captured"
        return self._kernel.plan_graph(rows, self._sites())

    def _sites(self) -> dict[str, tuple[int, int]]:
        """The linear layers of a decoding step by path, with their sizes."""
        roots = (self._model.backbone, self._model.head(Task.GENERATE))
        layers = (module for root in roots for module in root.modules() if isinstance(module, Linear))
        return {layer.path: (layer.in_features, layer.out_features) for layer in layers}


def sizes(max_rows: int) -> list[int]:
    """The numbers of rows that are captured: doubled each time, as decoding reads the same weights for few rows and many."""
    found = [1]
    while found[-1] < max_rows:
        found.append(min(2 * found[-1], max_rows))
    return found


@dataclass(frozen=True, slots=True)
class _Captured:
    """One captured step, and what must be brought up to date before it is replayed."""

    rows: int
    batch: Batch
    attention: GraphAttention
    lora: GraphLora | None
    graph: Graph


class _GraphAdapters:
    """The adapters of a captured step: the same launches at every linear layer, whichever adapter a row has."""

    def __init__(self, plan: GraphLora, sites: dict[str, tuple[int, int]]) -> None:
        self._plan = plan
        self._sites = frozenset(sites)

    def start(self, site: Site, x: Tensor) -> None:
        if site.path in self._sites:
            self._plan.start(site.path, x)

    def apply(self, site: Site, x: Tensor, y: Tensor) -> Tensor:
        if site.path in self._sites:
            self._plan.add(site.path, x, y)
        return y
