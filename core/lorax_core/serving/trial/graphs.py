"""Captured decoding steps against eager ones.

Decides which steps are replayed: with fewer rows than were captured and with as many, with adapters that come and go, of
one row and of several.
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Callable
from pkgutil import resolve_name
from typing import Any

import torch
from torch import Tensor, nn

from lorax_core.adapters.deltas import LowRank, RankBlock
from lorax_core.adapters.lora_kernels.base import LoraKernel, Segment, Updates
from lorax_core.attention.base import AttentionBackend
from lorax_core.engine.batcher import Batcher
from lorax_core.engine.graphs import DecodeGraphs, Graph, cuda_graphs
from lorax_core.engine.sequence import Sampling
from lorax_core.engine.step_input import ChunkInput, HeadRead, SamplingRow, StepInput
from lorax_core.kvcache.pool import KVPool
from lorax_core.modeling.blocks import GatedMLP, RotaryAttention
from lorax_core.modeling.config import ModelConfig
from lorax_core.modeling.decoder import Decoder, DecoderLayer
from lorax_core.modeling.heads import LanguageModelHead
from lorax_core.modeling.model import Model
from lorax_core.modeling.norm import RMSNorm
from lorax_core.modeling.rope import Rope
from lorax_core.modeling.rotary import RotaryEmbedding
from lorax_core.plugins.resolve import load_class
from lorax_core.serving.trial.cache import filled_pool, strewn, tried_layers
from lorax_core.serving.trial.compare import off
from lorax_core.serving.trial.kernels import load_kernel
from lorax_core.serving.trial.spec import GraphTrial
from lorax_core.types import Task

_HIDDEN, _VOCAB = 64, 128
_ROWS = 40
# Rows. A graph is replayed twice, and between the two its adapters change and its first row goes back to the base.
_STEPS = (_ROWS, 3, 1, 17, 9, _ROWS, 2)
_MOST_KEYS = 150
_RANKS = (8, 3, 100)
_RUNS = ((0, 1), (1, 3), (5, 26))  # rows of an adapter each, first and last
_WHOLE, _FUSED = "layers.0.self_attn.o_proj", "layers.1.mlp.gate_up_proj"


class _Config(ModelConfig):
    @property
    def max_tokens(self) -> int:
        return 512


@torch.inference_mode()
def try_graphs(trial: GraphTrial) -> str | None:
    """What replayed steps do wrong; None when they give what eager ones give."""
    device, dtype = torch.device(trial.device), trial.torch_dtype
    model = _model(trial)
    backend: AttentionBackend = load_class(trial.backend, None)()
    layout = backend.layout(model.attention_specs, dtype, getattr(torch, trial.kv_dtype), trial.device, trial.page_size)
    if isinstance(layout, str):
        raise RuntimeError(f"refuses the model: {layout}")
    most = -(-_MOST_KEYS // trial.page_size)
    pages = strewn([most] * _ROWS)
    pool = filled_pool(trial, _ROWS * most + 1, layout.dtype)
    backend.bind(model.attention_specs, dtype, pool)
    kernel = load_kernel(trial.kernel, device) if trial.kernel is not None else None
    make: Callable[[], Graph] = (resolve_name(trial.graph) if trial.graph is not None else cuda_graphs)(device)
    graphs = DecodeGraphs(model, backend, pool, kernel, _ROWS, make)
    adapters = _adapters(model, dtype) if kernel is not None else []
    before = pool.data.clone()
    for step, rows in enumerate(_STEPS):
        lengths = [1 + (37 * (step + 1) * (row + 1)) % _MOST_KEYS for row in range(rows)]
        chunks = [
            _chunk(row, length, pages[row][: -(-length // trial.page_size)]) for row, length in enumerate(lengths)
        ]
        segments = _segments(adapters, step, rows)
        eager = _eager(model, backend, kernel, pool, chunks, segments)
        pool.data.copy_(before)
        replayed = graphs.run(chunks, segments, _nothing)
        if isinstance(replayed, str):
            return replayed
        found = replayed.float().clone()
        # The same kernels run, but for other numbers of rows: sums in another order, layer after layer.
        if (problem := off(found.to(dtype), eager.to(dtype), eager, 64 if dtype is torch.float32 else 8)) is not None:
            return f"step {step} of {rows} rows: {problem}"
        before = pool.data.clone()
    return None


def _eager(
    model: Model,
    backend: AttentionBackend,
    kernel: LoraKernel | None,
    pool: KVPool,
    chunks: list[ChunkInput],
    segments: list[Segment],
) -> Tensor:
    batch = Batcher(model, pool.page_size, {}).pack(StepInput(tuple(chunks)))
    batch.attention = backend.plan(batch)
    if kernel is not None and segments:
        batch.adapters = _Adapters(kernel.plan(segments))
    found: Tensor = model(batch).answers[0].float()
    return found.clone()


def _nothing(_: Tensor) -> None:
    """No token of these steps is awaited."""


class _Adapters:
    def __init__(self, plan: Any) -> None:
        self._plan = plan

    def start(self, site: Any, x: Tensor) -> None:
        self._plan.start(site.path, x)

    def apply(self, site: Any, x: Tensor, y: Tensor) -> Tensor:
        self._plan.add(site.path, x, y)
        return y


def _model(trial: GraphTrial) -> Model:
    """A decoder with a layer of each kind, two of the first, and random numbers."""
    first, device = trial.layers[0], torch.device(trial.device)
    kinds = tried_layers(trial)
    config = _Config(
        model_type="trial",
        hidden_size=_HIDDEN,
        num_attention_heads=1,
        vocab_size=_VOCAB,
        num_hidden_layers=len(kinds),
    )
    rope = Rope(type="default", theta=10_000.0, partial=1.0, original_length=512)
    layers = [
        DecoderLayer(
            RotaryAttention(
                _HIDDEN,
                layer.heads,
                layer.kv_heads,
                layer.head_dim,
                rotary=RotaryEmbedding(first.head_dim, rope),
                causal=True,
                window=layer.window,
                soft_cap=layer.soft_cap,
            ),
            GatedMLP(_HIDDEN, 2 * _HIDDEN, "silu"),
            lambda: RMSNorm(_HIDDEN, 1e-6),
        )
        for layer in kinds
    ]
    backbone = Decoder(config, layers, RMSNorm(_HIDDEN, 1e-6))
    model = Model(config, backbone, {Task.GENERATE: LanguageModelHead(config)}, dtype=trial.torch_dtype, device=device)
    generator = torch.Generator().manual_seed(0)
    for parameter in nn.ModuleList([model]).parameters():
        numbers = torch.randn(parameter.shape, generator=generator) * parameter.shape[-1] ** -0.5
        parameter.data = (numbers if parameter.dim() > 1 else numbers + 1).to(trial.torch_dtype)
    return model.to(device)


def _adapters(model: Model, dtype: torch.dtype) -> list[Updates]:
    """Adapters of two layers, one of which is fused and has ranks of its own for each part."""
    generator = torch.Generator().manual_seed(2)

    def drawn(rows: int, width: int, scaled_by: int) -> Tensor:
        return torch.randn(rows, width, generator=generator) / math.sqrt(scaled_by)

    whole, fused = model.sites[_WHOLE], model.sites[_FUSED]
    half = fused.out_features // 2
    made = []
    for rank in _RANKS:
        a = drawn(rank, whole.in_features, whole.in_features)
        update = LowRank.whole(a, drawn(whole.out_features, rank, rank))
        blocks = (
            RankBlock(slice(0, 2), 0, drawn(2, half, 2)),
            RankBlock(slice(2, rank), half, drawn(rank - 2, half, rank)),
        )
        parts = LowRank(drawn(rank, fused.in_features, fused.in_features), blocks)
        made.append(
            Updates(
                {
                    path: one.placed(None, model.sites[path].out_features, model.device, dtype)
                    for path, one in ((_WHOLE, update), (_FUSED, parts))
                }
            )
        )
    return made


def _segments(adapters: list[Updates], step: int, rows: int) -> list[Segment]:
    """Whose rows are whose in a step: adapters change places, and every other step the first row is the base's."""
    return [
        Segment(first, min(last, rows), adapters[(at + step) % len(adapters)])
        for at, (first, last) in enumerate(_RUNS if adapters else ())
        if first < rows and (at > 0 or step % 2 == 0)
    ]


def _chunk(row: int, length: int, pages: list[int]) -> ChunkInput:
    """The newest token of a sequence of `length` tokens."""
    return ChunkInput(
        sequence=row,
        start=length - 1,
        tokens=array("q", [(11 * length + row) % _VOCAB]),
        reads=(HeadRead(Task.GENERATE, range(1)),),
        pages=array("i", pages),
        sampled=(SamplingRow(Sampling(), length),),
    )
