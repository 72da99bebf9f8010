"""The tokenizer beside a checkpoint.

Decides what is refused before a library reads the files: what is no file, code of the checkpoint's own, classes that are no
tokenizers, and numbers that make no sense. Nothing here runs a checkpoint's code, asks at the terminal or uses the network.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from lorax_core.adapters.formats.text_files import CONFIG, VOCABULARIES
from lorax_core.errors import CheckpointError
from lorax_core.untrusted import guarded, read_json, regular

_KINDS: Final = (".json", ".txt", ".model", ".jinja")
SPECIAL_TOKENS: Final = 256
"""Special tokens that a tokenizer may put around an input; those in use add up to five."""
GROWTH: Final = 64
_BYTES: Final = 256 * 2**20
"""The largest of these files that is read; the vocabularies in use have up to 35 MB."""
_SAVE: Final = (
    "where you trust its code, save it as tokenizer.json: "
    "python -c \"from transformers import AutoTokenizer; AutoTokenizer.from_pretrained('PATH', "
    "trust_remote_code=True).save_pretrained('NEW')\""
)


def load_tokenizer(folder: Path, config: Mapping[str, Any], like: Any = None) -> Any | None:
    """The tokenizer in a folder whose `config.json` is `config`, None when there are no files of one.

    It is of the class that the files, or the configuration, name; of that of another tokenizer where it is to be `like` one.
    Raises CheckpointError when its files are broken, or it is code of the checkpoint's own.
    """
    _check_files(folder)
    # First, as AutoTokenizer's error for a folder without any does not differ from that for a broken file.
    if not any((folder / name).exists() for name in VOCABULARIES):
        return None
    file = folder / CONFIG
    stated = read_json(file, CheckpointError) if os.path.lexists(file) else {}
    if not isinstance(stated, dict):
        raise CheckpointError(
            f"'{file}' holds a {type(stated).__name__} where a JSON object belongs",
            hint="download or copy it again",
        )
    for name, values in ((CONFIG, stated), ("config.json", config)):
        _check_class(folder / name, values.get("tokenizer_class"))
    message = f"the tokenizer in {folder} cannot be read"
    own = _own_code(stated)
    if own is not None:
        message = f"the tokenizer in {folder} is code of the checkpoint's own ({own!r:.80}), which is never run"
    with guarded(CheckpointError, message, hint=_SAVE if own is not None else "download or copy its files again"):
        from transformers import AutoTokenizer

        # False, and not the default None, with which transformers asks at the terminal whether to run the code.
        if like is None:
            tokenizer = AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
        else:
            tokenizer = type(like).from_pretrained(str(folder), local_files_only=True)
        limit = tokenizer.model_max_length
        template = tokenizer.chat_template
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if backend is not None:
            _check_growth(folder, backend)
    _check_values(folder, limit, template)
    return tokenizer


def _check_files(folder: Path) -> None:
    """Of all that a tokenizer could read, nothing is a pipe, a device, a link to nowhere or absurdly large."""
    for place in (folder, folder / "additional_chat_templates"):
        if not place.is_dir():
            continue
        for file in sorted(place.iterdir()):
            # Folders are never opened as files.
            if file.suffix not in _KINDS or (file.is_dir() and not file.name.startswith(VOCABULARIES)):
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
        raise CheckpointError(f"'{file}' has {name!r:.80} for tokenizer_class, which is not a name", hint=hint)
    from transformers import PreTrainedTokenizerBase
    from transformers.models.auto.tokenization_auto import tokenizer_class_from_name

    with guarded(CheckpointError, f"'{file}' names the tokenizer class {name!r}, which cannot be imported", hint):
        found = tokenizer_class_from_name(name)
    # Of a class whose library is missing there is a stand-in, which says so when it is used.
    known = found is None or getattr(found, "is_dummy", False)
    if not known and not (isinstance(found, type) and issubclass(found, PreTrainedTokenizerBase)):
        raise CheckpointError(f"'{file}' names the tokenizer class {name!r}, which is not a tokenizer", hint=hint)


def _check_growth(folder: Path, backend: Any) -> None:
    """What the tokenizer makes of an input is as long as the input, about: a file could multiply it without end."""
    hint = "use the tokenizer.json that transformers saves for this model"
    special = backend.num_special_tokens_to_add(True)
    if special > SPECIAL_TOKENS:
        raise CheckpointError(
            f"the tokenizer in {folder} adds {special:,} special tokens to an input; at most {SPECIAL_TOKENS} are read",
            hint=hint,
        )
    for name in ("normalizer", "decoder"):
        step = getattr(backend, name)
        growth = _growth(json.loads(step.__getstate__())) if step is not None else 1
        if growth > GROWTH:
            raise CheckpointError(
                f"the {name} of the tokenizer in {folder} makes a text up to {growth:,} times as long; at most {GROWTH} times "
                "are read",
                hint=hint,
            )


def _growth(step: Any) -> int:
    """How many times as long the replacements of a normalizer or decoder make a text at most."""
    if isinstance(step, list):
        return math.prod(map(_growth, step))
    if not isinstance(step, dict):
        return 1
    inside = math.prod(_growth(value) for value in step.values() if isinstance(value, (dict, list)))
    if step.get("type") != "Replace":
        return inside
    pattern = step["pattern"].get("String") if isinstance(step["pattern"], dict) else step["pattern"]
    # An expression may match a single character, or nothing between two.
    replaced = max(len(pattern), 1) if isinstance(pattern, str) else 1
    return max(-(-len(step["content"]) // replaced), 1)


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
