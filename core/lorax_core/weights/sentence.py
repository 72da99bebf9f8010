"""The files that sentence-transformers puts beside a checkpoint.

Decides how an input becomes one vector when a checkpoint says so: pooling, normalisation, length, prompt, lower case. Both the
old and the new spellings are read. A module that is not supported is refused by name, never skipped.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from lorax_core.errors import CheckpointError, listed
from lorax_core.types import Pooling
from lorax_core.weights.checkpoint import Checkpoint, opened

# Any other order is other arithmetic: a Dense after Normalize does not give unit vectors, for one.
_ORDER = ("Transformer", "Pooling", "Dense", "Normalize")
_MODES = {"cls": Pooling.CLS, "mean": Pooling.MEAN, "lasttoken": Pooling.LAST}
_ACTIVATIONS = {
    "Identity": "linear",
    "Tanh": "tanh",
    "ReLU": "relu",
    "GELU": "gelu",
    "Sigmoid": "sigmoid",
    "SiLU": "silu",
}
_OLD_MODES = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}


@dataclass(frozen=True, slots=True)
class SentenceFiles:
    """What the files say. `max_tokens` None leaves the limit to tokenizer and model.

    `prompt` is put before every input; with `pool_prompt` false its tokens attend but are left out of the pooling.
    """

    pooling: Pooling
    normalize: bool
    max_tokens: int | None = None
    lower_case: bool = False
    prompt: str = ""
    pool_prompt: bool = True
    dense: tuple[DenseFiles, ...] = ()


@dataclass(frozen=True)
class DenseFiles:
    """A dense layer on the pooled vector: weight `[out, in]`, bias `[out]`, and the activation's name."""

    weight: Tensor
    bias: Tensor | None
    activation: str


def read_sentence_files(checkpoint: Checkpoint, pooling: Pooling | None = None) -> SentenceFiles | None:
    """None when there is no `modules.json`; a `pooling` given stands in for the files'.

    Raises CheckpointError for a module or mode that is not supported.
    """
    modules = checkpoint.json("modules.json")
    if modules is None:
        return None
    steps = [(_kind(module), str(module.get("path", ""))) for module in modules if isinstance(module, dict)]
    kinds = [kind for kind, _ in steps]
    # Sorted by _ORDER, they must be what they were; an unknown kind drops out and differs, too.
    if kinds != [kind for kind in _ORDER for _ in range(kinds.count(kind))] or kinds[:2] != ["Transformer", "Pooling"]:
        raise CheckpointError(
            f"{checkpoint.path / 'modules.json'} chains {listed(kinds)}; supported are 'Transformer', 'Pooling', any number of "
            "'Dense', 'Normalize', in this order",
            hint="a module that is left out would change the vectors",
        )
    stated, pool_prompt = _pooling(checkpoint, steps[1][1], pooling)
    transformer = _object(checkpoint, "sentence_bert_config.json")
    return SentenceFiles(
        pooling=stated,
        # Old checkpoints name a folder for it that does not exist: the entry alone counts.
        normalize="Normalize" in kinds,
        dense=tuple(read_dense(checkpoint, path) for kind, path in steps if kind == "Dense"),
        max_tokens=transformer.get("max_seq_length"),
        lower_case=bool(transformer.get("do_lower_case", False)),
        prompt=_default_prompt(checkpoint),
        pool_prompt=pool_prompt,
    )


def read_dense(checkpoint: Checkpoint, folder: str) -> DenseFiles:
    """The dense layer in a folder of the checkpoint; raises CheckpointError when its files are missing or odd."""
    config = _object(checkpoint, f"{folder}/config.json")
    file = checkpoint.path / folder / "model.safetensors"
    if not file.is_file():
        raise CheckpointError(
            f"{checkpoint.path / folder} has no model.safetensors", hint="a pickle is not read: convert it"
        )
    stated = str(config.get("activation_function", "torch.nn.modules.linear.Identity")).rpartition(".")[2]
    if stated not in _ACTIVATIONS:
        raise CheckpointError(f"{checkpoint.path / folder} uses {stated!r}; supported are {listed(_ACTIVATIONS)}")
    with opened(file) as tensors:
        found = {name: tensors.get_tensor(name) for name in tensors.keys()}  # noqa: SIM118  (not a mapping)
    if not {"linear.weight"} <= set(found) <= {"linear.weight", "linear.bias"}:
        raise CheckpointError(
            f"{file} holds {listed(sorted(found))}; needed are 'linear.weight' and perhaps 'linear.bias'"
        )
    return DenseFiles(found["linear.weight"], found.get("linear.bias"), _ACTIVATIONS[stated])


def dense_folder(checkpoint: Checkpoint, dim: int) -> str:
    """The folder `2_Dense_{dim}` beside a checkpoint; raises CheckpointError that lists the sizes there are."""
    sizes = sorted(int(p.name[8:]) for p in checkpoint.path.glob("2_Dense_*") if p.name[8:].isdigit())
    if dim not in sizes:
        raise CheckpointError(
            f"{checkpoint.path} has no folder 2_Dense_{dim}; sizes there are {sizes or 'none'}",
            hint="give one of these as embedding_dim, or leave it out",
        )
    return f"2_Dense_{dim}"


def _kind(module: dict[str, Any]) -> str:
    return str(module.get("type", "")).rpartition(".")[2]


def _pooling(checkpoint: Checkpoint, folder: str, instead: Pooling | None) -> tuple[Pooling, bool]:
    config = _object(checkpoint, f"{folder}/config.json" if folder else "config.json")
    pool_prompt = bool(config.get("include_prompt", True))
    # Before the modes are checked: the option is the way around one that is not supported.
    if instead is not None:
        return instead, pool_prompt
    modes = config.get("pooling_mode")
    if modes is None:
        # Mean is the default of sentence-transformers where no flag is given.
        modes = [mode for key, mode in _OLD_MODES.items() if config.get(key)] or ["mean"]
    modes = [modes] if isinstance(modes, str) else list(modes)
    # Several modes are concatenated there, which makes longer vectors.
    if len(modes) != 1 or modes[0] not in _MODES:
        raise CheckpointError(
            f"{checkpoint.path / folder} pools by {listed(modes)}; supported is one of {listed(_MODES)}",
            hint="load(..., pooling='mean') overrides it where another pooling is acceptable",
        )
    return _MODES[modes[0]], pool_prompt


def _default_prompt(checkpoint: Checkpoint) -> str:
    config = _object(checkpoint, "config_sentence_transformers.json")
    name = config.get("default_prompt_name")
    if name is None:
        return ""
    prompts = config.get("prompts") or {}
    # Going on without it would give other vectors than the authors measured.
    if name not in prompts:
        raise CheckpointError(
            f"{checkpoint.path} names the default prompt {name!r}, but its prompts are {listed(sorted(prompts))}",
            hint="set default_prompt_name in config_sentence_transformers.json to one of them, or to null",
        )
    return str(prompts[name])


def _object(checkpoint: Checkpoint, name: str) -> dict[str, Any]:
    found = checkpoint.json(name)
    return found if isinstance(found, dict) else {}
