"""What of this machine's kernels an engine may use.

Decides which trials stand before which kernel. On a CPU kernels are compared in the process that uses them, by those who choose
them; on any other device nothing is used before it was tried in a process of its own.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import torch

from lorax_core.adapters.lora_kernels.select import LoadKernel, Verify
from lorax_core.attention.base import AttentionBackend, CacheLayout
from lorax_core.kernels.elementwise import READABLE, Elementwise
from lorax_core.kernels.select import select_elementwise
from lorax_core.modeling.blocks import MLP
from lorax_core.modeling.linear import GateUpLinear, Linear
from lorax_core.modeling.model import Model
from lorax_core.modeling.norm import Norm
from lorax_core.modeling.rotary import RotaryEmbedding
from lorax_core.plugins.spec import BackendSpec
from lorax_core.progress import Report, silent
from lorax_core.serving.trial.run import Trials
from lorax_core.serving.trial.spec import (
    AttentionTrial,
    ElementwiseTrial,
    GraphTrial,
    LoraTrial,
    dtype_name,
    layers_of,
)
from lorax_core.settings import Settings
from lorax_core.types import Task


class ModelTrials:
    """What is tried for one model: the same trials for every caller, so that a verdict holds for all."""

    def __init__(self, model: Model) -> None:
        self._model = model
        self._on = {"device": str(model.device), "dtype": dtype_name(model.dtype)}
        self._layers = [layer.model_dump() for layer in layers_of(model.attention_specs)]

    def attention(self, backend: str, layout: CacheLayout) -> AttentionTrial:
        """A backend, by class path, over all kinds of layers."""
        order = {"backend": backend, "layers": self._layers, **self._on, **_cache(layout)}
        return AttentionTrial.model_validate(order)

    def lora(self, load: LoadKernel) -> LoraTrial:
        """A LoRA kernel at each distinct size of a layer that adapters change."""
        sites = (module for module in self._model.modules() if isinstance(module, Linear))
        sizes = sorted({(site.in_features, site.out_features) for site in sites})
        return LoraTrial.model_validate({"kernel": class_path(load), "sizes": sizes, **self._on})

    def elementwise(self, form: Elementwise) -> ElementwiseTrial:
        """An elementwise form at each width that is normalised, activated or gated, and each number of dimensions that turn."""
        modules = list(self._model.modules())
        widths = {module.in_features for module in modules if isinstance(module, Norm)}
        gates = {module.intermediate for module in modules if isinstance(module, GateUpLinear)}
        gates |= {module.up_proj.out_features for module in modules if isinstance(module, MLP)}
        # 0 as well: layers without rotation store keys all the same.
        turned = {module.rotary_dim for module in modules if isinstance(module, RotaryEmbedding)} | {0}
        sizes = {"widths": sorted(widths), "gates": sorted(gates), "turned": sorted(turned)}
        order = {"form": class_path(type(form)), **sizes, "layers": self._layers, **self._on}
        return ElementwiseTrial.model_validate(order)

    def graphs(self, backend: str, layout: CacheLayout, load: LoadKernel | None = None) -> GraphTrial:
        """Captured steps with a backend, and with the LoRA kernel that `load` gives."""
        order = {"backend": backend, "layers": self._layers, **self._on, **_cache(layout)}
        kernel = None if load is None else class_path(load)
        return GraphTrial.model_validate({**order, "kernel": kernel})


class Trusted:
    """The verdicts on kernels for one model. `settings.trials` says on which types of devices kernels are tried."""

    def __init__(self, model: Model, settings: Settings, report: Report = silent) -> None:
        self._model = model
        self._orders = ModelTrials(model)
        self._trials = Trials(settings, report=report)
        self._tries = model.device.type in settings.trials
        self._any = bool(settings.trials)

    def attention(self, spec: BackendSpec, layout: CacheLayout) -> str | None:
        """Why a backend is not to be used for the model."""
        compiled = spec.backend == COMPILED_BACKEND and self._any
        if spec.backend == READABLE_BACKEND or not (self._tries or compiled):
            return None
        trial = self._orders.attention(spec.backend, layout)
        return self._trials.problem(trial) if self._tries else self._trials.problem_here(trial)

    @property
    def lora(self) -> Verify | None:
        """Why a LoRA kernel is not to be used; None where that is found out in this process."""
        return (lambda load: self._trials.problem(self._orders.lora(load))) if self._tries else None

    def elementwise(self) -> tuple[Elementwise, str]:
        """The form of elementwise arithmetic, and why it is this one."""
        form, reason = select_elementwise(self._model.dtype, self._model.device)
        compiled = class_path(type(form)) == COMPILED_FORM and self._any
        if form is READABLE or not (self._tries or compiled):
            return form, reason
        trial = self._orders.elementwise(form)
        problem = self._trials.problem(trial) if self._tries else self._trials.problem_here(trial)
        return (form, reason) if problem is None else (READABLE, f"no {form.name} kernels: {problem}")

    def graphs(self, backend: AttentionBackend, layout: CacheLayout, load: LoadKernel | None = None) -> str | None:
        """Why decoding is not to be captured with a backend, and with the LoRA kernel that `load` gives."""
        if type(backend).plan_graph is AttentionBackend.plan_graph:
            return f"the backend {backend.name!r} cannot be captured"
        if not self._tries:
            return None
        return self._trials.problem(self._orders.graphs(class_path(type(backend)), layout, load))


def _cache(layout: CacheLayout) -> dict[str, Any]:
    return {"kv_dtype": dtype_name(layout.dtype), "page_size": layout.page_size}


def class_path(found: type | Callable[..., object]) -> str:
    """The path by which another process finds a class or function."""
    return f"{found.__module__}:{found.__qualname__}"


READABLE_BACKEND: Final = "lorax_core.attention.torch:TorchBackend"
"""What everything else is compared with."""
COMPILED_BACKEND: Final = "lorax_core.attention.native:NativeBackend"
COMPILED_FORM: Final = "lorax_core.kernels.native.elementwise:NativeElementwise"
"""Core's own on a CPU, which is compared in the process that uses it."""


def may_be_captured(model: Model) -> bool:
    """Whether steps of a model can be captured at all: decoding, and on a GPU."""
    return model.device.type == "cuda" and model.needs_kv_cache and Task.GENERATE in model.tasks


def sixteen_bit(device: str) -> torch.dtype | None:
    """The dtype of 16 bit that a GPU computes in: bfloat16 where it can; None where there is no GPU."""
    if torch.device(device).type != "cuda":
        return None
    return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
