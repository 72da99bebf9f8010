from __future__ import annotations

import pytest
import torch
from fakes import WindowlessBackend, make_backend_spec

from lorax_core.attention.base import AttentionSpec
from lorax_core.attention.select import select_backend, why_not
from lorax_core.attention.torch import TorchBackend
from lorax_core.errors import RequestError
from lorax_core.plugins.spec import BackendSpec

LAYER = AttentionSpec(heads=4, kv_heads=2, head_dim=16, causal=True, window=8)
ABSENT = make_backend_spec("absent", "AbsentBackend")
WINDOWLESS = make_backend_spec("windowless", "WindowlessBackend")
TORCH = BackendSpec(
    name="torch", summary="Torch's.", backend="lorax_core.attention.torch:TorchBackend", device_types=("cpu",)
)


def selected(*declared, name=None, layers=(LAYER,)):
    return select_backend(declared, layers, dtype=torch.float32, device="cpu", name=name)


def test_the_first_backend_that_serves_every_layer_is_taken_and_the_others_are_told():
    selection = selected(ABSENT, WINDOWLESS, TORCH)

    assert isinstance(selection.backend, TorchBackend)
    assert selection.passed_over == (
        ("absent", "its library is not installed"),
        ("windowless", "no window of 8"),
    )


def test_why_a_backend_serves_nothing_at_all_is_told_without_a_model():
    told = {spec.name: (why_not(spec, "cpu"), why_not(spec, "cuda")) for spec in (ABSENT, WINDOWLESS, TORCH)}

    assert told["absent"][0] == "its library is not installed"
    assert told["windowless"][0] is None
    assert told["torch"] == (None, "runs on 'cpu', not on 'cuda'")


def test_a_backend_asked_for_by_name_is_the_only_one_tried():
    selection = selected(ABSENT, TORCH, WINDOWLESS, name="windowless", layers=())

    assert isinstance(selection.backend, WindowlessBackend)
    assert selection.passed_over == ()


def test_a_backend_asked_for_that_cannot_serve_the_model_is_refused_with_its_reason():
    with pytest.raises(RequestError, match="windowless: no window of 8"):
        selected(TORCH, WINDOWLESS, name="windowless")


def test_an_unknown_backend_is_refused_with_the_nearest():
    with pytest.raises(RequestError) as caught:
        selected(TORCH, WINDOWLESS, name="window")

    assert "'window'" in caught.value.message
    assert caught.value.hint == "did you mean 'windowless'?"


def test_a_backend_of_another_device_is_passed_over():
    elsewhere = make_backend_spec("windowless", "WindowlessBackend", device_types=("cuda",))

    selection = selected(elsewhere, TORCH)

    assert selection.passed_over == (("windowless", "runs on 'cuda', not on 'cpu'"),)


def test_a_class_that_is_no_backend_is_passed_over_by_name():
    with pytest.raises(RequestError, match="fakes:NoBackend is not an AttentionBackend"):
        selected(make_backend_spec("whatever", "NoBackend"))


def test_core_declares_the_torch_backend(host):
    selection = selected(*host.backends, name="torch")

    assert selection.backend.name == "torch"
