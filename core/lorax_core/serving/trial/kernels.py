"""A LoRA kernel and an elementwise form against the readable ones.

Decides which rows, ranks and sizes are tried.
"""

from __future__ import annotations

from pkgutil import resolve_name

import torch
from torch import Tensor

from lorax_core.adapters.deltas import LowRank, RankBlock
from lorax_core.adapters.lora_kernels.base import LoraKernel, Segment, Updates
from lorax_core.adapters.lora_kernels.torch import TorchKernel
from lorax_core.kernels.elementwise import READABLE, Angles, Elementwise
from lorax_core.modeling.activation import get_activation
from lorax_core.serving.trial.compare import off
from lorax_core.serving.trial.spec import ElementwiseTrial, LoraTrial
from lorax_core.settings import Settings

_RANKS = (16, 5, 100, 1)
_RUNS = ((0, 1), (1, 1), (3, 130), (140, 40))  # first row and rows of each adapter; others are the base's
_ROWS = 190


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

    for width, out in trial.sizes:
        updates = [LowRank.whole(drawn(rank, width) / width**0.5, drawn(out, rank)) for rank in _RANKS]
        if out > 1:  # a fused layer of which two parts are changed, with ranks of their own
            half = out // 2
            blocks = (RankBlock(slice(0, 3), 0, drawn(3, half)), RankBlock(slice(3, 16), half, drawn(13, out - half)))
            updates[0] = LowRank(drawn(16, width) / width**0.5, blocks)
        x, y = drawn(_ROWS, width), drawn(_ROWS, out)

        def added(
            by: LoraKernel, kind: torch.dtype, x: Tensor = x, y: Tensor = y, updates: list[LowRank] = updates
        ) -> Tensor:
            segments = [
                Segment(first, first + rows, Updates({"site": update.placed(None, y.shape[1], device, kind)}))
                for (first, rows), update in zip(_RUNS, updates, strict=True)
            ]
            found = y.to(device, kind, copy=True)
            by.plan(segments).add("site", x.to(device, kind), found)
            return found

        problem = off(added(kernel, dtype), added(TorchKernel(), dtype), added(TorchKernel(), torch.float32))
        if problem is not None:
            return f"{width} to {out}: {problem}"
    return None


@torch.inference_mode()
def try_elementwise(trial: ElementwiseTrial) -> str | None:
    """What an elementwise form does wrong; None when it gives what the readable one gives."""
    device, dtype = torch.device(trial.device), trial.torch_dtype
    form: Elementwise = resolve_name(trial.form)()
    generator = torch.Generator().manual_seed(0)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    for rows in (1, 7, 130):
        for width in trial.widths:
            inputs = drawn(rows, width), drawn(rows, width), drawn(width), drawn(width), drawn(rows, 2 * width)
            found, readable, exact = (
                _normed(by, [each.to(device, kind) for each in inputs])
                for by, kind in ((form, dtype), (READABLE, dtype), (READABLE, torch.float32))
            )
            for name in found:
                if (problem := off(found[name], readable[name], exact[name])) is not None:
                    return f"{name} of {rows} rows of {width}: {problem}"
        for layer in trial.layers:
            heads = drawn(rows, layer.heads + 2 * layer.kv_heads, layer.head_dim)
            turns = torch.rand(rows, 1, layer.head_dim // 2, generator=generator) * 6
            sizes = [layer.heads, layer.kv_heads, layer.kv_heads]
            found, readable, exact = (
                _stored(by, heads.to(device, kind), turns.to(device), sizes)
                for by, kind in ((form, dtype), (READABLE, dtype), (READABLE, torch.float32))
            )
            for name in found:
                if (problem := off(found[name], readable[name], exact[name])) is not None:
                    return f"{name} of {rows} rows, {layer}: {problem}"
    return None


def _normed(by: Elementwise, inputs: list[Tensor]) -> dict[str, Tensor]:
    x, residual, weight, bias, gate_up = inputs
    rms, rms_total = by.add_rms_norm(x, residual, weight, 1e-6)
    layer, layer_total = by.add_layer_norm(x, residual, weight, bias, 1e-5)
    return {
        "rms_norm": by.rms_norm(x, weight, 1e-6),
        "rms_norm with an offset": by.rms_norm(x, weight, 1e-6, 1.0),
        "layer_norm": by.layer_norm(x, weight, bias, 1e-5),
        "add_rms_norm": rms,
        "the sum of add_rms_norm": rms_total,
        "add_layer_norm": layer,
        "the sum of add_layer_norm": layer_total,
        **{
            f"gated {name}": by.gated_act(gate_up, get_activation(name))
            for name in ("silu", "gelu", "gelu_new", "relu")
        },
    }


def _stored(by: Elementwise, heads: Tensor, turns: Tensor, sizes: list[int]) -> dict[str, Tensor]:
    q, k, v = torch.split(heads, sizes, dim=1)  # [rows, heads, dim] each
    angles = Angles(turns.cos().to(heads.dtype), turns.sin().to(heads.dtype))
    # Ones: a row that is not written, or written elsewhere, shows.
    k_cache, v_cache = (torch.ones(len(q) + 1, 4, *k.shape[1:], dtype=q.dtype, device=q.device) for _ in "kv")
    slots = torch.arange(len(q), device=q.device).flip(0) * 4 + 2
    rotated = by.rotate_and_store(q, k, v, angles, k_cache, v_cache, slots)
    return {"rotated queries": rotated, "stored keys": k_cache, "stored values": v_cache}
