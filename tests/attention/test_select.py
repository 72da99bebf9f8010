from __future__ import annotations

from dataclasses import replace

import fakes
import pytest
import torch
from fakes import WindowlessBackend, make_backend_spec, with_backends

import lorax_core as lorax
from lorax_core.attention.base import AttentionSpec, CacheLayout
from lorax_core.attention.select import check_usable, select_backend, why_not
from lorax_core.attention.torch import TorchBackend
from lorax_core.errors import RequestError
from lorax_core.modeling import Attention
from lorax_core.plugins.spec import BackendSpec

LAYER = AttentionSpec(heads=4, kv_heads=2, head_dim=16, causal=True, window=8)
ABSENT = make_backend_spec("absent", "AbsentBackend")
WINDOWLESS = make_backend_spec("windowless", "WindowlessBackend")
TORCH = BackendSpec(
    name="torch", summary="Torch's.", backend="lorax_core.attention.torch:TorchBackend", device_types=("cpu",)
)


def selected(*declared, name=None, layers=(LAYER,)):
    return select_backend(declared, layers, dtype=torch.float32, device="cpu", name=name)


def test_the_first_backend_that_serves_every_layer_is_taken_and_the_others_are_listed():
    selection = selected(ABSENT, WINDOWLESS, TORCH)

    assert isinstance(selection.backend, TorchBackend)
    assert selection.passed_over == (
        ("absent", "its library is not installed"),
        ("windowless", "no window of 8"),
    )


def test_why_a_backend_serves_nothing_at_all_is_known_without_a_model():
    reasons = {spec.name: (why_not(spec, "cpu"), why_not(spec, "cuda")) for spec in (ABSENT, WINDOWLESS, TORCH)}

    assert reasons["absent"][0] == "its library is not installed"
    assert reasons["windowless"][0] is None
    assert reasons["torch"] == (None, "runs on 'cpu', not on 'cuda'")


def test_a_backend_asked_for_by_name_is_the_only_one_tried():
    selection = selected(ABSENT, TORCH, WINDOWLESS, name="windowless", layers=())

    assert isinstance(selection.backend, WindowlessBackend)
    assert selection.passed_over == ()


def test_a_backend_asked_for_that_cannot_serve_the_model_is_refused_with_its_reason():
    with pytest.raises(RequestError, match="'windowless' cannot serve this model on 'cpu': no window of 8"):
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


LARGE = make_backend_spec("large-pages", "LargePages")


def laid_out(*declared, dtype=torch.bfloat16, **options):
    return select_backend(declared, [LAYER], dtype=dtype, device="cpu", **options)


def test_the_backend_decides_the_pages_and_what_is_stored_in_them():
    assert laid_out(LARGE, TORCH).layout == CacheLayout(256, torch.bfloat16)
    assert laid_out(TORCH).layout == CacheLayout(16, torch.bfloat16)
    assert laid_out(TORCH, page_size=5, kv_dtype=torch.float8_e4m3fn).layout == CacheLayout(5, torch.float8_e4m3fn)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"dtype": torch.float32}, "computes in 16 bit, not in torch.float32"),
        ({"kv_dtype": torch.float8_e4m3fn}, "stores 16 bit, not torch.float8_e4m3fn"),
        ({"page_size": 16}, "pages of 256 tokens, not 16"),
    ],
)
def test_a_backend_that_cannot_have_the_cache_is_passed_over_with_its_reason(options, reason):
    selection = laid_out(LARGE, TORCH, **options)

    assert selection.backend.name == "torch"
    assert selection.passed_over == (("large-pages", reason),)


def test_a_named_backend_is_judged_without_a_model():
    check_usable([ABSENT, TORCH], "torch", "cpu")
    with pytest.raises(RequestError, match="'absent' cannot be used on 'cpu': its library is not installed"):
        check_usable([ABSENT, TORCH], "absent", "cpu")
    with pytest.raises(RequestError, match="no attention backend is called 'torsh'"):
        check_usable([ABSENT, TORCH], "torsh", "cpu")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kv_heads": 3}, "4 query heads over 3 key heads of 16"),
        ({"head_dim": 0}, "key heads of 0"),
        ({"window": 0}, "a window of 0 keys"),
        ({"soft_cap": 0.0}, "a soft cap of 0.0"),
        ({"soft_cap": float("nan")}, "a soft cap of nan"),
    ],
)
def test_a_layer_that_cannot_be_is_refused_when_it_is_made(changes, message):
    with pytest.raises(ValueError, match=message):
        replace(LAYER, **changes)


@pytest.mark.parametrize("scale", [0.0, -1.0, float("inf"), float("nan")])
def test_a_scale_that_cannot_be_is_refused_when_the_layer_is_made(scale):
    with pytest.raises(ValueError, match="a scale of"):
        Attention(4, 2, 16, causal=True, scale=scale)


def test_an_engine_has_the_pages_that_its_backend_asked_for(qwen2, host):
    host = with_backends(host, make_backend_spec("wide", "WidePages", priority=11))

    with lorax.load(qwen2, host=host, kv_cache_tokens=100) as engine:
        info = engine.info()
        long = engine.generate(list(range(40)), max_tokens=8).token_ids

    assert info.attention == "wide"
    assert info.kv_cache_tokens == 128  # two pages of 64
    with lorax.load(qwen2, kv_cache_tokens=100) as engine:
        assert engine.generate(list(range(40)), max_tokens=8).token_ids == long


class Breaks(TorchBackend):
    """A backend with a fault in its code."""

    def layout(self, specs, dtype, kv_dtype, device, page_size=None):
        raise KeyError("heads")


def test_a_backend_that_breaks_is_passed_over_and_does_not_keep_others_from_being_used(monkeypatch):
    monkeypatch.setattr(fakes, "WindowlessBackend", Breaks)

    selection = selected(WINDOWLESS, TORCH)

    assert isinstance(selection.backend, TorchBackend)
    assert selection.passed_over == (("windowless", "its layout() failed: KeyError: 'heads'"),)


@pytest.mark.parametrize(("page_size", "dtype"), [(0, torch.float32), (16, torch.int32)])
def test_a_layout_that_cannot_hold_keys_and_values_is_refused(page_size, dtype):
    with pytest.raises(ValueError, match="pages hold tokens in a float dtype"):
        CacheLayout(page_size, dtype)
