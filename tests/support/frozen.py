"""The plugin that was frozen with version 1 of the plugin API, as if it were installed."""

from __future__ import annotations

import hashlib
import tomllib
from importlib.metadata import EntryPoint, distributions
from pathlib import Path

FOLDER = Path(__file__).parents[1] / "api1"
PLUGIN = FOLDER / "lorax-frozen"
SOURCES = PLUGIN / "src"


def checksum() -> str:
    """One number for all frozen files, their names included."""
    made = hashlib.sha256()
    files = [path for path in FOLDER.rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    for path in sorted(files, key=lambda path: path.relative_to(FOLDER).as_posix()):
        made.update(f"{path.relative_to(FOLDER).as_posix()}\0".encode() + path.read_bytes() + b"\0")
    return made.hexdigest()


def write_metadata(folder: Path) -> None:
    """What pip would write of the package into `folder`, which goes onto the import path beside `SOURCES`."""
    project = tomllib.loads((PLUGIN / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    info = folder / f"lorax_frozen-{project['version']}.dist-info"
    info.mkdir(parents=True)
    lines = ["Metadata-Version: 2.1", f"Name: {project['name']}", f"Version: {project['version']}"]
    lines += [f"Requires-Dist: {line}" for line in project["dependencies"]]
    (info / "METADATA").write_text("\n".join(lines) + "\n", encoding="utf-8")
    [(name, module)] = project["entry-points"]["lorax.plugins"].items()
    (info / "entry_points.txt").write_text(f"[lorax.plugins]\n{name} = {module}\n", encoding="utf-8")


def entry_points(folder: Path) -> list[EntryPoint]:
    """The entry points of `write_metadata`."""
    return [entry for each in distributions(path=[str(folder)]) for entry in each.entry_points]
