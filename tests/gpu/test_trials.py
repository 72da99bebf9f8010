"""Trials of the GPU's kernels, over the doubles: what computes rightly passes, at all that is tried."""

from __future__ import annotations

import pytest
from gpu.doubles.backends import BACKENDS, backends_on_cpu
from gpu.doubles.triton_driver import pretend_gpu

from lorax_core.adapters.lora_kernels.triton import TritonKernel
from lorax_core.serving.trial.child import run_trial
from lorax_core.serving.trial.spec import AttentionTrial, ElementwiseTrial, LayerKind, LoraTrial

PLAIN = LayerKind(heads=4, kv_heads=2, head_dim=64, causal=True)
KINDS = {
    "causal": (PLAIN, PLAIN.model_copy(update={"window": 20})),
    "capped": (PLAIN.model_copy(update={"soft_cap": 30.0}),),
    "encoders": (LayerKind(heads=4, kv_heads=4, head_dim=64, causal=False),),
}


def load_kernel(_settings, device):
    return TritonKernel(device), ""


@pytest.mark.parametrize(
    ("name", "kinds"),
    # torch's copy of FlashAttention has no cap.
    [(name, kinds) for name in BACKENDS for kinds in KINDS if (name, kinds) != ("varlen", "capped")],
)
def test_backends_pass_their_trial(name, kinds):
    page = 16 if name == "flashinfer" else 256
    path = f"gpu.doubles.backends:{BACKENDS[name].__name__}"
    order = {"device": "cpu", "dtype": "bfloat16", "kv_dtype": "bfloat16", "page_size": page}

    with backends_on_cpu():
        assert run_trial(AttentionTrial(backend=path, layers=KINDS[kinds], **order)) is None


def test_an_8_bit_cache_passes_its_trial():
    path = f"gpu.doubles.backends:{BACKENDS['flashinfer'].__name__}"
    order = {"device": "cpu", "dtype": "bfloat16", "kv_dtype": "float8_e4m3fn", "page_size": 16}

    with backends_on_cpu():
        assert run_trial(AttentionTrial(backend=path, layers=KINDS["causal"], **order)) is None


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_kernels_of_adapters_pass_their_trial(dtype):
    order = {"device": "cpu", "dtype": dtype, "kernel": f"{__name__}:{load_kernel.__name__}"}

    with pretend_gpu(90):
        assert run_trial(LoraTrial(sizes=((48, 96), (64, 1)), **order)) is None


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_elementwise_kernels_pass_their_trial(dtype):
    path = "lorax_core.kernels.triton.elementwise:TritonElementwise"
    sizes = {"widths": (48,), "gates": (112,), "layers": (PLAIN, KINDS["encoders"][0]), "turned": (0, 16)}

    with pretend_gpu(90):
        assert run_trial(ElementwiseTrial(device="cpu", dtype=dtype, form=path, **sizes)) is None
