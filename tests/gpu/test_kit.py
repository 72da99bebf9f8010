"""The conformance kit over every architecture with each backend, over the doubles: those checks that attention has a part in.

The kit takes float16 where a backend has no float32: of the two 16-bit types it tells mistakes from rounding more sharply.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from fakes import with_backends
from gpu.doubles.backends import BACKENDS, backends_on_cpu, declared

from lorax_core.testing import CheckStatus
from lorax_core.testing.suite import Suite

# Attention has no part in what files and configurations mean: the kit on a CPU proves that.
_OF_FILES = ("light-import", "round-trip", "declaration", "weights", "config")
# Nor in these, which are tried in 16 bit once for each architecture, over the backend that refuses nothing.
_OF_LAYERS = (
    "adapter",
    "quantized",
    "dtype-constants",
    "dtype-norms",
    "numbers-embed",
    "numbers-token",
    "numbers-sequence",
)
LEFT_OUT = {
    "flashinfer": (*_OF_FILES, *_OF_LAYERS),
    "flash_attn": _OF_FILES,
    "varlen": (*_OF_FILES, *_OF_LAYERS),
}
ARCHITECTURES = ("bert", "roberta", "gpt2", "gpt_neox", "qwen2")
REFUSALS = {
    "flashinfer": ("has kernels for heads of 64, 128, 256", "has windows that end on the left only"),
    "flash_attn": (),
    "varlen": (),
}


@pytest.fixture(scope="module", autouse=True)
def _on_cpu() -> Iterator[None]:
    with backends_on_cpu():
        yield


def results(host, architecture, name, dtype=None, **limits):
    spec = declared(name)
    with Suite(architecture, host=with_backends(host, spec), backend=spec.name, dtype=dtype) as suite:
        planned = [
            (variant, check) for variant, check in suite.plan(**limits) if not check.name.startswith(LEFT_OUT[name])
        ]
        return [suite.run(variant, check) for variant, check in planned]


# torch's packaging differs in what is called, not in what is computed: one architecture of each kind shows that.
PAIRS = [(one, name) for name in BACKENDS for one in (("bert", "qwen2") if name == "varlen" else ARCHITECTURES)]


@pytest.mark.parametrize(("architecture", "name"), PAIRS)
def test_every_check_of_attention_passes_on_every_variant_that_the_backend_takes(host, architecture, name):
    found = results(host, architecture, name)

    failed = [f"{one.key}: {one.detail}" for one in found if one.status in (CheckStatus.FAILED, CheckStatus.KNOWN)]
    assert not failed
    passed = [one for one in found if one.variant is not None and one.status is CheckStatus.PASSED]
    assert {one.check for one in passed} == {one.check for one in found}
    assert len({one.variant for one in passed}) >= 8
    for one in found:
        if one.refused:
            assert any(reason in one.detail for reason in REFUSALS[name]), one.detail


@pytest.mark.parametrize("name", BACKENDS)
def test_in_bfloat16_too(host, name):
    found = results(host, "qwen2", name, torch.bfloat16, variants=["base", "windows"])

    # The base has no window.
    assert {one.key for one in found if one.status is not CheckStatus.PASSED} == {"masking-window[base]"}
    assert len(found) > 20
