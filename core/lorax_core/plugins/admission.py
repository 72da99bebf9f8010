"""Loads and validates one plugin: is it enabled, is it compatible, does it import, are its declarations valid.

Decides the status of one plugin. Knows nothing of the others: `host` resolves conflicts.
"""

from __future__ import annotations

import inspect
import re
import reprlib
import sys
import time
from collections.abc import Iterable
from dataclasses import replace
from functools import partial
from importlib.metadata import Distribution, EntryPoint
from typing import Final, TypeVar

import pluggy

from lorax_core.errors import LoraxError, PluginError, listed, nearest
from lorax_core.plugins import hookspecs
from lorax_core.plugins.record import PluginRecord, PluginStatus, Spec, explain
from lorax_core.plugins.resolve import load_cases, load_class
from lorax_core.plugins.spec import ArchitectureSpec, BackendSpec, Incompatible
from lorax_core.settings import Settings, canonical
from lorax_core.version import __version__

GROUP: Final = "lorax.plugins"
"""Entry-point group in which a distribution names its declaration module."""

CORE: Final = "lorax-core"
HOOK_PREFIX: Final = "lorax_"

_DOCTOR_HINT: Final = "`lorax plugins doctor` tries every plugin on its own"
_T = TypeVar("_T", ArchitectureSpec, BackendSpec)


def make_manager() -> pluggy.PluginManager:
    """A pluggy manager with core's hooks and no plugin."""
    # One for each host and none at module level: a second host must not see the plugins of the first.
    manager = pluggy.PluginManager(hookspecs.PROJECT)
    manager.add_hookspecs(hookspecs)
    return manager


def try_plugin(manager: pluggy.PluginManager, entry: EntryPoint, settings: Settings) -> PluginRecord:
    """Loads one entry point. Any exception of the plugin, `KeyboardInterrupt` apart, is recorded as its status."""
    # Before anything of it is imported: blocking is the way to go on with a plugin that crashes the process.
    if (blocked := blocked_by(settings, entry)) is not None:
        return blocked
    package, version = identity(entry)
    record = PluginRecord(entry.name, package, version, entry.value, PluginStatus.READY)
    # torch may be there already, through the application or an earlier plugin; only the one that imported it is slow.
    had_torch, start = "torch" in sys.modules, None
    try:
        if entry.dist is not None:
            # Before the import, which may fail in unrelated ways against another core.
            _check_requirements(entry.dist)
        start = time.perf_counter()
        architectures, backends = _admit(manager, entry, f"{package}:{entry.name}={entry.value}")
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # sys.exit() at import must not end the process either
        status = PluginStatus.INCOMPATIBLE if isinstance(error, Incompatible) else PluginStatus.BROKEN
        hint = (error.hint if isinstance(error, LoraxError) else None) or _DOCTOR_HINT
        seconds = None if start is None else time.perf_counter() - start
        return replace(record, status=status, cause=explain(error), hint=hint, exception=error, seconds=seconds)
    record = replace(record, architectures=architectures, backends=backends, seconds=time.perf_counter() - start)
    if "torch" in sys.modules and not had_torch:
        cause = "importing its declaration imported torch, which slows down every command"
        return replace(
            record, status=PluginStatus.SLOW_IMPORT, cause=cause, hint="name classes by strings in plugin.py"
        )
    return record


def with_classes(record: PluginRecord) -> PluginRecord:
    """The record after every class that its specs name, and the cases, were imported: broken where one is not there.

    Imports what the declaration keeps from importing, torch among it.
    """
    errors = []
    for spec in record.specs:
        if isinstance(spec, ArchitectureSpec):
            paths = (spec.config, spec.backbone, *map(spec.head, spec.tasks))
            loads = [partial(load_class, path) for path in dict.fromkeys(paths)] + [partial(load_cases, spec)]
        else:
            loads = [partial(load_class, spec.backend)]
        for load in loads:
            try:
                load(record)
            except LoraxError as error:
                errors.append(error)
    if not errors:
        return record
    cause = "; ".join(explain(error) for error in errors)
    return replace(record, status=PluginStatus.BROKEN, cause=cause, hint=errors[0].hint, architectures=(), backends=())


def identity(entry: EntryPoint) -> tuple[str, str]:
    """Package and version of the distribution that an entry point is from, as well as its metadata can be read."""
    try:
        metadata = entry.dist.metadata if entry.dist is not None else None
        if metadata is not None and metadata["Name"]:
            return canonical(metadata["Name"]), metadata["Version"] or ""
    except (
        Exception
    ):  # not lost: `_check_requirements` reads the same metadata, and its error becomes the plugin's status
        pass
    package = canonical(entry.value.partition(":")[0].partition(".")[0])
    return package, __version__ if package == CORE else ""


def key_of(spec: Spec) -> str:
    """The name that a spec claims; two plugins cannot have the same."""
    return spec.model_type if isinstance(spec, ArchitectureSpec) else spec.name


def blocked_by(settings: Settings, entry: EntryPoint) -> PluginRecord | None:
    """The record of a plugin that the settings block, with the cause; None for any other. Imports nothing of it."""
    package, version = identity(entry)
    record = PluginRecord(entry.name, package, version, entry.value, PluginStatus.BLOCKED)
    names = {canonical(entry.name), package}
    # Without core's own backend nothing could run on a CPU.
    if package == CORE:
        return None
    if names & settings.block_plugins:
        return replace(record, cause="LORAX_BLOCK_PLUGINS names it", hint="remove it from LORAX_BLOCK_PLUGINS")
    if settings.plugins and not names & settings.plugins:
        return replace(record, cause="LORAX_PLUGINS does not name it", hint=f"add {package} to LORAX_PLUGINS")
    return None


def _check_requirements(distribution: Distribution) -> None:
    lines = distribution.requires or ()
    # Compared by name first: parsing each requirement of each plugin would slow down every command.
    mine = [line for line in lines if canonical(re.split(r"[^\w.-]", line, maxsplit=1)[0]) == CORE]
    if not mine:
        return
    from packaging.requirements import (
        InvalidRequirement,
        Requirement,
    )  # late: a listing without plugins needs none of it

    for line in mine:
        try:
            wanted = Requirement(line)
        except InvalidRequirement as error:
            raise PluginError(
                f"its metadata requires {line!r}, which is not a requirement",
                hint=f"reinstall it: pip install --force-reinstall {distribution.name}",
            ) from error
        # extra "": requirements of optional extras do not bind the plugin.
        if wanted.marker is not None and not wanted.marker.evaluate({"extra": ""}):
            continue
        # prereleases=True: `>=1.0` must admit a development version of core 1.1.
        if not wanted.specifier.contains(__version__, prereleases=True):
            raise Incompatible(
                f"it requires {CORE}{wanted.specifier}; this is {CORE} {__version__}",
                hint=f"pip install --upgrade {CORE} {distribution.name}",
            )


def _admit(
    manager: pluggy.PluginManager, entry: EntryPoint, name: str
) -> tuple[tuple[ArchitectureSpec, ...], tuple[BackendSpec, ...]]:
    plugin = entry.load()
    # Two entry points of one module; pluggy would raise a ValueError that names neither.
    if manager.is_registered(plugin):
        raise PluginError(
            f"its module {entry.value} was registered already, by {manager.get_name(plugin)}",
            hint="name a module of its own in each entry point of the group lorax.plugins",
        )
    _check_hook_names(manager, plugin)
    manager.register(plugin, name)
    try:
        return (
            _ask(manager, name, "lorax_architectures", ArchitectureSpec),
            _ask(manager, name, "lorax_attention_backends", BackendSpec),
        )
    # A plugin without valid specs must leave no hooks behind in the manager.
    except BaseException:
        manager.unregister(name=name)
        raise


def _check_hook_names(manager: pluggy.PluginManager, plugin: object) -> None:
    """pluggy silently accepts a function of an unknown name; here it is an error."""
    hooks = sorted(name for name in vars(hookspecs) if name.startswith(HOOK_PREFIX))
    found = False
    for name in dir(plugin):
        marks = manager.parse_hookimpl_opts(plugin, name)
        if marks is None:
            # getattr_static: properties and lazy attributes of a module must not run here.
            if not name.startswith(HOOK_PREFIX) or not inspect.isroutine(inspect.getattr_static(plugin, name, None)):
                continue
            if name in hooks:
                raise PluginError(f"{name} is not marked as a hook", hint=f"put @hookimpl above `def {name}`")
        hook = (marks and marks.get("specname")) or name
        if hook in hooks:
            found = True
        elif not (marks and marks.get("optionalhook")):
            close = nearest(hook, hooks)
            raise PluginError(
                f"{hook!r} is not a hook; hooks are {listed(hooks)}",
                hint=f"did you mean {close!r}?" if close else "leave @hookimpl and the prefix lorax_ to hooks",
            )
    if not found:
        raise PluginError(
            f"{plugin!r} implements none of the hooks {listed(hooks)}",
            hint="write a function lorax_architectures with @hookimpl above it; docs/plugins.md shows one",
        )


def _ask(manager: pluggy.PluginManager, name: str, hook: str, kind: type[_T]) -> tuple[_T, ...]:
    """The specs that one plugin returns from one hook.

    The function is called directly and not through `manager.hook`: that would give one list without owners, and one plugin that
    raises would hide the others.
    """
    specs: list[_T] = []
    for impl in getattr(manager.hook, hook).get_hookimpls():
        if impl.plugin_name != name:
            continue
        answer = impl.function()
        # A str and a pydantic model are iterable too, and would fail below with a misleading message.
        if isinstance(answer, (str, kind)) or not isinstance(answer, Iterable):
            raise PluginError(
                f"{hook} returned {reprlib.repr(answer)}; it returns an iterable of {kind.__name__}",
                hint=f"return [{kind.__name__}(...)]",
            )
        for item in answer:
            if not isinstance(item, kind):
                raise PluginError(
                    f"{hook} yielded {reprlib.repr(item)}, which is not an instance of {kind.__name__}",
                    hint=f"yield {kind.__name__}(...), imported from lorax_core.plugins",
                )
            # Validated again: model_copy(update=...) and model_construct() skip validation.
            specs.append(kind.model_validate(dict(item)))
    keys = [key_of(spec) for spec in specs]
    twice = sorted({key for key in keys if keys.count(key) > 1})
    if twice:
        raise PluginError(
            f"{hook} declares {listed(twice)} more than once", hint="declare each once, with one model_type or name"
        )
    return tuple(specs)
