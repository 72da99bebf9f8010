"""Architectures under the kit: those that are right, and copies with one part exchanged."""

from __future__ import annotations

import sys
import types
from collections.abc import Callable, Iterator
from typing import Any

import gemma2
import pytest

from lorax_core.plugins import ArchitectureCases, ArchitectureSpec, BackendSpec
from lorax_core.plugins.host import PluginHost
from lorax_core.plugins.record import PluginRecord, PluginStatus
from lorax_core.plugins.resolve import load_cases
from lorax_core.testing import CheckResult, Suite
from lorax_core.testing.checks import CHECKS

VARIANTS = {
    "bert": {"relu": {"hidden_act": "relu"}},
    "qwen2": {
        "windows": {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 0},
        "other_base": {"rope_theta": 1000000.0},
        "linear_rope": {"rope_scaling": {"type": "linear", "factor": 4.0}},
        "padding": {"pad_token_id": 0},
        "tied": {"tie_word_embeddings": True},
    },
    "gpt2": {
        # Scores that are not scaled grow with the weights, and with them what rounding does.
        "rough": {"scale_attn_weights": False, "n_layer": 3, "initializer_range": 0.17},
        "wild": {"initializer_range": 30.0},
        "hopeless": {"scale_attn_weights": False, "n_layer": 6, "initializer_range": 0.4},
    },
    "gemma2": {
        # The config states a window that no layer uses, and one that a layer below makes invisible.
        "full": {"layer_types": ["full_attention", "full_attention"]},
        "mixed": {"layer_types": ["full_attention", "sliding_attention"]},
        "sliding": {"layer_types": ["sliding_attention", "sliding_attention"]},
    },
}
SPECIMENS = {"gemma2": gemma2.SPEC}
"""Architectures of the tests' own, whatever plugins there are."""
"""Few and of our own, so that these tests do not lean on what the plugins try of themselves."""


_ADDED = ("heads", "references", "hf_architectures")


@pytest.fixture(scope="session")
def make_spec(host: PluginHost) -> Iterator[Callable[..., ArchitectureSpec]]:
    """Makes a spec of an installed architecture with changes to it or to its cases, which lie in a module `kit_cases`.

    `heads`, `references` and `hf_architectures` add to what there is, other fields replace it.
    """
    module = types.ModuleType("kit_cases")
    sys.modules["kit_cases"] = module

    def make(model_type: str, **changes: Any) -> ArchitectureSpec:
        spec = SPECIMENS.get(model_type) or host.architecture(model_type)
        fields, of_cases = dict(spec), {**dict(load_cases(spec, None)), "variants": VARIANTS[model_type]}
        for name, value in changes.items():
            place = of_cases if name in of_cases else fields
            place[name] = {**place[name], **value} if name in _ADDED else value
        name = f"CASES{len(vars(module))}"
        setattr(module, name, ArchitectureCases.model_validate(of_cases))
        return ArchitectureSpec.model_validate({**fields, "cases": f"kit_cases:{name}"})

    yield make
    del sys.modules["kit_cases"]


@pytest.fixture(scope="session")
def twins(make_spec: Callable[..., ArchitectureSpec], host: PluginHost) -> Iterator[dict[str, Suite]]:
    """The kit on the architectures as they are: what a broken copy is held against."""
    suites = {model_type: Suite(make_spec(model_type), host=host) for model_type in VARIANTS}
    yield suites
    for suite in suites.values():
        suite.close()


@pytest.fixture(scope="session")
def run(host: PluginHost) -> Callable[..., CheckResult]:
    """Runs one check, `name` or `name[variant]`, on a spec (with an attention backend of the module `broken`) or a suite."""

    def run(subject: ArchitectureSpec | Suite, key: str, backend: str | None = None) -> CheckResult:
        name, _, variant = key.removesuffix("]").partition("[")
        check = next(check for check in CHECKS if check.name == name)
        if isinstance(subject, Suite):
            return subject.run(None if check.once else variant or "base", check)
        with Suite(subject, host=with_backend(host, backend), backend=backend) as suite:
            return suite.run(None if check.once else variant or "base", check)

    return run


def with_backend(host: PluginHost, backend: str | None) -> PluginHost:
    """A host that also declares an attention backend of the module `broken`, by the name of its class in kebab case."""
    if backend is None:
        return host
    name = "".join(word.title() if word != "a" else "A" for word in backend.split("-"))
    spec = BackendSpec(name=backend, summary="Wrong.", backend=f"broken:{name}", device_types=("cpu",))
    record = PluginRecord("broken", "broken", "", "", PluginStatus.READY, backends=(spec,))
    return PluginHost([*host.records, record])
