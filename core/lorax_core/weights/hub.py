"""Where a checkpoint comes from.

Decides whether a source is a folder or a model id on the hub, and fetches the latter. Only files that loading reads are
downloaded; offline, the local cache answers. What is wanted of a source is a `Kind`, so that adapters come the same way;
knows nothing of what the files hold.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

from lorax_core.errors import CheckpointError, LoraxError, listed, nearest
from lorax_core.untrusted import guarded

# Exactly owner/name: "./folder", "/abs" and "a/b/c" are paths, and must not become requests to the hub.
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
_ENDINGS = ("*.json", "*.safetensors", "*.txt", "*.model")


@dataclass(frozen=True, slots=True)
class Kind:
    """What is looked for: its noun in errors and their class, and which files of the hub are its own.

    Of the hub's files, those are fetched that match one of `wanted` and none of `unwanted`.
    """

    noun: str
    error: type[LoraxError]
    wanted: tuple[str, ...]
    unwanted: tuple[str, ...]
    forms: str  # what may be given, as a hint
    convert: str  # how pickles become safetensors, as a hint


# The hub's client lets * run over slashes. Of folders, only those of sentence-transformers are read: 1_Pooling, 2_Dense.
_CHECKPOINT = Kind(
    noun="checkpoint",
    error=CheckpointError,
    wanted=(*_ENDINGS, "*.jinja"),
    unwanted=tuple(f"[!0-9]*/{ending}" for ending in _ENDINGS),
    forms="give a folder with config.json and safetensors, or an id such as 'Qwen/Qwen2-0.5B'",
    convert="where you trust them, AutoModel.from_pretrained(ID).save_pretrained(FOLDER) of transformers writes safetensors",
)


def is_hub_id(source: str) -> bool:
    """Whether a source has the form of a hub id; a folder of the same spelling is still a folder."""
    return _HUB_ID.fullmatch(source) is not None


def find_checkpoint(source: str | Path, *, revision: str | None = None, token: str | None = None) -> Path:
    """The folder of `source`: itself when it is one, else the hub's files for the id.

    Raises CheckpointError when it is neither, or the hub does not give it, or has its weights only as pickles.
    """
    return find_files(_CHECKPOINT, source, revision, token)[0]


def find_files(kind: Kind, source: str | Path, revision: str | None, token: str | None) -> tuple[Path, str | None]:
    """The folder of a source, and the commit when it is the hub's; None for a folder of this machine.

    Raises the kind's error when it is neither, or the hub does not give it, or has its weights only as pickles.
    """
    shown = f"{str(source)!r:.200}"
    if not isinstance(source, (str, Path)):
        raise kind.error(f"a {kind.noun} is named by a string or a Path, not by {shown}", hint=kind.forms)
    # A NUL, a name too long for the file system, a home folder that nobody has: each raises in its own way.
    with guarded(kind.error, f"{shown} is not a valid {kind.noun}", kind.forms):
        path = Path(source).expanduser()
        is_folder, exists = path.is_dir(), path.exists()
    # A folder wins over a hub id of the same spelling, so a local copy is never downloaded again.
    if is_folder:
        if revision is not None:
            raise kind.error(f"{shown} is a folder, which has no revision {revision!r}", hint="leave revision out")
        return path, None
    if exists:
        raise kind.error(
            f"{shown} is a file; the folder of the {kind.noun} is needed", hint=f"try {str(path.parent)!r}"
        )
    if not isinstance(source, str) or not is_hub_id(source):
        raise kind.error(
            f"there is no {kind.noun} folder {shown}, and it is not a hub id either",
            hint=f"{_neighbour(path)}{kind.forms}",
        )
    return _download(kind, source, revision, token)


def refuse_pickles(kind: Kind, source: str, names: Iterable[str]) -> None:
    """Raises the kind's error when the files at the top of a source hold pickles and no safetensors."""
    # Pickles in subfolders do not matter: exports (onnx/, openvino/) lie there.
    top = sorted(name for name in names if "/" not in name)
    pickles = [name for name in top if any(fnmatch(name, pattern) for pattern in _PICKLES)]
    if pickles and not any(name.endswith(".safetensors") for name in top):
        raise kind.error(
            f"{source!r} has its weights only as pickles ({listed(pickles)}), which can run code and are not read",
            hint=kind.convert,
        )


def hub_sizes(kind: Kind, source: str, revision: str | None, token: str | None) -> list[int]:
    """Bytes of each file that `find_files` would download from the hub; none where the hub does not tell them."""
    from huggingface_hub import HfApi, RepoFile

    try:
        entries = list(HfApi().list_repo_tree(source, revision=revision, token=token))
    except Exception:  # each as in `_download`, which tells why; what was downloaded before needs no hub
        return []
    files = [entry for entry in entries if isinstance(entry, RepoFile)]
    return [file.size for file in files if any(fnmatch(file.path, pattern) for pattern in kind.wanted)]


def _download(kind: Kind, source: str, revision: str | None, token: str | None) -> tuple[Path, str]:
    # Late: loading from a folder needs no HTTP client.
    from huggingface_hub import snapshot_download

    try:
        folder = Path(
            snapshot_download(
                source,
                revision=revision,
                token=token,
                allow_patterns=list(kind.wanted),
                ignore_patterns=list(kind.unwanted),
            )
        )
    except Exception as error:  # the client's own, its HTTP library's (which one hangs on its version), and JSON's
        at = f" at revision {revision!r}" if revision else ""
        advice = "check the spelling; private models need HF_TOKEN or token=; offline, only what was downloaded before is there"
        raise kind.error(
            f"there is no {kind.noun} folder {source!r} here, and the hub did not give it{at}: {type(error).__name__}: {error}",
            hint=f"{_neighbour(Path(source))}{advice}",
        ) from error
    # Pickles were never downloaded, so only the hub's list can say that they are why there are no weights.
    if not any(folder.glob("*.safetensors")):
        refuse_pickles(kind, source, _hub_names(source, folder.name, token))
    return folder, folder.name  # the client calls a snapshot's folder after its commit


def _hub_names(source: str, commit: str, token: str | None) -> list[str]:
    """All files of a commit; none when the hub cannot be asked, as what was downloaded is then all that is known."""
    from huggingface_hub import HfApi

    try:
        return list(HfApi().list_repo_files(source, revision=commit, token=token))
    except Exception:  # as above; reading the folder tells what is missing
        return []


def _neighbour(path: Path) -> str:
    """The folder beside `path` with the most similar name, as the start of a hint; empty when none is close."""
    try:
        close = nearest(path.name, (other.name for other in path.parent.iterdir() if other.is_dir()))
    except OSError:
        return ""
    return f"did you mean {str(path.parent / close)!r}? Else " if close else ""
