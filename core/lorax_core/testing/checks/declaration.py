"""The declaration imports nothing heavy, is plain data, and matches the code.

Decides which facts of a spec and its cases can be checked without numbers. Everything here is about the architecture, not
about a variant.
"""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from typing import Any

from lorax_core.errors import LoraxError, PluginError, listed, nearest
from lorax_core.plugins.cases import ArchitectureCases
from lorax_core.plugins.resolve import load_class
from lorax_core.plugins.spec import ArchitectureSpec
from lorax_core.testing.case import Case
from lorax_core.testing.check import Check
from lorax_core.testing.inputs import LONGEST
from lorax_core.testing.reference import reference_class
from lorax_core.testing.result import CheckFailed, Measured, NotApplicable

_HEAVY = ("numpy", "safetensors", "tokenizers", "torch", "transformers")
# Every check builds, saves and loads such models, many times.
_MOST_PARAMETERS = 1_000_000
_PROBE = """
import importlib, sys
importlib.import_module(sys.argv[1])
print("imported:" + ", ".join(sorted(set(sys.argv[2:]) & set(sys.modules))))
"""


def _light(case: Case) -> Measured:
    declaring = case.host.owner(case.spec.model_type).module.partition(":")[0]
    if not declaring:
        raise NotApplicable("the spec was given by hand; no module declares it")
    modules = (declaring, case.spec.cases.partition(":")[0])
    for module in modules:
        # A process of its own: in this one all of them have been imported already.
        command = [sys.executable, "-c", _PROBE, module, *_HEAVY]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, env=_environment())
        if done.returncode:
            last = (done.stderr.strip().splitlines() or ["no output"])[-1]
            raise CheckFailed(f"importing {module} in a process of its own failed: {last}")
        # The plugin may print while it is imported.
        found = done.stdout.rpartition("imported:")[2].strip()
        if found:
            raise CheckFailed(
                f"importing {module} imports {found}; name classes by strings and import them nowhere here"
            )
    return Measured(note=f"{' and '.join(modules)} import none of {', '.join(_HEAVY)}")


def _environment() -> dict[str, str]:
    """This process's environment and import path: a plugin need not be installed to be checked."""
    return {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}


def _round_trip(case: Case) -> Measured:
    spec = case.spec
    if ArchitectureSpec.model_validate_json(spec.model_dump_json()) != spec:
        raise CheckFailed("written as JSON and read again, the spec is another")
    if pickle.loads(pickle.dumps(spec)) != spec:
        raise CheckFailed("pickled and unpickled, the spec is another")
    if ArchitectureCases.model_validate_json(case.cases.model_dump_json()) != case.cases:
        raise CheckFailed("written as JSON and read again, the cases are others")
    return Measured(note="JSON and pickle")


def _true(case: Case) -> Measured:
    problems = [*_classes(case), *_references(case.spec, case.cases), *_failures(case)]
    # Variants are built with the classes, which must be sound first.
    problems = problems or _variants(case.spec, case.cases)
    parameters = 0 if problems else sum(tensor.numel() for tensor in case.reference(case.main).parameters())
    if parameters >= _MOST_PARAMETERS:
        problems.append(f"tiny_config makes {parameters:,} parameters; it should stay under {_MOST_PARAMETERS:,}")
    if problems:
        raise CheckFailed("; ".join(problems))
    return Measured(
        note=f"{len(case.spec.tasks)} tasks, {len(case.cases.variants)} variants, {parameters:,} parameters"
    )


def _classes(case: Case) -> list[str]:
    """Problems of the classes that the spec names: each must import, and the heads be for the tasks they are named for."""
    spec, problems = case.spec, []
    owner = case.host.owner(spec.model_type)
    heads = [(task, spec.head(task)) for task in spec.tasks]
    for task, path in ((None, spec.config), (None, spec.backbone), *heads):
        try:
            found = load_class(path, owner if owner.module else None)
        except PluginError as error:
            problems.append(error.message)
            continue
        stated = getattr(found, "task", None)
        if task is not None and stated != task:
            problems.append(f"heads has {path} for {str(task)!r}, but its task is {str(stated)!r}")
    return problems


def _references(spec: ArchitectureSpec, cases: ArchitectureCases) -> list[str]:
    """Problems of the references: one for each task, usable, and loaded for the task that it is the reference of."""
    problems = [
        f"references names {str(task)!r}, which is not one of the tasks: {listed(map(str, spec.tasks))}"
        for task in cases.references
        if task not in spec.tasks
    ]
    for task in spec.tasks:
        try:
            name = reference_class(cases, task).__name__
        except (CheckFailed, LoraxError) as error:
            problems.append(str(error))
            continue
        stated = spec.hf_architectures.get(name)
        if stated != task:
            says = "does not name" if stated is None else f"has {str(stated)!r} for"
            problems.append(f"hf_architectures {says} {name!r}, the reference for {str(task)!r}")
    return problems


def _variants(spec: ArchitectureSpec, cases: ArchitectureCases) -> list[str]:
    """Declared features that no variant exercises."""
    configs = [cases.tiny_config, *(cases.config(name) for name in cases.variants)]
    make = reference_class(cases, spec.default_task).config_class
    problems = []
    if "tied_embeddings" in spec.features:
        tied = {bool(make(**config).tie_word_embeddings) for config in configs}
        # The default of the config class counts, so the class is asked and not the dict.
        if len(tied) < 2:
            problems.append(
                f"features names 'tied_embeddings', and every variant is {'' if True in tied else 'un'}tied"
            )
    if "sliding_window" in spec.features and not any(_window(config, make) for config in configs):
        problems.append("features names 'sliding_window', and no variant has one")
    return problems


def _window(config: dict[str, object], make: Any) -> bool:
    if any("window" in key and isinstance(value, int) and value > 1 for key, value in config.items()):
        return True
    # Under a key of another name (ModernBERT's `local_attention`): one that inputs of the kit are longer than.
    window = getattr(make(**config), "sliding_window", None)
    return isinstance(window, int) and 1 < window < LONGEST


def _failures(case: Case) -> list[str]:
    """Entries of known_failures that name no check, or no variant of it."""
    keys = case.failure_keys
    wrong = [name for name in case.cases.known_failures if name not in keys]
    close = [nearest(name, keys) for name in wrong]
    return [
        f"known_failures names {name!r}, which is not a check" + (f"; is {other!r} meant?" if other else "")
        for name, other in zip(wrong, close, strict=True)
    ]


CHECKS = (
    Check(
        "light-import",
        "importing the declaration or the cases imports neither torch nor transformers nor numpy",
        _light,
        once=True,
    ),
    Check("round-trip", "the spec and its cases survive JSON, and the spec pickle", _round_trip, once=True),
    Check("declaration", "classes, references, features and known failures are as the spec says", _true, once=True),
)
