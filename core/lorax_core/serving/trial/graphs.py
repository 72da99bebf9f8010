"""Captured decoding steps against eager ones.

Decides which steps are replayed: with fewer rows than were captured and with as many, with adapters that come and go.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable
from pkgutil import resolve_name
from typing import Any

import torch
from torch import Tensor, nn

from lorax_core.adapters.deltas import LowRank
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
from lorax_core.serving.trial.compare import off
from lorax_core.serving.trial.kernels import load_kernel
from lorax_core.serving.trial.spec import GraphTrial
from lorax_core.types import Task

_HIDDEN, _VOCAB, _ROWS = 64, 128, 8
_SITE = "layers.0.self_attn.o_proj"


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
    pool = _pool(trial, len(model.attention_layers))
    backend.bind(model.attention_specs, dtype, pool)
    kernel = load_kernel(trial.kernel, device) if trial.kernel is not None else None
    make: Callable[[], Graph] = (resolve_name(trial.graph) if trial.graph is not None else cuda_graphs)(device)
    graphs = DecodeGraphs(model, backend, pool, kernel, _ROWS, make)
    adapters = _adapters(model, dtype) if kernel is not None else []
    before = pool.data.clone()
    for step in range(6):
        rows = (_ROWS, 3, 1, 5, 2, _ROWS)[step]
        lengths = [1 + (37 * (step + 1) * (row + 1)) % 150 for row in range(rows)]
        chunks = [_chunk(row, length, trial.page_size) for row, length in enumerate(lengths)]
        segments = [Segment(at, at + 1, updates) for at, updates in enumerate(adapters[step % 2 :]) if at < rows]
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

    def apply(self, site: Any, x: Tensor, y: Tensor) -> Tensor:
        self._plan.add(site.path, x, y)
        return y


def _model(trial: GraphTrial) -> Model:
    """A decoder with one layer of each kind and random numbers."""
    first, device = trial.layers[0], torch.device(trial.device)
    config = _Config(
        model_type="trial",
        hidden_size=_HIDDEN,
        num_attention_heads=1,
        vocab_size=_VOCAB,
        num_hidden_layers=len(trial.layers),
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
        for layer in trial.layers
    ]
    backbone = Decoder(config, layers, RMSNorm(_HIDDEN, 1e-6))
    model = Model(config, backbone, {Task.GENERATE: LanguageModelHead(config)}, dtype=trial.torch_dtype, device=device)
    generator = torch.Generator().manual_seed(0)
    for parameter in nn.ModuleList([model]).parameters():
        numbers = torch.randn(parameter.shape, generator=generator) * parameter.shape[-1] ** -0.5
        parameter.data = (numbers if parameter.dim() > 1 else numbers + 1).to(trial.torch_dtype)
    return model.to(device)


def _pool(trial: GraphTrial, layers: int) -> KVPool:
    first, device = trial.layers[0], torch.device(trial.device)
    pages = _ROWS * -(-160 // trial.page_size) + 1
    pool = KVPool(
        layers=layers,
        pages=pages,
        page_size=trial.page_size,
        kv_heads=first.kv_heads,
        head_dim=first.head_dim,
        dtype=getattr(torch, trial.kv_dtype),
        device=device,
        scales=[(1.0, 1.0)] * layers,
    )
    generator = torch.Generator().manual_seed(1)
    slots = torch.arange(trial.page_size, pages * trial.page_size, device=device)
    for layer in range(layers):
        k, v = (
            torch.randn(len(slots), first.kv_heads, first.head_dim, generator=generator).to(device, trial.torch_dtype)
            for _ in "kv"
        )
        pool.write(layer, k, v, slots)
    return pool


def _adapters(model: Model, dtype: torch.dtype) -> list[Updates]:
    site, generator = model.sites[_SITE], torch.Generator().manual_seed(2)
    made = []
    for rank in (8, 3, 16):
        a = torch.randn(rank, site.in_features, generator=generator) * site.in_features**-0.5
        b = torch.randn(site.out_features, rank, generator=generator) * rank**-0.5
        update = LowRank.whole(a, b).placed(None, site.out_features, model.device, dtype)
        made.append(Updates({_SITE: update}))
    return made


def _chunk(row: int, length: int, page: int) -> ChunkInput:
    """The newest token of a sequence of `length` tokens, whose pages are its own."""
    most = -(-160 // page)
    return ChunkInput(
        sequence=row,
        start=length - 1,
        tokens=array("q", [(11 * length + row) % _VOCAB]),
        reads=(HeadRead(Task.GENERATE, range(1)),),
        pages=array("i", range(1 + row * most, 1 + row * most + -(-length // page))),
        sampled=(SamplingRow(Sampling(), length),),
    )
