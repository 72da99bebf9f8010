"""A backend against the torch backend.

Decides which steps are tried: those at which kernels change their ways, such as full pages, the edges of windows, more rows
than a tile has, more sequences than a block has, and few rows with many keys, which are computed in parts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from lorax_core.attention.base import AttentionBackend, HostAndDevice
from lorax_core.attention.torch import TorchBackend
from lorax_core.kernels.elementwise import Angles
from lorax_core.modeling.attention import Attention
from lorax_core.plugins.resolve import load_class
from lorax_core.serving.trial.cache import filled_pool, strewn, tried_layers
from lorax_core.serving.trial.compare import off
from lorax_core.serving.trial.spec import AttentionTrial, LayerKind

_LONG = 2000  # tokens of a step from which on it is computed for each kind of layer once
_MOST_KEYS = 255  # of a window: with more, one key too many drowns in rounding


def steps(page: int, windows: Sequence[int | None]) -> dict[str, list[tuple[int, int]]]:
    """The steps by name; each sequence as (tokens in the cache, new tokens)."""
    edges = sorted({size for window in windows if window for size in (window - 1, window, window + 1) if size > 0})
    return {
        "prompts": [(0, 1), (0, page), (0, page + 1), (0, 129)],
        "prompts after cached tokens": [(page - 1, 2), (page, 17), (3 * page + 1, 129)],
        "a long prompt": [(page + 1, 261)],
        "decoding": [(0, 1), (page - 1, 1), (page, 1), (5 * page + 3, 1), *((edge, 1) for edge in edges)],
        "decoding over many keys": [(2047, 1), (9000, 1)],
        "a prompt over many keys": [(4200, 9)],
        "decoding of many": [(5 * at % 61, 1) for at in range(33)],
        "all at once": [(0, 40), (2 * page, 1), (7, 5), (1500, 1), (0, 1), *((at, 1 + at % 3) for at in range(12))],
    }


@torch.inference_mode()
def try_attention(trial: AttentionTrial) -> str | None:
    """What a backend does wrong; None when it gives what torch gives."""
    causal = any(layer.causal for layer in trial.layers)
    narrow = [
        layer.model_copy(update={"window": layer.window and min(layer.window, _MOST_KEYS)}) for layer in trial.layers
    ]
    trial = trial.model_copy(update={"layers": tuple(narrow)})
    windows = [layer.window for layer in trial.layers]
    for number, (name, sequences) in enumerate(steps(trial.page_size, windows).items()):
        # Bidirectional layers have no past.
        step = _Step(trial, sequences if causal else [(0, new) for _, new in sequences], number)
        answers = step.answers(load_class(trial.backend, None)(), trial.torch_dtype)
        readable = step.answers(TorchBackend(), trial.torch_dtype)
        exact = readable if trial.dtype == "float32" else step.answers(TorchBackend(), torch.float32)
        for layer, mine, theirs, right in zip(step.layers, answers, readable, exact, strict=True):
            if (problem := off(mine, theirs, right)) is not None:
                return f"{name}, {layer}: {problem}"
    return None


@dataclass(frozen=True)
class _Rows:
    query_starts: HostAndDevice
    kv_lengths: HostAndDevice
    page_table: HostAndDevice | None
    slots: Tensor | None


class _Step:
    """One step over a cache whose pages are strewn about; the numbers are the same for every backend."""

    def __init__(self, trial: AttentionTrial, sequences: Sequence[tuple[int, int]], number: int) -> None:
        self._trial = trial
        self._sequences = sequences
        self._number = number
        self._first = int(sum(past + new for past, new in sequences) > _LONG)
        self._device = torch.device(trial.device)
        page = trial.page_size
        counts = [-(-(past + new) // page) for past, new in sequences]
        self._pages = sum(counts) + 1
        self._table = torch.zeros(len(counts), max(counts), dtype=torch.int32)
        for row, pages in zip(self._table, strewn(counts), strict=True):
            row[: len(pages)] = torch.tensor(pages, dtype=torch.int32)
        self._slots = torch.tensor(
            [
                int(row[at // page]) * page + at % page
                for row, (past, new) in zip(self._table, sequences, strict=True)
                for at in range(past, past + new)
            ]
        )

    @property
    def layers(self) -> list[LayerKind]:
        """The layers that it is computed for."""
        return tried_layers(self._trial)[self._first :]

    def answers(self, backend: AttentionBackend, dtype: torch.dtype) -> list[Tensor]:
        """What each layer gives, computed in `dtype`: `[tokens, heads, dim]`."""
        trial, specs = self._trial, [layer.spec for layer in self._trial.layers]
        causal = any(spec.causal for spec in specs)
        kv_dtype = getattr(torch, trial.kv_dtype) if trial.kv_dtype.startswith("float8") else dtype
        layout = backend.layout(specs, dtype, kv_dtype, trial.device, trial.page_size)
        if isinstance(layout, str):
            raise RuntimeError(f"refuses the model: {layout}")
        backend.bind(specs, dtype, filled_pool(trial, self._pages, kv_dtype, self._first) if causal else None)
        plan = backend.plan(self._rows(causal))
        generator = torch.Generator().manual_seed(0)
        return [self._layer(plan, at, layer, dtype, generator) for at, layer in enumerate(self.layers, self._first)]

    def _layer(self, plan: object, at: int, layer: LayerKind, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
        spec = layer.spec
        tokens = sum(new for _, new in self._sequences)
        module = Attention(
            spec.heads, spec.kv_heads, spec.head_dim, causal=spec.causal, window=spec.window, soft_cap=spec.soft_cap
        )
        module.index = at
        sizes = [spec.heads, spec.kv_heads, spec.kv_heads]
        # As a layer has them: views of one fused projection, whose rows lie apart.
        q, k, v = torch.split(self._drawn((tokens, sum(sizes), spec.head_dim), dtype, generator), sizes, dim=1)
        if spec.soft_cap is not None:
            q = q * (spec.soft_cap / 2)  # so that scores reach the cap
        # Heads that turn whole, in their first dimensions alone, and not at all.
        half = (spec.head_dim // 2, spec.head_dim // 4, 0)[(at + self._number) % 3]
        turns = torch.rand(tokens, 1, half, generator=generator) * 6
        angles = Angles(*(self._placed(each, dtype) for each in (turns.cos(), turns.sin()))) if half else None
        found: Tensor = plan.forward(module, q, k, v, angles)  # type: ignore[attr-defined]
        return found

    def _rows(self, causal: bool) -> _Rows:
        starts = [0, *accumulate(new for _, new in self._sequences)]
        return _Rows(
            self._both(torch.tensor(starts, dtype=torch.int32)),
            self._both(torch.tensor([past + new for past, new in self._sequences], dtype=torch.int32)),
            self._both(self._table) if causal else None,
            self._slots.to(self._device) if causal else None,
        )

    def _both(self, tensor: Tensor) -> HostAndDevice:
        return HostAndDevice(tensor, tensor.to(self._device))

    def _drawn(self, shape: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator) -> Tensor:
        return self._placed(torch.randn(shape, generator=generator), dtype)

    def _placed(self, tensor: Tensor, dtype: torch.dtype) -> Tensor:
        # Rounded to the trial's dtype first, so that every backend computes with the same numbers.
        return tensor.to(self._trial.torch_dtype).to(self._device, dtype)
