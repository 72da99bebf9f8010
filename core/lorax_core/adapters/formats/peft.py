"""The files that PEFT writes.

Sorts the tensors by module and role, and holds them against `adapter_config.json`: an error names what does not agree or is not
supported. Knows nothing of models: whether a module exists is decided in `lora`.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

from torch import Tensor

from lorax_core.adapters.formats.settings import PeftSettings, read_settings
from lorax_core.adapters.formats.tensors import content, equal, read_tensors
from lorax_core.errors import AdapterError, listed

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
_DIMENSIONS = {
    **dict.fromkeys(("a", "b", "embedding_a", "embedding_b", "tokens"), (2,)),
    **dict.fromkeys(("b_bias", "bias"), (1,)),
    "weight": (1, 2),
    "magnitude": (1, 2),  # DoRA of old versions keeps a dimension of 1
}
_CLAIM = "adapter_config.json and the tensors are not of one adapter: take both from where it was trained"
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

    def meta(self, *, saved: bool = False) -> ModuleTensors:
        """Its shapes: on the meta device, but for the weight and the bias, which are compared with the base's; `saved`: too."""
        made = replace(self)
        for role, tensor in self.items():
            if saved or role not in ("weight", "bias"):
                setattr(made, role, tensor.to("meta"))
        return made


@dataclass
class PeftFiles:
    """An adapter folder, read and sorted."""

    path: Path
    settings: PeftSettings
    modules: dict[str, ModuleTensors] = field(default_factory=dict)

    @property
    def ranks(self) -> tuple[int, ...]:
        """The distinct ranks of its low-rank updates, ascending."""
        return tuple(sorted({one.rank for one in self.modules.values() if one.rank is not None}))

    def identity(self, extra: Iterable[object] = ()) -> str:
        """Hash of the tensors and of the settings that change their effect, with `extra` settings given at load."""
        digest = hashlib.sha256()
        # The rank is not among them: the shapes of the tensors, which are hashed too, hold it.
        names = ("lora_alpha", "use_rslora", "task_type", "alpha_pattern", "trainable_token_indices")
        digest.update(json.dumps([getattr(self.settings, name) for name in names], sort_keys=True).encode())
        digest.update(repr(list(extra)).encode())
        # Sorted, since the order in which a file lists its tensors must not change the identity.
        for module in sorted(self.modules):
            for role, tensor in self.modules[module].items():
                digest.update(f"{module} {role} ".encode() + content(tensor))
        return digest.hexdigest()


def read_peft(path: str | Path, *, shapes_only: bool = False) -> PeftFiles:
    """Read an adapter folder, with `shapes_only` without its numbers, all tensors on the meta device.

    Raises AdapterError naming the file, setting or tensor that is bad or not supported.
    """
    folder = Path(path)
    files = PeftFiles(folder, read_settings(folder))
    leftover: list[str] = []
    doubled: set[tuple[str, str]] = set()
    # The base's own numbers beside a saved module, which PEFT writes with bias="all".
    originals: list[tuple[str, str]] = []
    for name, tensor in read_tensors(_tensor_files(folder), shapes_only=shapes_only):
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
        if before is not None and not (again and before.dtype == tensor.dtype and equal(before, tensor)):
            raise AdapterError(
                f"{folder}: {name!r} is there twice, under two spellings",
                hint="keep the tensors of one spelling; PEFT's save_pretrained writes each once",
            )
        setattr(tensors, role, tensor)
    leftover += [
        name for name, module in originals if module not in files.modules or not files.modules[module].is_saved
    ]
    if leftover:
        raise AdapterError(
            f"{folder} holds tensors that are not supported: {listed(leftover)}",
            hint="docs/adapters.md lists what is supported",
        )
    if not files.modules:
        raise AdapterError(
            f"{folder} holds no tensors", hint="download or copy it again, or save it again with PEFT's save_pretrained"
        )
    for module, tensors in files.modules.items():
        _check_shapes(folder, module, tensors)
        _check_pairs(folder, module, tensors)
        _check_claims(files, module, tensors)
        if tensors.tokens is not None:
            tensors.token_ids = _token_ids(files, module)
    _check_saved(files)
    _check_tokens(files)
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
            raise AdapterError(
                f"{folder}: {module!r} is not a pair of {names}: {shapes}",
                hint="download or copy it again, or save it again with PEFT's save_pretrained",
            )


def _check_shapes(folder: Path, module: str, tensors: ModuleTensors) -> None:
    for role, tensor in tensors.items():
        # How large they are depends on the base; what they are does not.
        if tensor.dim() not in _DIMENSIONS[role] or not tensor.numel():
            raise AdapterError(
                f"{folder}: {role!r} of {module!r} has shape {list(tensor.shape)}, with which nothing can be computed",
                hint="save the adapter again with PEFT's save_pretrained",
            )


def _check_claims(files: PeftFiles, module: str, tensors: ModuleTensors) -> None:
    """What the settings say must be in the tensors, and what is in the tensors must be said."""
    settings = files.settings
    for setting, name, tensor, expected in (
        ("use_dora", "lora_magnitude_vector", tensors.magnitude, tensors.pair is not None),
        ("lora_bias", "lora_B.bias", tensors.b_bias, tensors.a is not None),
    ):
        said = bool(getattr(settings, setting))
        if tensor is not None and not said:
            raise AdapterError(f"{files.path} holds {module}.{name}, but {setting} is not set", hint=_CLAIM)
        if tensor is None and said and expected:
            raise AdapterError(f"{files.path} says {setting}=True, but {module!r} has no {name}", hint=_CLAIM)
    if tensors.rank is None:
        return
    if settings.target_modules is None:
        raise AdapterError(
            f"{files.path} holds an update of {module!r}, and names no target_modules: which modules PEFT updates then "
            "depends on its version and the architecture",
            hint="add the target_modules that it was trained with to adapter_config.json",
        )
    # PEFT drops such an update without an error, so the file does not do there what it does here.
    out = settings.leaves_out(module)
    if out is not None:
        raise AdapterError(f"{files.path} holds an update of {module!r}, which {out} leaves out", hint=_CLAIM)
    if tensors.rank != settings.rank(module):
        stated = f"r={settings.r}, rank_pattern={settings.rank_pattern or {}!r:.80}"
        raise AdapterError(
            f"{files.path} says {stated}, but the update of {module!r} has rank {tensors.rank}", hint=_CLAIM
        )


def _check_saved(files: PeftFiles) -> None:
    """PEFT's conversion of PiSSA and its like drops saved modules. Which of them a model has is not known here."""
    wanted = files.settings.modules_to_save
    if wanted and not any(tensors.is_saved for tensors in files.modules.values()):
        raise AdapterError(
            f"{files.path} says modules_to_save={wanted!r:.60}, but holds no saved module",
            hint="PEFT leaves them out when it converts PiSSA and its like: such an adapter cannot be converted",
        )


def _token_ids(files: PeftFiles, module: str) -> tuple[int, ...]:
    """Whose rows were trained in a module."""
    ids = files.settings.token_ids(module)
    if ids is None:
        raise AdapterError(
            f"{files.path} trains rows of {module!r}, but trainable_token_indices does not say which", hint=_CLAIM
        )
    # Which of its rows one would get, two libraries need not agree on.
    if twice := next((token for token, count in Counter(ids).items() if count > 1), None):
        raise AdapterError(
            f"{files.path}: trainable_token_indices of {module!r} has {twice} more than once", hint=_CLAIM
        )
    return tuple(ids)


def _check_tokens(files: PeftFiles) -> None:
    stated = files.settings.trainable_token_indices
    if stated and all(tensors.tokens is None for tensors in files.modules.values()):
        raise AdapterError(
            f"{files.path} says trainable_token_indices={stated!r:.60}, but holds no trained tokens", hint=_CLAIM
        )


def _tensor_files(path: Path) -> list[Path]:
    single = path / "adapter_model.safetensors"
    if single.is_file():
        return [single]
    shards = sorted(path.glob("adapter_model-*-of-*.safetensors"))
    if shards:
        count = int(shards[0].stem.rpartition("-of-")[2])
        # An incomplete download would load as an adapter that silently lacks layers.
        if len(shards) != count:
            raise AdapterError(
                f"{path} has {len(shards)} of {count} files of its tensors", hint="download or copy it again"
            )
        return shards
    pickled = " (adapter_model.bin is a pickle, which can run code, and is not read)" if any(path.glob("*.bin")) else ""
    raise AdapterError(
        f"{path} has no adapter_model.safetensors{pickled}",
        hint="save it with PEFT's save_pretrained, which writes safetensors",
    )
