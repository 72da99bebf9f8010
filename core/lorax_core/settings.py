"""What the environment says.

The only reader of `LORAX_*` variables. Decides which of their values are sound; knows nothing of what is done with
them. Reading happens when `Settings.from_env()` is called, never at import.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from lorax_core.errors import PluginError, nearest

# The form of a distribution's name by PEP 508.
_NAME: Final = re.compile(r"[A-Za-z0-9]([A-Za-z0-9._-]*[A-Za-z0-9])?")
_CACHE: Final = Path("~/.cache/lorax")
_TRUE: Final = ("1", "true", "yes", "on")
_TRIALS: Final[Mapping[str, tuple[str, ...]]] = {"gpu": ("cuda",), "all": ("cuda", "cpu")}
_FALSE: Final = ("0", "false", "no", "off")


def canonical(name: str) -> str:
    """A distribution's or an entry point's name as names are compared: `Lorax_BERT` and `lorax-bert` are the same."""
    # The rule of PEP 503, by which package indexes compare names.
    return re.sub(r"[-_.]+", "-", name).lower()


@dataclass(frozen=True, slots=True)
class Settings:
    """The settings of this process, read once and passed to those who need them.

    - `plugins` (`LORAX_PLUGINS`): only these plugins are loaded; empty means all. Names, separated by commas, of
      distributions (`lorax-bert`) or of their entry points (`bert`).
    - `block_plugins` (`LORAX_BLOCK_PLUGINS`): these are not loaded, whatever `plugins` says.
    - `strict` (`LORAX_STRICT`): discovery raises on the first plugin that cannot be used; it does not go on without.
    - `cache` (`LORAX_CACHE`): the folder for downloads that no library of their own keeps. It need not exist, and a
      leading `~` is still to be expanded. Unset: `lorax` in `$XDG_CACHE_HOME`, or else in `~/.cache`.

    - `native` (`LORAX_NATIVE`, on by default): native kernels may be compiled for this machine.
    - `trials` (`LORAX_TRIALS`: `gpu`, which is the default, `all` or `off`): the types of devices whose kernels compute small
      steps in a process of their own before an engine uses them.
    - `api_keys` (`LORAX_API_KEYS`, separated by commas) and `admin_key` (`LORAX_ADMIN_KEY`): those of `lorax serve`.

    Names are kept in canonical form.
    """

    plugins: frozenset[str] = frozenset()
    block_plugins: frozenset[str] = frozenset()
    strict: bool = False
    cache: Path = _CACHE
    native: bool = True
    trials: tuple[str, ...] = ("cuda",)
    api_keys: tuple[str, ...] = field(default=(), repr=False)
    admin_key: str | None = field(default=None, repr=False)

    @classmethod
    def from_env(cls, environ: Mapping[str, str] = os.environ) -> Settings:
        """Reads the variables; those that are unset or empty keep their defaults.

        Raises `PluginError` for a name that cannot be a plugin's and for a switch that is neither on nor off.
        """
        return cls(
            plugins=_names(environ, "LORAX_PLUGINS"),
            block_plugins=_names(environ, "LORAX_BLOCK_PLUGINS"),
            strict=_switch(environ, "LORAX_STRICT", False),
            cache=_cache(environ),
            native=_switch(environ, "LORAX_NATIVE", True),
            trials=_trials(environ),
            api_keys=tuple(key for part in environ.get("LORAX_API_KEYS", "").split(",") if (key := part.strip())),
            admin_key=environ.get("LORAX_ADMIN_KEY", "").strip() or None,
        )


def _names(environ: Mapping[str, str], variable: str) -> frozenset[str]:
    # A comma too many gives an empty name, which is passed over.
    names = [name.strip() for name in environ.get(variable, "").split(",")]
    for name in filter(None, names):
        if not _NAME.fullmatch(name):
            raise PluginError(
                f"{variable} holds {name!r}, which cannot be the name of a plugin",
                hint=f"separate names by commas: {variable}=lorax-bert,lorax-qwen2",
            )
    return frozenset(canonical(name) for name in names if name)


def _cache(environ: Mapping[str, str]) -> Path:
    given = environ.get("LORAX_CACHE", "").strip()
    if given:
        return Path(given)
    shared = environ.get("XDG_CACHE_HOME", "")
    return Path(shared) / "lorax" if os.path.isabs(shared) else _CACHE  # XDG ignores relative ones


def _trials(environ: Mapping[str, str]) -> tuple[str, ...]:
    value = environ.get("LORAX_TRIALS", "").strip().lower() or "gpu"
    if value in _FALSE:
        return ()
    if value in _TRIALS:
        return _TRIALS[value]
    close = nearest(value, [*_TRIALS, "off"])
    raise PluginError(
        f"LORAX_TRIALS is {value!r}, which is not gpu, all or off",
        hint=f"did you mean {close!r}?" if close else "leave it unset: kernels of a GPU are tried before they are used",
    )


def _switch(environ: Mapping[str, str], variable: str, default: bool) -> bool:
    value = environ.get(variable, "").strip().lower()
    if value in ("", *_TRUE, *_FALSE):
        return value in _TRUE if value else default
    close = nearest(value, (*_TRUE, *_FALSE))
    raise PluginError(
        f"{variable} is {value!r}, which is neither on nor off",
        hint=f"did you mean {close!r}?" if close else f"use {variable}=1 or {variable}=0",
    )
