from __future__ import annotations

import pytest
import torch
from builders import BERT, make_bert_model, make_lora, make_qwen2, make_qwen2_model, with_lora
from rigs import Bench, all_logits, finish, make_adapters, make_loaded, make_loop, make_sequence
from transformers import BertModel

PROMPTS = [[5, 9, 2, 77, 13], [300, 1, 1, 8], [44] * 18, [7]]

# What PEFT is asked for, on Qwen2. Ranks and scales in all the ways that a configuration can give them.
QWEN2_LORA = {
    "every linear layer": {},
    "one module": {"target_modules": ["v_proj"]},
    "the second of two fused": {"target_modules": ["up_proj"]},
    "two of three fused": {"target_modules": ["q_proj", "v_proj"], "r": 3},
    "some layers only": {"layers_to_transform": [1], "target_modules": ["q_proj", "down_proj"]},
    "one layer by name": {"target_modules": r".*layers\.0\.mlp\.gate_proj"},
    "the head": {"target_modules": ["lm_head", "o_proj"]},
    "alpha unlike r": {"r": 2, "lora_alpha": 7},
    "rslora": {"r": 4, "lora_alpha": 6, "use_rslora": True},
    "ranks by layer": {
        "target_modules": ["q_proj", "k_proj", "o_proj"],
        "r": 2,
        "rank_pattern": {"layers.0.self_attn.k_proj": 5, "o_proj": 1},
    },
    "rank one": {"r": 1},
    "dropout in training": {"lora_dropout": 0.5},
    "a task type": {"task_type": "CAUSAL_LM"},
}
BERT_LORA = {
    "every linear layer": {},
    "one module": {"target_modules": ["value"]},
    "dense layers alike in name": {"target_modules": ["dense"]},
    "one of the dense layers": {"target_modules": ["intermediate.dense"]},
    "some layers only": {"target_modules": ["query"], "layers_to_transform": [1]},
    "rslora": {"r": 2, "lora_alpha": 5, "use_rslora": True},
    "ranks by layer": {"target_modules": ["query", "key"], "rank_pattern": {"encoder.layer.0.attention.self.key": 7}},
}


@pytest.fixture(scope="module")
def base(qwen2, host):
    return make_loaded(qwen2, host)


@pytest.fixture(scope="module")
def encoder(bert, host):
    return make_loaded(bert, host)


@torch.inference_mode()
def oracle_logits(folder):
    model = with_lora(make_qwen2_model(), folder)
    return [model(torch.tensor([ids])).logits[0] for ids in PROMPTS]


def make_encoder_oracle():
    """The BERT of the fixture without its pooler, which embeddings do not use."""
    whole = make_bert_model()
    bare = BertModel(whole.config, add_pooling_layer=False).eval()
    bare.load_state_dict({name: t for name, t in whole.state_dict().items() if not name.startswith("pooler.")})
    return bare


@torch.inference_mode()
def oracle_hidden(folder):
    model = with_lora(make_encoder_oracle(), folder)
    return [
        model(torch.tensor([[token % BERT["vocab_size"] for token in ids]])).last_hidden_state[0] for ids in PROMPTS
    ]


@pytest.mark.parametrize("options", QWEN2_LORA.values(), ids=QWEN2_LORA)
def test_qwen2_with_an_adapter_computes_what_peft_computes(base, tmp_path, options):
    folder = make_lora(make_qwen2_model(), tmp_path, **options)
    plain = all_logits(base, PROMPTS)
    adapter = make_adapters(base, it=folder).get("it")

    logits = all_logits(base, PROMPTS, [adapter] * len(PROMPTS))

    for ours, theirs in zip(logits, oracle_logits(folder), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    assert (logits[0] - plain[0]).abs().max() > 0.01


@pytest.mark.parametrize("options", BERT_LORA.values(), ids=BERT_LORA)
def test_bert_with_an_adapter_computes_what_peft_computes(encoder, tmp_path, options):
    folder = make_lora(make_encoder_oracle(), tmp_path, **options)
    adapter = make_adapters(encoder, it=folder).get("it")
    bench = Bench(encoder)
    texts = [[token % BERT["vocab_size"] for token in ids] for ids in PROMPTS]

    hidden = bench.hidden(*((bench.sequence(ids, adapter), 0, len(ids)) for ids in texts))

    for ours, theirs in zip(hidden, oracle_hidden(folder), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    [plain] = bench.hidden((bench.sequence(texts[0]), 0, len(texts[0])))
    assert (hidden[0] - plain).abs().max() > 0.01


def test_an_adapter_of_a_model_saved_without_its_prefix_fits_too(base, tmp_path):
    model = make_qwen2_model()
    whole = make_lora(model, tmp_path / "whole", seed=3, target_modules=["q_proj", "down_proj"])
    inner = make_lora(model.model, tmp_path / "inner", seed=3, target_modules=["q_proj", "down_proj"])
    store = make_adapters(base, whole=whole, inner=inner)

    logits = all_logits(base, [PROMPTS[0]] * 2, [store.get("whole"), store.get("inner")])

    torch.testing.assert_close(logits[0], logits[1], rtol=0, atol=1e-6)


def test_rows_of_one_batch_each_have_their_own_adapter(base, tmp_path):
    first = make_lora(make_qwen2_model(), tmp_path / "first", seed=1)
    second = make_lora(make_qwen2_model(), tmp_path / "second", seed=2, target_modules=["q_proj", "lm_head"], r=2)
    store = make_adapters(base, first=first, second=second)
    adapters = [store.get("second"), None, store.get("first"), store.get("second"), None, store.get("first")]
    prompts = [PROMPTS[at % len(PROMPTS)] for at in range(len(adapters))]

    together = all_logits(base, prompts, adapters)

    for ours, ids, adapter in zip(together, prompts, adapters, strict=True):
        [alone] = all_logits(base, [ids], [adapter])
        torch.testing.assert_close(ours, alone, rtol=1e-5, atol=1e-5)


def test_texts_written_in_one_batch_are_those_written_alone(base, tmp_path):
    folders = {name: make_lora(make_qwen2_model(), tmp_path / name, seed=seed) for seed, name in enumerate("ab")}
    store = make_adapters(base, **folders)
    names = [None, "a", "b", "b", None, "a"]
    adapters = [store.get(name) if name else None for name in names]

    together = finish(
        make_loop(base), *(make_sequence([9, 8, at], 20, adapter=adapter) for at, adapter in enumerate(adapters))
    )

    for at, (adapter, tokens) in enumerate(zip(adapters, together, strict=True)):
        assert finish(make_loop(base), make_sequence([9, 8, at], 20, adapter=adapter)) == [tokens]
    assert len({tuple(tokens) for tokens in together}) == 6


# Merging would be a problem with tied weights, and nothing is merged here.
@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")
def test_a_head_that_is_tied_to_the_embedding_changes_alone(host, tmp_path):
    folder = make_qwen2(tmp_path / "model", tie_word_embeddings=True)
    model = make_qwen2_model(tie_word_embeddings=True)
    lora = make_lora(model, tmp_path / "lora", target_modules=["lm_head"])
    base = make_loaded(folder, host)
    adapter = make_adapters(base, it=lora).get("it")

    logits = all_logits(base, [PROMPTS[0]], [adapter])[0]

    with torch.inference_mode():
        expected = with_lora(model, lora)(torch.tensor([PROMPTS[0]])).logits[0]
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
