"""LoRA adapters in PEFT's files.

Decides what of `adapter_config.json` is served and where each tensor goes. What is not served is refused by name, and a
tensor without a place is an error: nothing is dropped silently.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lorax_core.adapters.base import Adapter, LowRank
from lorax_core.errors import AdapterError, CheckpointError, listed, nearest
from lorax_core.modeling.linear import Linear
from lorax_core.modeling.model import Model
from lorax_core.weights.checkpoint import opened
from lorax_core.weights.loader import LoadedModel

_KEY = re.compile(r"(?:base_model\.model\.)?(?P<module>.+)\.lora_(?P<side>[AB])(?:\.[^.]+)?\.weight")

# Fields that say how an adapter was trained or stored; none of them changes what it computes.
_HARMLESS = frozenset(
    [
        "arrow_config",
        "auto_mapping",
        "base_model_name_or_path",
        "corda_config",
        "ensure_weight_tying",
        "eva_config",
        "exclude_modules",
        "fan_in_fan_out",
        "inference_mode",
        "init_lora_weights",
        "layers_pattern",
        "layers_to_transform",
        "loftq_config",
        "lora_alpha",
        "lora_dropout",
        "lora_ga_config",
        "megatron_config",
        "megatron_core",
        "monteclora_config",
        "peft_type",
        "peft_version",
        "qalora_group_size",
        "r",
        "rank_pattern",
        "revision",
        "runtime_config",
        "target_modules",
        "task_type",
        "use_rslora",
        "velora_config",
    ]
)

# Initialisations that subtract from the base's weights: such files fit only the changed base.
_CHANGED_BASE = ("pissa", "olora", "loftq", "corda", "lora_ga")


class LoraAdapter(Adapter):
    """Low-rank updates of linear layers, as PEFT's `save_pretrained` writes them.

    Reading checks the files; `bind` checks them against a model. Ranks are those of the tensors and may differ by layer.
    """

    kind = "lora"

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.config = _read_config(self.path)
        self.tensors = _read_tensors(self.path)
        self._identity = _hash(self.config, self.tensors)
        self._deltas: dict[str, LowRank] = {}

    @property
    def identity(self) -> str:
        return self._identity

    @property
    def targets(self) -> tuple[str, ...]:
        return tuple(self._deltas)

    @property
    def nbytes(self) -> int:
        return sum(delta.a.nbytes + delta.b.nbytes for delta in self._deltas.values())

    @property
    def deltas(self) -> Mapping[str, LowRank]:
        return self._deltas

    @property
    def ranks(self) -> tuple[int, ...]:
        """The distinct ranks in the files, ascending."""
        return tuple(sorted({a.shape[0] for a, _ in self.tensors.values()}))

    def bind(self, base: LoadedModel) -> None:
        parts: dict[str, dict[int, LowRank]] = {}
        for module, (a, b) in self.tensors.items():
            target = base.weight_map.resolve_module(module)
            site = base.model.sites.get(target.name)
            if site is None:
                raise self._unknown(module, base)
            if not isinstance(site, Linear):
                raise AdapterError(
                    f"{self.path} changes {module!r}, a {type(site).__name__}; LoRA is served on linear layers only"
                )
            rows = site.out_features if target.part is None else site.parts[target.part]
            if a.shape[1] != site.in_features or b.shape[0] != rows:
                raise AdapterError(
                    f"{self.path} does not fit {module!r}: lora_A is {list(a.shape)} and lora_B {list(b.shape)}, the base "
                    f"maps {site.in_features} to {rows}; it was trained on {self._trained_on()}",
                    hint="load it with the base that it was trained on",
                )
            scale = self._scale(a.shape[0])
            b = target.arranged(b)
            start = 0 if target.part is None else sum(site.parts[: target.part])
            parts.setdefault(target.name, {})[start] = LowRank(a.float(), b.float() * scale)
        model = base.model
        self._deltas = {
            path: _joined(members, model.sites[path].out_features, model) for path, members in parts.items()
        }

    def unbind(self) -> None:
        self._deltas = {}

    def _scale(self, rank: int) -> float:
        alpha = float(self.config["lora_alpha"])
        return alpha / math.sqrt(rank) if self.config.get("use_rslora") else alpha / rank

    def _trained_on(self) -> str:
        return repr(self.config.get("base_model_name_or_path") or "a base that it does not name")

    def _unknown(self, module: str, base: LoadedModel) -> AdapterError:
        names = [name for path in base.model.sites for name in base.weight_map.members(path)]
        close = nearest(base.weight_map.canonical(module), names)
        return AdapterError(
            f"{self.path} changes {module!r}, which {base.spec.model_type!r} does not have; it was trained on "
            f"{self._trained_on()}",
            hint=f"the nearest layer here is {close!r}" if close else "load it with the base that it was trained on",
        )


def _joined(members: dict[int, LowRank], out_features: int, model: Model) -> LowRank:
    """The parts of a layer, by their first output row, as one product.

    A is stacked `[sum of ranks, in]`; B stands block by block, `[out, sum of ranks]`.
    """
    a = torch.cat([delta.a for delta in members.values()])
    b = torch.zeros(out_features, a.shape[0])
    column = 0
    for start, delta in members.items():
        rows, rank = delta.b.shape
        b[start : start + rows, column : column + rank] = delta.b
        column += rank
    return LowRank(a.to(model.device, model.dtype), b.to(model.device, model.dtype))


def _read_config(path: Path) -> dict[str, Any]:
    if not path.is_dir():
        raise AdapterError(f"there is no adapter folder {str(path)!r}", hint="give the folder that PEFT wrote")
    file = path / "adapter_config.json"
    if not file.is_file():
        raise AdapterError(
            f"{path} has no adapter_config.json; it holds {listed(sorted(p.name for p in path.iterdir()))}"
        )
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise AdapterError(f"{file} is not valid JSON: {error}") from error
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        kind = config.get("peft_type") if isinstance(config, dict) else type(config).__name__
        raise AdapterError(f"{path} is an adapter of kind {kind!r}; served is 'LORA'")
    refused = [
        name for name, value in config.items() if name not in _HARMLESS and value not in (None, False, "none", {}, [])
    ]
    if refused:
        told = ", ".join(f"{name}={config[name]!r:.60}" for name in refused)
        raise AdapterError(f"{path} uses what is not served: {told}")
    start = config.get("init_lora_weights")
    if isinstance(start, str) and start.startswith(_CHANGED_BASE):
        raise AdapterError(
            f"{path} was initialised with {start!r}, which changes the base's weights",
            hint="convert it with PEFT: save_pretrained(..., path_initial_model_for_weight_conversion=...)",
        )
    if not isinstance(config.get("lora_alpha"), (int, float)):
        raise AdapterError(f"{file} has no number 'lora_alpha' (found {config.get('lora_alpha')!r})")
    return config


def _read_tensors(path: Path) -> dict[str, tuple[Tensor, Tensor]]:
    """Module name to its A `[rank, in]` and B `[out, rank]`; every tensor of the file belongs to such a pair."""
    file = path / "adapter_model.safetensors"
    if not file.is_file():
        pickled = (
            " (adapter_model.bin is a pickle, which can run code, and is not read)" if any(path.glob("*.bin")) else ""
        )
        raise AdapterError(f"{path} has no adapter_model.safetensors{pickled}")
    sides: dict[str, dict[str, Tensor]] = {}
    leftover: list[str] = []
    try:
        with opened(file) as tensors:
            for name in tensors.keys():  # noqa: SIM118  (not a mapping)
                key = _KEY.fullmatch(name)
                if key is None:
                    leftover.append(name)
                    continue
                tensor = tensors.get_tensor(name)
                if not torch.isfinite(tensor).all():
                    raise AdapterError(f"{file}: {name!r} holds NaN or infinite numbers")
                sides.setdefault(key["module"], {})[key["side"]] = tensor
    except CheckpointError as error:
        raise AdapterError(error.message, hint=error.hint) from error
    if leftover:
        raise AdapterError(f"{file} holds tensors that are not served: {listed(leftover)}")
    if not sides:
        raise AdapterError(f"{file} holds no tensors")
    for module, pair in sides.items():
        if set(pair) != {"A", "B"} or pair["A"].shape[0] != pair["B"].shape[1]:
            shapes = {f"lora_{side}": list(tensor.shape) for side, tensor in sorted(pair.items())}
            raise AdapterError(f"{file}: {module!r} is no pair of lora_A [rank, in] and lora_B [out, rank]: {shapes}")
    return {module: (pair["A"], pair["B"]) for module, pair in sides.items()}


def _hash(config: dict[str, Any], tensors: dict[str, tuple[Tensor, Tensor]]) -> str:
    digest = hashlib.sha256()
    settings = {name: config.get(name) for name in ("lora_alpha", "use_rslora", "task_type")}
    digest.update(json.dumps(settings, sort_keys=True).encode())
    for module in sorted(tensors):
        digest.update(module.encode())
        for tensor in tensors[module]:
            digest.update(f"{tensor.dtype}{tuple(tensor.shape)}".encode())
            digest.update(tensor.contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
