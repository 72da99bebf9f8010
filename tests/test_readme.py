"""What the documents say is what happens: examples run, tables and maps are those of the code.

`python tests/test_readme.py` writes README's table of architectures again.
"""

from __future__ import annotations

import ast
import contextlib
import io
import os
import re
import subprocess
import tomllib
from pathlib import Path

import pytest
import typer
from support.documents import FENCE, blocks, console_steps, matches

from lorax_core.cli.main import app
from lorax_core.plugins.host import PluginHost
from lorax_core.plugins.spec import ArchitectureSpec
from lorax_core.settings import Settings
from lorax_core.types import Task

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"
MAP = ROOT / "docs/architecture.md"
TUTORIAL = ROOT / "docs/plugins.md"
CORE = ROOT / "core/lorax_core"

TABLE = re.compile(r"(?<=<!-- made by: python tests/test_readme.py -->\n\n).*?(?=\n\n<!-- end -->)", re.DOTALL)
VERBS = dict.fromkeys((Task.TOKEN_CLASSIFICATION, Task.SEQUENCE_CLASSIFICATION), "classify, rerank")
MODULE = re.compile(r"`((?:[a-z_0-9]+/)*[a-z_0-9]+\.py)`")
CLASS = re.compile(r"`([A-Z][A-Za-z0-9]*[a-z][A-Za-z0-9]*)(?:\.(\w+))?(?:\([^`]*\))?`")


def table() -> str:
    """README's table: the architectures of this repository, whatever else is installed."""
    files = [*ROOT.glob("lorax_*/pyproject.toml"), *ROOT.glob("plugins/*/pyproject.toml")]
    projects = [tomllib.loads(file.read_text(encoding="utf-8")) for file in files]
    ours = {project["project"]["name"] for project in projects}
    host = PluginHost.discover(Settings())
    found: dict[str, list[ArchitectureSpec]] = {}
    for model_type, spec in host.architectures.items():
        package = host.owner(model_type).package
        if package in ours:
            found.setdefault(package, []).append(spec)
    rows = [("Package", "Model types", "Tasks", "For example"), ("---",) * 4]
    for package, specs in sorted(found.items()):
        types = ", ".join(f"`{spec.model_type}`" for spec in specs)
        tasks = dict.fromkeys(VERBS.get(task, str(task)) for spec in specs for task in spec.tasks)
        examples = ", ".join(spec.examples[0] for spec in specs)
        rows.append((f"`{package}`", types, ", ".join(tasks), examples))
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def with_table(text: str) -> str:
    """README with the table as it should be."""
    return TABLE.sub(lambda _: table(), text)


def defined_in(folder: Path) -> dict[str, set[str]]:
    """Every class below `folder` with the names that its body binds, those of its instances included."""
    classes: dict[str, set[str]] = {}
    for file in folder.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ClassDef):
                bodies = [n for n in ast.walk(node) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef)]
                names = {n.name for n in bodies}
                names |= {
                    n.target.id for n in node.body if isinstance(n, ast.AnnAssign) and isinstance(n.target, ast.Name)
                }
                names |= {
                    t.id for n in node.body if isinstance(n, ast.Assign) for t in n.targets if isinstance(t, ast.Name)
                }
                names |= {
                    n.attr for n in ast.walk(node) if isinstance(n, ast.Attribute) and isinstance(n.ctx, ast.Store)
                }
                classes.setdefault(node.name, set()).update(names)
    return classes


STEPS = [
    step
    for language, text in blocks(README.read_text(encoding="utf-8"))
    if language == "console"
    for step in console_steps(text)
]


@pytest.mark.parametrize(
    ("pattern", "printed", "same"),
    [
        ("a  b\n", "a b", True),
        ("a\n...\nd", "a\nb\nc\nd\n", True),
        ("a ...", "a", True),
        ("a\n...\nd", "a\nb\nc\n", False),
        ("a", "a b", False),
        ("...\n1 token", "x\n11 token", True),
    ],
)
def test_shown_output_is_compared(pattern, printed, same):
    assert matches(pattern, printed) is same


def test_the_table_of_architectures_is_what_is_installed():
    text = README.read_text(encoding="utf-8")

    assert text == with_table(text), "run: python tests/test_readme.py"
    assert "`qwen2`" in text


def test_python_examples_run_in_order_and_print_what_is_shown(monkeypatch):
    monkeypatch.chdir(ROOT)
    namespace: dict[str, object] = {}
    printed = ""
    ran = 0

    for language, text in blocks(README.read_text(encoding="utf-8")):
        if language == "python":
            out = io.StringIO()
            with contextlib.redirect_stdout(out):
                exec(compile(text, f"README.md: {text[:40]!r}", "exec"), namespace)
            printed = out.getvalue()
            ran += 1
        elif language == "text":
            assert matches(text, printed), f"README shows:\n{text}\nprinted was:\n{printed}"

    assert ran >= 4
    assert str(namespace["upper"].text).isupper()
    assert namespace["bullets"].text.count("\n- ") >= 2


@pytest.mark.parametrize(("command", "shown"), STEPS, ids=[command[:50] for command, _ in STEPS])
def test_console_examples_run_and_print_what_is_shown(forked, command, shown):
    here = os.pathsep.join([str(forked.path.parent), os.environ.get("PATH", "")])

    done = subprocess.run(
        command,
        shell=True,
        cwd=ROOT,
        env={**os.environ, "PATH": here},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=120,
        check=False,
    )

    assert done.returncode == 0, done.stdout
    assert matches(shown, done.stdout), f"README shows:\n{shown}\nprinted was:\n{done.stdout}"


def test_links_lead_somewhere():
    for document in (README, *(ROOT / "docs").glob("*.md")):
        for link in re.findall(r"\]\(([^)#:]+)\)", document.read_text(encoding="utf-8")):
            assert (document.parent / link).exists(), f"{document.name} links to {link}"


def test_the_map_has_every_module_of_core_and_no_other():
    modules = {file.relative_to(CORE).as_posix() for file in CORE.rglob("*.py") if file.name != "__init__.py"}
    mapped = set(MODULE.findall(MAP.read_text(encoding="utf-8")))

    in_core = {name for name in mapped if not (ROOT / name).exists()}
    assert modules - in_core == set(), "these are missing from the map"
    assert in_core - modules == set(), "the map names these, which do not exist"


def test_the_map_has_every_package_of_core():
    text = MAP.read_text(encoding="utf-8")

    missing = [file.parent.name for file in CORE.glob("*/__init__.py") if f"`{file.parent.name}/`" not in text]
    assert missing == []


@pytest.mark.parametrize("document", [MAP, TUTORIAL], ids=lambda path: path.stem)
def test_the_types_that_documents_name_exist(document):
    classes = defined_in(CORE)
    prose = FENCE.sub("", document.read_text(encoding="utf-8"))

    named = CLASS.findall(prose)
    unknown = [f"{name}.{member}".rstrip(".") for name, member in named if member not in {"", *classes.get(name, ())}]
    unknown += [name for name, _ in named if name not in classes]
    assert len(named) >= 10
    assert unknown == []


def test_the_map_fits_in_one_sitting():
    assert len(MAP.read_text(encoding="utf-8").splitlines()) < 180


@pytest.mark.parametrize("document", [README, TUTORIAL], ids=lambda path: path.stem)
def test_the_commands_that_documents_name_exist(document):
    said = re.findall(r"(?:^|[`$| ])lorax ([a-z]+)(?: ([a-z]+))?", document.read_text(encoding="utf-8"), re.MULTILINE)

    root = typer.main.get_command(app)
    groups = {first: root.get_command(None, first) for first, _ in said}
    unknown = [first for first, group in groups.items() if group is None]
    unknown += [f"{a} {b}" for a, b in said if b and b not in getattr(groups[a], "commands", {b: None})]
    assert len(said) >= 5
    assert unknown == []


def test_the_tutorial_names_every_variable_that_steers_the_host():
    variables = set(re.findall(r'"(LORAX_[A-Z_]+)"', (CORE / "settings.py").read_text(encoding="utf-8")))
    text = TUTORIAL.read_text(encoding="utf-8")

    assert variables
    assert [name for name in sorted(variables) if f"`{name}`" not in text] == []


if __name__ == "__main__":
    README.write_text(with_table(README.read_text(encoding="utf-8")), encoding="utf-8")
