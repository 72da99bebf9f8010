"""What `adapter_config.json` says.

Decides which settings of PEFT are supported, what they mean for a module of the files, and that the file contradicts neither
PEFT's rules nor itself. Knows nothing of tensors: `peft` holds the two against each other.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from lorax_core.errors import AdapterError
from lorax_core.patterns import UntrustedPattern
from lorax_core.types import Task
from lorax_core.untrusted import read_json

FILE = "adapter_config.json"
SETTINGS_BYTES = 2**20
"""The largest file of settings that is read: one that names every module of a large model has some 50,000."""
TASKS = {
    "CAUSAL_LM": Task.GENERATE,
    "FEATURE_EXTRACTION": Task.EMBED,
    "TOKEN_CLS": Task.TOKEN_CLASSIFICATION,
    "SEQ_CLS": Task.SEQUENCE_CLASSIFICATION,
}

# Fields that say how an adapter was trained or stored, or whose effect is in the tensors.
_HARMLESS = frozenset(
    """
    arrow_config auto_mapping bias corda_config ensure_weight_tying eva_config inference_mode loftq_config lora_dropout
    lora_ga_config megatron_config megatron_core monteclora_config peft_version qalora_group_size revision runtime_config
    velora_config
    """.split()  # noqa: SIM905
)
# Initialisations that subtract from the base's weights: such files fit only the changed base.
_CHANGED_BASE = ("pissa", "olora", "loftq", "corda", "lora_ga")
_ALL_LINEAR = "all-linear"

Number = Annotated[float, Field(allow_inf_nan=False)]
Rank = Annotated[int, Field(ge=1)]
Index = Annotated[int, Field(ge=0)]
Modules = str | list[str] | None


class PeftSettings(BaseModel):
    """The settings that change what an adapter does, checked. Their meaning is PEFT's; `path` is the adapter's folder."""

    model_config = ConfigDict(frozen=True, extra="allow", strict=True, ignored_types=(functools.cached_property,))

    path: Path
    peft_type: str
    lora_alpha: Number
    r: Rank = 8
    alpha_pattern: dict[str, Number] | None = None
    rank_pattern: dict[str, Rank] | None = None
    use_rslora: bool | None = False
    use_dora: bool | None = False
    lora_bias: bool | None = False
    fan_in_fan_out: bool | None = False
    init_lora_weights: bool | str | None = True
    task_type: str | None = None
    base_model_name_or_path: str | None = None
    revision: str | None = None
    target_modules: Modules = None
    exclude_modules: Modules = None
    modules_to_save: list[str] | None = None
    layers_to_transform: int | list[int] | None = None
    layers_pattern: str | list[str] | None = None
    trainable_token_indices: list[Index] | dict[str, list[Index]] | None = None

    @property
    def task(self) -> Task | None:
        """The task that the files name."""
        return TASKS.get(str(self.task_type))

    @property
    def trained_on(self) -> str:
        """The base that the files name, for errors."""
        return repr(self.base_model_name_or_path) if self.base_model_name_or_path else "a base that it does not name"

    @property
    def ranks(self) -> tuple[int, ...]:
        """Every rank that is stated, used or not."""
        return (self.r, *(self.rank_pattern or {}).values())

    def rank(self, module: str) -> int:
        """The rank that a module's update has."""
        return next((rank for pattern, rank in self._ranks if pattern.fullmatch(module)), self.r)

    def scale(self, module: str, rank: int) -> float:
        """`alpha / r`, or `alpha / sqrt(r)`; alpha may be the module's own."""
        alpha = next((alpha for pattern, alpha in self._alphas if pattern.fullmatch(module)), self.lora_alpha)
        return alpha / math.sqrt(rank) if self.use_rslora else alpha / rank

    def leaves_out(self, module: str) -> str | None:
        """The setting by which PEFT puts no update at a module, with its value; None where it does."""
        if _named(module, self.exclude_modules, self._excluded):
            return f"exclude_modules={self.exclude_modules!r:.80}"
        if any(pattern.fullmatch(module) for pattern in self._saved):
            return f"modules_to_save={self.modules_to_save!r:.80}"
        targets = self.target_modules
        if targets is not None and not _named(module, targets, self._targets):
            return f"target_modules={targets!r:.80}"
        if isinstance(targets, list) and self.layers_to_transform not in (None, []):
            layers = (
                [self.layers_to_transform] if isinstance(self.layers_to_transform, int) else self.layers_to_transform
            )
            found = next((layer for pattern in self._layers if (layer := pattern.group(module, "layer"))), None)
            if found is None or int(found) not in (layers or ()):
                return f"layers_to_transform={layers!r:.80}"
        return None

    def token_ids(self, module: str) -> list[int] | None:
        """Ids whose rows were trained in a module; None where the file does not say."""
        if isinstance(self.trainable_token_indices, dict):
            named = self.trainable_token_indices.items()
            return next((ids for key, ids in named if module == key or module.endswith(f".{key}")), None)
        return self.trainable_token_indices

    # Compiled when first asked for: one module of one adapter may ask for thousands of matches.
    @functools.cached_property
    def _alphas(self) -> list[tuple[UntrustedPattern, float]]:
        return [(self._ending(key, "alpha_pattern"), alpha) for key, alpha in (self.alpha_pattern or {}).items()]

    @functools.cached_property
    def _ranks(self) -> list[tuple[UntrustedPattern, int]]:
        return [(self._ending(key, "rank_pattern"), rank) for key, rank in (self.rank_pattern or {}).items()]

    @functools.cached_property
    def _targets(self) -> UntrustedPattern | None:
        text = self.target_modules
        # PEFT saves the modules that it stands for; in a file that was written otherwise it may be any.
        text = ".*" if text == _ALL_LINEAR else text
        return self._pattern(text, "target_modules") if isinstance(text, str) else None

    @functools.cached_property
    def _excluded(self) -> UntrustedPattern | None:
        text = self.exclude_modules
        return self._pattern(text, "exclude_modules") if isinstance(text, str) else None

    @functools.cached_property
    def _saved(self) -> list[UntrustedPattern]:
        return [self._pattern(rf"(.*\.)?{name}(\..*)?", "modules_to_save") for name in self.modules_to_save or ()]

    @functools.cached_property
    def _layers(self) -> list[UntrustedPattern]:
        stated = self.layers_pattern or [r"[^.]*"]
        names = [stated] if isinstance(stated, str) else stated
        # Lazy, for the first number counts.
        return [self._pattern(rf"(?:.*?\.)??{name}\.(?P<layer>\d+)\..*", "layers_pattern") for name in names]

    def _ending(self, key: str, setting: str) -> UntrustedPattern:
        # As PEFT matches its patterns: the whole name, or its end from a dot on.
        return self._pattern(rf"(.*\.)?({key})", setting)

    def _pattern(self, expression: str, setting: str) -> UntrustedPattern:
        return UntrustedPattern(expression, f"{setting} of {self.path}", AdapterError)


def read_settings(folder: Path) -> PeftSettings:
    """The settings in a folder; raises AdapterError naming the setting that is bad or not supported."""
    if not folder.is_dir():
        raise AdapterError(f"there is no adapter folder {str(folder)!r}", hint="give the folder that PEFT wrote")
    file = folder / FILE
    if not file.is_file():
        base = (folder / "config.json").is_file()
        raise AdapterError(
            f"{folder} has no {FILE}" + (", but the config.json of a model" if base else ""),
            hint="give the folder that PEFT's save_pretrained wrote",
        )
    values = read_json(file, AdapterError, SETTINGS_BYTES)
    # Other kinds (IA3, prompt tuning) use the same two file names.
    if not isinstance(values, dict) or values.get("peft_type") != "LORA":
        kind = values.get("peft_type") if isinstance(values, dict) else type(values).__name__
        raise AdapterError(
            f"{folder} is an adapter of kind {kind!r:.60}; supported is 'LORA'", hint="train it with PEFT's LoraConfig"
        )
    _refuse_unsupported(folder, values)
    try:
        # "path" is ours: a setting of that name must not stand in for it.
        return PeftSettings.model_validate({**values, "path": folder})
    except ValidationError as error:
        raise AdapterError(f"{file}: {_said(error)}", hint="write it as PEFT's save_pretrained does") from error


def _refuse_unsupported(folder: Path, values: dict[str, Any]) -> None:
    # A setting off or empty is harmless whatever it means: newer versions of PEFT write many such.
    known = _HARMLESS | PeftSettings.model_fields.keys()
    unsupported = [
        name for name, value in values.items() if name not in known and value not in (None, False, "none", {}, [])
    ]
    if unsupported:
        stated = ", ".join(f"{name}={values[name]!r:.60}" for name in unsupported[:8])
        raise AdapterError(
            f"{folder} uses what is not supported: {stated}", hint="train it without, or merge it with PEFT"
        )
    start = values.get("init_lora_weights")
    if isinstance(start, str) and start.lower().startswith(_CHANGED_BASE):
        raise AdapterError(
            f"{folder} was initialised with {start!r:.60}, which changes the base's weights",
            hint="convert it with PEFT: save_pretrained(..., path_initial_model_for_weight_conversion=...)",
        )


def _named(module: str, stated: str | Sequence[str] | None, pattern: UntrustedPattern | None) -> bool:
    """Whether an expression or a list of names, or of ends of names, names a module."""
    if pattern is not None:
        return pattern.fullmatch(module)
    return any(module == name or module.endswith(f".{name}") for name in stated or ())


def _said(error: ValidationError) -> str:
    """What is wrong with the first setting that is."""
    problem = error.errors(include_url=False)[0]
    place = ".".join(str(step) for step in problem["loc"] if step not in ("list[int]", "str", "float"))
    found = "" if problem["type"] == "missing" else f" (found {problem['input']!r:.80})"
    return f"{place:.120}: {problem['msg']}{found}"
