"""What is shipped: each distribution builds, its wheel holds its modules and nothing else, two of them make a product.

The sources are copied and littered first, as a working checkout is, so that nothing stale gets into a wheel unseen. The
clean environment gets our distributions from wheels alone and shares the third-party packages of the running one;
`make check-wheels` does the same with everything installed again.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import textwrap
import tomllib
import venv
import zipfile
from importlib.metadata import version
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = sorted(path.parent.name for path in [ROOT / "core/pyproject.toml", *ROOT.glob("lorax_*/pyproject.toml")])
LEFTOVERS = shutil.ignore_patterns("build", "dist", "*.egg-info", "__pycache__")


def package_of(folder: str) -> Path:
    """The folder of the import package, inside a checkout: `lorax_xxx/` is one, core's lies a floor deeper."""
    return Path("core/lorax_core") if folder == "core" else Path(folder)


def project_of(folder: str) -> dict:
    return tomllib.loads((ROOT / folder / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def run(*command: object, cwd: Path) -> str:
    """The output of a command that must succeed; what it said otherwise."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    words = [str(word) for word in command]
    done = subprocess.run(words, cwd=cwd, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{' '.join(words)}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def make_littered_copy(folder: str, to: Path) -> Path:
    """A copy of one distribution's sources with what in-tree builds and test runs leave in a checkout."""
    copy = shutil.copytree(ROOT / folder, to / folder, ignore=LEFTOVERS)
    package = to / package_of(folder)
    stale = [copy / "build/lib" / package.name, package / "build", package / "tests", package / "__pycache__"]
    for place in stale:
        place.mkdir(parents=True, exist_ok=True)
        (place / "test_stale.py").write_text("raise AssertionError\n", encoding="utf-8")
        (place / "stale.json").write_text("{}\n", encoding="utf-8")
    return copy


@pytest.fixture(scope="session")
def dist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the sdist and wheel of every distribution."""
    work = tmp_path_factory.mktemp("wheels")
    # Isolation means a download; it is left out where the build backend is here anyway.
    isolation = [] if int(version("setuptools").split(".")[0]) < 77 else ["--no-isolation"]
    for folder in FOLDERS:
        copy = make_littered_copy(folder, work / "sources")
        run(sys.executable, "-m", "build", *isolation, "--outdir", work / "dist", copy, cwd=work)
    return work / "dist"


def make_borrowed_packages(to: Path) -> Path:
    """Links to every third-party package of this environment; none to ours, to editable ones, or to other plugins."""
    to.mkdir()
    for packages in (Path(entry) for entry in sys.path if entry.endswith("site-packages")):
        for found in packages.iterdir():
            entry_points = found / "entry_points.txt"
            plugin = entry_points.exists() and "[lorax.plugins]" in entry_points.read_text(encoding="utf-8")
            ours = found.name.startswith(("lorax", "__editable__")) or found.suffix == ".pth"
            if not (plugin or ours or (to / found.name).exists()):
                (to / found.name).symlink_to(found)
    return to


@pytest.fixture(scope="session")
def clean_python(dist: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Python of an environment that has nothing of ours but the wheels of core and Qwen2."""
    home = tmp_path_factory.mktemp("clean")
    venv.create(home / "env", symlinks=True)
    python = home / "env/bin/python"
    [packages] = (home / "env/lib").glob("python*/site-packages")
    borrowed = make_borrowed_packages(home / "borrowed")
    (packages / "borrowed.pth").write_text(f"{borrowed}\n", encoding="utf-8")
    install = ["install", "--quiet", "--no-index", "--find-links", dist, "--constraint", ROOT / "constraints.txt"]
    run(sys.executable, "-m", "pip", "--python", python, *install, "lorax-core", "lorax-qwen2", cwd=home)
    return python


@pytest.mark.parametrize("folder", FOLDERS)
def test_a_wheel_holds_the_modules_of_its_package_and_nothing_else(folder: str, dist: Path):
    package = package_of(folder)
    # Compiled kernels travel as their sources, and the server's page beside its module.
    sources = [
        path
        for ending in ("*.py", "*.cpp", "*.h", "*.html", "*.css", "*.js")
        for path in (ROOT / package).rglob(ending)
    ]
    files = {path.relative_to(ROOT / package) for path in sources}
    modules = {path for path in files if not {"build", "tests"} & set(path.parts)}
    expected = {f"{package.name}/{path.as_posix()}" for path in [*modules, Path("py.typed")]}

    [wheel] = dist.glob(f"{project_of(folder)['name'].replace('-', '_')}-*.whl")
    with zipfile.ZipFile(wheel) as opened:
        names = set(opened.namelist())

        licences = [opened.read(name) for name in names if name.endswith(".dist-info/licenses/LICENSE")]

    assert {name for name in names if ".dist-info/" not in name} == expected
    assert licences == [(ROOT / "LICENSE").read_bytes()]


def test_an_index_would_show_every_distribution(dist: Path):
    files = sorted(dist.iterdir())

    said = run(sys.executable, "-m", "twine", "--no-color", "check", "--strict", *files, cwd=dist)

    assert len(files) == 2 * len(FOLDERS)
    assert said.count("PASSED") == len(files)


@pytest.mark.parametrize("folder", FOLDERS)
def test_versions_agree(folder: str):
    package = ROOT / package_of(folder)
    home = package / "version.py" if (package / "version.py").exists() else package / "__init__.py"
    told = re.search(r'^__version__(?:: Final)? = "(.+)"$', home.read_text("utf-8"), re.M)

    assert told
    assert told[1] == project_of(folder)["version"]


def test_core_and_one_architecture_list_exactly_that_one(clean_python: Path, tmp_path: Path):
    listing = json.loads(run(clean_python.with_name("lorax"), "models", "list", "--json", cwd=tmp_path))

    assert [model["model_type"] for model in listing["models"]] == ["qwen2"]
    assert listing["problems"] == []


def test_core_and_one_architecture_generate(clean_python: Path, tmp_path: Path):
    code = """
        import sys
        import lorax_core as lorax

        with lorax.load(sys.argv[1]) as engine:
            print(lorax.__file__, engine.generate("The", max_tokens=8).text, sep="\\n")
    """
    script = tmp_path / "generate.py"
    script.write_text(textwrap.dedent(code), encoding="utf-8")

    home, text = run(clean_python, script, ROOT / "examples/tiny_qwen2/model", cwd=tmp_path).split("\n", 1)

    assert Path(home).is_relative_to(clean_python.parents[1])
    assert text.strip()
