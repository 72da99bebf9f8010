"""The declaration is light, plain data, and true of what it declares.

Decides what of a spec can be judged without numbers. Everything here is of the architecture, not of a variant.
"""

from __future__ import annotations

import os
import pickle
import subprocess
import sys

from lorax_core.errors import LoraxError, PluginError, nearest
from lorax_core.plugins.resolve import load_class
from lorax_core.plugins.spec import ArchitectureSpec
from lorax_core.testing.case import Case
from lorax_core.testing.reference import reference_class
from lorax_core.testing.result import Check, CheckFailed, Measured, NotApplicable

_HEAVY = ("numpy", "safetensors", "tokenizers", "torch", "transformers")
_MOST_PARAMETERS = 1_000_000
_PROBE = """
import importlib, sys
importlib.import_module(sys.argv[1])
print("imported:" + ", ".join(sorted(set(sys.argv[2:]) & set(sys.modules))))
"""


def _light(case: Case) -> Measured:
    module = case.host.owner(case.spec.model_type).module.partition(":")[0]
    if not module:
        raise NotApplicable("the spec was given by hand; no module declares it")
    command = [sys.executable, "-c", _PROBE, module, *_HEAVY]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, env=_environment())
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
        raise CheckFailed(f"importing {module} in a process of its own failed: {last}")
    found = done.stdout.rpartition("imported:")[2].strip()
    if found:
        raise CheckFailed(f"importing {module} imports {found}; name classes by strings and import them nowhere here")
    return Measured(note=f"{module} imports none of {', '.join(_HEAVY)}")


def _environment() -> dict[str, str]:
    """This process's environment and import path: a plugin need not be installed to be checked."""
    return {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}


def _round_trip(case: Case) -> Measured:
    spec = case.spec
    if ArchitectureSpec.model_validate_json(spec.model_dump_json()) != spec:
        raise CheckFailed("written as JSON and read again, the spec is another")
    if pickle.loads(pickle.dumps(spec)) != spec:
        raise CheckFailed("pickled and unpickled, the spec is another")
    return Measured(note="JSON and pickle")


def _true(case: Case) -> Measured:
    problems = [*_classes(case), *_oracles(case.spec), *_failures(case.spec)]
    problems = problems or _variants(case.spec)
    parameters = 0 if problems else sum(tensor.numel() for tensor in case.reference(case.main).parameters())
    if parameters >= _MOST_PARAMETERS:
        problems.append(f"tiny_config makes {parameters:,} parameters; it should stay under {_MOST_PARAMETERS:,}")
    if problems:
        raise CheckFailed("; ".join(problems))
    return Measured(
        note=f"{len(case.spec.heads)} heads, {len(case.spec.tiny_variants)} variants, {parameters:,} parameters"
    )


def _classes(case: Case) -> list[str]:
    """Problems of the classes that the spec names: each must import, and the heads be for the tasks they are named for."""
    spec, problems = case.spec, []
    owner = case.host.owner(spec.model_type)
    for task, path in (("config", spec.config), ("backbone", spec.backbone), *spec.heads.items()):
        try:
            found = load_class(path, owner if owner.module else None)
        except PluginError as error:
            problems.append(error.message)
            continue
        stated = getattr(found, "task", None)
        if task in spec.heads and stated != task:
            problems.append(f"heads has {path} for {str(task)!r}, but its task is {str(stated)!r}")
    return problems


def _oracles(spec: ArchitectureSpec) -> list[str]:
    """Problems of the references: one for each head, usable, and served as the task that it is the reference of."""
    problems = []
    for task in spec.heads:
        try:
            name = reference_class(spec, task).__name__
        except (CheckFailed, LoraxError) as error:
            problems.append(str(error))
            continue
        served = spec.hf_architectures.get(name)
        if served != task:
            says = "does not name" if served is None else f"has {str(served)!r} for"
            problems.append(f"hf_architectures {says} {name!r}, the reference for {str(task)!r}")
    return problems


def _variants(spec: ArchitectureSpec) -> list[str]:
    """Declared features that no variant exercises."""
    configs = [{**spec.tiny_config, **changes} for changes in ({}, *spec.tiny_variants.values())]
    problems = []
    if "tied_embeddings" in spec.features:
        make = reference_class(spec, spec.default_task).config_class
        tied = {bool(make(**config).tie_word_embeddings) for config in configs}
        if len(tied) < 2:
            problems.append(
                f"features names 'tied_embeddings', and every tiny variant is {'' if True in tied else 'un'}tied"
            )
    if "sliding_window" in spec.features and not any(_window(c) for c in configs):
        problems.append("features names 'sliding_window', and no tiny variant has one")
    return problems


def _window(config: dict[str, object]) -> bool:
    return any("window" in key and isinstance(value, int) and value > 1 for key, value in config.items())


def _failures(spec: ArchitectureSpec) -> list[str]:
    """Entries of known_failures that name no check, or no variant of it."""
    from lorax_core.testing.suite import known_keys

    keys = known_keys(spec)
    wrong = [name for name in spec.known_failures if name not in keys]
    close = [nearest(name, keys) for name in wrong]
    return [
        f"known_failures names {name!r}, which is no check" + (f"; is {other!r} meant?" if other else "")
        for name, other in zip(wrong, close, strict=True)
    ]


CHECKS = (
    Check(
        "light-import", "importing the declaration imports neither torch nor transformers nor numpy", _light, once=True
    ),
    Check("round-trip", "the spec survives JSON and pickle", _round_trip, once=True),
    Check("declaration", "classes, references, features and known failures are as the spec says", _true, once=True),
)
