"""Strangers: plugin packages as somebody else would have installed them, metadata and all.

`tests/cli` uses them too.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from importlib.metadata import EntryPoint, distributions
from importlib.util import find_spec
from pathlib import Path

import pytest

SPEC = {
    "model_type": "stranger",
    "summary": "Somebody else's architecture.",
    "api": 1,
    "config": "lorax_stranger.config:StrangerConfig",
    "backbone": "lorax_stranger.modeling:StrangerModel",
    "tasks": ("embed",),
    "hf_architectures": {"StrangerModel": "embed"},
    "default_task": "embed",
    "causal": False,
    "cases": "lorax_stranger.cases:STRANGER",
}


def make_spec_fields(**changes: object) -> dict[str, object]:
    """The fields of a sound `ArchitectureSpec`, with changes; a field that is changed to None is left out."""
    fields = {**SPEC, **changes}
    return {name: value for name, value in fields.items() if value is not None}


def make_declaration(*specs: dict[str, object]) -> str:
    """A plugin module that declares architectures as it should be done."""
    return f"""
from lorax_core.plugins import ArchitectureSpec, hookimpl

@hookimpl
def lorax_architectures():
    return [ArchitectureSpec(**fields) for fields in {list(specs)!r}]
"""


class Strangers:
    """A folder of installed packages."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def install(
        self,
        package: str = "lorax-stranger",
        code: str | None = None,
        *,
        name: str | None = None,
        version: str = "1.0",
        requires: tuple[str, ...] = ("lorax-core",),
        **spec: object,
    ) -> None:
        """Installs a package whose entry point `name` is a module with this code, by default a sound declaration."""
        module = package.replace("-", "_")
        if find_spec(module) is not None:  # the real one is installed here too
            module = f"strange_{module}"
        name = name or package.removeprefix("lorax-")
        home = self.folder / module
        home.mkdir()
        (home / "__init__.py").touch()
        (home / "plugin.py").write_text(code or make_declaration(make_spec_fields(**spec)), encoding="utf-8")
        info = self.folder / f"{package.replace('-', '_')}-{version}.dist-info"
        info.mkdir()
        lines = ["Metadata-Version: 2.1", f"Name: {package}", f"Version: {version}"]
        lines += [f"Requires-Dist: {line}" for line in requires]
        (info / "METADATA").write_text("\n".join(lines) + "\n", encoding="utf-8")
        (info / "entry_points.txt").write_text(f"[lorax.plugins]\n{name} = {module}.plugin\n", encoding="utf-8")
        (info / "INSTALLER").write_text("pip\n", encoding="utf-8")

    def entry_points(self) -> list[EntryPoint]:
        """The plugins in the folder, as `importlib.metadata` finds them."""
        found = [entry for each in distributions(path=[str(self.folder)]) for entry in each.entry_points]
        return [entry for entry in found if entry.group == "lorax.plugins"]


@pytest.fixture
def strangers(tmp_path: Path) -> Strangers:
    """An empty folder of installed packages, not on `sys.path`."""
    folder = tmp_path / "site"
    folder.mkdir()
    return Strangers(folder)


@pytest.fixture
def importable_strangers(strangers: Strangers, monkeypatch: pytest.MonkeyPatch) -> Iterator[Strangers]:
    """The same on `sys.path`, and forgotten afterwards."""
    monkeypatch.syspath_prepend(strangers.folder)
    yield strangers
    for name, module in list(sys.modules.items()):
        if str(strangers.folder) in str(getattr(module, "__file__", "")):
            del sys.modules[name]


@pytest.fixture
def spec_fields() -> Callable[..., dict[str, object]]:
    """`make_spec_fields`, for tests in modules that cannot import it."""
    return make_spec_fields


@pytest.fixture
def declaration() -> Callable[..., str]:
    """`make_declaration`, likewise."""
    return make_declaration
