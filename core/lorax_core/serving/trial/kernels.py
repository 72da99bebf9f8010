"""A LoRA kernel and an elementwise form against the readable ones.

Decides which rows, ranks and sizes are tried.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from itertools import product
from pkgutil import resolve_name

import torch
from torch import Tensor

from lorax_core.adapters.deltas import LowRank, RankBlock
from lorax_core.adapters.lora_kernels.base import LoraKernel, Segment, Updates
from lorax_core.adapters.lora_kernels.torch import TorchKernel
from lorax_core.kernels.elementwise import READABLE, Angles, Elementwise
from lorax_core.modeling.activation import get_activation
from lorax_core.serving.trial.compare import off
from lorax_core.serving.trial.spec import ElementwiseTrial, LayerKind, LoraTrial
from lorax_core.settings import Settings

# First row, rows and rank of each adapter; rows between them, and the last ones, are the base's.
_LORA_STEPS = {
    "few rows": ((0, 1, 16), (1, 1, 5), (3, 40, 100), (50, 20, 1)),
    "many rows": ((0, 150, 16), (151, 1, 200), (152, 110, 8)),
    "many adapters": tuple((4 * at, 1 + at % 3, (8, 16, 3, 5)[at % 4]) for at in range(12)),
}
_BASE_ROWS = 5
_ROWS = (1, 7, 130)  # of elementwise arithmetic

_Compute = Callable[[Elementwise, list[Tensor]], dict[str, Tensor]]


def load_kernel(path: str, device: torch.device) -> LoraKernel:
    """The kernel that a function at a path loads; raises RuntimeError when it gives none."""
    kernel, reason = resolve_name(path)(Settings.from_env(), device)
    if kernel is None:
        raise RuntimeError(reason)
    found: LoraKernel = kernel
    return found


@torch.inference_mode()
def try_lora(trial: LoraTrial) -> str | None:
    """What a LoRA kernel does wrong; None when it gives what torch gives."""
    device, dtype = torch.device(trial.device), trial.torch_dtype
    kernel = load_kernel(trial.kernel, device)
    generator = torch.Generator().manual_seed(0)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    for (width, out), (name, runs) in product(trial.sizes, _LORA_STEPS.items()):
        rows = max(first + count for first, count, _ in runs) + _BASE_ROWS
        x, y = drawn(rows, width), drawn(rows, out)
        updates = [LowRank.whole(drawn(rank, width) / width**0.5, drawn(out, rank)) for _, _, rank in runs]
        if out > 1:  # a fused layer of which two parts are changed, with ranks of their own
            rank, half = runs[0][2], out // 2
            blocks = (
                RankBlock(slice(0, 3), 0, drawn(3, half)),
                RankBlock(slice(3, rank), half, drawn(rank - 3, out - half)),
            )
            updates[0] = LowRank(drawn(rank, width) / width**0.5, blocks)
        placed = [(first, first + count, update) for (first, count, _), update in zip(runs, updates, strict=True)]
        added = partial(_added, device, placed, x, y)
        problem = off(added(kernel, dtype), added(TorchKernel(), dtype), added(TorchKernel(), torch.float32))
        if problem is not None:
            return f"{width} to {out}, {name}: {problem}"
    return None


def _added(
    device: torch.device,
    updates: list[tuple[int, int, LowRank]],
    x: Tensor,
    y: Tensor,
    kernel: LoraKernel,
    dtype: torch.dtype,
) -> Tensor:
    """y with what the updates of its rows, first and last, add for x."""
    segments = [
        Segment(start, stop, Updates({"site": update.placed(None, y.shape[1], device, dtype)}))
        for start, stop, update in updates
    ]
    found = y.to(device, dtype, copy=True)
    kernel.plan(segments).add("site", x.to(device, dtype), found)
    return found


@torch.inference_mode()
def try_elementwise(trial: ElementwiseTrial) -> str | None:
    """What an elementwise form does wrong; None when it gives what the readable one gives."""
    device, dtype = torch.device(trial.device), trial.torch_dtype
    form: Elementwise = resolve_name(trial.form)()
    for case, compute, inputs in _cases(trial):
        found, readable, exact = (
            compute(by, [each.to(device, kind) for each in inputs])
            for by, kind in ((form, dtype), (READABLE, dtype), (READABLE, torch.float32))
        )
        for name in found:
            if (problem := off(found[name], readable[name], exact[name])) is not None:
                return f"{name} of {case}: {problem}"
    return None


def _cases(trial: ElementwiseTrial) -> Iterator[tuple[str, _Compute, list[Tensor]]]:
    """What is computed of which rows, and how that is called."""
    generator = torch.Generator().manual_seed(0)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(trial.torch_dtype)

    for rows in _ROWS:
        for width in trial.widths:
            inputs = [drawn(rows, width), drawn(rows, width), drawn(width), drawn(width)]
            yield f"{rows} rows of {width}", _normed, inputs
        for width in trial.gates:
            yield f"{rows} rows of {width}", _gated, [drawn(rows, 2 * width)]
        for layer, turned in product(trial.layers, trial.turned):
            if turned <= layer.head_dim:
                heads = drawn(rows, layer.heads + 2 * layer.kv_heads, layer.head_dim)
                turns = [torch.rand(rows, 1, turned // 2, generator=generator) * 6] if turned else []
                yield f"{rows} rows, {layer}, {turned} of them turned", partial(_turned, layer), [heads, *turns]


def _normed(by: Elementwise, inputs: list[Tensor]) -> dict[str, Tensor]:
    x, residual, weight, bias = inputs
    found = {
        "rms_norm": by.rms_norm(x, weight, 1e-6),
        "rms_norm with an offset": by.rms_norm(x, weight, 1e-6, 1.0),
        "layer_norm": by.layer_norm(x, weight, bias, 1e-5),
        "layer_norm without a bias": by.layer_norm(x, weight, None, 1e-5),
        "layer_norm without weight and bias": by.layer_norm(x, None, None, 1e-5),
    }
    for name, (normed, total) in {
        "add_rms_norm": by.add_rms_norm(x, residual, weight, 1e-6),
        "add_rms_norm with an offset": by.add_rms_norm(x, residual, weight, 1e-6, 1.0),
        "add_layer_norm": by.add_layer_norm(x, residual, weight, bias, 1e-5),
        "add_layer_norm without a bias": by.add_layer_norm(x, residual, weight, None, 1e-5),
        "add_layer_norm without weight and bias": by.add_layer_norm(x, residual, None, None, 1e-5),
    }.items():
        found |= {name: normed, f"the sum of {name}": total}
    return found


def _gated(by: Elementwise, inputs: list[Tensor]) -> dict[str, Tensor]:
    names = ("silu", "gelu", "gelu_new", "relu")
    found = {f"gated {name}": by.gated_act(inputs[0], get_activation(name)) for name in names}
    return found | {name: by.act(inputs[0], get_activation(name)) for name in names}


def _turned(layer: LayerKind, by: Elementwise, inputs: list[Tensor]) -> dict[str, Tensor]:
    heads, *turns = inputs
    q, k, v = torch.split(heads, [layer.heads, layer.kv_heads, layer.kv_heads], dim=1)  # [rows, heads, dim] each
    angles = Angles(turns[0].cos(), turns[0].sin()) if turns else None
    found = dict(zip(("turned queries", "turned keys"), by.rotate(q, k, angles), strict=True)) if angles else {}
    if layer.causal:
        # Ones: a row that is not written, or written elsewhere, shows.
        k_cache, v_cache = (torch.ones(len(q) + 1, 4, *k.shape[1:], dtype=q.dtype, device=q.device) for _ in "kv")
        slots = torch.arange(len(q), device=q.device).flip(0) * 4 + 2
        found["queries beside stored keys"] = by.rotate_and_store(q, k, v, angles, k_cache, v_cache, slots)
        found |= {"stored keys": k_cache, "stored values": v_cache}
    return found
