"""The files that PEFT writes.

Decides what of `adapter_config.json` is supported, and sorts the tensors by module and role. An error names
everything else. Knows nothing of models: whether a module exists is decided in `lora`.
"""

from __future__ import annotations

import functools
import hashlib
import json
import math
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lorax_core.errors import AdapterError, CheckpointError, listed
from lorax_core.patterns import UntrustedPattern
from lorax_core.types import Task
from lorax_core.untrusted import read_json
from lorax_core.weights.checkpoint import opened

TASKS = {
    "CAUSAL_LM": Task.GENERATE,
    "FEATURE_EXTRACTION": Task.EMBED,
    "TOKEN_CLS": Task.TOKEN_CLASSIFICATION,
    "SEQ_CLS": Task.SEQUENCE_CLASSIFICATION,
}

# Fields that say how an adapter was trained or stored, or whose effect is in the tensors.
_HARMLESS = frozenset(
    """
    alpha_pattern arrow_config auto_mapping base_model_name_or_path bias corda_config ensure_weight_tying eva_config
    exclude_modules fan_in_fan_out inference_mode init_lora_weights layers_pattern layers_to_transform loftq_config
    lora_alpha lora_bias lora_dropout lora_ga_config megatron_config megatron_core modules_to_save monteclora_config
    peft_type peft_version qalora_group_size r rank_pattern revision runtime_config target_modules task_type
    trainable_token_indices use_dora use_rslora velora_config
    """.split()  # noqa: SIM905
)

# Initialisations that subtract from the base's weights: such files fit only the changed base.
_CHANGED_BASE = ("pissa", "olora", "loftq", "corda", "lora_ga")

# What stands behind the module in a tensor's name, the adapter's own name left out. Magnitudes and embeddings are stored with
# and without a leaf, by version.
_ROLES = {
    "lora_A.weight": "a",
    "lora_B.weight": "b",
    "lora_B.bias": "b_bias",
    "base_layer.weight": "weight",
    "base_layer.bias": "bias",
    "token_adapter.trainable_tokens_delta": "tokens",
    **{f"lora_embedding_A{leaf}": "embedding_a" for leaf in ("", ".weight", ".bias")},
    **{f"lora_embedding_B{leaf}": "embedding_b" for leaf in ("", ".weight", ".bias")},
    **{f"lora_magnitude_vector{leaf}": "magnitude" for leaf in ("", ".weight", ".bias")},
    "weight": "weight",
    "bias": "bias",
}
_NAMED = re.compile(
    r"(\.lora_(?:A|B|embedding_A|embedding_B|magnitude_vector))\.(?!weight$|bias$)[^.]+(?=\.weight$|\.bias$|$)"
)
_SAVED = re.compile(r"\.modules_to_save(?:\.(?!weight$|bias$)[^.]+)?(?=\.)")


@dataclass
class ModuleTensors:
    """The tensors of one module by role, None where the files have none. Shapes are PEFT's."""

    a: Tensor | None = None  # [rank, in]
    b: Tensor | None = None  # [out, rank]
    b_bias: Tensor | None = None  # [out]
    embedding_a: Tensor | None = None  # [rank, vocab]
    embedding_b: Tensor | None = None  # [dim, rank]
    magnitude: Tensor | None = None  # [out]
    weight: Tensor | None = None  # as the base's
    bias: Tensor | None = None  # as the base's
    tokens: Tensor | None = None  # [tokens, dim]
    token_ids: tuple[int, ...] = ()  # whose rows `tokens` are

    def items(self) -> Iterator[tuple[str, Tensor]]:
        """Roles that are filled."""
        yield from ((role, value) for role, value in vars(self).items() if isinstance(value, Tensor))

    @property
    def is_saved(self) -> bool:
        """Whether it has a weight or a bias that is as the base's."""
        return self.weight is not None or self.bias is not None

    @property
    def pair(self) -> tuple[Tensor, Tensor] | None:
        """A and B of its low-rank update, of a layer or of an embedding; None without one."""
        a, b = (self.a, self.b) if self.a is not None else (self.embedding_a, self.embedding_b)
        return (a, b) if a is not None and b is not None else None

    @property
    def rank(self) -> int | None:
        """Of its low-rank update; None without one."""
        return self.pair[0].shape[0] if self.pair is not None else None

    def meta(self) -> ModuleTensors:
        """Its shapes: on the meta device, but for the weight and the bias, which have to be compared with the base's."""
        made = replace(self)
        for role, tensor in self.items():
            if role not in ("weight", "bias"):
                setattr(made, role, tensor.to("meta"))
        return made


@dataclass
class PeftFiles:
    """An adapter folder, read and sorted."""

    path: Path
    config: dict[str, Any]
    modules: dict[str, ModuleTensors] = field(default_factory=dict)

    @property
    def trained_on(self) -> str:
        """The base that the files name, for errors."""
        name = self.config.get("base_model_name_or_path")
        return repr(name) if name else "a base that it does not name"

    @property
    def task(self) -> Task | None:
        """The task that the files name."""
        return TASKS.get(str(self.config.get("task_type")))

    @property
    def ranks(self) -> tuple[int, ...]:
        """The distinct ranks of its low-rank updates, ascending."""
        return tuple(sorted({one.rank for one in self.modules.values() if one.rank is not None}))

    def scale(self, module: str, rank: int) -> float:
        """`alpha / r`, or `alpha / sqrt(r)`; alpha may be the module's own. Raises AdapterError for a rank of 0."""
        if rank < 1:
            raise AdapterError(
                f"{self.path} has an update of rank 0 for {module!r}", hint="leave the module out of the adapter"
            )
        matched = (alpha for pattern, alpha in self._alphas if pattern.fullmatch(module))
        alpha = next(matched, float(self.config["lora_alpha"]))
        return alpha / math.sqrt(rank) if self.config.get("use_rslora") else alpha / rank

    @functools.cached_property
    def _alphas(self) -> list[tuple[UntrustedPattern, float]]:
        """Modules whose alpha is their own, in order: the first that matches counts."""
        patterns = self.config.get("alpha_pattern") or {}
        source = f"alpha_pattern of {self.path}"
        # As PEFT matches them: the whole name, or its end from a dot on.
        return [
            (UntrustedPattern(rf"(.*\.)?({key})", source, AdapterError), float(alpha))
            for key, alpha in patterns.items()
        ]

    def token_ids(self, module: str) -> list[int]:
        """Ids whose rows were trained in a module."""
        indices = self.config.get("trainable_token_indices")
        if isinstance(indices, dict):
            matched = next((key for key in indices if module == key or module.endswith(f".{key}")), None)
            indices = indices.get(matched)
        if not isinstance(indices, list) or not all(isinstance(index, int) for index in indices):
            raise AdapterError(f"{self.path} trains rows of {module!r}, but trainable_token_indices does not say which")
        return indices

    def identity(self, extra: Iterable[object] = ()) -> str:
        """Hash of the tensors and of the settings that change their effect, with `extra` settings given at load."""
        digest = hashlib.sha256()
        # The rank is not among them: the shapes of the tensors, which are hashed too, hold it.
        names = ("lora_alpha", "use_rslora", "task_type", "alpha_pattern", "trainable_token_indices")
        digest.update(json.dumps([self.config.get(name) for name in names], sort_keys=True).encode())
        digest.update(repr(list(extra)).encode())
        # Sorted, since the order in which a file lists its tensors must not change the identity.
        for module in sorted(self.modules):
            for role, tensor in self.modules[module].items():
                digest.update(f"{module} {role} ".encode() + content(tensor))
        return digest.hexdigest()


def read_peft(path: str | Path) -> PeftFiles:
    """Read an adapter folder; raises AdapterError naming the file, setting or tensor that is bad or not supported."""
    folder = Path(path)
    config = _read_config(folder)
    files = PeftFiles(folder, config)
    leftover: list[str] = []
    doubled: set[tuple[str, str]] = set()
    # The base's own numbers beside a saved module, which PEFT writes with bias="all".
    originals: list[tuple[str, str]] = []
    for name, tensor in read_tensors(_tensor_files(folder)):
        spelt = _SAVED.sub("", name)
        module, role = _split(spelt.replace(".original_module.", "."))
        if not module:
            leftover.append(name)
            continue
        if ".original_module." in spelt:
            originals.append((name, module))
            continue
        tensors = files.modules.setdefault(module, ModuleTensors())
        before = getattr(tensors, role)
        # A saved module's bias stands there under its plain name too, with bias="all".
        if spelt != name:
            doubled.add((module, role))
        again = (module, role) in doubled
        if before is not None and not (again and before.dtype == tensor.dtype and torch.equal(before, tensor)):
            raise AdapterError(f"{folder}: {name!r} is there twice, under two spellings")
        setattr(tensors, role, tensor)
    leftover += [
        name for name, module in originals if module not in files.modules or not files.modules[module].is_saved
    ]
    if leftover:
        raise AdapterError(f"{folder} holds tensors that are not supported: {listed(leftover)}")
    if not files.modules:
        raise AdapterError(f"{folder} holds no tensors")
    for module, tensors in files.modules.items():
        _check_pairs(folder, module, tensors)
        _check_claims(files, module, tensors)
        if tensors.tokens is not None:
            tensors.token_ids = tuple(files.token_ids(module))
    _check_saved(files)
    if config.get("trainable_token_indices") and all(tensors.tokens is None for tensors in files.modules.values()):
        stated = f"trainable_token_indices={config['trainable_token_indices']!r:.60}"
        raise AdapterError(f"{folder} says {stated}, but holds no trained tokens")
    return files


def _split(name: str) -> tuple[str, str]:
    """The module and the role of a tensor; the module is empty when there is no such role."""
    name = _NAMED.sub(r"\1", name).removeprefix("base_model.model.")
    ending = next((ending for ending in _ROLES if name.endswith(f".{ending}")), None)
    return (name.removesuffix(f".{ending}"), _ROLES[ending]) if ending is not None else ("", "")


def _check_pairs(folder: Path, module: str, tensors: ModuleTensors) -> None:
    for pair, names in (
        ({"lora_A": tensors.a, "lora_B": tensors.b}, "lora_A [rank, in] and lora_B [out, rank]"),
        (
            {"lora_embedding_A": tensors.embedding_a, "lora_embedding_B": tensors.embedding_b},
            "lora_embedding_A [rank, vocab] and lora_embedding_B [dim, rank]",
        ),
    ):
        shapes = {name: list(tensor.shape) for name, tensor in pair.items() if tensor is not None}
        sides = list(shapes.values())
        fits = len(sides) == 2 and all(len(shape) == 2 for shape in sides) and sides[0][0] == sides[1][1]
        if shapes and not fits:
            raise AdapterError(f"{folder}: {module!r} is no pair of {names}: {shapes}")


def _check_claims(files: PeftFiles, module: str, tensors: ModuleTensors) -> None:
    """What the settings say must be in the tensors, and what is in the tensors must be said."""
    for setting, name, tensor, expected in (
        ("use_dora", "lora_magnitude_vector", tensors.magnitude, tensors.pair is not None),
        ("lora_bias", "lora_B.bias", tensors.b_bias, tensors.a is not None),
    ):
        said = bool(files.config.get(setting))
        if tensor is not None and not said:
            raise AdapterError(f"{files.path} holds {module}.{name}, but {setting} is not set")
        if tensor is None and said and expected:
            raise AdapterError(f"{files.path} says {setting}=True, but {module!r} has no {name}")


def _check_saved(files: PeftFiles) -> None:
    """PEFT's conversion of PiSSA and its like drops saved modules. Which are there cannot be asked: PEFT names more heads
    than a model has, and versions name modules differently.
    """
    wanted = files.config.get("modules_to_save")
    if wanted and not any(tensors.is_saved for tensors in files.modules.values()):
        raise AdapterError(
            f"{files.path} says modules_to_save={wanted!r:.60}, but holds no saved module",
            hint="PEFT leaves them out when it converts PiSSA and its like: such an adapter cannot be converted",
        )


def _read_config(path: Path) -> dict[str, Any]:
    if not path.is_dir():
        raise AdapterError(f"there is no adapter folder {str(path)!r}", hint="give the folder that PEFT wrote")
    file = path / "adapter_config.json"
    if not file.is_file():
        raise AdapterError(
            f"{path} has no adapter_config.json; it holds {listed(sorted(p.name for p in path.iterdir()))}"
        )
    config = read_json(file, AdapterError)
    # Other kinds (IA3, prompt tuning) use the same two file names.
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        kind = config.get("peft_type") if isinstance(config, dict) else type(config).__name__
        raise AdapterError(f"{path} is an adapter of kind {kind!r}; supported is 'LORA'")
    # A setting off or empty is harmless whatever it means: newer versions of PEFT write many such.
    unsupported = [
        name for name, value in config.items() if name not in _HARMLESS and value not in (None, False, "none", {}, [])
    ]
    if unsupported:
        stated = ", ".join(f"{name}={config[name]!r:.60}" for name in unsupported)
        raise AdapterError(f"{path} uses what is not supported: {stated}")
    start = config.get("init_lora_weights")
    if isinstance(start, str) and start.startswith(_CHANGED_BASE):
        raise AdapterError(
            f"{path} was initialised with {start!r}, which changes the base's weights",
            hint="convert it with PEFT: save_pretrained(..., path_initial_model_for_weight_conversion=...)",
        )
    alpha = config.get("lora_alpha")
    if not isinstance(alpha, (int, float)) or not math.isfinite(alpha):
        raise AdapterError(f"{file} has no number 'lora_alpha' (found {alpha!r})")
    patterns = config.get("alpha_pattern") or {}
    if not isinstance(patterns, dict) or not all(isinstance(one, (int, float)) for one in patterns.values()):
        raise AdapterError(
            f"{file} has an 'alpha_pattern' that does not map patterns to numbers (found {patterns!r:.80})"
        )
    return config


def read_tensors(files: Iterable[Path]) -> Iterator[tuple[str, Tensor]]:
    """The tensors of an adapter's files; raises AdapterError for one that holds other than finite floating-point numbers."""
    try:
        for file in files:
            with opened(file) as tensors:
                for name in tensors.keys():  # noqa: SIM118  (not a mapping)
                    tensor = tensors.get_tensor(name)
                    if not tensor.is_floating_point() or tensor.itemsize == 1:  # 8 bit would need its scales
                        raise AdapterError(
                            f"{file}: {name!r} holds {tensor.dtype}; 16, 32 or 64 bit floating point is needed"
                        )
                    if not torch.isfinite(tensor).all():
                        raise AdapterError(f"{file}: {name!r} holds NaN or infinite numbers")
                    yield name, tensor
    except CheckpointError as error:
        raise AdapterError(error.message, hint=error.hint) from error


def content(tensor: Tensor) -> bytes:
    """What a hash of an adapter takes of a tensor: its dtype, its shape and its numbers."""
    return f"{tensor.dtype} {tuple(tensor.shape)}".encode() + tensor.contiguous().view(torch.uint8).numpy().tobytes()


def _tensor_files(path: Path) -> list[Path]:
    single = path / "adapter_model.safetensors"
    if single.is_file():
        return [single]
    shards = sorted(path.glob("adapter_model-*-of-*.safetensors"))
    if shards:
        count = int(shards[0].stem.rpartition("-of-")[2])
        # An incomplete download would load as an adapter that silently lacks layers.
        if len(shards) != count:
            raise AdapterError(f"{path} has {len(shards)} of {count} files of its tensors")
        return shards
    pickled = " (adapter_model.bin is a pickle, which can run code, and is not read)" if any(path.glob("*.bin")) else ""
    raise AdapterError(f"{path} has no adapter_model.safetensors{pickled}")
