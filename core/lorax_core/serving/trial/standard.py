"""What `lorax doctor --verify` tries: all that this machine offers, for a model or for standard shapes.

Decides on sizes that published models have: heads of 64 and 128, grouped queries, windows, caps, encoders.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

import torch

from lorax_core.adapters.lora_kernels.select import KERNELS, LoadKernel
from lorax_core.adapters.lora_kernels.triton import load_triton_kernel
from lorax_core.attention.base import AttentionBackend, CacheLayout
from lorax_core.attention.select import why_not
from lorax_core.kernels.elementwise import READABLE
from lorax_core.kernels.select import select_elementwise
from lorax_core.modeling.model import Model
from lorax_core.plugins.resolve import load_class
from lorax_core.plugins.spec import BackendSpec
from lorax_core.serving.trial.spec import TRIAL, LayerKind, Trial, dtype_name
from lorax_core.serving.trial.trusted import READABLE_BACKEND, ModelTrials, class_path, may_be_captured, sixteen_bit
from lorax_core.settings import Settings

_KINDS: Final[Mapping[str, tuple[LayerKind, ...]]] = {
    "heads of 64": (LayerKind(heads=14, kv_heads=2, head_dim=64, causal=True),),
    "heads of 128, windows": (
        LayerKind(heads=8, kv_heads=2, head_dim=128, causal=True),
        LayerKind(heads=8, kv_heads=2, head_dim=128, causal=True, window=128),
    ),
    "a cap": (LayerKind(heads=8, kv_heads=4, head_dim=128, causal=True, window=64, soft_cap=30.0),),
    "an encoder": (LayerKind(heads=6, kv_heads=6, head_dim=64, causal=False),),
}
_SIZES: Final = ((896, 1152), (896, 9728), (4864, 896))
_ROWS: Final = {"widths": (896, 4096), "gates": (4864,), "turned": (0, 64, 128)}


def standard_trials(
    backends: Sequence[BackendSpec], device: str, settings: Settings
) -> tuple[list[Trial], dict[str, str]]:
    """Trials of whatever this machine would use beside plain torch; and what was refused, with the reason."""
    dtypes = [dtype] if (dtype := sixteen_bit(device)) is not None else [torch.float32, torch.bfloat16]
    orders: list[dict[str, Any]] = []
    refused: dict[str, str] = {}
    for spec in backends:
        if spec.backend == READABLE_BACKEND:
            continue
        if (reason := why_not(spec, device)) is not None:
            refused[spec.name] = reason
            continue
        for dtype in dtypes:
            for name, kinds in _KINDS.items():
                orders += _of_backend(spec, name, kinds, device, dtype, refused)
    for dtype in dtypes:
        on = {"device": device, "dtype": dtype_name(dtype)}
        orders += _of_kernels(on, dtype, settings, refused)
    return [TRIAL.validate_python(order) for order in orders], refused


def model_trials(
    model: Model, backends: Sequence[BackendSpec], settings: Settings
) -> tuple[list[Trial], dict[str, str]]:
    """Trials of whatever this machine could use for a model, those that an engine asks for; and what was refused."""
    orders, device, dtype = ModelTrials(model), model.device, model.dtype
    made: list[Trial] = []
    refused: dict[str, str] = {}
    captured = may_be_captured(model)
    adapted = captured and _lora_problem(load_triton_kernel, settings, dtype, device) is None
    for spec in backends:
        if spec.backend == READABLE_BACKEND:
            continue
        layout: CacheLayout | str | None = why_not(spec, str(device))
        if layout is None:
            layout = load_class(spec.backend, None)().layout(model.attention_specs, dtype, dtype, device.type)
        if not isinstance(layout, CacheLayout):
            refused[spec.name] = layout
            continue
        made.append(orders.attention(spec.backend, layout))
        if not _has_graphs(spec):
            continue
        if captured:
            made.append(orders.graphs(spec.backend, layout))
        if adapted:
            made.append(orders.graphs(spec.backend, layout, load_triton_kernel))
    for name, load in KERNELS:
        if (problem := _lora_problem(load, settings, dtype, device)) is not None:
            refused[f"LoRA kernel {name}"] = problem
        else:
            made.append(orders.lora(load))
    form, reason = select_elementwise(dtype, device)
    if form is READABLE:
        refused["elementwise"] = reason
    else:
        made.append(orders.elementwise(form))
    return made, refused


def _lora_problem(load: LoadKernel, settings: Settings, dtype: torch.dtype, device: torch.device) -> str | None:
    """Why a LoRA kernel computes nothing of this dtype here; None when it may."""
    kernel, reason = load(settings, device)
    return reason if kernel is None else kernel.supports(dtype, device)


def _of_backend(
    spec: BackendSpec, name: str, kinds: tuple[LayerKind, ...], device: str, dtype: torch.dtype, refused: dict[str, str]
) -> list[dict[str, Any]]:
    layout: CacheLayout | str
    try:
        layout = load_class(spec.backend, None)().layout([kind.spec for kind in kinds], dtype, dtype, device)
    except Exception as error:  # a backend that is broken must not keep the others from being tried
        layout = f"its layout() failed: {type(error).__name__}: {error}"
    if not isinstance(layout, CacheLayout):
        refused[f"{spec.name}, {name}, {dtype_name(dtype)}"] = layout
        return []
    cache = {"kv_dtype": dtype_name(layout.dtype), "page_size": layout.page_size}
    order = {"device": device, "dtype": dtype_name(dtype), "backend": spec.backend, "layers": kinds, **cache}
    made = [{"kind": "attention", **order}]
    # Graphs are for decoding, on a GPU.
    if _has_graphs(spec) and kinds[0].causal and torch.device(device).type == "cuda":
        made.append({"kind": "graphs", **order})
    return made


def _of_kernels(
    on: dict[str, Any], dtype: torch.dtype, settings: Settings, refused: dict[str, str]
) -> list[dict[str, Any]]:
    made: list[dict[str, Any]] = []
    device = torch.device(on["device"])
    for name, load in KERNELS:
        if (problem := _lora_problem(load, settings, dtype, device)) is not None:
            refused[f"LoRA kernel {name}"] = problem
        else:
            made.append({"kind": "lora", "kernel": class_path(load), "sizes": _SIZES, **on})
    form, reason = select_elementwise(dtype, device)
    if form is READABLE:
        refused["elementwise"] = reason
    else:
        layers = [kinds[0] for kinds in _KINDS.values()]
        made.append({"kind": "elementwise", "form": class_path(type(form)), "layers": layers, **_ROWS, **on})
    return made


def _has_graphs(spec: BackendSpec) -> bool:
    return load_class(spec.backend, None).plan_graph is not AttentionBackend.plan_graph  # type: ignore[attr-defined]
