"""The tokenizer beside a checkpoint.

Decides what is refused before a library reads the files: what is no file, code of the checkpoint's own, classes that are no
tokenizers, and numbers that make no sense. Nothing here runs a checkpoint's code, asks at the terminal or uses the network.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

from lorax_core.errors import CheckpointError
from lorax_core.untrusted import guarded, regular
from lorax_core.weights.checkpoint import Checkpoint

# Looked for first, as AutoTokenizer's error for a folder without any does not differ from that for a broken file.
_VOCABULARIES: Final = (
    "tokenizer.json",
    "tokenizer.model",
    "vocab.txt",
    "vocab.json",
    "spiece.model",
    "sentencepiece.bpe.model",
)
_KINDS: Final = (".json", ".txt", ".model", ".jinja")
_BYTES: Final = 256 * 2**20
"""The largest of these files that is read; the vocabularies in use have up to 35 MB."""
_SAVE: Final = (
    "where you trust its code, save it as tokenizer.json: "
    "python -c \"from transformers import AutoTokenizer; AutoTokenizer.from_pretrained('PATH', "
    "trust_remote_code=True).save_pretrained('NEW')\""
)


def load_tokenizer(checkpoint: Checkpoint) -> Any | None:
    """The tokenizer of a checkpoint, None when there are no files of one.

    Raises CheckpointError when its files are broken, or it is code of the checkpoint's own.
    """
    folder = checkpoint.path
    _check_files(folder)
    if not any((folder / name).exists() for name in _VOCABULARIES):
        return None
    stated = checkpoint.json("tokenizer_config.json") or {}
    if not isinstance(stated, dict):
        raise CheckpointError(
            f"'{folder / 'tokenizer_config.json'}' holds a list where a JSON object belongs",
            hint="download or copy it again",
        )
    for file, config in (("tokenizer_config.json", stated), ("config.json", checkpoint.config)):
        _check_class(folder / file, config.get("tokenizer_class"))
    message = f"the tokenizer in {folder} cannot be read"
    own = _own_code(stated)
    if own is not None:
        message = f"the tokenizer in {folder} is code of the checkpoint's own ({own!r:.80}), which is never run"
    with guarded(CheckpointError, message, hint=_SAVE if own is not None else "download or copy its files again"):
        from transformers import AutoTokenizer

        # False, and not the default None, with which transformers asks at the terminal whether to run the code.
        tokenizer = AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
        limit = tokenizer.model_max_length
        template = tokenizer.chat_template
    _check_values(folder, limit, template)
    return tokenizer


def _check_files(folder: Path) -> None:
    """Of all that a tokenizer could read, nothing is a pipe, a device, a link to nowhere or absurdly large."""
    for place in (folder, folder / "additional_chat_templates"):
        if not place.is_dir():
            continue
        for file in sorted(place.iterdir()):
            # Folders are never opened as files.
            if file.suffix not in _KINDS or (file.is_dir() and not file.name.startswith(_VOCABULARIES)):
                continue
            size = regular(file, CheckpointError)
            if size > _BYTES:
                raise CheckpointError(
                    f"'{file}' has {size:,} bytes; at most {_BYTES:,} are read", hint="download or copy it again"
                )


def _check_class(file: Path, name: object) -> None:
    """A named class must be a tokenizer: transformers would call `from_pretrained` of any class of its own."""
    if name is None:
        return
    hint = "remove the key, or name the tokenizer class that transformers saved"
    if not isinstance(name, str) or not name.isidentifier():
        raise CheckpointError(f"'{file}' has {name!r:.80} for tokenizer_class, which is no name", hint=hint)
    from transformers import PreTrainedTokenizerBase
    from transformers.models.auto.tokenization_auto import tokenizer_class_from_name

    with guarded(CheckpointError, f"'{file}' names the tokenizer class {name!r}, which cannot be imported", hint):
        found = tokenizer_class_from_name(name)
    # Of a class whose library is missing there is a stand-in, which says so when it is used.
    known = found is None or getattr(found, "is_dummy", False)
    if not known and not (isinstance(found, type) and issubclass(found, PreTrainedTokenizerBase)):
        raise CheckpointError(f"'{file}' names the tokenizer class {name!r}, which is no tokenizer", hint=hint)


def _own_code(stated: dict[str, Any]) -> object | None:
    """The class in the checkpoint's own code that its configuration names, None when it names none."""
    found = stated.get("auto_map")
    return found.get("AutoTokenizer") if isinstance(found, dict) else found


def _check_values(folder: Path, limit: Any, template: Any) -> None:
    number = isinstance(limit, (int, float)) and not isinstance(limit, bool)
    # `not >=` is also true of NaN. An infinite limit is none.
    if limit is not None and (not number or not limit >= 1):
        raise CheckpointError(
            f"'{folder / 'tokenizer_config.json'}' has {limit!r:.80} for model_max_length",
            hint="it is a number of tokens, 1 or more",
        )
    named = template.values() if isinstance(template, dict) else [template]
    if not all(one is None or isinstance(one, str) for one in named):
        raise CheckpointError(
            f"'{folder / 'tokenizer_config.json'}' has {template!r:.80} for chat_template",
            hint="it is a template as text, or several by name",
        )
