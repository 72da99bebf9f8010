from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from lorax_core.adapters.lora_kernels.base import GraphLora
from lorax_core.adapters.lora_kernels.select import AutoKernel, select_kernel
from lorax_core.adapters.lora_kernels.triton import load_triton_kernel
from lorax_core.kernels.elementwise import READABLE
from lorax_core.kernels.select import select_elementwise
from lorax_core.kernels.triton import available
from lorax_core.settings import Settings

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def test_on_a_cpu_the_compiled_form_computes():
    kernels, reason = select_elementwise(torch.bfloat16, CPU)

    assert kernels.name == "native"
    assert reason.endswith(".so")


@pytest.mark.parametrize(
    ("dtype", "native", "told"),
    [
        (torch.float16, "1", "no native kernels: they compute in float32 and bfloat16, not in float16"),
        (torch.float32, "0", "no native kernels: LORAX_NATIVE is off"),
    ],
)
def test_on_a_cpu_the_readable_form_computes_the_rest_and_says_why(monkeypatch, dtype, native, told):
    monkeypatch.setenv("LORAX_NATIVE", native)

    kernels, reason = select_elementwise(dtype, CPU)

    assert kernels is READABLE
    assert reason.startswith(told)


@pytest.mark.parametrize(
    ("found", "dtype", "told"),
    [
        ({"spec": None}, torch.bfloat16, "the package triton is not installed; `pip install triton`"),
        ({"hip": "6.4"}, torch.bfloat16, "it computes on NVIDIA GPUs, not on AMD's"),
        ({}, torch.float64, "it computes in float32, bfloat16 and float16, not in float64"),
        ({"capability": (7, 5)}, torch.float16, "the GPU has compute capability 7.5; at least 8.0 is needed"),
        ({"capability": (12, 0)}, torch.bfloat16, None),
    ],
    ids=["no package", "AMD", "dtype", "an old GPU", "a new GPU"],
)
def test_a_gpu_is_refused_with_the_reason(monkeypatch, found, dtype, told):
    monkeypatch.setattr(available, "find_spec", lambda name: found.get("spec", name))
    monkeypatch.setattr(torch.version, "hip", found.get("hip"))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: found.get("capability", (9, 0)))

    assert available.unavailable(dtype, CUDA) == told


def test_on_a_cpu_nothing_imports_triton():
    program = (
        "import sys, torch\n"
        "from lorax_core.adapters.lora_kernels.select import select_kernel\n"
        "from lorax_core.kernels.select import select_elementwise\n"
        "from lorax_core.settings import Settings\n"
        "before = 'triton' in sys.modules\n"
        "select_elementwise(torch.float32, torch.device('cpu'))\n"
        "select_kernel(torch.float32, torch.device('cpu'), Settings(native=False))\n"
        "print(before or 'triton' not in sys.modules)\n"
    )

    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=120)

    assert done.stdout == "True\n", done.stderr


def test_triton_s_lora_kernel_is_for_cuda_devices():
    kernel, reason = load_triton_kernel(Settings(), CPU)
    choice = select_kernel(torch.float32, CPU, Settings(native=False))

    assert kernel is None
    assert reason == "it computes on CUDA devices, not on cpu"
    assert choice.reason.startswith(f"no triton kernel: {reason}; no native kernel: ")


def test_the_kernel_that_was_chosen_is_asked_for_captured_steps():
    told = AutoKernel(torch.float32, CPU, Settings(native=False)).plan_graph(4, {"here": (8, 8)})

    assert not isinstance(told, GraphLora)
    assert told == "the LoRA kernel 'torch' cannot be captured"
