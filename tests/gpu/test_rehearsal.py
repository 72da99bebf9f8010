"""Everything of a decoding step on a GPU, together and on a CPU: FlashInfer's own wrappers in graph mode over the double of
their module, Triton's LoRA kernels compiled for sm_90 and interpreted, captured by the tape and replayed while adapters come
and go. The oracle is the eager step with the torch backend and torch's products.
"""

from __future__ import annotations

import pytest
import torch
from builders import make_lora, make_qwen2_model
from gpu.doubles.backends import FlashInferOnCpu, backends_on_cpu
from gpu.doubles.launch import Misuse
from gpu.doubles.triton_driver import pretend_gpu
from oracles import saved
from replays import COUNTS, ROWS, Rig, drive
from rigs import make_capturable

from lorax_core.adapters.lora_kernels import triton as lora_kernel
from lorax_core.engine.graphs import sizes

SIZES = {"hidden_size": 128, "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 160}
WINDOW = {"use_sliding_window": True, "sliding_window": 19, "max_window_layers": 1}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A Qwen2 with heads of 64, one of its layers with a window, and adapters of three ranks."""
    model = make_qwen2_model(seed=2, **SIZES, **WINDOW)
    folders = [
        make_lora(model, tmp_path_factory.mktemp("lora"), rank, r=rank, lora_alpha=16, target_modules=targets)
        for rank, targets in ((8, ["q_proj", "v_proj", "down_proj"]), (24, "all-linear"), (5, ["o_proj", "up_proj"]))
    ]
    return saved(model, tmp_path_factory.mktemp("model")), folders


def test_a_whole_decoding_model_is_captured_and_replayed(files, host):
    folder, lora = files
    with backends_on_cpu(), pretend_gpu(90) as gpu:
        base = make_capturable(folder, host, dtype=torch.bfloat16)
        rig = Rig(base, backend=FlashInferOnCpu, kernel=lambda: lora_kernel.TritonKernel(torch.device("cpu")))
        assert rig.graphs.prepare(adapted=False) is None
        assert rig.graphs.prepare(adapted=True) is None
        compiled = len(gpu.compiled)

        assert drive(rig, lora) < 0.05

        assert len(gpu.compiled) == compiled  # adapters came and went
        assert len(rig.tapes) == 2 * len(sizes(ROWS))
        assert sum(tape.replays for tape in rig.tapes) == len(COUNTS)


class PlansOneWindow(FlashInferOnCpu):
    """Plans the wrapper of one kind of layer again before a replay, and forgets the other's."""

    def prepare(self, wrappers, rows):
        planned = wrappers if not hasattr(next(iter(wrappers.values())), "seen") else dict([*wrappers.items()][:1])
        super().prepare(planned, rows)
        next(iter(wrappers.values())).seen = True


class SetsOnce(lora_kernel.TritonGraph):
    """Keeps the tiles of the first step with adapters."""

    done = False

    def set(self, segments):
        if not self.done:
            super().set(segments)
        self.done = bool(segments)


class SetsOnceKernel(lora_kernel.TritonKernel):
    def plan_graph(self, rows, sites):
        return SetsOnce(self, rows, sites)


@pytest.mark.parametrize(
    ("backend", "kernel"),
    [(PlansOneWindow, lora_kernel.TritonKernel), (FlashInferOnCpu, SetsOnceKernel)],
    ids=["window", "tiles"],
)
def test_a_mistake_between_two_replays_shows(files, host, backend, kernel):
    folder, lora = files
    with backends_on_cpu(), pretend_gpu(90):
        base = make_capturable(folder, host, dtype=torch.bfloat16)
        rig = Rig(base, backend=backend, kernel=lambda: kernel(torch.device("cpu")))

        try:
            error = drive(rig, lora)
        except Misuse:  # the double knows what was planned
            error = float("inf")

    assert error > 0.2
