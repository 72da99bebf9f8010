"""The rules of the house that can be read off the source: floors, sizes, docstrings, who may know what.

Works on syntax trees and text; imports none of the code. Every rule is a function from sources to offences (a list of
lines, empty when all is well), tried first on a source that breaks it.
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from importlib.util import resolve_name
from itertools import pairwise
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FACE = "lorax_core/__init__"

# Packages of core from the ground up, one line a rank. A package imports itself and what stands on lines above its own;
# packages of one line do not know each other. A new package needs its place here, and in docs/architecture.md.
RANKS = [
    ["errors", "version"],  # floor 0: vocabulary
    ["types", "untrusted", "progress", "patterns", "output"],
    ["settings"],
    ["options"],
    ["plugins"],  # floor 1: declaration and discovery
    ["kernels", "parallel"],  # floor 2: torch lives here
    ["attention", "kvcache", "linear_methods"],
    ["modeling"],
    ["weights"],
    ["adapters"],
    ["engine"],  # floor 3
    ["serving"],  # floor 4
    [FACE],  # the lazy public names, for those above
    ["server", "ray", "scaffold"],  # floor 5
    ["cli"],
    ["__main__"],
    ["testing"],  # may import all; nothing imports it but the command that runs it
]
RANK = {package: rank for rank, packages in enumerate(RANKS) for package in packages}
# Layers call protocols carried on the batch, so of attention modeling knows the vocabulary and none of the backends.
ONLY = {("modeling", "attention"): "lorax_core.attention.base"}
# The one module that looks up, at the kit that it is the command line of.
COMMAND_OF = {"cli/check.py": "testing"}

MAX_FILE, MAX_FUNCTION, MAX_MODELING = 400, 60, 120
PLANNERS = {
    "adapters/residency/slots.py",
    "engine/queue.py",
    "engine/scheduler.py",
    "engine/sequence.py",
    "kvcache/allocator.py",
    "kvcache/prefix.py",
}
MODEL_TYPES = {
    "bert", "camembert", "distilbert", "gemma2", "gpt2", "gpt_neox", "llama", "mistral", "modernbert", "qwen2", "qwen3",
    "roberta", "xlm-roberta",
}  # fmt: skip
# A literal key that does not begin with LORAX_ belongs to somebody else and is admitted.
ENVIRONMENT_READ = re.compile(r"(os\.)?(environ\[|environ\.(get|pop|setdefault)\(|getenv\()(?!['\"](?!LORAX_))")
FOR_TYPES = {"TYPE_CHECKING", "typing.TYPE_CHECKING"}
INSTALL_HINTS = "plugins/resolve.py"
OLD_NAMES = re.compile(
    r"\bdistrust|\b[Ww]hoever\b|\banew\b|\bbeneath\b|\blikeliest\b|\bPlaces\b|is not served"
    r"|text of ids|stranger would|\bPiece\b|\bguess"
    r"|the last by rank|\bhears of\b|has nothing to say|\bRecipe\b|\bAdapterSegments\b|\bpage_multiple\b"
    r"|\bkept pages?\b|\bPicked\b|\btold=|\bface\.py\b|\bdraw_as_at_creation\b|\bgives its own back"
)
OLD_EXAMPLES = (
    "distrusts",
    "made anew",
    "has Places",
    "is not served",
    "reads a text of ids",
    "acts as a stranger would",
    "has a Piece",
)
PLUGIN_FILES = [
    "README.md",
    "__init__.py",
    "cases.py",
    "config.py",
    "modeling.py",
    "plugin.py",
    "py.typed",
    "pyproject.toml",
]
PLUGIN_TEST_FILES = ["conftest.py", "test_conformance.py", "test_quirks.py"]
# What makes a hint superfluous: the message itself says what would be right.
STATES_VALID = re.compile(
    r"\bsupported (is|are)\b|\bneeded\b|\bit supports\b|\bat (most|least)\b|; (give|name) |\bone of\b"
    r"|\b(a prompt is|requests are)\b"
)
MACHINE_PATH = re.compile(r"(?<![\w.~-])/(?:(?:home|root|Users|work|farm|mnt|opt)/|tmp/[w]\b)[\w./-]*")


@dataclass(frozen=True)
class Source:
    """One file: its `path` inside the folder `base` (of a package, say) and its text."""

    base: str
    path: str
    text: str

    @cached_property
    def tree(self) -> ast.Module:
        return ast.parse(self.text)

    @property
    def name(self) -> str:
        return f"{self.base}/{self.path}".removeprefix("./")

    @property
    def package(self) -> str:
        """Which package of core this is of: `modeling`, or a module of the ground floor such as `errors`."""
        first = self.path.split("/")[0]
        return FACE if first == "__init__.py" else first.removesuffix(".py")

    @property
    def parent(self) -> str:
        """The dotted package that relative imports start from."""
        return ".".join([self.base.split("/")[-1], *self.path.split("/")[:-1]])

    @property
    def module(self) -> str:
        return f"{self.parent}.{Path(self.path).stem}".removesuffix(".__init__")


@dataclass(frozen=True)
class Import:
    """One imported module, `of` the name that is taken from it (None for `import module`).

    `late` ones are inside a function, `typing` ones under TYPE_CHECKING.
    """

    module: str
    of: str | None
    line: int
    late: bool
    typing: bool


def sources(folder: Path, *patterns: str) -> list[Source]:
    return [
        Source(
            folder.relative_to(ROOT).as_posix(), path.relative_to(folder).as_posix(), path.read_text(encoding="utf-8")
        )
        for pattern in patterns
        for path in sorted(folder.glob(pattern))
        if not {"build", "__pycache__"} & set(path.relative_to(folder).parts)
    ]


CORE = sources(ROOT / "core/lorax_core", "**/*.py")
MARKS = [*ROOT.glob("lorax_*/pyproject.toml"), *ROOT.glob("plugins/*/src/*/plugin.py")]
ARCHITECTURES = sorted(path.parent for path in MARKS)
PLUGINS = [source for folder in ARCHITECTURES for source in sources(folder, "*.py")]
STRANGERS = sources(ROOT, "plugins/*/src/**/*.py", "plugins/*/tests/**/*.py")
PLUGIN_TESTS = [source for folder in ARCHITECTURES for source in sources(folder, "tests/**/*.py")] + STRANGERS
NAMES = {folder.name for folder in ARCHITECTURES}
STRANGE_NAMES = {folder.name for folder in ARCHITECTURES if folder.parent != ROOT}


def core_source(path, text):
    return Source("core/lorax_core", path, text)


def taken_from(tree: ast.Module, module: str) -> list[str]:
    """The names that are read off a module imported as a whole."""
    attributes = [node for node in ast.walk(tree) if isinstance(node, ast.Attribute)]
    return sorted({node.attr for node in attributes if isinstance(node.value, ast.Name) and node.value.id == module})


def by_name(call: ast.Call) -> str | None:
    """The module that `import_module("...")` or `__import__("...")` imports, where it is written there."""
    called = ast.unparse(call.func).split(".")[-1]
    named = call.args[0] if called in {"import_module", "__import__"} and call.args else None
    return named.value if isinstance(named, ast.Constant) and isinstance(named.value, str) else None


def imports(source: Source) -> Iterator[Import]:
    """All imports of a module, those in functions and under TYPE_CHECKING too."""
    pending: list[tuple[ast.AST, bool, bool]] = [(source.tree, False, False)]
    while pending:
        node, late, typing = pending.pop()
        if isinstance(node, ast.Import):
            for alias in node.names:
                taken = taken_from(source.tree, alias.asname or alias.name) if alias.name == "lorax_core" else [None]
                yield from (Import(alias.name, name, node.lineno, late, typing) for name in taken)
        elif isinstance(node, ast.ImportFrom):
            module = resolve_name("." * node.level + (node.module or ""), source.parent)
            yield from (Import(module, alias.name, node.lineno, late, typing) for alias in node.names)
        elif isinstance(node, ast.Call) and (named := by_name(node)) is not None:
            yield Import(named, None, node.lineno, late, typing)
        late = late or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        for_types = node.body if isinstance(node, ast.If) and ast.unparse(node.test) in FOR_TYPES else []
        pending.extend((child, late, typing or child in for_types) for child in ast.iter_child_nodes(node))


def imported_package(found: Import) -> str | None:
    """Which package of core an import reaches; None outside core and for `__version__`, which is nobody's."""
    parts = found.module.split(".")
    if parts[0] != "lorax_core":
        return None
    if len(parts) > 1:
        return parts[1]
    return None if found.of == "__version__" else found.of if found.of in RANK else FACE


def violations(source: Source) -> list[str]:
    """Imports of one module of core that go up, or sideways, or to a plugin."""
    if source.package == FACE:
        return []
    if source.package not in RANK:
        return [f"{source.name}: package {source.package!r} has no place in RANKS"]
    offences = []
    for found in imports(source):
        target = imported_package(found)
        below = RANK.get(target, len(RANKS)) < RANK[source.package] or target == COMMAND_OF.get(source.path)
        admitted = f"{found.module}.{found.of}".startswith(ONLY.get((source.package, target), ""))
        wrong = target != source.package and not (below and admitted)
        if wrong if target else found.module.split(".")[0] in NAMES:
            offences.append(f"{source.name}:{found.line}: {source.package} imports {target or found.module}")
    return offences


def strange_imports(source: Source) -> list[str]:
    """Imports by which an architecture would depend on more than it may."""
    allowed = [source.module.split(".")[0], "lorax_core.plugins"]
    if source.path not in {"plugin.py", "cases.py", "__init__.py"}:
        allowed = [allowed[0], "lorax_core.modeling", "lorax_core.weights", "torch", "pydantic"]
    return [
        f"{source.name}:{found.line}: imports {found.module}; allowed: {', '.join(allowed)} and the standard library"
        for found in imports(source)
        if found.module.split(".")[0] not in sys.stdlib_module_names
        and not any(f"{found.module}.{found.of}.".startswith(f"{prefix}.") for prefix in allowed)
    ]


def neighbours(source: Source) -> list[str]:
    """Imports of another architecture, in code or tests."""
    others = NAMES - set(source.name.replace("-", "_").split("/"))
    found = [found for found in imports(source) if found.module.split(".")[0] in others]
    return [f"{source.name}:{one.line}: imports its neighbour {one.module}" for one in found]


def public_names(path: str) -> set[str]:
    """What a package of core lists in `__all__`, or in its table of names that are imported when first used."""
    tree = next(source for source in CORE if source.path == path).tree
    assigned = [node for node in tree.body if isinstance(node, ast.Assign)]
    lists = [node.value for node in assigned if ast.unparse(node.targets[0]) in ("_HOMES", "__all__")]
    names = [name for found in lists for name in (found.keys if isinstance(found, ast.Dict) else ast.walk(found))]
    return {name.value for name in names if isinstance(name, ast.Constant)}


def private_imports(source: Source) -> list[str]:
    """Names of core that a stranger takes from elsewhere than the packages that list them."""
    return [
        f"{source.name}:{found.line}: imports {found.of} of {found.module}, which does not list it"
        for found in imports(source)
        if found.module.split(".")[0] == "lorax_core" and found.of not in PUBLIC.get(found.module, ())
    ]


def strangers_known(source: Source) -> list[str]:
    """Imports of a stranger's package by what must do without."""
    found = [found for found in imports(source) if found.module.split(".")[0] in STRANGE_NAMES]
    return [f"{source.name}:{one.line}: imports {one.module}, a stranger's" for one in found]


def too_long(source: Source) -> list[str]:
    """Files and functions that no longer fit on a few screens."""
    lines = len(source.text.splitlines())
    limit = MAX_MODELING if source.path == "modeling.py" else MAX_FILE
    offences = [f"{source.name}: {lines} lines, at most {limit}"] if lines > limit else []
    for node in ast.walk(source.tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            told = len((ast.get_docstring(node) or "").splitlines())  # a long explanation is no long function
            length = (node.end_lineno or node.lineno) - node.lineno + 1 - told
            if length > MAX_FUNCTION:
                offences.append(f"{source.name}:{node.lineno}: {node.name} has {length} lines, at most {MAX_FUNCTION}")
    return offences


def undocumented(source: Source) -> list[str]:
    """Modules and public names without a docstring, public functions and methods without a return annotation."""
    function = ast.FunctionDef | ast.AsyncFunctionDef
    offences = [] if ast.get_docstring(source.tree) else [f"{source.name}: no module docstring"]
    public = [n for n in source.tree.body if isinstance(n, function | ast.ClassDef) and not n.name.startswith("_")]
    for node in public:
        if not ast.get_docstring(node):
            offences.append(f"{source.name}:{node.lineno}: {node.name} has no docstring")
        members = [n for n in (node.body if isinstance(node, ast.ClassDef) else [node]) if isinstance(n, function)]
        untyped = [n for n in members if not n.name.startswith("_") and n.returns is None]
        offences += [f"{source.name}:{n.lineno}: {n.name} has no return annotation" for n in untyped]
    return offences


def torch_imports(all_sources: Iterable[Source]) -> list[str]:
    """Planners that import torch themselves (late imports too), or import at their top something that does."""
    modules = {source.module: source for source in all_sources}
    offences = []
    for planner in modules.values():
        if planner.package != "plugins" and planner.path not in PLANNERS:
            continue
        reached, pending = set(), [(planner.module, planner.module)]
        while pending:
            module, way = pending.pop()
            for found in imports(modules[module]):
                if found.typing:  # does not happen when the code runs
                    continue
                names = f"{found.module}.{found.of}".split(".")
                if names[0] == "torch" and (module == planner.module or not found.late):
                    offences.append(f"{planner.name}: imports torch ({way}, line {found.line})")
                elif not found.late:
                    prefixes = {".".join(names[:size]) for size in range(1, len(names) + 1)}
                    fresh = prefixes & modules.keys() - reached
                    pending.extend((name, f"{way} > {name}") for name in fresh)
                    reached |= fresh
    return offences


def model_type_literals(source: Source) -> list[str]:
    """Model types that core knows by name."""
    return [
        f"{source.name}:{node.lineno}: {node.value!r} belongs to a plugin"
        for node in ast.walk(source.tree)
        if isinstance(node, ast.Constant) and node.value in MODEL_TYPES and source.path != INSTALL_HINTS
    ]


def environment_reads(source: Source) -> list[str]:
    """Reads of LORAX_* variables, or of ones whose name is not written there, outside settings."""
    found = [(node, ast.unparse(node)) for node in ast.walk(source.tree) if isinstance(node, ast.Subscript | ast.Call)]
    return [
        f"{source.name}:{node.lineno}: {text} is for settings.py to read"
        for node, text in found
        if ENVIRONMENT_READ.match(text) and source.path != "settings.py"
    ]


def environment_names(source: Source) -> list[str]:
    """Names of `os` that read the environment, taken where they could be renamed."""
    return [
        f"{source.name}:{found.line}: os.{found.of} is for settings.py to read"
        for found in imports(source)
        if found.module == "os" and found.of in {"environ", "environb", "getenv"} and source.path != "settings.py"
    ]


def packages(source: Source) -> list[str]:
    """The packages that a module is in, dotted."""
    parts = source.parent.split(".")
    return [".".join(parts[:count]) for count in range(1, len(parts) + 1)]


def own_init_imports(source: Source) -> list[str]:
    """Names that a module takes from the `__init__` of its own package, which may import the module itself."""
    if source.path.endswith("__init__.py"):
        return []
    known, above = {one.module for one in CORE}, [name for name in packages(source) if "." in name]
    return [
        f"{source.name}:{found.line}: import {found.of} from its own module, not from {found.module}"
        for found in imports(source)
        if found.module in above and found.of is not None and f"{found.module}.{found.of}" not in known
    ]


def error_classes(all_sources: Iterable[Source]) -> set[str]:
    """The names of LoraxError and of all that is derived from it."""
    classes = [node for source in all_sources for node in source.tree.body if isinstance(node, ast.ClassDef)]
    found, before = {"LoraxError"}, 0
    while len(found) > before:
        before = len(found)
        found |= {node.name for node in classes if found & {ast.unparse(base) for base in node.bases}}
    return found


def hintless(source: Source) -> list[str]:
    """Errors of ours that are made without `hint=`, though their message does not state what is valid.

    `raise kind(...)` counts, where `kind` is a class that was passed; `raise invalid(...)` does not, which is a function that
    makes the error, and is looked into by itself.
    """
    raised = {id(node.exc) for node in ast.walk(source.tree) if isinstance(node, ast.Raise)}
    offences = []
    for node in ast.walk(source.tree):
        if not isinstance(node, ast.Call) or any(keyword.arg is None for keyword in node.keywords):
            continue
        name = ast.unparse(node.func).split(".")[-1]
        makes = name in ERRORS or (id(node) in raised and name in ("kind", "error"))
        message = node.args[:1] if makes else node.args[1:2]  # guarded(kind, message, hint)
        hints = [ast.unparse(keyword.value) for keyword in node.keywords if keyword.arg == "hint"]
        hints += [ast.unparse(hint) for hint in node.args[2:3]] if name == "guarded" else []
        # One that is None in some cases is no hint in those.
        hinted = any(not hint.endswith("None") for hint in hints)
        if (makes or name == "guarded") and not hinted and not STATES_VALID.search("".join(map(ast.unparse, message))):
            offences.append(f"{source.name}:{node.lineno}: {ast.unparse(node):.120} has no hint")
    return offences


def machine_paths(source: Source) -> list[str]:
    """Absolute paths of somebody's machine."""
    lines = enumerate(source.text.splitlines(), start=1)
    return [f"{source.name}:{at}: {found.group()}" for at, line in lines for found in MACHINE_PATH.finditer(line)]


def import_cycles(all_sources: Iterable[Source]) -> list[str]:
    """Modules of core that reach themselves by imports of any kind, each cycle once, by its first module."""
    modules = {source.module: source for source in all_sources if not is_lazy(source)}
    reached = {name: set(filter(modules.__contains__, targets(source, modules))) for name, source in modules.items()}
    offences, seen = [], set()
    for start in sorted(modules):
        pending, back = [(start, (start,))], None
        visited = set()
        while pending and back is None:
            name, way = pending.pop(0)
            for target in sorted(reached[name]):
                if target == start:
                    back = way
                elif target not in visited:
                    visited.add(target)
                    pending.append((target, (*way, target)))
        if back is not None and not seen & set(back):
            offences.append(" > ".join([*back, start]))
            seen |= set(back)
    return offences


def is_lazy(source: Source) -> bool:
    """Whether a package imports its names when they are first used: its table names modules that import nothing of it."""
    return source.path.endswith("__init__.py") and "_HOMES" in source.text


def targets(source: Source, modules: Iterable[str]) -> Iterator[str]:
    """The modules that a module imports, a name taken from a package being the module of that name if there is one."""
    for found in imports(source):
        inner = f"{found.module}.{found.of}"
        yield inner if inner in modules else found.module


def old_names(source: Source) -> list[str]:
    """Words that have been replaced by the field's own."""
    lines = enumerate(source.text.splitlines(), start=1)
    offences = [f"{source.name}:{at}: {found.group()!r}" for at, line in lines for found in OLD_NAMES.finditer(line)]
    if source.path.endswith(".py"):
        parameters = [node for node in ast.walk(source.tree) if isinstance(node, ast.arg) and node.arg == "told"]
        offences += [f"{source.name}:{node.lineno}: a parameter 'told'" for node in parameters]
    return offences


def sections(source: Source) -> list[tuple[int, str]]:
    """The top-level definitions of a plugin's file, each with the rank of its section."""
    ranked = []
    for node in source.tree.body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef):
            ranked.append((SECTIONS[source.path](node), node.name))
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            target = node.targets[0] if isinstance(node, ast.Assign) else node.target
            cases = source.path == "cases.py" and not ast.unparse(target).startswith("_")
            ranked.append((9 if cases else 0, ast.unparse(target)))
    return ranked


def modeling_section(node: ast.ClassDef | ast.FunctionDef) -> int:
    """Layers, then the backbone, then heads, then the model classes that fix a task."""
    if isinstance(node, ast.FunctionDef):
        return 1
    bases = [ast.unparse(base) for base in node.bases]
    if any(base == "Model" or base.startswith("Flash") for base in bases):
        return 4
    if any(base.endswith("Head") for base in bases):
        return 3
    return 2 if any(isinstance(n, ast.FunctionDef) and n.name == "weight_map" for n in node.body) else 1


def disorder(source: Source) -> list[str]:
    """Definitions that stand before one of an earlier section."""
    ranked = sections(source)
    return [
        f"{source.name}: {name} stands before {after}"
        for (rank, name), (next_rank, after) in pairwise(ranked)
        if next_rank < rank
    ]


SECTIONS = {
    "__init__.py": lambda node: 1,
    "plugin.py": lambda node: 1 if node.name == "lorax_architectures" else 2,  # the hook, then its helpers
    "config.py": lambda node: 1 if isinstance(node, ast.ClassDef) else 2,  # the configuration, then its helpers
    "modeling.py": modeling_section,
    "cases.py": lambda node: 1,  # helpers, then the cases
}


def written_files() -> list[Source]:
    """What people write and read, wherever it lies; not what tools leave."""
    folders = [path for path in sorted(ROOT.iterdir()) if path.is_dir() and path.name[0] != "." and path.name != "dist"]
    ours = [folder for folder in folders if not (folder / "pyvenv.cfg").exists()]
    below = [source for folder in ours for source in sources(folder, "**/*.py", "**/*.md", "**/*.toml")]
    return [*sources(ROOT, "*.md", "*.toml", "*.txt", "Makefile", ".ci/*"), *below]


PUBLIC = {
    ".".join(["lorax_core", *path.split("/")[:-1]]): public_names(path)
    for path in ("__init__.py", *(f"{name}/__init__.py" for name in ("plugins", "modeling", "weights", "testing")))
}


ERRORS = error_classes(CORE)


def all_offences(rule, checked: Iterable[Source]) -> str:
    return "\n".join(offence for source in checked for offence in rule(source))


@pytest.mark.parametrize(
    ("path", "text", "offence"),
    [
        ("errors.py", "from lorax_core.types import Task", "errors imports types"),
        ("plugins/host.py", "from lorax_core import engine", "plugins imports engine"),
        ("attention/base.py", "def f():\n    from ..kvcache import pool", "attention imports kvcache"),
        ("modeling/blocks.py", "from lorax_core.attention import reference", "modeling imports attention"),
        ("modeling/blocks.py", "import lorax_core.adapters.base", "modeling imports adapters"),
        ("weights/loader.py", "if not TYPE_CHECKING:\n    from ..adapters import a", "weights imports adapters"),
        ("engine/engine.py", "import lorax_core as lorax\nlorax.load", f"engine imports {FACE}"),
        ("engine/engine.py", "from lorax_core import load", f"engine imports {FACE}"),
        ("serving/engine.py", "from ..cli.main import main", "serving imports cli"),
        ("cli/main.py", "from lorax_core.testing import tiny", "cli imports testing"),
        ("cli/main.py", "from lorax_core.nowhere import x", "cli imports nowhere"),
        ("weights/loader.py", "import lorax_bert.config", "weights imports lorax_bert"),
        ("types.py", "if TYPE_CHECKING:\n    from lorax_core.engine.engine import Engine", "types imports engine"),
        ("options.py", "def f():\n    from lorax_core.plugins.host import PluginHost", "options imports plugins"),
        ("settings.py", "from lorax_core.options import EngineOptions", "settings imports options"),
        ("linear_methods/base.py", "from lorax_core.modeling.linear import Linear", "linear_methods imports modeling"),
        ("kernels/triton.py", "from lorax_core.parallel import group", "kernels imports parallel"),
        ("serving/engine.py", "from lorax_core.server import app", "serving imports server"),
        ("server/app.py", "from lorax_core.ray import deployment", "server imports ray"),
        ("scaffold/new.py", "from lorax_core.cli import render", "scaffold imports cli"),
        ("nowhere/thing.py", "", "'nowhere' has no place"),
    ],
)
def test_an_import_that_goes_up_is_caught(path, text, offence):
    found = violations(core_source(path, text))

    assert len(found) == 1
    assert offence in found[0]


@pytest.mark.parametrize(
    ("path", "text"),
    [
        ("weights/loader.py", "import torch\nfrom lorax_core import __version__, errors\nfrom ..modeling import batch"),
        ("plugins/host.py", "import lorax_core\nlorax_core.__version__"),
        ("modeling/blocks.py", "from lorax_core.attention.base import AttentionSpec"),
        ("cli/main.py", "from lorax_core import load"),
        ("cli/check.py", "from lorax_core.testing import run_checks"),
        ("testing/case.py", "from lorax_core.cli.main import main"),
        ("__init__.py", "from lorax_core.serving.engine import load"),
    ],
)
def test_an_import_that_goes_down_is_admitted(path, text):
    assert violations(core_source(path, text)) == []


@pytest.mark.parametrize(
    ("rule", "source"),
    [
        (strange_imports, Source("lorax_x", "plugin.py", "import torch")),
        (strange_imports, Source("lorax_x", "plugin.py", "from lorax_core.modeling import Linear")),
        (strange_imports, Source("lorax_x", "plugin.py", "from lorax_core import pluginsmith")),
        (strange_imports, Source("lorax_x", "modeling.py", "from lorax_core.engine import engine")),
        (strange_imports, Source("lorax_x", "config.py", "import transformers")),
        (neighbours, Source("lorax_bert", "modeling.py", "from lorax_qwen2 import modeling")),
        (neighbours, Source(".", "plugins/lorax-distilbert/tests/test_x.py", "import lorax_distilbert, lorax_bert")),
        (private_imports, Source(".", "plugins/x/src/x/modeling.py", "from lorax_core.modeling.norm import LayerNorm")),
        (private_imports, Source(".", "plugins/x/src/x/modeling.py", "from lorax_core.modeling import norm")),
        (private_imports, Source(".", "plugins/x/tests/test_x.py", "import lorax_core as lorax\nlorax.serving")),
        (strangers_known, Source("tests", "test_x.py", "from lorax_distilbert.config import DistilBertConfig")),
        (too_long, Source("lorax_x", "modeling.py", "x = 1\n" * 121)),
        (too_long, core_source("engine/engine.py", "x = 1\n" * 401)),
        (too_long, core_source("engine/engine.py", "def f():\n" + "    x = 1\n" * 60)),
        (undocumented, core_source("types.py", "x = 1")),
        (undocumented, core_source("types.py", '"""Doc."""\nclass Task: ...')),
        (undocumented, core_source("types.py", '"""Doc."""\ndef f():\n    """Doc."""')),
        (undocumented, core_source("types.py", '"""Doc."""\nclass Task:\n    """Doc."""\n    def f(self): ...')),
        (model_type_literals, core_source("engine/engine.py", "if model_type == 'qwen2': pass")),
        (disorder, Source("lorax_x", "plugin.py", "def _spec(): ...\ndef lorax_architectures(): ...")),
        (disorder, Source("lorax_x", "modeling.py", "class FlashX(Model): ...\nclass XLayer(nn.Module): ...")),
        (disorder, Source("lorax_x", "modeling.py", "class XHead(Head): ...\nclass X:\n    def weight_map(): ...")),
        (disorder, Source("lorax_x", "cases.py", "X = _cases()\ndef _cases(): ...")),
        (old_names, core_source("engine/engine.py", "def f(x: int, told: int = 1): ...")),
        *((old_names, Source("docs", "x.md", f"It {words}.")) for words in OLD_EXAMPLES),
        (environment_reads, core_source("engine/engine.py", "import os\nos.environ['LORAX_STRICT']")),
        (environment_reads, core_source("engine/engine.py", "import os\nos.environ.get(name)")),
        (environment_names, core_source("engine/engine.py", "from os import environ as env\nenv.get('LORAX_NATIVE')")),
        (own_init_imports, core_source("modeling/embedding.py", "from lorax_core.modeling import Linear")),
        (
            violations,
            core_source("modeling/blocks.py", "import importlib\nimportlib.import_module('lorax_core.engine.loop')"),
        ),
        (environment_reads, core_source("engine/engine.py", "import os\nos.getenv(f'LORAX_{name}')")),
        (hintless, core_source("engine/engine.py", "raise errors.RequestError(f'{n} is wrong')")),
        (hintless, core_source("engine/engine.py", "failed = Incompatible('it is too old')")),
        (hintless, core_source("engine/engine.py", "with guarded(AdapterError, f'{file} is not read'): pass")),
        (hintless, core_source("engine/engine.py", "raise RequestError('no', hint=f'{near}?' if near else None)")),
        (hintless, core_source("untrusted.py", "def f(kind: type[LoraxError]):\n    raise kind('it is wrong')")),
        (machine_paths, Source(".", "README.md", "see " + "/".join(["", "home", "ada", "notes"]))),
        (machine_paths, Source(".", "README.md", "see " + "/".join(["", "tmp", "w"]))),
    ],
)
def test_a_broken_rule_is_caught(rule, source):
    assert len(rule(source)) == 1


@pytest.mark.parametrize(
    ("path", "text"),
    [
        ("plugins/host.py", "import torch"),
        ("kvcache/prefix.py", "def f():\n    import torch.nn"),
        ("engine/scheduler.py", "from lorax_core.modeling.batch import Batch"),
        ("engine/scheduler.py", "from lorax_core.modeling import Batch"),
    ],
)
def test_torch_in_a_planner_is_caught_at_any_distance(path, text):
    house = [
        core_source("modeling/__init__.py", "from .batch import Batch"),
        core_source("modeling/batch.py", "import torch"),
    ]

    found = torch_imports([*house, core_source(path, text)])

    assert found
    assert all(offence.startswith(f"core/lorax_core/{path}: imports torch") for offence in found)


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("from lorax_core.kvcache.pool import KVPool", "from lorax_core.kvcache import prefix"),
        (
            "if TYPE_CHECKING:\n    from .pool import KVPool",
            "def f():\n    from lorax_core.kvcache.prefix import Index",
        ),
    ],
)
def test_a_cycle_of_imports_is_caught(first, second):
    house = [
        core_source("kvcache/prefix.py", first),
        core_source("kvcache/pool.py", second),
        core_source("errors.py", ""),
    ]

    found = import_cycles(house)

    assert found == ["lorax_core.kvcache.pool > lorax_core.kvcache.prefix > lorax_core.kvcache.pool"]


def test_imports_run_downwards():
    assert not all_offences(violations, CORE)


def test_no_modules_of_core_import_each_other():
    assert import_cycles(CORE) == []


def test_a_name_of_a_class_means_one_thing():
    homes: dict[str, list[str]] = {}
    for source in CORE:
        for node in source.tree.body:
            if isinstance(node, ast.ClassDef):
                homes.setdefault(node.name, []).append(source.name)

    clashes = {name: found for name, found in homes.items() if len(found) > 1}

    # A result of the public API and a layer, both by the name that the field has for them.
    assert list(clashes) == ["Embedding"]


def test_old_names_are_gone():
    docs = sources(ROOT / "docs", "*.md")
    readmes = sources(ROOT, "*.md", "lorax_*/*.md", "plugins/*/*.md")
    assert not all_offences(old_names, [*CORE, *PLUGINS, *docs, *readmes])


def test_plugins_have_the_same_files():
    faces = {}
    for folder in ARCHITECTURES:
        project = folder if folder.parent == ROOT else folder.parents[1]
        files = {path.name for path in folder.iterdir() if path.suffix in {".py", ".typed"}}
        files |= {name for name in ("README.md", "pyproject.toml") if (project / name).is_file()}
        files |= {f"tests/{name}" for name in PLUGIN_TEST_FILES if (project / "tests" / name).is_file()}
        faces[folder.name] = sorted(files)

    assert len(faces) > 5
    assert faces == dict.fromkeys(faces, sorted([*PLUGIN_FILES, *(f"tests/{name}" for name in PLUGIN_TEST_FILES)]))


def test_files_of_plugins_have_their_sections_in_the_same_order():
    assert not all_offences(disorder, PLUGINS)


def test_architectures_know_only_the_public_api():
    assert not all_offences(strange_imports, PLUGINS)


def test_no_architecture_imports_another():
    assert not all_offences(neighbours, [*PLUGINS, *PLUGIN_TESTS])


def test_strangers_know_only_what_core_lists():
    assert {"load", "hookimpl", "Linear", "WeightMap", "conformance"} <= set().union(*PUBLIC.values())
    assert not all_offences(private_imports, STRANGERS)


def test_nothing_of_ours_imports_a_stranger():
    ours = [source for source in written_files() if source.path.endswith(".py") and source.base != "plugins"]
    assert not all_offences(strangers_known, ours)


def test_strangers_are_ordinary_src_projects():
    projects = [folder for folder in sorted(ROOT.glob("plugins/*")) if folder.is_dir()]
    packages = [folder / "src" / folder.name.replace("-", "_") for folder in projects]
    expected = [folder / name for folder in projects for name in ("pyproject.toml", "README.md", "tests")]
    expected += [package / name for package in packages for name in ("plugin.py", "modeling.py", "py.typed")]
    assert [path.relative_to(ROOT).as_posix() for path in expected if not path.exists()] == []


def test_files_and_functions_stay_short():
    assert not all_offences(too_long, [*CORE, *PLUGINS])


def test_public_names_are_documented_and_typed():
    assert not all_offences(undocumented, [*CORE, *PLUGINS])


def test_planners_do_without_torch():
    assert not "\n".join(torch_imports(CORE))


def test_core_knows_no_model_type_by_name():
    assert not all_offences(model_type_literals, CORE)


def test_only_settings_reads_the_environment():
    assert not all_offences(environment_reads, [*CORE, *PLUGINS])
    assert not all_offences(environment_names, [*CORE, *PLUGINS])


def test_every_error_says_what_to_do_next():
    assert {"LoraxError", "RequestError", "StepError", "Incompatible", "OutputError"} <= ERRORS
    assert not all_offences(hintless, [*CORE, *PLUGINS, *STRANGERS])


@pytest.mark.parametrize(
    "text",
    [
        "raise RequestError('no', hint='give another')",
        "raise RequestError('no', **about)",
        "raise RequestError(f'{n} heads; supported are 1 to {most}')",
        "with guarded(AdapterError, f'{file} cannot be read', again): pass",
        "raise ValueError('no')",
        "raise invalid(error)",
    ],
)
def test_an_error_that_says_what_to_do_next_is_admitted(text):
    assert hintless(core_source("engine/engine.py", text)) == []


def test_no_module_imports_from_the_init_of_its_own_package():
    assert not all_offences(own_init_imports, CORE)


def test_no_file_names_a_path_of_one_machine():
    assert not all_offences(machine_paths, written_files())
