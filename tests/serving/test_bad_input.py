"""What users get wrong: each time a typed error that names the value, the limit and the next step; the engine serves on."""

from __future__ import annotations

import shutil

import pytest
from builders import change_json, make_bert_model, make_lora, make_qwen2, make_qwen2_model

import lorax_core as lorax

CACHE = 128


@pytest.fixture(scope="module")
def engine(qwen2, tmp_path_factory):
    adapter = make_lora(make_qwen2_model(), tmp_path_factory.mktemp("adapter"))
    with lorax.load(qwen2, adapters={"summary": adapter}, kv_cache_tokens=CACHE) as engine:
        yield engine


def refusal(kind, call, *args, **options):
    with pytest.raises(lorax.LoraxError) as caught:
        call(*args, **options)
    assert type(caught.value) is kind
    return caught.value


def refused_and_served_on(engine, kind, call, *args, **options):
    before = engine.generate([5, 6, 7], max_tokens=4)
    error = refusal(kind, call, *args, **options)
    assert engine.generate([5, 6, 7], max_tokens=4).token_ids == before.token_ids
    return error


def test_a_checkpoint_that_is_not_there(tmp_path):
    error = refusal(lorax.CheckpointError, lorax.load, tmp_path / "qwen")

    assert str(tmp_path / "qwen") in error.message
    assert "config.json" in error.hint


def test_a_corrupt_checkpoint(tmp_path):
    file = make_qwen2(tmp_path) / "model.safetensors"
    file.write_bytes(file.read_bytes()[:5000])

    error = refusal(lorax.CheckpointError, lorax.load, tmp_path)

    assert str(file) in error.message
    assert "5000 bytes" in error.message
    assert "download it again" in error.hint


def test_a_configuration_that_is_no_json(tmp_path):
    (make_qwen2(tmp_path) / "config.json").write_text('{"model_type": "qwen2",')

    error = refusal(lorax.CheckpointError, lorax.load, tmp_path)

    assert "config.json" in error.message
    assert "line 1" in error.message


def test_an_unknown_model_type(tmp_path):
    change_json(make_qwen2(tmp_path) / "config.json", model_type="qwen22")

    error = refusal(lorax.PluginError, lorax.load, tmp_path)

    assert "'qwen22'" in error.message
    assert "'qwen2'" in error.hint


def test_a_checkpoint_that_is_a_pickle(tmp_path):
    (make_qwen2(tmp_path) / "model.safetensors").rename(tmp_path / "pytorch_model.bin")

    error = refusal(lorax.CheckpointError, lorax.load, tmp_path)

    assert "'pytorch_model.bin'" in error.message
    assert "save_pretrained" in error.hint


def test_an_adapter_for_another_base(engine, tmp_path):
    folder = make_lora(make_bert_model(), tmp_path)
    change_json(folder / "adapter_config.json", base_model_name_or_path="acme/bert")

    error = refused_and_served_on(engine, lorax.AdapterError, engine.adapters.load, "other", folder)

    assert "'acme/bert'" in error.message
    assert error.hint
    assert "other" not in engine.adapters


def test_an_adapter_that_is_not_there(engine, tmp_path):
    error = refused_and_served_on(engine, lorax.AdapterError, engine.adapters.load, "other", tmp_path / "gone")

    assert str(tmp_path / "gone") in error.message
    assert "PEFT" in error.hint


def test_a_prompt_longer_than_the_model(qwen2):
    with lorax.load(qwen2, kv_cache_tokens=2048) as engine:
        error = refused_and_served_on(engine, lorax.CapacityError, engine.generate, [5] * 600, max_tokens=4)

    assert "600 tokens and 4 more" in error.message
    assert "the model holds 512" in error.message
    assert "shorten" in error.hint


def test_a_prompt_longer_than_the_cache(engine):
    error = refused_and_served_on(engine, lorax.CapacityError, engine.generate, [5] * 200, max_tokens=100)

    assert "200 tokens and 100 more" in error.message
    assert f"the KV cache {CACHE}" in error.message
    assert "kv_cache_tokens=300" in error.hint


def test_an_answer_that_would_not_fit(engine):
    fits = engine.generate([5] * 100, max_tokens=CACHE - 100, ignore_eos=True)
    error = refused_and_served_on(engine, lorax.CapacityError, engine.generate, [5] * 100, max_tokens=CACHE - 99)

    assert len(fits.token_ids) == CACHE - 100
    assert "100 tokens and 29 more" in error.message


def test_a_prompt_that_leaves_no_room(engine):
    error = refused_and_served_on(engine, lorax.CapacityError, engine.generate, [5] * CACHE)

    assert f"{CACHE} tokens" in error.message


def test_a_text_too_long_to_embed(bert):
    with lorax.load(bert) as engine:
        vector = engine.embed("ab")
        error = refusal(lorax.CapacityError, engine.embed, "x " * 300)

        assert (engine.embed("ab") == vector).all()
    assert "302 tokens" in error.message
    assert "takes 96" in error.message
    assert "truncate=" in error.hint


@pytest.mark.parametrize("prompt", ["", []])
@pytest.mark.parametrize("task", ["prompt", "input"])
def test_an_empty_prompt(engine, prompt, task):
    kind = lorax.GenerateRequest if task == "prompt" else lorax.EmbedRequest

    error = refused_and_served_on(engine, lorax.RequestError, engine.run, [kind(**{task: prompt})])

    assert "empty" in error.message
    assert "at least one token" in error.hint


def test_an_unknown_adapter(engine):
    error = refused_and_served_on(engine, lorax.AdapterError, engine.generate, "hello", adapter="sumary")

    assert "'sumary'" in error.message
    assert error.hint == "did you mean 'summary'?"


def test_an_adapter_that_was_unloaded(engine, tmp_path):
    engine.adapters.load("brief", make_lora(make_qwen2_model(), tmp_path, seed=8))
    engine.adapters.unload("brief")

    error = refused_and_served_on(engine, lorax.AdapterError, engine.embed, "hello", adapter="brief")

    assert "'brief'" in error.message
    assert "'summary'" in error.message


@pytest.mark.parametrize("token", [320, -1, 10**12])
def test_a_token_id_outside_of_the_vocabulary(engine, token):
    error = refused_and_served_on(engine, lorax.RequestError, engine.generate, [5, token, 6], max_tokens=2)

    assert str(token) in error.message
    assert "0 to 319" in error.message


@pytest.mark.parametrize("options", [{"stop_token_ids": [999]}, {"logit_bias": {999: 1.0}}])
def test_an_option_that_names_a_token_outside_of_the_vocabulary(engine, options):
    error = refused_and_served_on(engine, lorax.RequestError, engine.generate, [5], max_tokens=2, **options)

    assert f"{next(iter(options))}: token id 999" in error.message


def test_an_unknown_option(engine):
    error = refused_and_served_on(engine, lorax.RequestError, engine.generate, "hello", max_new_tokens=3)

    assert "'max_new_tokens'" in error.message
    assert error.hint == "did you mean 'max_tokens'?"


def test_a_task_that_the_checkpoint_has_no_head_for(bert, engine):
    with lorax.load(bert) as encoder:
        error = refusal(lorax.RequestError, encoder.generate, "hello")
    other = refused_and_served_on(engine, lorax.RequestError, engine.classify, "hello")

    assert "no head for 'generate'; it has 'embed'" in error.message
    assert "no head for " in other.message
    assert "lorax models check" in error.hint


def test_a_text_for_a_checkpoint_without_a_tokenizer(qwen2, tmp_path):
    folder = tmp_path / "bare"
    shutil.copytree(qwen2, folder, ignore=shutil.ignore_patterns("tokenizer*", "*.jinja"))
    with lorax.load(folder, kv_cache_tokens=CACHE) as engine:
        error = refused_and_served_on(engine, lorax.RequestError, engine.generate, "hello", max_tokens=2)
        stop = refused_and_served_on(engine, lorax.RequestError, engine.generate, [5], max_tokens=2, stop="x")
        completion = engine.generate([5, 6], max_tokens=3, ignore_eos=True)

    assert "'hello'" in error.message
    assert "list[int]" in error.hint
    assert "['x']" in stop.message
    assert completion.text == ""
    assert len(completion.token_ids) == 3


def test_one_bad_request_among_good_ones_starts_nothing(engine):
    error = refused_and_served_on(engine, lorax.CapacityError, engine.generate, [[5, 6], [5] * 500, [7]], max_tokens=3)

    assert "500 tokens" in error.message


def test_a_prompt_of_no_known_shape(engine):
    for prompt in (None, 3, {"role": "user"}, [None], [[1.5]], [{"role": "user", "content": "a"}, "b"]):
        error = refused_and_served_on(engine, lorax.RequestError, engine.generate, prompt, max_tokens=2)

        assert "prompt" in error.message
