"""Which sources there are for an engine, and for how long they are awaited.

Decides by one list of kinds and roots what a request may name, before anything is looked for: it must reach nothing that the
list does not name. What `adapters.load` is given is not limited, since that is the operator's own word.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from lorax_core.adapters.formats.medusa import is_medusa
from lorax_core.adapters.formats.settings import FILE
from lorax_core.adapters.residency.fetching import WAITING, within
from lorax_core.adapters.residency.source import FoundAdapter, find_adapter, masked, url_scheme
from lorax_core.errors import AdapterError, listed
from lorax_core.options import SOURCE_KINDS
from lorax_core.untrusted import guarded
from lorax_core.weights.hub import is_hub_id

_FORMS = "name a loaded adapter, a folder, or a hub id such as 'org/name'"


class AdapterSources:
    """Where an engine finds adapters: `cache` keeps what URLs give, `seconds` is how long any source is awaited.

    `allowed` is what requests may name: a kind ("folder", "hub", "url"), a folder ("/srv/adapters": what lies below it), or the
    beginning of a URL ("s3://bucket/adapters/"). Without entries they name loaded adapters only. What is brought by somebody
    else than the operator may have `max_bytes`.
    """

    def __init__(
        self,
        cache: Path,
        allowed: Iterable[str] = ("folder", "hub"),
        seconds: float = 600.0,
        max_bytes: int | None = None,
    ) -> None:
        self.seconds = seconds
        self._max_bytes = max_bytes
        self._cache = cache
        self._entries = tuple(allowed)
        self._kinds = {entry for entry in self._entries if entry in SOURCE_KINDS}
        roots = [entry for entry in self._entries if entry not in SOURCE_KINDS]
        # With a slash at the end, so that s3://bucket is not the beginning of s3://bucket-of-another.
        self._urls = tuple(f"{entry.rstrip('/')}/" for entry in roots if url_scheme(entry) is not None)
        self._folders = [Path(entry).expanduser().resolve() for entry in roots if url_scheme(entry) is None]

    def find(
        self, source: str | Path, revision: str | None = None, token: str | None = None, *, bounded: bool = False
    ) -> FoundAdapter:
        """The files of a source; raises AdapterError as `find_adapter` does, and when it is not there in time.

        `bounded`: also when they are larger than `max_bytes`.
        """
        limit = self._max_bytes if bounded else None
        return within(
            self.seconds,
            lambda: find_adapter(source, revision=revision, token=token, cache=self._cache, max_bytes=limit),
            lambda: self.late(str(source)),
        )

    def check(self, source: str) -> None:
        """Raises AdapterError for a source that requests may not name.

        A folder without an adapter is refused as one outside of what is allowed: who asks must not learn what else there is.
        """
        with guarded(AdapterError, f"{masked(source)!r:.200} is not the source of an adapter", _FORMS):
            allowed = self._allows(source)
        if not allowed:
            folders = ", of folders those with an adapter_config.json"
            raise AdapterError(
                f"requests may not name {masked(source)!r:.200} as an adapter; they may name "
                f"{listed(self._entries) if self._entries else 'loaded adapters only'}"
                f"{folders if self._folders or 'folder' in self._kinds else ''}",
                hint="engine.adapters.load(name, source) loads it or says what is wrong with a folder; "
                "load(..., adapter_sources=[...]) allows others",
                http_hint="POST /v1/adapters loads it, and the server's --adapter-sources allows it",
            )

    def late(self, source: str) -> AdapterError:
        """The error of a source that was not there in time."""
        return AdapterError(
            f"{masked(source)!r:.200} was not loaded within {self.seconds:g} seconds",
            hint="load it ahead with engine.adapters.load(name, source), or load(..., adapter_timeout=SECONDS)",
            http_hint="try again later; the server may load it ahead with --adapter NAME=SOURCE",
        )

    def unfit(self, error: AdapterError) -> AdapterError:
        """The error of a source that a request named and that is no adapter for this base, without a hint about files."""
        return AdapterError(
            error.message,
            hint="engine.adapters.load(name, source) says more",
            http_hint="POST /v1/adapters, which needs the admin key, says more",
        )

    def full(self, source: str) -> AdapterError:
        """The error of a source that comes when too many are being fetched."""
        return AdapterError(
            f"{masked(source)!r:.200} was not loaded: {WAITING} other adapters are being fetched",
            hint="try again later",
        )

    def _allows(self, source: str) -> bool:
        if url_scheme(source) is not None:
            # Some filesystems resolve "..", which would lead out of the root.
            inside = source.startswith(self._urls) and ".." not in source.split("/")
            return "url" in self._kinds or inside
        try:
            path = Path(source).expanduser()
        except RuntimeError:  # nor which users there are
            return False
        if is_hub_id(source) and not path.is_dir():
            return "hub" in self._kinds
        # Whether "a/../b" is there says whether "a" is.
        if ".." in path.parts:
            return False
        # Links are followed first: one below a root may lead anywhere.
        inside = "folder" in self._kinds or any(path.resolve().is_relative_to(root) for root in self._folders)
        return inside and _has_adapter(path)


def _has_adapter(folder: Path) -> bool:
    try:
        return (folder / FILE).is_file() or is_medusa(folder)
    except (AdapterError, OSError, ValueError):
        return False
