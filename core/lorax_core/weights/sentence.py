"""The files that sentence-transformers puts beside a checkpoint.

Decides how an input becomes one vector when a checkpoint says so: pooling, normalisation, length, prompt, lower case. Both the
old and the new spellings are read. A module that is not supported is refused by name, never skipped; a value of another type
than the library writes is refused as well.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, TypeVar, cast

from torch import Tensor

from lorax_core.errors import CheckpointError, listed
from lorax_core.types import Pooling
from lorax_core.untrusted import file_in, guarded
from lorax_core.weights.checkpoint import FLOATS, Checkpoint, is_finite, opened, read_headers

T = TypeVar("T")

_LIBRARY: Final = "sentence_transformers."
_NO_MODULES: Final = (
    "download or copy the folder whole, or say which pooling you want: `pooling='mean'`, --pooling mean"
)
_AGAIN: Final = "compare it with what sentence-transformers' save_pretrained writes"
_NOUNS: Final = {int: "a whole number", bool: "true or false", str: "a text", dict: "an object", list: "a list"}
# Any other order is other arithmetic: a Dense after Normalize does not give unit vectors, for one.
_ORDER = ("Transformer", "Pooling", "Dense", "Normalize")
_SCORE: Final = "LogitScore"
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

    `prompt` is put before every input, or one of `prompts` that a request names; with `pool_prompt` false its tokens attend but
    are left out of the pooling.
    """

    pooling: Pooling
    normalize: bool
    max_tokens: int | None = None
    lower_case: bool = False
    prompt: str = ""
    prompts: dict[str, str] = field(default_factory=dict)
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
    with guarded(CheckpointError, f"the sentence-transformers files of '{checkpoint.path}' cannot be read", _AGAIN):
        return _read(checkpoint, pooling)


def _read(checkpoint: Checkpoint, pooling: Pooling | None) -> SentenceFiles | None:
    modules = checkpoint.json("modules.json")
    if modules is None:
        if pooling is None and (checkpoint.path / "1_Pooling/config.json").is_file():
            raise CheckpointError(
                f"{checkpoint.path} has a 1_Pooling folder, and no modules.json that says how to use it",
                hint=_NO_MODULES,
            )
        return None
    file = checkpoint.path / "modules.json"
    steps = [_step(file, module) for module in _typed(file, "modules", modules, list)]
    kinds = [kind for kind, _ in steps]
    if kinds == ["Transformer", _SCORE] or (kinds == ["Transformer"] and _is_cross_encoder(checkpoint)):
        return None  # a reranker's, which say nothing of vectors
    # Sorted by _ORDER, they must be what they were; an unknown kind drops out and differs, too.
    if kinds != [kind for kind in _ORDER for _ in range(kinds.count(kind))] or kinds[:2] != ["Transformer", "Pooling"]:
        raise CheckpointError(
            f"{file} chains {listed(kinds)}; supported are 'Transformer', 'Pooling', any number of "
            "'Dense', 'Normalize', in this order",
            hint="a module that is left out would change the vectors",
        )
    inner = [path for kind, path in steps if kind == "Transformer" and path.strip("./")]
    if inner:
        raise CheckpointError(
            f"{file} says that the weights lie in {inner[0]!r:.120}, and those of {checkpoint.path} were read",
            hint="move the files of that folder up, and state the path ''",
        )
    stated, pool_prompt = _pooling(checkpoint, steps[1][1], pooling)
    transformer = checkpoint.path / "sentence_bert_config.json"
    limits = _object(checkpoint, transformer.name) or {}
    prompts, prompt = _prompts(checkpoint)
    return SentenceFiles(
        pooling=stated,
        # Old checkpoints name a folder for it that does not exist: the entry alone counts.
        normalize="Normalize" in kinds,
        dense=tuple(read_dense(checkpoint, path) for kind, path in steps if kind == "Dense"),
        max_tokens=_length(transformer, limits.get("max_seq_length")),
        lower_case=bool(_optional(transformer, limits, "do_lower_case", bool)),
        prompt=prompt,
        prompts=prompts,
        pool_prompt=pool_prompt,
    )


@dataclass(frozen=True, slots=True)
class RerankerFiles:
    """What the files say of a reranker's input. `chat` says whether a pair is a conversation, None where they do not say it.

    `prompt` is put before the query, or is the system message; `variables` are those that a chat template is given.
    """

    prompt: str = ""
    chat: bool | None = None
    variables: dict[str, Any] = field(default_factory=dict)


def read_reranker_files(checkpoint: Checkpoint) -> RerankerFiles | None:
    """None when they are not those of a cross-encoder of sentence-transformers; raises CheckpointError for odd ones."""
    with guarded(CheckpointError, f"the sentence-transformers files of '{checkpoint.path}' cannot be read", _AGAIN):
        if not _is_cross_encoder(checkpoint) and read_score_tokens(checkpoint) is None:
            return None
        file = checkpoint.path / "sentence_bert_config.json"
        config = _object(checkpoint, file.name) or {}
        modalities = _optional(file, config, "modality_config", dict) or {}
        options = _optional(file, config, "processing_kwargs", dict) or {}
        return RerankerFiles(
            prompt=_prompts(checkpoint)[1],
            # The library reads texts alone where files of before `modality_config` list the modules.
            chat="message" in modalities if checkpoint.json("modules.json") is not None else None,
            variables=_optional(file, options, "chat_template", dict) or {},
        )


def read_score_tokens(checkpoint: Checkpoint) -> tuple[int, ...] | None:
    """The ids of `LogitScore`, by whose logits a reranker scores a text: one, or one and another that is taken off.

    None where the files name no such module. Raises CheckpointError where they do, and its own file does not fit.
    """
    with guarded(CheckpointError, f"the sentence-transformers files of '{checkpoint.path}' cannot be read", _AGAIN):
        file, modules = checkpoint.path / "modules.json", checkpoint.json("modules.json")
        # Other files of this name are for embedding to judge.
        named = [str(one.get("type")) for one in modules or () if isinstance(one, dict)]
        if not any(one.startswith(_LIBRARY) and one.endswith(f".{_SCORE}") for one in named):
            return None
        folder = dict(_step(file, one) for one in _typed(file, "modules", modules, list)).get(_SCORE)
        config = _object(checkpoint, f"{folder}/config.json") if folder else None
        if config is None:
            raise CheckpointError(
                f"{checkpoint.path} lacks the config.json of the module {_SCORE}, which its modules.json names",
                hint=_AGAIN,
            )
        file = checkpoint.path / f"{folder}/config.json"
        read = _optional(file, config, "module_input_name", str)
        if read not in (None, "causal_logits"):
            raise CheckpointError(
                f"{file} reads {read!r:.60}; supported is 'causal_logits'", hint="it would change the scores"
            )
        wanted = _typed(file, "true_token_id", config.get("true_token_id"), int)
        other = _optional(file, config, "false_token_id", int)
        return (wanted,) if other is None else (wanted, other)


def read_dense(checkpoint: Checkpoint, folder: str) -> DenseFiles:
    """The dense layer in a folder of the checkpoint; raises CheckpointError when its files are missing or odd."""
    path = file_in(checkpoint.path, folder, CheckpointError)
    config = _object(checkpoint, f"{folder}/config.json")
    file = path / "model.safetensors"
    if config is None or not file.exists():
        lacks = "config.json" if config is None else file.name
        raise CheckpointError(f"{path} has no {lacks}", hint="it is needed beside the other; a pickle is not read")
    activation = _activation(path / "config.json", config)
    layer = DenseFiles(*_dense_tensors(file), activation)
    out, size = layer.weight.shape
    for key, found in (("in_features", size), ("out_features", out), ("bias", layer.bias is not None)):
        stated = _optional(path / "config.json", config, key, type(found))
        if stated is not None and stated != found:
            raise CheckpointError(
                f"{path / 'config.json'} states {key} {stated}, and {file.name} has {found}", hint=_AGAIN
            )
    return layer


def _dense_tensors(file: Path) -> tuple[Tensor, Tensor | None]:
    """Weight `[out, in]` and bias `[out]` of a dense layer's file."""
    headers = read_headers(file)
    if not {"linear.weight"} <= set(headers) <= {"linear.weight", "linear.bias"}:
        raise CheckpointError(
            f"{file} holds {listed(sorted(headers))}; needed are 'linear.weight' and perhaps 'linear.bias'", hint=_AGAIN
        )
    shape = headers["linear.weight"].shape
    if len(shape) != 2 or not all(shape):
        raise CheckpointError(f"{file}: 'linear.weight' has shape {list(shape)}, needed is [out, in]", hint=_AGAIN)
    for name, stored in headers.items():
        if name == "linear.bias" and stored.shape != shape[:1]:
            raise CheckpointError(
                f"{file}: {name!r} has shape {list(stored.shape)}, needed is {list(shape[:1])}", hint=_AGAIN
            )
        if stored.dtype not in FLOATS:
            raise CheckpointError(
                f"{file}: {name!r} holds {stored.dtype}, needed is one of {', '.join(FLOATS)}", hint=_AGAIN
            )
    with opened(file) as tensors:
        # As the layer is computed: a cast may make numbers infinite.
        found = {name: tensors.get_tensor(name).float() for name in headers}
    for name, tensor in found.items():
        if not is_finite(tensor):
            raise CheckpointError(f"{file}: {name!r} holds NaN, or numbers that are infinite in float32", hint=_AGAIN)
    return found["linear.weight"], found.get("linear.bias")


def _activation(file: Path, config: dict[str, Any]) -> str:
    """The activation's name of ours; raises CheckpointError for one that is not supported, and for other arithmetic."""
    # Tanh is the default of sentence-transformers for a file that states none.
    stated = _typed(
        file, "activation_function", config.get("activation_function", "torch.nn.modules.activation.Tanh"), str
    )
    name = stated.rpartition(".")[2]
    if name not in _ACTIVATIONS or not stated.startswith("torch.nn."):
        raise CheckpointError(
            f"{file.parent} uses {stated!r:.120}; supported are {listed(f'torch.nn.{known}' for known in _ACTIVATIONS)}",
            hint="a checkpoint with one of these is needed",
        )
    plain = {
        "module_input_name": "sentence_embedding",
        "module_output_name": "sentence_embedding",
        "use_residual": False,
    }
    for key, usual in plain.items():
        found = config.get(key)
        if found is not None and found != usual:
            raise CheckpointError(
                f"{file} states {key} {found!r:.60}; supported is {usual!r}", hint="it would change the vectors"
            )
    return _ACTIVATIONS[name]


def dense_folder(checkpoint: Checkpoint, dim: int) -> str:
    """The folder `2_Dense_{dim}` beside a checkpoint; raises CheckpointError that lists the sizes there are."""
    sizes = sorted(int(p.name[8:]) for p in checkpoint.path.glob("2_Dense_*") if p.name[8:].isdecimal())
    if dim not in sizes:
        raise CheckpointError(
            f"{checkpoint.path} has no folder 2_Dense_{dim}; sizes there are {sizes or 'none'}",
            hint="give one of these as embedding_dim, or leave it out",
        )
    return f"2_Dense_{dim}"


def _step(file: Path, module: object) -> tuple[str, str]:
    """A module's kind, and the folder that it is in."""
    entry = _typed(file, "a module", module, dict)
    named = _typed(file, "type", entry.get("type"), str)
    # A class of the checkpoint's own code keeps its whole name, which no kind has.
    kind = named.rpartition(".")[2] if named.startswith(_LIBRARY) else named
    path = _optional(file, entry, "path", str) or ""
    if path:
        file_in(file.parent, path, CheckpointError)
    return kind, path


def _pooling(checkpoint: Checkpoint, folder: str, instead: Pooling | None) -> tuple[Pooling, bool]:
    name = f"{folder}/config.json" if folder else "config.json"
    config, file = _object(checkpoint, name), checkpoint.path / name
    if config is None:
        raise CheckpointError(f"{checkpoint.path} has no {name}, which its modules.json names", hint=_AGAIN)
    pool_prompt = bool(_typed(file, "include_prompt", config.get("include_prompt", True), bool))
    # Before the modes are checked: the option is the way around one that is not supported.
    if instead is not None:
        return instead, pool_prompt
    stated = config.get("pooling_mode")
    if stated is None:
        # Mean is the default of sentence-transformers where no flag is given.
        stated = [mode for key, mode in _OLD_MODES.items() if _optional(file, config, key, bool)] or ["mean"]
    modes = [_typed(file, "pooling_mode", mode, str) for mode in (stated if isinstance(stated, list) else [stated])]
    # Several modes are concatenated there, which makes longer vectors.
    if len(modes) != 1 or modes[0] not in _MODES:
        raise CheckpointError(
            f"{checkpoint.path / folder} pools by {listed(modes)}; supported is one of {listed(_MODES)}",
            hint="load(..., pooling='mean') overrides it where another pooling is acceptable",
        )
    return _MODES[modes[0]], pool_prompt


def _is_cross_encoder(checkpoint: Checkpoint) -> bool:
    file = checkpoint.path / "config_sentence_transformers.json"
    return _optional(file, _object(checkpoint, file.name) or {}, "model_type", str) == "CrossEncoder"


def _prompts(checkpoint: Checkpoint) -> tuple[dict[str, str], str]:
    """The prompts by name, and the one that is put before every input; empty without one."""
    file = checkpoint.path / "config_sentence_transformers.json"
    config = _object(checkpoint, file.name) or {}
    prompts = _optional(file, config, "prompts", dict) or {}
    for prompt in prompts.values():
        _typed(file, "a prompt", prompt, str)
    name = _optional(file, config, "default_prompt_name", str)
    if name is None:
        return prompts, ""
    # Going on without it would give other vectors than the authors measured.
    if name not in prompts:
        raise CheckpointError(
            f"{checkpoint.path} names the default prompt {name!r:.60}, but its prompts are {listed(sorted(prompts))}",
            hint=f"set default_prompt_name in {file.name} to one of them, or to null",
        )
    return prompts, prompts[name]


def _length(file: Path, value: object) -> int | None:
    if value is None:
        return None
    if _typed(file, "max_seq_length", value, int) < 1:
        raise CheckpointError(f"'{file}' has {value} for 'max_seq_length'; it is 1 or more", hint=_AGAIN)
    return cast("int", value)


def _object(checkpoint: Checkpoint, name: str) -> dict[str, Any] | None:
    found = checkpoint.json(name)
    return None if found is None else _typed(checkpoint.path / name, "its content", found, dict)


def _optional(file: Path, config: dict[str, Any], key: str, kind: type[T]) -> T | None:
    """A value of this type; None when there is none, or null."""
    found = config.get(key)
    return None if found is None else _typed(file, key, found, kind)


def _typed(file: Path, what: str, value: object, kind: type[T]) -> T:
    # By type and not by isinstance: true is an int.
    if type(value) is not kind:
        raise CheckpointError(f"'{file}' has {value!r:.60} for {what!r} where {_NOUNS[kind]} belongs", hint=_AGAIN)
    return value
