"""Medusa heads: whatever they draft, answers are those of the model without them."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from builders import change_json, make_lora, make_qwen2_model
from rigs import within
from safetensors.torch import load_file, save_file

import lorax_core as lorax
from lorax_core.errors import AdapterError

HIDDEN, VOCAB = 64, 320
FAVOURITE = 77
PROMPTS = [[3, 1, 4, 1, 5], [9, 2, 6], list(range(10, 31))]


def make_heads(folder, *, heads=3, layers=1, own_output=True, seed=0, prefix="", **changes):
    """Random heads; a `favourite` is drafted by all of them, always."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for head in range(heads):
        for layer in range(layers):
            tensors[f"{prefix}{head}.{layer}.linear.weight"] = torch.randn(HIDDEN, HIDDEN, generator=generator) * 0.1
            tensors[f"{prefix}{head}.{layer}.linear.bias"] = torch.randn(HIDDEN, generator=generator) * 0.1
        if own_output:
            tensors[f"{prefix}{head}.{layers}.weight"] = torch.randn(VOCAB, HIDDEN, generator=generator)
    folder.mkdir(exist_ok=True)
    save_file(tensors, folder / "medusa_lm_head.safetensors")
    config = {"medusa_num_heads": heads, "medusa_num_layers": layers, "base_model_name_or_path": None, **changes}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


def make_sure_heads(folder, token, heads=3):
    """Heads that draft one token, whatever they read: a large bias before an output layer that looks for it."""
    make_heads(folder, heads=heads)
    tensors = load_file(folder / "medusa_lm_head.safetensors")
    for name, tensor in tensors.items():
        tensor.zero_()
        if name.endswith("bias"):
            tensor.fill_(1000.0)
        if tensor.shape[0] == VOCAB:
            tensor[token] = 1.0
    save_file(tensors, folder / "medusa_lm_head.safetensors")
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("medusa")
    both = make_lora(make_qwen2_model(), root / "both", seed=4, target_modules=["q_proj", "lm_head"])
    return {
        "own": make_heads(root / "own", layers=2, seed=1),
        "shared": make_heads(root / "shared", own_output=False, seed=2, prefix="medusa_head."),
        "both": make_heads(both, seed=3),
        "lora": shutil.copytree(both, root / "lora", ignore=shutil.ignore_patterns("config.json", "medusa*")),
        "sure": make_sure_heads(root / "sure", FAVOURITE),
    }


@pytest.fixture(scope="module")
def engine(qwen2, folders):
    with lorax.load(qwen2, adapters=folders, max_batch_tokens=16) as engine:
        yield engine


@pytest.mark.parametrize("temperature", [0.0, 0.9])
@pytest.mark.parametrize(("name", "without"), [("own", None), ("shared", None), ("both", "lora"), ("sure", None)])
def test_answers_are_those_without_the_heads(engine, name, without, temperature):
    options = {"max_tokens": 20, "ignore_eos": True, "temperature": temperature, "seed": 5, "logprobs": 0}

    found = within(60, lambda: engine.generate(PROMPTS, adapter=name, **options))

    for one, other in zip(found, engine.generate(PROMPTS, adapter=without, **options), strict=True):
        assert one.token_ids == other.token_ids
        scores = [[each.logprob for each in completion.logprobs] for completion in (one, other)]
        assert scores[0] == pytest.approx(scores[1], abs=1e-4)


def test_right_drafts_are_taken(engine):
    options = {"max_tokens": 20, "ignore_eos": True, "logit_bias": {FAVOURITE: 100.0}}

    found = engine.generate(PROMPTS, adapter="sure", **options)

    for one in found:
        assert one.token_ids == [FAVOURITE] * 20
        # A step gives a token and three drafts; the first one comes from the prompt.
        assert one.usage.accepted_tokens == 14
    assert engine.generate(PROMPTS[0], **options).usage.accepted_tokens == 0


def test_they_mix_with_other_rows(engine):
    names = ["own", None, "both", "lora", "sure", "shared"]
    options = {"max_tokens": 12, "ignore_eos": True}
    alone = [engine.generate(PROMPTS[0], adapter=name, **options).token_ids for name in names]

    mixed = within(60, lambda: engine.generate([PROMPTS[0]] * 6, adapter=names, **options))

    assert [one.token_ids for one in mixed] == alone


def test_several_answers_and_a_grammar_go_with_them(engine):
    options = {"max_tokens": 9, "ignore_eos": True, "temperature": 1.0, "seed": 3, "n": 3}
    found, plain = (engine.generate(PROMPTS[2], adapter=name, **options) for name in ("own", None))

    assert [one.token_ids for one in (found, *found.alternatives)] == [
        one.token_ids for one in (plain, *plain.alternatives)
    ]
    assert engine.generate("x", adapter="sure", choice=["yes", "no"]).text in ("yes", "no")


def test_they_come_back_to_the_device(qwen2, folders, engine):
    expected = engine.generate(PROMPTS[0], adapter="both", max_tokens=8, ignore_eos=True).token_ids
    with lorax.load(qwen2, adapters=folders, max_adapters=1, max_cpu_adapters=0) as small:
        for _ in range(2):
            small.generate(PROMPTS[0], adapter="own", max_tokens=2)
            found = within(60, lambda: small.generate(PROMPTS[0], adapter="both", max_tokens=8, ignore_eos=True))
            assert found.token_ids == expected


def test_files_that_changed_are_refused_however_often_they_are_asked_for(qwen2, folders, tmp_path):
    moving = shutil.copytree(folders["own"], tmp_path / "moving")
    with lorax.load(
        qwen2, adapters={"it": moving, "other": folders["sure"]}, max_adapters=1, max_cpu_adapters=0
    ) as small:
        small.generate(PROMPTS[0], adapter="other", max_tokens=2)
        make_heads(moving, layers=2, seed=9)

        for _ in range(2):
            with pytest.raises(AdapterError, match="are not those that were loaded"):
                within(60, lambda: small.generate(PROMPTS[0], adapter="it", max_tokens=2))


def test_content_that_moved_is_read_where_it_was_last_found(qwen2, folders, tmp_path, engine):
    expected = engine.generate(PROMPTS[0], adapter="both", max_tokens=8, ignore_eos=True).token_ids
    first = shutil.copytree(folders["both"], tmp_path / "first")
    with lorax.load(
        qwen2, adapters={"it": first, "other": folders["sure"]}, max_adapters=1, max_cpu_adapters=0
    ) as small:
        small.generate(PROMPTS[0], adapter="other", max_tokens=2)
        small.adapters.load("it", shutil.copytree(first, tmp_path / "second"))
        shutil.rmtree(first)

        found = within(60, lambda: small.generate(PROMPTS[0], adapter="it", max_tokens=8, ignore_eos=True))

    assert found.token_ids == expected


def test_what_they_are_is_reported(engine):
    told = {info.name: info for info in engine.adapters.list()}

    assert told["own"].kind == "medusa"
    # Three heads, each of two blocks and an output layer, in 32 bit.
    assert told["own"].nbytes == 3 * 4 * (2 * (HIDDEN * HIDDEN + HIDDEN) + VOCAB * HIDDEN)
    assert told["both"].ranks == (4,)
    with pytest.raises(AdapterError, match="Medusa heads"):
        engine.generate(PROMPTS[0], adapter={"own": 0.5, "lora": 0.5})


def without_a_tensor(folder):
    tensors = load_file(folder / "medusa_lm_head.safetensors")
    del tensors["1.0.linear.bias"]
    save_file(tensors, folder / "medusa_lm_head.safetensors")


def with_a_stray_tensor(folder):
    tensors = load_file(folder / "medusa_lm_head.safetensors")
    save_file({**tensors, "3.0.linear.bias": torch.zeros(HIDDEN)}, folder / "medusa_lm_head.safetensors")


def of_another_width(folder):
    tensors = load_file(folder / "medusa_lm_head.safetensors")
    save_file(
        {
            name: tensor[:32, ..., :32].clone() if tensor.ndim > 1 else tensor[:32].clone()
            for name, tensor in tensors.items()
        },
        folder / "medusa_lm_head.safetensors",
    )


def as_a_pickle(folder):
    (folder / "medusa_lm_head.safetensors").rename(folder / "medusa_lm_head.pt")


def of_no_heads(folder):
    (folder / "config.json").write_text('{"medusa_num_heads": 0}', encoding="utf-8")


def of_numbers(**changes):
    return lambda folder: change_json(folder / "config.json", **changes)


def of_no_object(folder):
    (folder / "config.json").write_text('["medusa_num_heads"]', encoding="utf-8")
    (folder / "adapter_model.safetensors").write_bytes(b"")


def with_nan(folder):
    tensors = load_file(folder / "medusa_lm_head.safetensors")
    tensors["0.1.weight"][0, 0] = float("nan")
    save_file(tensors, folder / "medusa_lm_head.safetensors")


@pytest.mark.parametrize(
    ("spoil", "told"),
    [
        (without_a_tensor, r"lacks '1.0.linear.bias'"),
        (with_a_stray_tensor, r"'3.0.linear.bias', which 3 Medusa heads"),
        (of_another_width, "the base is 64 wide and has 320 tokens"),
        (as_a_pickle, "a pickle, which can run code"),
        (of_no_heads, "medusa_num_heads=0"),
        (of_numbers(medusa_num_heads=10**9), "medusa_num_heads=1000000000, and holds"),
        (of_numbers(medusa_num_layers=10**9), "medusa_num_layers=1000000000, and holds"),
        (of_numbers(medusa_num_heads=True), "medusa_num_heads=True"),
        (of_numbers(medusa_num_heads="3"), "medusa_num_heads='3'"),
        (of_no_object, "holds no object"),
        (with_nan, "NaN"),
    ],
)
def test_bad_heads_are_refused_by_name(engine, tmp_path, spoil, told):
    folder = make_heads(tmp_path / "bad")
    spoil(folder)

    with pytest.raises(AdapterError, match=told):
        engine.adapters.load("bad", folder)

    assert "bad" not in engine.adapters


@pytest.mark.parametrize("said", [{"task": "token-classification"}, {"id2label": {0: "a"}}])
def test_what_is_said_of_a_head_that_labels_is_refused(engine, folders, said):
    with pytest.raises(AdapterError, match="Medusa heads alone"):
        engine.adapters.load("labels", folders["own"], **said)


def test_a_base_that_writes_nothing_takes_none(bert, folders):
    with lorax.load(bert) as encoder, pytest.raises(AdapterError, match="this base generates none"):
        encoder.adapters.load("own", folders["own"])
