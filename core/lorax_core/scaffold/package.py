"""A whole package for an architecture of transformers, in a folder that is there whole or not at all.

Decides which files there are and what they are called. Knows nothing of the command line.
"""

from __future__ import annotations

import keyword
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, distribution, packages_distributions
from pathlib import Path
from typing import Final

from lorax_core.errors import PluginError, listed, shown
from lorax_core.scaffold.blueprint import Blueprint, understand
from lorax_core.scaffold.errors import NotUnderstood
from lorax_core.scaffold.source import read_source
from lorax_core.scaffold.write_config import config_text
from lorax_core.scaffold.write_files import small_files
from lorax_core.scaffold.write_modeling import modeling_text
from lorax_core.settings import canonical

_NAME: Final = re.compile(r"[a-z][a-z0-9]*(?:[-_][a-z0-9]+)*")
_NAME_LENGTH: Final = 100


@dataclass(frozen=True)
class Package:
    """The texts of a package, by their paths in its folder, and what is to be said of it.

    `refused` are fields of the configuration of which not all values are supported, with which are and what was seen.
    """

    name: str
    module: str
    model_type: str
    files: Mapping[str, str]
    refused: Mapping[str, str]

    def write(self, folder: Path) -> None:
        """Write all files; raises PluginError when the folder holds anything, or cannot be written."""
        from lorax_core.output import new_folder

        with new_folder(folder, PluginError) as fresh:
            for path, text in self.files.items():
                file = fresh / path
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_text(text, encoding="utf-8")


def make_package(name: str, source: str) -> Package:
    """The package `name` for an architecture, read from one of the forms of `read_source`.

    Raises PluginError for a name that no package can have, and for what core's blocks do not compute.
    """
    module = check_name(name)
    found = read_source(source)
    try:
        plan = understand(found)
    except NotUnderstood as error:
        seen = "; ".join(error.problems)
        raise PluginError(
            f"{found.model_type!r} computes what core's blocks do not: {seen}",
            hint="nothing was written; write it by hand, after docs/plugins.md",
        ) from error
    return Package(name, module, plan.source.model_type, _files(plan, name, module), _refused(plan))


def check_name(name: str) -> str:
    """The module of a distribution of that name; raises PluginError for one that is none."""
    module = name.replace("-", "_")
    if not _NAME.fullmatch(name) or keyword.iskeyword(module):
        raise PluginError(
            f"{shown(name)} is not a name for a package", hint="use small letters, digits and '-', as in lorax-gemma2"
        )
    if len(name) > _NAME_LENGTH:
        raise PluginError(f"a name of {len(name)} characters", hint=f"use at most {_NAME_LENGTH}")
    taken = _taken(canonical(name), module)
    if taken is not None:
        raise PluginError(f"{name!r} cannot name a package: {taken}", hint="use a name of your own, as in lorax-gemma2")
    return module


def _taken(name: str, module: str) -> str | None:
    """Whose a name is already, when it is not that of an installed plugin, which may be written again."""
    if module in sys.stdlib_module_names:
        return f"{module} is a module of Python"
    owners = {canonical(one) for one in packages_distributions().get(module, ())}
    if owners - {name}:
        return f"the module {module} is that of {listed(sorted(owners))}"
    try:
        points = distribution(name).entry_points.select(group="lorax.plugins")
    except PackageNotFoundError:
        return None
    return None if points and module != "lorax_core" else "it is that of an installed package"


def _files(plan: Blueprint, name: str, module: str) -> dict[str, str]:
    return {
        **small_files(plan, name, module),
        f"src/{module}/config.py": config_text(plan),
        f"src/{module}/modeling.py": modeling_text(plan, module),
    }


def _refused(plan: Blueprint) -> dict[str, str]:
    supported = {name: "hidden_size" if name in plan.tiny.equal else "the default" for name in plan.refused}
    return {
        name: f"only {supported[name]} is supported, config.py refuses other values "
        f"({one.why or 'its effect is not that of any block'})"
        for name, one in plan.refused.items()
    }
