"""What the backends find on a machine, and what they say of what is missing."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from gpu.doubles.flash_attn_module import flash_attn_on_cpu

from lorax_core.attention import flash_attn, flashinfer
from lorax_core.attention.base import AttentionSpec
from lorax_core.attention.flash_attn import FlashAttnBackend, FlashAttnPackage, TorchVarlen
from lorax_core.attention.flashinfer import FlashInferBackend, missing_tools
from lorax_core.attention.select import why_not
from lorax_core.attention.staging import Staging

SPEC = AttentionSpec(4, 2, 64, True)
ENCODER = AttentionSpec(2, 2, 64, False)


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine with all that compiling takes; its programs are in this folder."""
    for name in ("nvcc", "ninja", "c++"):
        program = tmp_path / "bin" / name
        program.parent.mkdir(exist_ok=True)
        program.write_text("#!/bin/sh\n")
        program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    return tmp_path / "bin"


@pytest.mark.parametrize(("program", "name"), [("nvcc", "nvcc"), ("ninja", "ninja"), ("c++", "C++ compiler")])
def test_the_tool_that_is_missing_is_named(machine, program, name):
    assert missing_tools() == ()
    assert FlashInferBackend.is_available() == (True, "")

    (machine / program).unlink()

    assert missing_tools() == (name,)
    reason = f"compiles its kernels, and finds no {name}; nor is there any built module"
    assert FlashInferBackend.is_available() == (False, reason)


def test_several_missing_tools_are_all_named(machine):
    (machine / "nvcc").unlink()
    (machine / "ninja").unlink()

    assert "finds no nvcc, no ninja; nor" in FlashInferBackend.is_available()[1]


@pytest.fixture
def hidden(monkeypatch: pytest.MonkeyPatch) -> Iterator[set[str]]:
    """Names of modules that this machine does not have."""
    names: set[str] = set()
    for module in (flashinfer, flash_attn):
        found = module.find_spec
        monkeypatch.setattr(module, "find_spec", lambda name, found=found: None if name in names else found(name))
    return names


def test_without_the_package_nothing_of_it_is_imported(hidden, machine):
    hidden.add("flashinfer")

    assert FlashInferBackend.is_available() == (False, "flashinfer-python is not installed")


BUILT = """
import sys
from pathlib import Path
import torch
import flashinfer.jit.env as env
import flashinfer.prefill as prefill
from lorax_core.attention.base import AttentionSpec
from lorax_core.attention.flashinfer import FlashInferBackend

class Bare(FlashInferBackend):
    missing_tools = staticmethod(lambda: ("nvcc", "ninja"))

folder = Path(sys.argv[1])
env.FLASHINFER_AOT_DIR, env.FLASHINFER_AOT_DIRS = folder, (folder,)
assert not Bare.is_available()[0]
bf16 = torch.bfloat16
name = prefill._gen_batch_prefill_primary_module("fa2", bf16, bf16, bf16, torch.int32, 64, 64, 0, False, False, False).name
(folder / name).mkdir()
(folder / name / (name + ".so")).touch()
assert Bare.is_available() == (True, "")
full, windowed = AttentionSpec(4, 2, 64, True), AttentionSpec(4, 2, 64, True, window=9)
print(Bare().layout([full], bf16, bf16, "cpu"))
print(Bare().layout([full, windowed], bf16, bf16, "cpu"))
print(Bare().layout([full], bf16, torch.float8_e4m3fn, "cpu"))
name = prefill._gen_batch_prefill_primary_module("fa2", bf16, bf16, bf16, torch.int32, 64, 64, 0, True, False, False).name
(folder / name).mkdir()
(folder / name / (name + ".so")).touch()
print(Bare().layout([AttentionSpec(4, 2, 64, True, soft_cap=5.0)], bf16, bf16, "cpu"))
print(Bare().layout([full, windowed], bf16, bf16, "cpu"))
"""


def test_a_built_module_serves_without_tools_the_layers_that_it_was_built_for(tmp_path):
    built = tmp_path / "built"
    built.mkdir()
    environment = {**os.environ, "FLASHINFER_CUDA_ARCH_LIST": "9.0a", "FLASHINFER_WORKSPACE_BASE": str(tmp_path)}

    run = subprocess.run(
        [sys.executable, "-c", BUILT, str(built)], env=environment, capture_output=True, text=True, timeout=300
    )

    assert run.returncode == 0, run.stderr
    taken, *refused, both = run.stdout.splitlines()
    assert taken.startswith("CacheLayout(page_size=16")
    assert both.startswith("CacheLayout(page_size=16")
    assert refused == [
        "has no built module for heads of 64, with a window, and to compile one no nvcc, no ninja",
        "has no built module for heads of 64, and to compile one no nvcc, no ninja",
        "has no built module for heads of 64, with a soft cap, and to compile one no nvcc, no ninja",
    ]


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """A torch that was built with FlashAttention, as those for CUDA are."""
    monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: True)


def test_flash_attn_that_was_compiled_for_nothing_gives_way_to_torch(compiled):
    assert "flash-attn cannot be imported: ModuleNotFoundError" in str(FlashAttnPackage.missing())
    assert FlashAttnBackend.is_available() == (True, "")
    assert isinstance(FlashAttnBackend()._packaging, TorchVarlen)


def test_a_torch_without_the_kernels_is_told_from_one_that_has_them():
    available, reason = FlashAttnBackend.is_available()

    assert not available
    assert reason.startswith("flash-attn cannot be imported: ")
    assert reason.endswith(" was built without FlashAttention")


def test_flash_attn_comes_first_where_it_can_be_imported():
    with flash_attn_on_cpu():
        assert FlashAttnPackage.missing() is None
        assert isinstance(FlashAttnBackend()._packaging, FlashAttnPackage)


def test_where_neither_is_there_both_reasons_are_given(hidden):
    hidden.update({"flash_attn", "torch.nn.attention.varlen"})

    available, reason = FlashAttnBackend.is_available()

    assert not available
    assert "flash-attn is not installed; torch 2." in reason
    assert "has no torch.nn.attention.varlen" in reason


def older(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, return_aux=None, scale=None, window_size=(-1, -1)):
    """`varlen_attn` as torch 2.11 has it."""
    raise NotImplementedError


def test_an_older_torch_serves_encoders_alone(monkeypatch, compiled):
    module = SimpleNamespace(varlen_attn=older)
    monkeypatch.setattr(flash_attn, "import_module", lambda name: module)

    class Older(FlashAttnBackend):
        packagings = (TorchVarlen,)

    wanted = {"dtype": torch.bfloat16, "kv_dtype": torch.bfloat16, "device": "cpu"}

    assert "has no block_table, no enable_gqa, no num_splits, no seqused_k" in Older().layout([SPEC], **wanted)
    assert Older().layout([ENCODER], **wanted).dtype is torch.bfloat16
    assert "has no enable_gqa" in Older().layout([AttentionSpec(4, 2, 64, False)], **wanted)


def aged(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, causal=False, window_size=(-1, -1)):
    """`flash_attn_varlen_func` as flash-attn 2.3 has it."""
    raise NotImplementedError


def test_an_older_flash_attn_serves_what_it_takes(monkeypatch):
    module = SimpleNamespace(flash_attn_varlen_func=aged, flash_attn_with_kvcache=aged)
    monkeypatch.setattr(flash_attn, "import_module", lambda name: module)
    backend, wanted = FlashAttnBackend(), {"dtype": torch.float16, "kv_dtype": torch.float16, "device": "cpu"}

    assert "has no block_table" in backend.layout([SPEC], **wanted)
    assert "has no softcap" in backend.layout([AttentionSpec(2, 2, 64, False, soft_cap=9.0)], **wanted)
    assert backend.layout([ENCODER], **wanted).dtype is torch.float16


def test_both_are_declared_for_cuda_before_the_torch_backend(host, machine, compiled):
    declared = {spec.name: spec for spec in host.backends}

    assert list(declared) == ["flashinfer", "flash_attn", "native", "torch"]
    for name in ("flashinfer", "flash_attn"):
        assert why_not(declared[name], "cpu") == "runs on 'cuda', not on 'cpu'"
        assert why_not(declared[name], "cuda") is None


class Stamps:
    """An event that tells what is asked of it."""

    def __init__(self, told: list[str]) -> None:
        self.told = told

    def record(self) -> None:
        self.told.append("record")

    def synchronize(self) -> None:
        self.told.append("wait")


def test_pinned_rows_are_written_again_only_after_their_copies():
    told: list[str] = []
    staging = Staging(Stamps(told), pinned=False)
    for numbers in ([1, 2], [3, 4]):
        with staging.rows(4) as put:
            told.append("write")
            first, second = put(torch.tensor(numbers)), put(torch.tensor(numbers[:1]))
        assert (first.tolist(), second.tolist()) == (numbers, numbers[:1])
        assert first.dtype is torch.int32

    assert told == ["wait", "write", "record"] * 2


def test_one_buffer_serves_step_after_step_and_grows_when_it_must():
    staging = Staging(Stamps([]), pinned=False)

    def placed(size: int) -> int:
        with staging.rows(size) as put:
            return put(torch.arange(size)).data_ptr()

    assert placed(8) == placed(3) == placed(8)
    with staging.rows(100) as put:
        assert put(torch.arange(100)).tolist() == list(range(100))


def test_the_event_is_recorded_even_where_planning_fails():
    told: list[str] = []
    with pytest.raises(ZeroDivisionError), Staging(Stamps(told), pinned=False).rows(1):
        raise ZeroDivisionError

    assert told == ["wait", "record"]


def test_without_an_event_no_rows_share_memory():
    staging = Staging.of(torch.device("cpu"))
    with staging.rows(2) as put:
        first = put(torch.tensor([1, 2]))
    with staging.rows(2) as put:
        put(torch.tensor([3, 4]))

    assert first.tolist() == [1, 2]
