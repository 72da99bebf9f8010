"""What can be installed beside core and what CI pins of it, and that tests/gpu is left to `make test-gpu`."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tomllib
from importlib.metadata import entry_points
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from lorax_core.cli.main import main

ROOT = Path(__file__).resolve().parents[1]
EXTRAS: dict[str, list[str]] = tomllib.loads((ROOT / "core/pyproject.toml").read_text("utf-8"))["project"][
    "optional-dependencies"
]
OF_THE_GPU = ["flashinfer", "flash-attn", "gpu", "gpu-test"]


def pinned() -> dict[str, str]:
    """The versions of constraints.txt."""
    lines = (ROOT / "constraints.txt").read_text("utf-8").splitlines()
    pairs = [line.split("==") for line in lines if line and not line.startswith("#")]
    ours = [tomllib.loads(file.read_text("utf-8"))["project"] for file in ROOT.glob("lorax_*/pyproject.toml")]
    return {canonicalize_name(name): version for name, version in pairs} | {one["name"]: one["version"] for one in ours}


def required(extra: str) -> dict[str, Requirement]:
    """What an extra installs, extras that it names included."""
    found: dict[str, Requirement] = {}
    for text in EXTRAS[extra]:
        requirement = Requirement(text)
        if requirement.name == "lorax-core":
            for other in requirement.extras:
                found |= required(other)
        else:
            found[canonicalize_name(requirement.name)] = requirement
    return found


def test_the_extras_for_a_gpu_are_there():
    assert set(OF_THE_GPU) <= set(EXTRAS)
    assert set(required("gpu")) == {"flashinfer-python", "triton"}
    assert set(required("flash-attn")) == {"flash-attn"}


def test_one_extra_brings_the_architectures_of_this_repository():
    folders = [file.parent.name.replace("_", "-") for file in ROOT.glob("lorax_*/pyproject.toml")]

    assert set(required("all")) == set(folders)


@pytest.mark.parametrize("folder", ["core", *sorted(file.parent.name for file in ROOT.glob("lorax_*/pyproject.toml"))])
def test_what_an_index_shows_of_a_distribution_is_there(folder: str):
    project = tomllib.loads((ROOT / folder / "pyproject.toml").read_text("utf-8"))["project"]
    readme = (ROOT / folder / "README.md").read_text("utf-8")

    assert len(project["description"]) <= 150
    assert project["keywords"]
    assert {"Typing :: Typed", "Programming Language :: Python :: 3.11"} <= set(project["classifiers"])
    # An index shows the text alone, so a relative link would lead nowhere.
    assert re.findall(r"\]\((?!https://)[^)]*\)", readme) == []


@pytest.mark.parametrize("extra", EXTRAS)
def test_what_an_extra_names_is_pinned_for_ci_to_a_version_that_it_allows(extra: str):
    pins = pinned()

    refused = [
        f"{name}: {pins.get(name)} is not in {requirement.specifier or 'any'}"
        for name, requirement in required(extra).items()
        if name not in pins or pins[name] not in requirement.specifier
    ]

    assert refused == []


@pytest.mark.parametrize("extra", OF_THE_GPU)
def test_docs_say_what_an_extra_for_a_gpu_brings_and_needs(extra: str):
    document = (ROOT / "docs/gpu.md").read_text("utf-8")

    assert f"| `lorax-core[{extra}]` |" in document


def test_no_dependency_and_no_extra_for_tests_brings_the_packages_for_a_gpu():
    project = tomllib.loads((ROOT / "core/pyproject.toml").read_text("utf-8"))["project"]
    everywhere = {canonicalize_name(Requirement(text).name) for text in project["dependencies"]}

    assert not {"triton", "flashinfer-python", "flash-attn"} & (everywhere | set(required("test")))


def test_tests_that_need_more_packages_run_only_where_they_are_named(tmp_path: Path):
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    for folder in ("tests", "tests/gpu", "tests/cross", "tests/support"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "test_one.py").write_text("def test_it():\n    pass\n", encoding="utf-8")

    assert collected(tmp_path, "tests") == ["tests/support/test_one.py::test_it", "tests/test_one.py::test_it"]
    for folder in ("tests/gpu", "tests/cross"):
        assert collected(tmp_path, folder) == [f"{folder}/test_one.py::test_it"]


def collected(folder: Path, *arguments: str) -> list[str]:
    """The tests that pytest finds in a folder."""
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider", *arguments]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    environment["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"  # none is needed to collect, and each takes time
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return sorted(line for line in done.stdout.splitlines() if "::" in line)


def test_ci_runs_the_tests_that_need_more_packages_after_the_others():
    commands = (ROOT / ".ci/run").read_text("utf-8").splitlines()

    more = ["server", "examples", "scaffold", "zoo", "clients", "page", "gpu", "triton", "cross"]
    first = ["make lint", "make lint-files", "make docs", "make test"]
    assert commands[-13:] == [*first, *(f"make test-{name}" for name in more)]
    makefile = (ROOT / "Makefile").read_text("utf-8")
    for name in ("examples", "clients", "gpu", "cross"):
        assert f" tests/{name} " in makefile.partition(f"\ntest-{name}:")[2].partition("\n\n")[0]


def test_the_command_is_the_one_that_tests_run():
    [script] = entry_points(group="console_scripts", name="lorax")

    assert script.load() is main
