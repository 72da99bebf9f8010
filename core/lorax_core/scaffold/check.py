"""The conformance kit on a package that is not installed: in a process of its own, which finds it as if it were.

Decides how a folder is made known to that process, and what is said of checks that fail. Knows nothing of what is checked.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from lorax_core.errors import PluginError
from lorax_core.scaffold.package import Package

# What to look at first, by the check that fails; the rest is in docs/conformance.md.
_LOOK: Final = {
    "numbers-hidden": "modeling.py: the options of the blocks, and `weight_map`",
    "config-defaults": "config.py: the defaults, and what `normalise` derives",
    "config-spellings": "config.py: `aliases`, and what `normalise` reads",
    "weights-accounted": "modeling.py: `weight_map`",
    "declaration": "plugin.py and cases.py",
    "masking-window": "config.py: which layers have a window",
    "numbers-generate": "modeling.py: the language model's head",
    "dtype-constants": "modeling.py: `embed_scale`",
}


@dataclass(frozen=True)
class KitReport:
    """What the kit says: how many checks came to each outcome, and each failure with what to look at."""

    ok: bool
    counts: dict[str, int]
    failures: tuple[tuple[str, str, str], ...]


def check_package(package: Package, folder: Path, options: Sequence[str] = ()) -> KitReport:
    """Run the kit on a package that was written to `folder`; raises PluginError where it cannot run at all."""
    with tempfile.TemporaryDirectory() as made:
        known_to(package, Path(made))
        path = os.pathsep.join([str(folder / "src"), made, *(one for one in sys.path if one)])
        # Alone: another installed package may declare the same model type.
        environment = {**os.environ, "PYTHONPATH": path, "LORAX_PLUGINS": package.name}
        command = [sys.executable, "-P", "-m", "lorax_core.cli.main", "plugins", "check", package.model_type, "--json"]
        done = subprocess.run([*command, *options], capture_output=True, text=True, env=environment, check=False)
    try:
        report = json.loads(done.stdout)
    except json.JSONDecodeError as error:
        last = (done.stderr.strip().splitlines() or ["no output"])[-1]
        raise PluginError(
            f"the conformance kit could not run on {folder}: {last}",
            hint=f"pip install -e {folder} && lorax plugins doctor",
        ) from error
    return KitReport(
        report["ok"], {name: count for name, count in report["counts"].items() if count}, tuple(_failures(report))
    )


def known_to(package: Package, folder: Path) -> None:
    """Write the metadata by which a folder on the import path is an installed distribution."""
    metadata = folder / f"{package.module}-0.1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text(
        f"Metadata-Version: 2.1\nName: {package.name}\nVersion: 0.1.0\n", encoding="utf-8"
    )
    entry = f"[lorax.plugins]\n{package.model_type} = {package.module}.plugin\n"
    (metadata / "entry_points.txt").write_text(entry, encoding="utf-8")


def _failures(report: dict[str, Any]) -> Iterator[tuple[str, str, str]]:
    for result in report["results"]:
        if result["status"] in ("failed", "badly-conditioned"):
            key = f"{result['check']}[{result['variant']}]" if result["variant"] else result["check"]
            yield key, str(result["detail"]), _LOOK.get(result["check"], "docs/conformance.md, When a check fails")
