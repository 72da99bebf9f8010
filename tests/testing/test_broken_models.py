"""Each check finds what it is for: a model that is wrong in one way fails it by far, and the right one passes.

By far means a hundred times the tolerance: a check that finds a mistake barely would miss its smaller sibling.
"""

from __future__ import annotations

import math

import pytest

from lorax_core.adapters.apply import SegmentedAdapters
from lorax_core.adapters.formats.settings import PeftSettings
from lorax_core.testing import CheckStatus
from lorax_core.weights import fill

BY_FAR = 100

MODELS = [
    ("bert", "ShiftsPositions", "packing-repeat"),
    ("bert", "SwapsQueryAndKey", "numbers-hidden"),
    ("bert", "DropsABias", "numbers-hidden"),
    ("bert", "DropsANormWeight", "numbers-hidden"),
    ("bert", "LooksBackOnly", "masking"),
    ("qwen2", "MissesATranspose", "numbers-hidden"),
    ("qwen2", "PeeksAhead", "masking"),
    ("qwen2", "HasAShortTable", "numbers-hidden"),
    ("qwen2", "CountsFromTheChunk", "cache-decode"),
    ("qwen2", "CountsFromTheChunk", "cache-chunks"),
    ("qwen2", "AdaptsAllButOne", "adapter-merged"),
    ("qwen2", "AdaptsAllButOne", "adapter-peft"),
    ("qwen2", "KeepsItsNorm", "adapter-replaced"),
    ("qwen2", "KeepsItsTable", "adapter-replaced"),
    ("qwen2", "KeepsItsTable", "adapter-tokens"),
    ("qwen2", "KeepsItsTable", "adapter-tokens[tied]"),
]
CONFIGS = [
    ("qwen2", "WidensWindows", "masking-window[windows]"),
    ("qwen2", "NarrowsWindows", "masking-window[windows]"),
    ("qwen2", "WidensWindows", "numbers-hidden[windows]"),
    ("qwen2", "ForgetsTheBase", "numbers-hidden[other_base]"),
]
HEADS = [
    ("qwen2", "generate", "KeepsItsHead", "adapter-replaced"),
    ("bert", "embed", "ReadsTheSecondRow", "numbers-embed"),
    ("qwen2", "sequence-classification", "CountsPadding", "numbers-sequence-classification[padding]"),
]
BACKENDS = [
    ("bert", "attends-pads", "packing-together"),
    ("bert", "sees-neighbours", "packing-together"),
    ("bert", "sees-neighbours", "packing-order"),
    ("qwen2", "reads-pages-in-a-row", "cache-pages"),
    ("qwen2", "forgets-long-pasts", "cache-decode"),
    ("qwen2", "forgets-long-pasts", "cache-chunks"),
]


@pytest.fixture
def fails_by_far(run, twins):
    """That a broken spec fails a check by far, and the right one passes it."""

    def judge(model_type, spec, key, backend=None):
        right = run(twins[model_type], key)
        wrong = run(spec, key, backend)
        assert right.status is CheckStatus.PASSED, right.detail
        assert wrong.status is CheckStatus.FAILED, wrong.detail
        assert wrong.ratio is not None, wrong.detail
        assert wrong.ratio >= BY_FAR, wrong.detail
        assert math.isfinite(wrong.ratio), wrong.detail

    return judge


@pytest.mark.parametrize(("model_type", "broken", "key"), MODELS)
def test_a_broken_backbone(model_type, broken, key, make_spec, fails_by_far):
    fails_by_far(model_type, make_spec(model_type, backbone=f"broken:{broken}"), key)


@pytest.mark.parametrize("key", ["masking", "dtype-bfloat16", "numbers-hidden"])
def test_a_number_that_is_none_is_never_outdone_by_a_finite_one(key, make_spec, run):
    wrong = run(make_spec("qwen2", backbone="broken:LosesAllRowsButTheLast"), key)

    assert wrong.status is CheckStatus.FAILED
    assert wrong.error == math.inf


@pytest.mark.parametrize(("model_type", "broken", "key"), CONFIGS)
def test_a_broken_config(model_type, broken, key, make_spec, fails_by_far):
    fails_by_far(model_type, make_spec(model_type, config=f"broken:{broken}"), key)


@pytest.mark.parametrize(("model_type", "task", "broken", "key"), HEADS)
def test_a_broken_head(model_type, task, broken, key, make_spec, fails_by_far):
    fails_by_far(model_type, make_spec(model_type, heads={task: f"broken:{broken}"}), key)


@pytest.mark.parametrize(("model_type", "backend", "key"), BACKENDS)
def test_a_broken_attention_backend(model_type, backend, key, make_spec, fails_by_far):
    fails_by_far(model_type, make_spec(model_type), key, backend)


@pytest.mark.parametrize("key", ["adapter-merged", "adapter-peft"])
def test_a_wrong_scale_of_lora(key, make_spec, fails_by_far, monkeypatch, run, twins):
    assert run(twins["qwen2"], key).status is CheckStatus.PASSED
    monkeypatch.setattr(PeftSettings, "scale", lambda self, module, rank: 1.05 * self.lora_alpha / rank)

    wrong = run(make_spec("qwen2"), key)

    assert wrong.status is CheckStatus.FAILED
    assert wrong.ratio >= BY_FAR


def test_one_adapter_for_the_whole_batch(make_spec, monkeypatch, run, twins):
    def for_all(self, site, x, y):
        for delta in self.runs[0].bound.deltas.get(site.path, ()):
            delta.apply(site, x, y)
        return y

    right = run(twins["bert"], "adapter-mixed")
    monkeypatch.setattr(SegmentedAdapters, "apply", for_all)

    wrong = run(make_spec("bert"), "adapter-mixed")

    assert right.status is CheckStatus.PASSED
    assert wrong.status is CheckStatus.FAILED
    assert wrong.ratio >= BY_FAR


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_too_few_bits(dtype, make_spec, run, twins):
    right = run(twins["bert"], f"dtype-{dtype}")
    wrong = run(make_spec("bert", backbone="broken:RoundsToEightBit"), f"dtype-{dtype}")

    assert right.status is CheckStatus.PASSED
    assert wrong.status is CheckStatus.FAILED
    assert wrong.ratio > right.ratio


@pytest.mark.parametrize("name", ["int8", "int4"])
def test_rows_of_a_quantized_weight_that_are_mixed_up(name, make_spec, run, twins):
    right = run(twins["qwen2"], f"quantized-{name}")
    wrong = run(make_spec("qwen2", backbone="broken:TakesCodesForNumbers"), f"quantized-{name}")

    assert right.status is CheckStatus.PASSED
    assert right.ratio < 0.6
    assert wrong.status is CheckStatus.FAILED
    assert wrong.ratio > 2


@pytest.mark.parametrize(
    ("broken", "key", "told"),
    [
        ("MissesARename", "weights-accounted", "encoder.layer.0.intermediate.dense"),
        ("MakesUpAMissingNorm", "weights-missing", "encoder.layer.1.output.LayerNorm.weight"),
        ("IgnoresBiases", "weights-extra", "embeddings.word_embeddings.bias"),
        ("UsesForeignLinear", "adapter-identity", "encoder.layer.0.output.dense"),
    ],
)
def test_what_is_wrong_is_named(broken, key, told, make_spec, run, twins):
    right = run(twins["bert"], key)
    wrong = run(make_spec("bert", backbone=f"broken:{broken}"), key)

    assert right.status is CheckStatus.PASSED
    assert wrong.status is CheckStatus.FAILED
    assert told in wrong.detail


def test_a_loader_that_takes_nan(make_spec, run, twins, monkeypatch):
    assert run(twins["bert"], "weights-corrupt").status is CheckStatus.PASSED
    monkeypatch.setattr(fill, "is_finite", lambda tensor: True)

    wrong = run(make_spec("bert"), "weights-corrupt")

    assert wrong.status is CheckStatus.FAILED
    assert "loading does not say so" in wrong.detail
