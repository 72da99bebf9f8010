"""How the rows of an adapter are read and written.

Decides when an adapter's own tokenizer and chat template serve its requests: where every token of the base has the same id.
Another vocabulary is refused by name. Knows nothing of what an adapter does to a model.
"""

from __future__ import annotations

import logging
import threading
import weakref
from pathlib import Path
from typing import Any, cast

from lorax_core.adapters.formats.text_files import CONFIG, TEMPLATE, VOCABULARIES, text_digest
from lorax_core.adapters.merging.merged import MergedCheckpoint
from lorax_core.errors import AdapterError, CheckpointError, listed, shown
from lorax_core.serving.text import TextFront
from lorax_core.serving.tokenizer import load_tokenizer
from lorax_core.untrusted import guarded, read_json
from lorax_core.weights.checkpoint import Checkpoint

_log = logging.getLogger(__name__)
_USE_BASE = "where it was trained with the base's tokenizer, remove the files of its own from the folder"
_SHOWN = 3  # tokens that differ, in an error
_REMEMBERED = 1_000


class AdapterTexts:
    """Reads the tokenizers and templates of adapters over one base. Safe to call from any thread.

    Equal files share what is made of them; of a tokenizer that is the base's but for its chat template there is no second copy.
    """

    def __init__(self, base: TextFront) -> None:
        self._base = base
        # By a hash of the files: what was made of them, and those that say what the base's do.
        self._made: weakref.WeakValueDictionary[str, TextFront] = weakref.WeakValueDictionary()
        self._plain: set[str] = set()
        self._lock = threading.Lock()

    def read(self, folder: Path) -> TextFront | None:
        """What reads and writes the text of the adapter in a folder; None where that is the base's.

        Raises AdapterError for files that are bad, or of another vocabulary than the base's.
        """
        digest = text_digest(folder)
        if not digest:
            return None
        if not self._base.has_tokenizer:
            _log.warning("the tokenizer in %s is not used: the base has none to compare it with, and takes ids", folder)
            return None
        with self._lock:
            known = self._made.get(digest)
            if known is not None or digest in self._plain:
                return known
        found = self._read(folder)
        # What others are to share must be made of the files that were hashed.
        if text_digest(folder) != digest:
            raise AdapterError(
                f"the tokenizer in {folder} was changed while it was read",
                hint="load it again when nothing writes to it",
            )
        with self._lock:
            if found is not None:
                return self._made.setdefault(digest, found)
            if len(self._plain) < _REMEMBERED:
                self._plain.add(digest)
        return None

    def _read(self, folder: Path) -> TextFront | None:
        base, own = self._base.tokenizer, None
        if any((folder / name).exists() for name in VOCABULARIES):
            own = _tokenizer(folder, base)
        if own is not None:
            _refuse_another(folder, own, base)
        tokenizer = base if own is None or _is_same(own, base) else own
        template = _template(folder)
        if tokenizer is base and template in (None, self._base.template):
            return None
        what = "chat template" if tokenizer is base else "tokenizer"
        _log.info("requests with the adapter in %s use its own %s", folder, what)
        return self._base.like(tokenizer, template or self._base.template)


def with_merged(text: TextFront, checkpoint: Checkpoint) -> TextFront:
    """What reads and writes the text of a checkpoint, which may have an adapter with files of its own merged."""
    own = AdapterTexts(text).read(checkpoint.adapter) if isinstance(checkpoint, MergedCheckpoint) else None
    return own or text


def _tokenizer(folder: Path, base: Any) -> Any:
    try:
        # Of the base's class, which may add tokens of its own: a base's configuration chooses it, and an adapter has none.
        return load_tokenizer(folder, {}, like=base)
    except CheckpointError as error:
        raise AdapterError(error.message, hint=f"{error.hint}; or remove them to use the base's") from error


def _refuse_another(folder: Path, own: Any, base: Any) -> None:
    """Raises AdapterError where a token of the base has another id, or none; what an adapter has beyond them may be used."""
    with guarded(AdapterError, f"the tokenizer in {folder} cannot be read", _USE_BASE):
        theirs, ours = cast("dict[str, int]", own.get_vocab()), cast("dict[str, int]", base.get_vocab())
        other = sorted((index, token) for token, index in ours.items() if theirs.get(token) != index)
    if other:
        told = [f"{shown(token, 40)} {theirs.get(token, 'none')} for {index}" for index, token in other[:_SHOWN]]
        raise AdapterError(
            f"the tokenizer in {folder} is of another vocabulary than the base's: of {len(other):,} tokens the ids differ "
            f"({', '.join(told)})",
            hint=_USE_BASE,
        )


def _is_same(own: Any, base: Any) -> bool:
    """Whether two tokenizers read and write every text the same way, as far as that can be seen."""
    inner, outer = (getattr(one, "backend_tokenizer", None) for one in (own, base))
    if inner is None or outer is None or type(own) is not type(base):
        return False
    # What training cut or padded its texts to: neither is done here.
    inner.no_truncation()
    inner.no_padding()
    stated = [(one.special_tokens_map, one.model_input_names) for one in (own, base)]
    return bool(stated[0] == stated[1] and inner.to_str() == outer.to_str())


def _template(folder: Path) -> str | None:
    """The chat template in a folder; of several, the default one."""
    if (folder / TEMPLATE).exists():
        with guarded(AdapterError, f"'{folder / TEMPLATE}' cannot be read", "download or copy it again"):
            return (folder / TEMPLATE).read_text(encoding="utf-8")
    stated = read_json(folder / CONFIG, AdapterError) if (folder / CONFIG).exists() else {}
    found = stated.get("chat_template") if isinstance(stated, dict) else None
    if isinstance(found, list):
        named = {one.get("name"): one.get("template") for one in found if isinstance(one, dict)}
        if named and "default" not in named:
            raise AdapterError(
                f"'{folder / CONFIG}' names the chat templates {listed(map(str, named))}, and none is 'default'",
                hint="name one of them 'default', or put it into chat_template.jinja",
            )
        found = named.get("default")
    if found is not None and not isinstance(found, str):
        raise AdapterError(
            f"'{folder / CONFIG}' has {found!r:.80} for chat_template",
            hint="it is a template as text, or several by name",
        )
    return found
