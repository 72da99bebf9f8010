"""The plugins of one process: what is installed, the status of each, and which plugin owns which name.

Decides who gets a name, and what the error for an unusable plugin says. Knows nothing of how one plugin is validated
(`admission`), and has no global state: every `discover()` makes a new host.
"""

from __future__ import annotations

import importlib.metadata
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import replace
from importlib.metadata import EntryPoint
from types import MappingProxyType
from typing import Final

from lorax_core.errors import PluginError, listed, nearest
from lorax_core.plugins.admission import CORE, GROUP, key_of, make_manager, try_plugin
from lorax_core.plugins.record import PluginRecord, PluginStatus, Spec
from lorax_core.plugins.resolve import INSTALL_HINTS
from lorax_core.plugins.spec import ArchitectureSpec, BackendSpec
from lorax_core.settings import Settings, canonical

__all__ = ["PluginHost", "PluginRecord", "PluginStatus"]

_BUILTIN: Final = EntryPoint("core", "lorax_core.plugins.builtin", GROUP)


class PluginHost:
    """The installed plugins and what they provide.

    - `records`: every plugin, core's own first, then by name;
    - `problems`: the records of those that failed;
    - `architectures`: what can be used, by model type;
    - `backends`: what can be used, by falling priority.
    """

    def __init__(self, records: Iterable[PluginRecord]) -> None:
        """Resolves names that several `records` claim: none of them gets it, unless it is one of core's own."""
        self.records: Final = _settle(list(records))
        self.problems: Final = tuple(record for record in self.records if record.status.failed)
        self._owners: Final = {spec.model_type: record for record in self.records for spec in record.architectures}
        architectures = {spec.model_type: spec for record in self.records for spec in record.architectures}
        self.architectures: Final[Mapping[str, ArchitectureSpec]] = MappingProxyType(
            {model_type: architectures[model_type] for model_type in sorted(architectures)}
        )
        backends = [spec for record in self.records for spec in record.backends]
        # By name where priorities are equal, so that the choice does not depend on the order of installation.
        self.backends: Final[list[BackendSpec]] = sorted(backends, key=lambda spec: (-spec.priority, spec.name))

    @classmethod
    def discover(cls, settings: Settings | None = None, entry_points: Iterable[EntryPoint] | None = None) -> PluginHost:
        """Loads every installed plugin, each isolated from the others.

        `settings` come from the environment, `entry_points` from the installed distributions, unless given. A plugin
        that fails is recorded and the others go on; under `settings.strict` the first failure raises `PluginError`.
        """
        settings = Settings.from_env() if settings is None else settings
        manager = make_manager()
        records: list[PluginRecord] = []
        for entry in installed(entry_points):
            records.append(try_plugin(manager, entry, settings))
            _insist(records[-1:], settings)
        records += missing(records, settings)
        # Conflicts are known only when all are there, so `_insist` runs again.
        host = cls(records)
        _insist(host.records, settings)
        return host

    def architecture(self, model_type: str) -> ArchitectureSpec:
        """The architecture of that name.

        Raises `PluginError` when no plugin provides it (with those installed, the nearest name, the package to install)
        and when the plugin that does cannot be used (with its cause).
        """
        # For its errors.
        self.owner(model_type)
        return self.architectures[model_type]

    def owner(self, model_type: str) -> PluginRecord:
        """The plugin that provides an architecture. Raises as `architecture()` does."""
        record = self._owners.get(model_type)
        if record is not None:
            return record
        suspect = self._suspect(model_type)
        if suspect is None:
            raise self._unknown(model_type)
        raise _unusable(suspect, f"model type {model_type!r} is unavailable: ") from suspect.exception

    def _suspect(self, model_type: str) -> PluginRecord | None:
        """The unusable plugin that provides, or most likely would have provided, a model type."""
        for record in self.records:
            if any(key_of(spec) == model_type for spec in record.contested if isinstance(spec, ArchitectureSpec)):
                return record
        for record in self.records:
            # A plugin that failed at import declared nothing: its name and core's table of packages have to do.
            likely = canonical(record.name) == canonical(model_type) or record.package == INSTALL_HINTS.get(model_type)
            if likely and record.status in (PluginStatus.BROKEN, PluginStatus.INCOMPATIBLE, PluginStatus.BLOCKED):
                return record
        return None

    def _unknown(self, model_type: str) -> PluginError:
        # Model types are lower case, and class names such as "Bert" are a common slip.
        close = nearest(model_type.lower(), [*self.architectures, *INSTALL_HINTS])
        package = INSTALL_HINTS.get(model_type)
        if package is not None:
            present = next((record for record in self.records if record.package == package), None)
            hint = f"pip install {package}"
            if present is not None:
                hint = f"pip install --upgrade {package} ({present.version} does not provide it)"
        elif close in self.architectures:
            hint = f"did you mean {close!r}?"
        elif close is not None:
            hint = f"did you mean {close!r}? pip install {INSTALL_HINTS[close]}"
        else:
            hint = "install the plugin that provides it; `lorax models list` shows what is there"
        return PluginError(
            f"no plugin provides model type {model_type!r}; installed: {listed(self.architectures)}", hint=hint
        )


def installed(entry_points: Iterable[EntryPoint] | None = None) -> list[EntryPoint]:
    """Core's own plugin and, by name, those that the installed distributions (or `entry_points`) name. Imports none.

    Two distributions may use one entry-point name: both are here.
    """
    if entry_points is None:
        entry_points = importlib.metadata.entry_points(group=GROUP)
    # By name and not in the order of the metadata, which depends on the file system.
    return [_BUILTIN, *sorted(entry_points, key=lambda entry: (entry.name, entry.value))]


def missing(records: list[PluginRecord], settings: Settings) -> list[PluginRecord]:
    """A record for each name in LORAX_PLUGINS that is not installed: a misspelt one would block all others."""
    names = {canonical(name) for record in records for name in (record.name, record.package)}
    packages = {canonical(name): package for name, package in INSTALL_HINTS.items()}
    missing = []
    for name in sorted(settings.plugins - names):
        close = nearest(name, sorted(names))
        cause = f"LORAX_PLUGINS names {name!r}, which is not installed"
        hint = f"did you mean {close!r}?" if close else f"installed: {listed(sorted(names))}"
        if name in packages or name in packages.values():
            hint = f"pip install {packages.get(name, name)}"
        missing.append(PluginRecord(name, name, "", "", PluginStatus.BROKEN, cause=cause, hint=hint))
    return missing


def _insist(records: Iterable[PluginRecord], settings: Settings) -> None:
    for record in records:
        if settings.strict and record.status.failed:
            raise _unusable(record, "LORAX_STRICT is set and ") from record.exception


def _unusable(record: PluginRecord, lead: str) -> PluginError:
    return PluginError(f"{lead}{record.verdict}", hint=record.hint)


def _settle(records: list[PluginRecord]) -> tuple[PluginRecord, ...]:
    # By type as well: an architecture and a backend may have the same name.
    claimants: defaultdict[tuple[type, str], list[PluginRecord]] = defaultdict(list)
    for record in records:
        for spec in record.specs:
            claimants[type(spec), key_of(spec)].append(record)
    settled = []
    for record in records:
        rivals = [(spec, other) for spec in record.specs for other in claimants[type(spec), key_of(spec)]]
        rivals = [(spec, other) for spec, other in rivals if other is not record]
        # Core's own names are not lost to a plugin: else installing one could take the reference backend away.
        settled.append(_concede(record, rivals) if rivals and record.package != CORE else record)
    return tuple(settled)


def _concede(record: PluginRecord, rivals: list[tuple[Spec, PluginRecord]]) -> PluginRecord:
    """The record in conflict: without the names that others claim too, and with a hint."""
    lost = {(type(spec), key_of(spec)) for spec, _ in rivals}
    causes = [f"{_named(spec)} is claimed by {other.title} too, and neither gets it" for spec, other in rivals]
    rival = rivals[0][1]
    # LORAX_BLOCK_PLUGINS takes packages and entry-point names; within one package only the latter differ.
    mine, its = (one.package if rival.package != record.package else one.name for one in (record, rival))
    hint = f"to keep {mine}, set LORAX_BLOCK_PLUGINS={its} (or LORAX_PLUGINS={mine}, which loads nothing else)"
    if rival.package == CORE:
        causes = [f"{_named(spec)} is core's own" for spec, _ in rivals]
        hint = f"{record.package} must name it otherwise"
    return replace(
        record,
        status=PluginStatus.CONFLICT,
        cause="; ".join(causes),
        hint=hint,
        architectures=tuple(spec for spec in record.architectures if (type(spec), key_of(spec)) not in lost),
        backends=tuple(spec for spec in record.backends if (type(spec), key_of(spec)) not in lost),
        contested=tuple(spec for spec in record.specs if (type(spec), key_of(spec)) in lost),
    )


def _named(spec: Spec) -> str:
    return f"{'model type' if isinstance(spec, ArchitectureSpec) else 'attention backend'} {key_of(spec)!r}"
