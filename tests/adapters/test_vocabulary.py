"""Adapters that were trained with tokens which their base does not have: merged they work, unmerged they are refused."""

from __future__ import annotations

import json

import pytest
import torch
import transformers as hf
from matrix import ARCHS, saved, trained
from oracles import TOLERANCE

import lorax_core as lorax
from lorax_core.errors import AdapterError

QWEN2, TIED, BERT = (next(arch for arch in ARCHS if arch.name == name) for name in ("qwen2", "qwen2, tied", "bert"))
MORE = 5
TEXT = [5, 9, -1, 2, -3, 13]  # -1 is the last of the added tokens


def make_base(arch, folder):
    """A base of `arch`, saved; then resized, as for training with more tokens."""
    model = arch.model()
    model.save_pretrained(folder)
    vocabulary = model.config.vocab_size
    torch.manual_seed(7)
    model.resize_token_embeddings(vocabulary + MORE, mean_resizing=False)
    return model, vocabulary


def make_adapter(arch, model, folder, *, save_embeddings=False, **options):
    lora = trained(model, 1, target_modules=[arch.dense], **options)
    if save_embeddings:
        lora.save_pretrained(folder, save_embedding_layers=True)
        return folder
    return saved(lora, folder)


@torch.inference_mode()
def their_logprobs(model, ids):
    logits = model(torch.tensor([ids])).logits[0, :-1]
    return logits.log_softmax(-1)[range(len(ids) - 1), ids[1:]]


def our_logprobs(engine, ids):
    [result] = engine.run([lorax.GenerateRequest(prompt=ids, max_tokens=1, prompt_logprobs=0)])
    return torch.tensor([one.logprob for one in result.prompt_logprobs[1:]])


WAYS = {
    "saved tables": (QWEN2, {"modules_to_save": ["embed_tokens", "lm_head"]}),
    "saved tables, tied": (TIED, {"modules_to_save": ["embed_tokens", "lm_head"]}),
    "`save_embedding_layers`": (QWEN2, {"save_embeddings": True}),
    "`save_embedding_layers`, tied": (TIED, {"save_embeddings": True}),
    "trained tokens, tied": (TIED, {"trainable_token_indices": {"embed_tokens": [3, *range(320, 320 + MORE)]}}),
}


@pytest.mark.parametrize("way", WAYS)
def test_added_tokens_work_in_a_merged_engine_and_checkpoint(way, tmp_path, host):
    arch, options = WAYS[way]
    model, vocabulary = make_base(arch, tmp_path / "base")
    folder = make_adapter(arch, model, tmp_path / "lora", **options)
    ids = [token if token >= 0 else vocabulary + MORE + token for token in TEXT]

    done = lorax.merge_into_base(tmp_path / "base", folder, tmp_path / "out", host)

    expected = their_logprobs(model, ids)
    merged = hf.AutoModelForCausalLM.from_pretrained(done.path).eval()
    assert merged.config.vocab_size == vocabulary + MORE
    assert (their_logprobs(merged, ids) - expected).abs().max() < TOLERANCE * expected.abs().max()
    for place, merge in ((done.path, None), (tmp_path / "base", folder)):
        with lorax.load(place, merge_adapter=merge, kv_cache_tokens=64, host=host) as engine:
            assert (our_logprobs(engine, ids) - expected).abs().max() < TOLERANCE * expected.abs().max()
            if merge is not None:
                assert f"the adapter adds {MORE} tokens: the vocabulary has {vocabulary + MORE}" in engine.info().notes


def test_added_tokens_of_an_encoder_need_no_head(tmp_path, host):
    model, vocabulary = make_base(BERT, tmp_path / "base")
    folder = make_adapter(BERT, model, tmp_path / "lora", modules_to_save=["word_embeddings"])
    ids = [5, vocabulary + MORE - 1, 9]

    with lorax.load(tmp_path / "base", merge_adapter=folder, pooling="mean", host=host) as engine:
        vector = torch.from_numpy(engine.embed(ids))

    with torch.inference_mode():
        expected = model(torch.tensor([ids])).last_hidden_state[0].mean(0)
    assert (vector - expected).abs().max() < TOLERANCE * expected.abs().max()


@pytest.mark.parametrize(("way", "arch"), [(way, WAYS[way][0]) for way in WAYS], ids=WAYS)
def test_unmerged_they_are_refused_by_name_and_the_engine_goes_on(way, arch, tmp_path, host):
    model, vocabulary = make_base(arch, tmp_path / "base")
    folder = make_adapter(arch, model, tmp_path / "lora", **WAYS[way][1])

    with lorax.load(tmp_path / "base", kv_cache_tokens=64, host=host) as engine:
        with pytest.raises(
            AdapterError, match=f"adds {MORE} tokens to the base's vocabulary of {vocabulary}"
        ) as caught:
            engine.adapters.load("more", folder)
        assert "merge_adapter=SOURCE" in caught.value.hint
        assert len(engine.generate([5, 9], max_tokens=2).token_ids) == 2


@pytest.mark.parametrize(
    ("arch", "options", "lacking"),
    [
        (QWEN2, {"modules_to_save": ["embed_tokens"]}, "'lm_head'"),
        (TIED, {"modules_to_save": ["embed_tokens"]}, "'lm_head'"),
        (QWEN2, {"trainable_token_indices": {"embed_tokens": [320 + MORE - 1]}}, "'embed_tokens'"),
        (TIED, {"trainable_token_indices": {"embed_tokens": [320 + MORE - 1]}}, "'embed_tokens'"),
    ],
)
def test_a_merge_for_which_rows_are_missing_is_refused(arch, options, lacking, tmp_path, host):
    model, _ = make_base(arch, tmp_path / "base")
    folder = make_adapter(arch, model, tmp_path / "lora", **options)

    with pytest.raises(AdapterError, match=f"does not hold all rows of {lacking}"):
        lorax.load(tmp_path / "base", merge_adapter=folder, kv_cache_tokens=64, host=host)


def test_a_token_id_beyond_all_memory_is_refused_at_once(tmp_path, host):
    model, vocabulary = make_base(TIED, tmp_path / "base")
    folder = make_adapter(TIED, model, tmp_path / "lora", trainable_token_indices={"embed_tokens": [3]})
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, "trainable_token_indices": [10**15]}))

    with pytest.raises(AdapterError, match="does not hold all rows"):
        lorax.load(tmp_path / "base", merge_adapter=folder, kv_cache_tokens=64, host=host)
    with (
        lorax.load(tmp_path / "base", kv_cache_tokens=64, host=host) as engine,
        pytest.raises(AdapterError, match=f"adds {10**15 - vocabulary + 1} tokens"),
    ):
        engine.adapters.load("far", folder)
