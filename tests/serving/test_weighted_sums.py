"""`adapter={"a": 0.7, "b": 0.3}` against what the updates of PEFT's adapters sum up to."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from builders import make_lora, make_qwen2_model
from peft import PeftModel
from rigs import make_loaded, within
from safetensors.torch import load_file, save_file

import lorax_core as lorax
from lorax_core.adapters.residency.store import AdapterStore
from lorax_core.errors import AdapterError, RequestError
from lorax_core.serving.requests import GenerateRequest

PROMPTS = [[3, 1, 4, 1, 5, 10]]


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    root = tmp_path_factory.mktemp("pair")
    targets = ["q_proj", "o_proj", "embed_tokens"]
    first = make_lora(make_qwen2_model(), root / "first", seed=1, r=3, lora_alpha=7, target_modules=targets)
    second = make_lora(
        make_qwen2_model(),
        root / "second",
        seed=2,
        r=2,
        use_rslora=True,
        target_modules=["q_proj", "v_proj", "lm_head"],
    )
    return {"first": first, "second": second}


def summed(pair, weights):
    """Logits of transformers with every update of every member added to its weight, times its weight."""
    model = make_qwen2_model()
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for name, weight in weights.items():
        merged = PeftModel.from_pretrained(make_qwen2_model(), pair[name]).merge_and_unload()
        for key, tensor in merged.state_dict().items():
            state[key] += weight * (tensor - model.state_dict()[key])
    model.load_state_dict(state)
    return model


@pytest.mark.parametrize("weights", [{"first": 0.7, "second": 0.3}, {"first": -1.5, "second": 2}, {"first": 0.25}])
def test_a_sum_is_the_weighted_sum_of_updates(qwen2, pair, weights):
    model = summed(pair, weights)
    with torch.no_grad():
        logits = model(torch.tensor([PROMPTS[0]])).logits[0]
    expected = logits[:-1].log_softmax(-1)[range(5), PROMPTS[0][1:]]

    with lorax.load(qwen2, adapters=pair, dtype="float32") as engine:
        base, found = engine.generate([PROMPTS[0]] * 2, adapter=[None, weights], max_tokens=1, prompt_logprobs=0)

    scores = [one.logprob for one in found.prompt_logprobs[1:]]
    np.testing.assert_allclose(scores, expected.numpy(), atol=2e-4)
    assert abs(np.array(scores) - [one.logprob for one in base.prompt_logprobs[1:]]).max() > 0.05


def test_sums_mix_with_their_members_and_share_places(qwen2, pair):
    choices = [
        {"first": 0.5, "second": 0.5},
        "first",
        {"second": 0.5, "first": 0.5},
        None,
        {"first": 1.0},
        "second",
    ]
    with lorax.load(qwen2, adapters=pair) as engine:
        alone = [engine.generate(PROMPTS[0], adapter=one, max_tokens=9, ignore_eos=True).token_ids for one in choices]

    with lorax.load(qwen2, adapters=pair, max_adapters=1, max_cpu_adapters=1) as engine:
        mixed = within(60, lambda: engine.generate([PROMPTS[0]] * 6, adapter=choices, max_tokens=9, ignore_eos=True))

        engine.adapters.check()
    assert [one.token_ids for one in mixed] == alone
    assert alone[0] == alone[2]
    assert alone[4] == alone[1]


def test_a_sum_is_known_by_members_and_weights(qwen2, host, pair):
    store = AdapterStore(make_loaded(qwen2, host))
    for name in pair:
        store.load(name, pair[name])
    store.load("twin", pair["first"])

    sums = [store.get(one) for one in ({"first": 0.5, "second": 1}, {"second": 1.0, "twin": 0.5}, {"first": 0.5})]

    assert sums[0] is sums[1]
    assert sums[0].identity != sums[2].identity
    assert store.get({"first": 0.25, "twin": 0.25}).identity == sums[2].identity
    assert store.get({"first": 1.0}) is store.get("first")


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"use_dora": True}, r"a magnitude \(DoRA\)"),
        ({"bias": "lora_only", "target_modules": ["q_proj"]}, "a replaced weight or bias"),
        ({"modules_to_save": ["norm"]}, "a replaced weight or bias"),
        ({"trainable_token_indices": [1, 2]}, "trained tokens"),
    ],
)
def test_what_is_no_sum_is_refused_by_name(qwen2, pair, tmp_path, options, told):
    folder = make_lora(make_qwen2_model(), tmp_path / "odd", seed=3, **options)
    trained = {name: tensor + 0.1 for name, tensor in load_file(folder / "adapter_model.safetensors").items()}
    save_file(trained, folder / "adapter_model.safetensors")
    with lorax.load(qwen2, adapters={**pair, "odd": folder}) as engine:
        with pytest.raises(AdapterError, match=told):
            engine.generate(PROMPTS[0], adapter={"first": 0.5, "odd": 0.5})

        assert engine.generate(PROMPTS[0], adapter="odd", max_tokens=2).token_ids


def test_bad_sums_are_refused(qwen2, pair):
    with lorax.load(qwen2, adapters=pair) as engine:
        for adapter, error, told in (
            ({}, AdapterError, "needs at least one"),
            ({"first": float("nan")}, RequestError, "finite"),
            ({"frist": 0.5}, AdapterError, "no adapter is called 'frist'"),
            (3, RequestError, "adapter"),
        ):
            with pytest.raises(error, match=told):
                engine.run([GenerateRequest(prompt="x", adapter=adapter)])


def test_many_sums_do_not_pile_up(qwen2, pair):
    with lorax.load(qwen2, adapters=pair) as engine:
        for number in range(20):
            engine.generate(PROMPTS[0], adapter={"first": number / 10 + 0.05}, max_tokens=1)

        assert len(engine.adapters.bound) <= 2 + 8
        engine.adapters.check()


def test_a_sum_leaves_the_device_with_the_name_of_a_member(qwen2, pair):
    with lorax.load(qwen2, adapters=pair) as engine:
        engine.generate(PROMPTS[0], adapter={"first": 0.4, "second": 0.3}, max_tokens=1)

        engine.adapters.unload("first")

        within(60, lambda: settled(engine, {engine.adapters.get("second").identity}))
        engine.adapters.check()


def settled(engine, wanted):
    """Waits until the engine holds these adapters alone: a step in progress may still hold others."""
    while set(engine.adapters.bound) != wanted:
        engine.generate(PROMPTS[0], max_tokens=1)
