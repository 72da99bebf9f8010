"""What an engine does with the verdicts of trials. Here the kernels of a CPU are tried, as a GPU's are."""

from __future__ import annotations

import shutil

import pytest
import torch
from builders import make_lora, make_qwen2_model
from caches import fresh_cache
from fakes import make_backend_spec, with_backends
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

import lorax_core as lorax
from lorax_core.adapters.lora_kernels.select import select_kernel
from lorax_core.errors import PluginError, RequestError
from lorax_core.kernels.elementwise import READABLE
from lorax_core.kernels.native.attention import PagedAttention
from lorax_core.kernels.native.elementwise import NativeElementwise
from lorax_core.serving import loading
from lorax_core.serving.machine import choose_dtype, find_device
from lorax_core.serving.trial.run import Trials
from lorax_core.serving.trial.standard import model_trials
from lorax_core.serving.trial.trusted import ModelTrials, Trusted, sixteen_bit
from lorax_core.settings import Settings
from lorax_core.weights.checkpoint import Checkpoint


@pytest.fixture(autouse=True)
def _tried_on_a_cpu(monkeypatch, tmp_path):
    monkeypatch.setenv("LORAX_TRIALS", "all")
    monkeypatch.setenv("LORAX_CACHE", fresh_cache(tmp_path / "cache"))


@pytest.fixture(scope="session")
def verdicts(qwen2, tmp_path_factory):
    """What trials in processes of their own say of the kernels of a CPU for this model, all of which are right."""
    cache = tmp_path_factory.mktemp("verdicts") / "cache"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LORAX_TRIALS", "all")
        patch.setenv("LORAX_CACHE", fresh_cache(cache))
        with lorax.load(qwen2, kv_cache_tokens=64) as engine:
            assert (engine.info().attention, engine.info().elementwise[0]) == ("native", "native")
    return cache / "trials"


@pytest.fixture
def others_tried(verdicts, tmp_path):
    """Those verdicts are kept already: what is tried is what a test brings."""
    shutil.copytree(verdicts, tmp_path / "cache/trials")


@pytest.fixture
def settings():
    return Settings.from_env()


@pytest.fixture
def faulty(host):
    spec = make_backend_spec("faulty", "GivesNaN", priority=50)
    return with_backends(host, spec.model_copy(update={"backend": "faulty_kernels:GivesNaN"}))


@pytest.mark.usefixtures("others_tried")
def test_a_backend_that_fails_its_trial_is_passed_over_with_the_reason(qwen2, faulty, host):
    with lorax.load(qwen2, host=host, kv_cache_tokens=64) as engine:
        expected = engine.generate([1, 2, 3], max_tokens=4)

    with lorax.load(qwen2, host=faulty, kv_cache_tokens=64) as engine:
        info, answer = engine.info(), engine.generate([1, 2, 3], max_tokens=4)

    assert info.attention != "faulty"
    assert "not finite" in dict(info.passed_over)["faulty"]
    assert answer == expected


@pytest.mark.usefixtures("others_tried")
def test_a_backend_that_was_named_and_fails_its_trial_is_an_error(qwen2, faulty):
    with pytest.raises(
        RequestError, match=r"'faulty' cannot serve this model on 'cpu': prompts, .* not finite"
    ) as caught:
        lorax.load(qwen2, host=faulty, kv_cache_tokens=64, attention="faulty")

    assert "lorax doctor --verify" in caught.value.hint


@pytest.mark.usefixtures("others_tried")
def test_the_doctor_shows_what_failed_a_trial_until_it_is_tried_again(qwen2, faulty, settings):
    trials = Trials(settings)
    with lorax.load(qwen2, host=faulty, kv_cache_tokens=64):
        pass

    failures = trials.failures()
    elsewhere = Trials(settings, {"lorax-core": "another version"}).failures()
    trials.forget()

    assert set(failures) == {"faulty_kernels:GivesNaN"}
    assert "not finite" in failures["faulty_kernels:GivesNaN"]
    assert elsewhere == {}  # whoever has another version tries again
    assert trials.failures() == {}
    assert not list((settings.cache / "trials").iterdir())


@pytest.mark.usefixtures("others_tried")
def test_a_backend_that_cannot_be_imported_keeps_none_of_the_others_from_being_used(qwen2, host):
    spec = make_backend_spec("absent", "AbsentBackend", priority=50)
    broken = with_backends(host, spec.model_copy(update={"backend": "no_such_module_at_all:Backend"}))

    with lorax.load(qwen2, host=broken, kv_cache_tokens=64) as engine:
        assert "no_such_module_at_all" in dict(engine.info().passed_over)["absent"]


def test_a_second_gpu_is_refused_with_the_way_to_it():
    with pytest.raises(RequestError, match="'cuda:1'") as caught:
        find_device("cuda:1")

    assert "CUDA_VISIBLE_DEVICES=1" in caught.value.hint


def test_without_trials_a_backend_is_believed(qwen2, faulty, monkeypatch):
    monkeypatch.setenv("LORAX_TRIALS", "off")

    with lorax.load(qwen2, host=faulty, kv_cache_tokens=64) as engine:
        assert engine.info().attention == "faulty"


@pytest.mark.usefixtures("others_tried")
def test_kernels_of_adapters_are_tried_at_the_sizes_of_the_model(qwen2, tmp_path):
    folder = make_lora(make_qwen2_model(), tmp_path / "it")

    with lorax.load(qwen2, adapters={"it": folder}, kv_cache_tokens=64) as engine:
        name, reason = engine.info().lora_kernel

    assert name == "native", reason
    kept = [file.read_text() for file in (tmp_path / "cache/trials").iterdir()]
    assert any("LoRA, float32" in text and "64 to 128" in text for text in kept)


def test_a_kernel_that_fails_its_trial_is_passed_over_with_the_reason():
    from faulty_kernels import load_ranks_cut

    choice = select_kernel(
        torch.float32, torch.device("cpu"), Settings(), (("cut", load_ranks_cut),), verify=lambda _: "off by 0.5"
    )

    assert (choice.kernel.name, choice.reason) == ("torch", "no cut kernel: off by 0.5")


def test_the_trial_of_a_kernel_is_its_verdict(qwen2):
    from faulty_kernels import load_ranks_cut, load_torch

    model = lorax.load_model(qwen2)
    verify = Trusted(model, Settings.from_env()).lora

    assert verify is not None
    assert verify(load_torch) is None
    assert "off by" in verify(load_ranks_cut)


def test_the_readable_form_is_not_tried(qwen2, monkeypatch):
    monkeypatch.setenv("LORAX_NATIVE", "0")
    model = lorax.load_model(qwen2)

    form, reason = Trusted(model, Settings.from_env()).elementwise()

    assert form is READABLE
    assert "LORAX_NATIVE" in reason


def test_a_compiled_form_with_wrong_numbers_is_passed_over(qwen2, monkeypatch):
    monkeypatch.delenv("LORAX_TRIALS")
    compute = NativeElementwise.gated_act
    monkeypatch.setattr(NativeElementwise, "gated_act", lambda *args: compute(*args) * 1.01)

    form, reason = Trusted(lorax.load_model(qwen2), Settings.from_env()).elementwise()

    assert form is READABLE
    assert "gated" in reason
    assert "off by" in reason


def test_a_backend_that_cannot_be_captured_has_no_graphs(qwen2):
    from captured import CapturableBackend

    from lorax_core.attention.base import CacheLayout

    model = lorax.load_model(qwen2)
    layout = CacheLayout(16, torch.float32)

    # There is no GPU, so the capture itself fails: the reason is what matters here.
    reason = Trusted(model, Settings.from_env()).graphs(CapturableBackend(), layout)

    assert reason is not None
    assert Trusted(model, Settings()).graphs(CapturableBackend(), layout) is None


def test_on_a_gpu_what_is_verified_for_a_model_includes_its_graphs(qwen2, monkeypatch):
    # Too old for Triton, with the package or without it.
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    model = lorax.load_model(qwen2)
    model.device = torch.device("cuda")  # nothing is computed: the orders alone matter
    spec = make_backend_spec("captured", "CapturableBackend", device_types=("cuda",))
    spec = spec.model_copy(update={"backend": "captured:CapturableBackend"})

    trials, refused = model_trials(model, [spec], Settings())

    assert [(one.kind, one.subject, one.device) for one in trials] == [
        ("attention", "CapturableBackend", "cuda"),
        ("graphs", "CapturableBackend", "cuda"),
    ]
    assert {"LoRA kernel triton", "elementwise"} <= refused.keys()


@pytest.fixture
def on_a_gpu(monkeypatch):
    """What is tried for graphs and what the cache takes, in order; the model is on a CPU, but that is not asked."""
    monkeypatch.setenv("LORAX_TRIALS", "off")  # of the attention backend: that takes a process
    happened, problems = [], {}
    make = loading.make_pool

    def tried(_, backend, layout, load=None):
        happened.append("graphs" if load is None else "graphs with adapters")
        return problems.get(happened[-1])

    def captured(model, backend, pool, kernel, rows):
        happened.append("captured" if kernel is not None else "captured without adapters")
        return "as far as a CPU goes"

    monkeypatch.setattr(loading, "may_be_captured", lambda model: True)
    monkeypatch.setattr(Trusted, "graphs", tried)
    monkeypatch.setattr(loading, "decode_graphs", captured)
    monkeypatch.setattr(loading, "make_pool", lambda *args: [happened.append("cache"), make(*args)][1])
    return happened, problems


def test_graphs_are_tried_before_the_cache_takes_the_memory(qwen2, on_a_gpu):
    happened, _ = on_a_gpu

    with lorax.load(qwen2, kv_cache_tokens=64):
        assert happened == ["graphs", "graphs with adapters", "cache", "captured"]


def test_graphs_that_fail_their_trial_are_not_captured_and_the_reason_is_told(qwen2, on_a_gpu):
    happened, problems = on_a_gpu
    problems["graphs"] = "step 0 of 40 rows: off by 1"

    with lorax.load(qwen2, kv_cache_tokens=64) as engine:
        assert engine.info().graphs == "graphs are off: step 0 of 40 rows: off by 1"
    assert happened == ["graphs", "cache"]


def test_steps_with_adapters_that_fail_their_trial_run_eagerly(qwen2, on_a_gpu, caplog):
    happened, problems = on_a_gpu
    problems["graphs with adapters"] = "step 0 of 40 rows: off by 1"

    with lorax.load(qwen2, kv_cache_tokens=64):
        assert happened[-1] == "captured without adapters"
    assert "steps with adapters are not captured: step 0" in caplog.text


def test_graphs_that_are_not_wanted_are_not_tried(qwen2, on_a_gpu):
    with lorax.load(qwen2, kv_cache_tokens=64, cuda_graphs=False) as engine:
        assert engine.info().graphs == "cuda_graphs=False was asked for"
    assert on_a_gpu[0] == ["cache"]


def test_elementwise_arithmetic_is_tried_at_the_sizes_of_the_model(qwen2, bert, tmp_path):
    neox = tmp_path / "neox"
    sizes = {"vocab_size": 96, "hidden_size": 64, "num_attention_heads": 4, "num_hidden_layers": 1}
    GPTNeoXForCausalLM(GPTNeoXConfig(**sizes, intermediate_size=96, rotary_pct=0.25)).save_pretrained(neox)

    of_neox, of_qwen2, of_bert = (
        ModelTrials(lorax.load_model(folder)).elementwise(READABLE) for folder in (neox, qwen2, bert)
    )

    # Of GPT-NeoX a quarter of a head turns; it and BERT have activations without a gate.
    assert (of_neox.widths, of_neox.gates, of_neox.turned) == ((64,), (96,), (0, 4))
    assert (of_qwen2.widths, of_qwen2.gates, of_qwen2.turned) == ((64,), (96,), (0, 16))
    assert (of_bert.gates, of_bert.turned) == ((96,), (0,))


@pytest.mark.parametrize("value", ["gpus", "1"])
def test_a_setting_that_is_none_is_refused(value):
    with pytest.raises(PluginError, match=f"LORAX_TRIALS is '{value}'") as caught:
        Settings.from_env({"LORAX_TRIALS": value})

    assert caught.value.hint


def test_without_the_setting_kernels_of_a_gpu_are_tried():
    assert Settings.from_env({}).trials == ("cuda",)


# --- dtypes ---

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16


@pytest.mark.parametrize(
    ("stored", "half", "chosen"),
    [(F32, BF16, BF16), (BF16, BF16, BF16), (F16, BF16, F16), (F32, F16, F16), (BF16, F16, F16), (F16, F16, F16)],
)
def test_on_a_gpu_auto_is_a_dtype_of_16_bit_that_it_has(stored, half, chosen, tmp_path):
    make_qwen2_model().to(stored).save_pretrained(tmp_path)

    assert choose_dtype("auto", Checkpoint(tmp_path), "cuda", half) is chosen
    assert choose_dtype("float32", Checkpoint(tmp_path), "cuda", half) is F32


def test_a_model_without_an_engine_is_in_the_dtype_of_one(qwen2, monkeypatch):
    # What a GPU without bfloat16 says; the model itself may be anywhere.
    for module in ("loading", "model"):
        monkeypatch.setattr(f"lorax_core.serving.{module}.sixteen_bit", lambda device: F16)

    with lorax.load(qwen2, kv_cache_tokens=64) as engine:
        assert engine.info().dtype == "float16"
    assert lorax.load_model(qwen2).dtype is F16


def test_a_cpu_has_no_dtype_of_16_bit_of_its_own():
    assert sixteen_bit("cpu") is None


@pytest.mark.usefixtures("others_tried")
def test_an_engine_says_when_it_computes_in_another_dtype_than_the_checkpoint(tmp_path):
    make_qwen2_model().to(F16).save_pretrained(tmp_path / "f16")
    make_qwen2_model().save_pretrained(tmp_path / "f32")

    with (
        lorax.load(tmp_path / "f16", kv_cache_tokens=64) as other,
        lorax.load(tmp_path / "f32", kv_cache_tokens=64) as same,
    ):
        assert other.info().notes == ("the checkpoint is in float16 and computed in float32; dtype='float16' keeps it",)
        assert same.info().notes == ()


@pytest.mark.usefixtures("others_tried")
def test_an_engine_says_what_loading_took(qwen2, caplog):
    caplog.set_level("INFO", logger="lorax_core.serving.loading")

    with lorax.load(qwen2, kv_cache_tokens=64) as engine:
        info = engine.info()

    assert info.weight_bytes == sum(file.stat().st_size for file in qwen2.glob("*.safetensors"))
    assert info.load_seconds > 0
    assert info.load_bytes_per_second == info.weight_bytes / info.load_seconds
    assert "GB of weights in" in caplog.text
    assert info.graphs == "graphs need a GPU, and the model is on 'cpu'"
    assert info.elementwise[0] == "native"


# --- compiled on a CPU ---


def test_the_compiled_attention_is_tried_in_this_process_and_its_verdict_kept(qwen2, monkeypatch, tmp_path):
    monkeypatch.delenv("LORAX_TRIALS")

    with lorax.load(qwen2, kv_cache_tokens=64) as engine:
        assert engine.info().attention == "native"

    kept = "".join(one.read_text() for one in (tmp_path / "cache/trials").iterdir())
    assert "attention, float32" in kept
    assert "elementwise, float32" in kept


def test_a_compiled_attention_with_wrong_numbers_is_passed_over(qwen2, monkeypatch):
    monkeypatch.delenv("LORAX_TRIALS")
    compute = PagedAttention.append_and_attend
    monkeypatch.setattr(PagedAttention, "append_and_attend", lambda *args: compute(*args) * 1.01)

    with lorax.load(qwen2, kv_cache_tokens=64) as engine:
        info = engine.info()

    assert info.attention == "torch"
    assert "off by" in dict(info.passed_over)["native"]


@pytest.mark.parametrize("value", ["off", "0", "NO", "false"])
def test_trials_are_switched_off_as_anything_else_is(value):
    assert Settings.from_env({"LORAX_TRIALS": value}).trials == ()


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [("kv_cache_dtype", "kv_dtype"), ("enforce_eager", "cuda_graphs"), ("gpu_memory_utilization", "kv_cache_fraction")],
)
def test_options_of_vllm_lead_to_ours(theirs, ours):
    with pytest.raises(RequestError) as caught:
        lorax.EngineOptions(checkpoint="x", **{theirs: 1})

    assert caught.value.hint == f"did you mean {ours!r}?"


def test_without_trials_the_compiled_attention_is_not_tried_either(qwen2, monkeypatch, tmp_path):
    monkeypatch.setenv("LORAX_TRIALS", "off")

    with lorax.load(qwen2, kv_cache_tokens=64) as engine:
        assert engine.info().attention == "native"

    assert not (tmp_path / "cache/trials").exists()
