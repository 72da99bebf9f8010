"""Where a checkpoint comes from.

Decides whether a source is a folder or a model id on the hub, and fetches the latter. Only files that loading reads are
downloaded; offline, the local cache answers.
"""

from __future__ import annotations

import re
from pathlib import Path

from lorax_core.errors import CheckpointError

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_ENDINGS = ("*.json", "*.safetensors", "*.txt", "*.model")
# The hub's client lets * run over slashes. Of folders, only those of sentence-transformers are read: 1_Pooling, 2_Dense.
_WANTED = [*_ENDINGS, "*.jinja"]
_UNWANTED = [f"[!0-9]*/{ending}" for ending in _ENDINGS]


def find_checkpoint(source: str | Path, *, revision: str | None = None, token: str | None = None) -> Path:
    """The folder of `source`: itself when it is one, else the hub's files for the id.

    Raises CheckpointError when it is neither, or the hub does not give it.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        if revision is not None:
            raise CheckpointError(
                f"{str(source)!r} is a folder, which has no revision {revision!r}", hint="leave revision out"
            )
        return path
    if path.exists():
        raise CheckpointError(f"{str(source)!r} is a file; a checkpoint is a folder", hint=f"try {str(path.parent)!r}")
    if not isinstance(source, str) or not _HUB_ID.fullmatch(source):
        raise CheckpointError(
            f"there is no folder {str(source)!r}, and it is no hub id either",
            hint="give a folder with config.json and safetensors, or an id such as 'Qwen/Qwen2-0.5B'",
        )
    return _download(source, revision, token)


def _download(source: str, revision: str | None, token: str | None) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(
            snapshot_download(source, revision=revision, token=token, allow_patterns=_WANTED, ignore_patterns=_UNWANTED)
        )
    except Exception as error:  # the client's own, its HTTP library's (which one hangs on its version), and JSON's
        at = f" at revision {revision!r}" if revision else ""
        raise CheckpointError(
            f"there is no folder {source!r} here, and the hub did not give it{at}: {type(error).__name__}: {error}",
            hint="check the spelling; private models need token=; offline, only what was downloaded before is there",
        ) from error
