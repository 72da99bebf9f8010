"""Where an adapter comes from.

Decides what a source means (a folder, a hub id, the URL of a folder that fsspec reads), fetches the files of an adapter,
and keeps those of URLs in a cache, by what they were when they were fetched. Knows nothing of what the files hold.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from lorax_core.adapters.formats.text_files import NAMES
from lorax_core.errors import AdapterError, nearest
from lorax_core.untrusted import read_json
from lorax_core.weights.hub import Kind, find_files, hub_sizes, is_hub_id, refuse_pickles

# Filesystems that read through another: what they are given would reach what a plain URL may not.
_WRAPPERS = frozenset(
    """
    arrow_hdfs async_wrapper asyncwrapper blockcache cached dask data dir filecache generic libarchive reference simplecache tar
    zip
    """.split()  # noqa: SIM905
)
_URL = re.compile(r"(?P<scheme>[A-Za-z][A-Za-z0-9+.-]*)(?:://|::).*", re.DOTALL)
# After "//", or with a password wherever it stands: what is nearly a URL is shown too.
_USER = re.compile(r"(?<=://)(?:[^/@\s]+|[^/\s]*:[^\s'\"]*)@|(?<![^/\s'\"])[^/@:\s'\"]+:[^/@\s'\"]+@")
_QUERY = re.compile(r"(?<=[?&#])([^=&#\s]+)=[^&#\s'\"]+")
_COLLAPSED = re.compile(r"(?P<scheme>[A-Za-z][A-Za-z0-9+.-]+):/(?P<rest>[^/].*)", re.DOTALL)  # what Path makes of one
_ADAPTER = Kind(
    noun="adapter",
    error=AdapterError,
    wanted=("*.json", "*.safetensors", *(name for name in NAMES if not name.endswith(".json"))),
    unwanted=("*/*",),
    forms="give the folder that PEFT wrote, a hub id such as 'org/name', or a URL such as 's3://bucket/folder'",
    convert="where you trust them, PeftModel.from_pretrained(BASE, ID).save_pretrained(FOLDER) writes safetensors",
)
# What filesystems call the mark of a file's version, the surest first.
_TAGS = ("ETag", "etag", "md5Hash", "version_id", "mtime", "LastModified", "last_modified", "updated", "created")


_DIGESTS = ".sha256.json"  # beside the files of a download: the hash of each


@dataclass(frozen=True, slots=True)
class FoundAdapter:
    """A folder of this machine with an adapter's files, and where they came from.

    `origin` is the source as given, without credentials. `revision` says exactly what was found there: the hub's commit, a
    hash of a URL's listing or content, and None for a folder, which may change. Remote files are not to be changed.
    """

    folder: Path
    origin: str
    revision: str | None = None


@dataclass(frozen=True, slots=True)
class _File:
    """One file of a URL as its listing has it; `size` in bytes and `tag` are None where the listing has none."""

    path: str
    name: str
    size: int | None
    tag: str | None


def find_adapter(
    source: str | Path,
    *,
    revision: str | None = None,
    token: str | None = None,
    cache: Path,
    max_bytes: int | None = None,
) -> FoundAdapter:
    """The files of an adapter, fetched when they are elsewhere.

    - A folder is itself.
    - A hub id `org/name` may have a `revision` and a `token`. The hub's client keeps the files; offline, what it has kept
      is the answer.
    - A URL `scheme://...` is listed each time, and fetched when what is listed is not in `cache`. Calls at
      the same time, from any process, do not disturb each other.

    Raises AdapterError, naming the source, when it is none of these or cannot be read, when its weights are pickles, and when
    its files have more than `max_bytes` together.
    """
    with _masked_errors(source):
        found = _find(source, revision, token, cache, max_bytes)
        files = [file for pattern in _ADAPTER.wanted for file in found.folder.glob(pattern) if file.name != _DIGESTS]
        _refuse_large(found.origin, (file.stat().st_size for file in files), max_bytes)
        return found


def _find(
    source: str | Path, revision: str | None, token: str | None, cache: Path, max_bytes: int | None
) -> FoundAdapter:
    scheme = url_scheme(source) if isinstance(source, str) else None
    if scheme is not None:
        url = str(source)
        _refuse_schemes(url, scheme)
        _refuse_options(url, revision, token)
        return _from_url(url, scheme, cache / "adapters", max_bytes)
    collapsed = _COLLAPSED.fullmatch(str(source))
    if isinstance(source, Path) and collapsed is not None and not source.exists():
        raise AdapterError(
            f"there is no adapter folder {str(source)!r}; a path cannot be a URL",
            hint=f"give URLs as text: '{collapsed['scheme']}://{collapsed['rest']}'",
        )
    if max_bytes is not None and isinstance(source, str) and is_hub_id(source) and not Path(source).is_dir():
        _refuse_large(source, hub_sizes(_ADAPTER, source, revision, token), max_bytes)
    folder, commit = find_files(_ADAPTER, source, revision, token)
    return FoundAdapter(folder, str(source), commit)


def url_scheme(source: str) -> str | None:
    """The scheme of a source that is a URL; None for any other."""
    found = _URL.fullmatch(source)
    return found["scheme"] if found is not None else None


def masked(text: str) -> str:
    """A text without the credentials of the URLs in it: users, passwords, and the values of queries."""
    return _QUERY.sub(r"\1=***", _USER.sub("***@", text))


@contextlib.contextmanager
def _masked_errors(source: str | Path) -> Iterator[None]:
    """Whatever an error says of a source, it is read by people who may not have its password."""
    try:
        yield
    except AdapterError as error:
        # A library may quote the credentials without the URL around them.
        credentials = [found[0] for found in _USER.finditer(str(source))]
        message, hint, http_hint = error.message, error.hint or "", error.http_hint or ""
        for each in credentials:
            message, hint, http_hint = (text.replace(each, "***@") for text in (message, hint, http_hint))
            # Or a part of them, as what is no number of a port; after the user's name, which is no secret.
            for part in re.split(r"[:/@]", each)[1:]:
                message = message.replace(part, "***") if len(part) > 3 else message
        message, hint, http_hint = map(masked, (message, hint, http_hint))
        # Without the cause where there is something to hide: a logged traceback would show it.
        cause = error.__cause__ if masked(str(source)) == str(source) else None
        raise AdapterError(message, hint=hint or _ADAPTER.forms, http_hint=http_hint or _ADAPTER.forms) from cause


def _refuse_schemes(url: str, scheme: str) -> None:
    """The address of a web page is no folder that can be listed, and a chain of filesystems is none to trust."""
    if "::" in url or scheme.lower() in _WRAPPERS:
        raise AdapterError(
            f"{url!r} chains filesystems, which is not supported",
            hint="give the URL of the folder itself, such as 's3://bucket/folder'",
        )
    if scheme.lower() in ("http", "https"):
        parts = [part for part in url.split("/")[3:] if part]
        close = f" of the hub, for this page perhaps {'/'.join(parts[:2])!r}" if len(parts) > 1 else " of the hub"
        raise AdapterError(
            f"{url!r} is a page, not a folder: http and https are not supported",
            hint=f"give an id{close}; or a folder, or a URL such as 's3://bucket/folder'",
        )


def _refuse_options(url: str, revision: str | None, token: str | None) -> None:
    if revision is not None:
        raise AdapterError(
            f"{url!r} has no revision {revision!r}; only hub ids have revisions",
            hint="leave revision out, and give each version a folder of its own",
        )
    if token is not None:
        raise AdapterError(
            f"token is for hub ids, not for {url!r}",
            hint="leave token out; set the store's own credentials, for S3 AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY",
        )


def _refuse_large(source: str, sizes: Iterable[int], max_bytes: int | None) -> None:
    total = sum(sizes) if max_bytes is not None else 0
    if max_bytes is not None and total > max_bytes:
        raise AdapterError(
            f"the adapter {source!r:.200} has {total:,} bytes; one that is brought to this engine may have {max_bytes:,}",
            hint="the operator may load it by name, or load the engine with a larger max_adapter_bytes",
            http_hint="the server may be started with it (--adapter NAME=SOURCE), or with a larger --max-adapter-bytes",
        )


def _from_url(url: str, scheme: str, root: Path, max_bytes: int | None) -> FoundAdapter:
    files, path = _filesystem(url, scheme)
    remote = _listing(files, path, url)
    _refuse_large(masked(url), (file.size or 0 for file in remote), max_bytes)  # before anything is downloaded
    # Listing alone decides: with tags that mark versions, nothing is downloaded twice.
    version = _digest([url.rstrip("/"), *((file.name, file.size, file.tag) for file in remote)])
    sure = all(file.tag is not None and file.size is not None for file in remote)
    try:
        root = root.expanduser()
        if sure and _intact(root / version, remote):
            return FoundAdapter(root / version, masked(url), version)
        root.mkdir(parents=True, exist_ok=True)
        # In the same folder, so that the move to its final name is one step; a download that fails leaves nothing.
        with tempfile.TemporaryDirectory(dir=root, prefix=".part-") as scratch:
            part = Path(scratch) / "files"
            part.mkdir()
            _fetch(files, remote, part, url)
            found = dict(map(_content, sorted(part.iterdir())))
            # Files may be replaced one by one: a mixture of two versions would pass every other check.
            if _listing(files, path, url) != remote:
                raise AdapterError(f"{url!r} changed while it was downloaded", hint="try again")
            # Without tags only the content can tell versions apart.
            key = version if sure else _digest([url.rstrip("/"), *found.items()])
            (part / _DIGESTS).write_text(json.dumps(found), encoding="utf-8")
            _settle(part, root / key, remote)
            return FoundAdapter(root / key, masked(url), key)
    except (OSError, RuntimeError) as error:  # no space, no permission, no home folder
        raise AdapterError(
            f"{url!r} could not be kept in {str(root)!r}: {type(error).__name__}: {error}",
            hint="name a folder that can be written to with LORAX_CACHE",
        ) from error


def _filesystem(url: str, scheme: str) -> tuple[Any, str]:
    """What reads a URL, and the URL as it calls it. Never a shared one: those remember credentials and listings."""
    try:
        import fsspec

        filesystem, path = fsspec.core.url_to_fs(url, skip_instance_cache=True)
    except ImportError as error:
        extra = scheme.lower() in ("s3", "s3a")
        raise AdapterError(
            f"{url!r} needs a package that is not installed: {error}",
            hint="pip install 'lorax-core[s3]'" if extra else f"install what fsspec reads {scheme}:// with",
        ) from error
    except ValueError as error:
        close = nearest(scheme, fsspec.available_protocols())
        raise AdapterError(
            f"{url!r} cannot be read: {error}", hint=f"did you mean '{close}://'?" if close else _ADAPTER.forms
        ) from error
    except Exception as error:  # each filesystem has its own
        raise AdapterError(
            f"{url!r} cannot be read: {type(error).__name__}: {error}",
            hint="check the URL, and the credentials of the store",
        ) from error
    return filesystem, path


def _listing(filesystem: Any, path: str, url: str) -> list[_File]:
    """The adapter's files at a URL, by name; an error when there is no adapter among them."""
    try:
        # Listed twice, before and after the download: a remembered listing would never differ.
        filesystem.invalidate_cache()
        entries = filesystem.ls(path, detail=True)
    except Exception as error:  # each filesystem has its own
        raise AdapterError(
            f"{url!r} cannot be listed: {type(error).__name__}: {' '.join(str(error).split())[:300]}",
            hint="check the spelling, and the credentials that the environment gives",
        ) from error
    found = [
        _File(str(entry["name"]), str(entry["name"]).rpartition("/")[2], entry.get("size"), _tag(entry))
        for entry in entries
        if entry.get("type") != "directory" and not str(entry["name"]).endswith("/")
    ]
    if [file.path.rstrip("/") for file in found] == [str(path).rstrip("/")]:
        raise AdapterError(
            f"{url!r} is a file; the folder of the adapter is needed", hint=f"try {url.rpartition('/')[0]!r}"
        )
    names = sorted(file.name for file in found)
    refuse_pickles(_ADAPTER, url, names)
    if not {"adapter_config.json", "config.json"} & set(names):  # the latter is Medusa's
        raise AdapterError(f"{url!r} has no adapter_config.json", hint="give the folder that PEFT wrote")
    wanted = (file for file in found if any(fnmatch(file.name, pattern) for pattern in _ADAPTER.wanted))
    return sorted(wanted, key=lambda file: file.name)


def _tag(entry: dict[str, Any]) -> str | None:
    return next((f"{name}={entry[name]}" for name in _TAGS if entry.get(name) is not None), None)


def _fetch(filesystem: Any, remote: Iterable[_File], folder: Path, url: str) -> None:
    for file in remote:
        target = folder / file.name
        try:
            filesystem.get_file(file.path, str(target))
        except Exception as error:  # each filesystem has its own
            raise AdapterError(
                f"{file.name!r} of {url!r} could not be downloaded: {type(error).__name__}: {error}", hint="try again"
            ) from error
        size = target.stat().st_size
        if file.size not in (None, size):
            raise AdapterError(
                f"{file.name!r} of {url!r} has {file.size} bytes, of which {size} arrived", hint="try again"
            )


def _settle(part: Path, folder: Path, remote: Iterable[_File]) -> None:
    """Moves a finished download to its place, unless another one got there first."""
    if folder.is_dir() and not _intact(folder, remote):
        # Into the scratch folder, which is deleted: rename does not replace a folder that holds files.
        os.rename(folder, part.with_name("incomplete"))
    try:
        os.rename(part, folder)
    except OSError:
        # Another process was first; what it left is the same version.
        if not _intact(folder, remote):
            raise


def _intact(folder: Path, remote: Iterable[_File]) -> bool:
    """Whether a folder of the cache holds every listed file as it was downloaded: disks fail, and people edit files."""
    try:
        digests = read_json(folder / _DIGESTS, AdapterError)
        return isinstance(digests, dict) and all(
            digests.get(file.name) == _content(folder / file.name)[1] for file in remote
        )
    except (AdapterError, OSError):
        return False


def _content(file: Path) -> tuple[str, str]:
    with file.open("rb") as opened:
        return file.name, hashlib.file_digest(opened, "sha256").hexdigest()


def _digest(version: list[Any]) -> str:
    return hashlib.sha256(json.dumps(version).encode()).hexdigest()[:40]
