"""The files of a tokenizer beside an adapter.

Decides which files those are, and that they are files that can be read. What they say is decided in `serving/adapter_text.py`.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Final

from lorax_core.errors import AdapterError
from lorax_core.untrusted import regular

VOCABULARIES: Final = (
    "tokenizer.json",
    "tokenizer.model",
    "vocab.txt",
    "vocab.json",
    "spiece.model",
    "sentencepiece.bpe.model",
)
"""A folder has a tokenizer when it has one of these."""
TEMPLATE: Final = "chat_template.jinja"
CONFIG: Final = "tokenizer_config.json"
NAMES: Final = (*VOCABULARIES, "merges.txt", "added_tokens.json", "special_tokens_map.json", CONFIG, TEMPLATE)
TEXT_BYTES: Final = 64 * 2**20
"""The largest of these files that is read beside an adapter, which a request may name; those in use have up to 35 MB."""


def text_files(folder: Path) -> list[Path]:
    """Those that are there; raises AdapterError for a pipe, a device or a link to nowhere, and for one that is too large."""
    files = [folder / name for name in NAMES if (folder / name).is_symlink() or (folder / name).exists()]
    for file in files:
        size = regular(file, AdapterError)
        if size > TEXT_BYTES:
            raise AdapterError(
                f"'{file}' has {size:,} bytes; at most {TEXT_BYTES:,} are read", hint="download or copy it again"
            )
    return files


def text_digest(folder: Path) -> str:
    """A hash of their contents; empty where there are none."""
    digest, files = hashlib.sha256(), text_files(folder)
    for file in files:
        digest.update(f"{file.name} {file.stat().st_size} ".encode())
        with file.open("rb") as opened:
            digest.update(hashlib.file_digest(opened, "sha256").digest())
    return digest.hexdigest() if files else ""
