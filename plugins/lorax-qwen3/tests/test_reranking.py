"""Rerankers: the score of a text is that of sentence-transformers, whichever way a checkpoint states its tokens."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from sentence_transformers import CrossEncoder
from sentence_transformers.base.modules import Transformer
from sentence_transformers.cross_encoder.modules import LogitScore
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM, Qwen3ForSequenceClassification

import lorax_core as lorax

TINY = {
    "vocab_size": 96,
    "hidden_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "intermediate_size": 64,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
}
TEXTS = [[5, 9, 2, 77, 13], [30], [3, 1, 1, 8, 60, 61, 0], list(range(2, 42))]
YES, NO = 19, 7


def make(folder, **changes):
    """A random model that generates, and its files."""
    torch.manual_seed(0)
    model = Qwen3ForCausalLM._from_config(Qwen3Config(**{**TINY, **changes}), attn_implementation="eager").eval()
    shake(model)
    model.save_pretrained(folder)
    return model


@torch.no_grad()
def shake(model):
    for tensor in model.parameters():
        tensor.copy_(torch.randn_like(tensor) * 0.2 + (0.5 if tensor.ndim == 1 else 0.0))


def name_tokens(folder, *ids):
    """The files of sentence-transformers that name the tokens."""
    kinds = ("base.modules.transformer.Transformer", "cross_encoder.modules.logit_score.LogitScore")
    steps = [
        {"idx": at, "name": str(at), "path": path, "type": f"sentence_transformers.{kind}"}
        for at, (kind, path) in enumerate(zip(kinds, ("", "1_LogitScore"), strict=True))
    ]
    (folder / "modules.json").write_text(json.dumps(steps))
    (folder / "1_LogitScore").mkdir()
    LogitScore(*ids).save(str(folder / "1_LogitScore"))


def state(folder, **changes):
    """More keys of a `config.json`."""
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


@torch.inference_mode()
def expected(model, *ids):
    score = LogitScore(*ids)
    return torch.cat([score({"causal_logits": model(torch.tensor([text])).logits})["scores"] for text in TEXTS])


def found(folder, adapter=None):
    with lorax.load(folder, dtype="float32") as engine:
        if adapter is not None:
            engine.adapters.load("tuned", adapter)
        answers = engine.classify(TEXTS, adapter=adapter and "tuned")
    assert {tuple(answer.labels) for answer in answers} == {("LABEL_0",)}
    return torch.tensor([answer.scores for answer in answers])


def assert_same(scores, wanted):
    assert scores.shape == wanted.shape
    assert (scores - wanted).abs().max() < 2e-5 * wanted.abs().max()


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("ids", [(YES, NO), (YES,)])
def test_tokens_that_files_name_score_as_in_sentence_transformers(ids, tied, tmp_path):
    model = make(tmp_path, tie_word_embeddings=tied)

    name_tokens(tmp_path, *ids)

    assert_same(found(tmp_path), expected(model, *ids))


def test_tokens_that_a_config_names_score_alike(tmp_path):
    model = make(tmp_path)

    state(tmp_path, score_tokens=[YES, NO])

    assert_same(found(tmp_path), expected(model, YES, NO))


def test_a_converted_checkpoint_scores_alike(tmp_path):
    model = make(tmp_path)
    config = Qwen3Config(**TINY, num_labels=1)
    converted = Qwen3ForSequenceClassification._from_config(config, attn_implementation="eager").eval()
    converted.model.load_state_dict(model.model.state_dict())
    rows = model.lm_head.weight.detach()
    converted.score.weight.data = (rows[YES] - rows[NO])[None]

    converted.save_pretrained(tmp_path / "converted")

    # Read at the last token that is not padding, as transformers does.
    scores, wanted = found(tmp_path / "converted"), expected(model, YES, NO)
    kept = [at for at, text in enumerate(TEXTS) if text[-1] != TINY["pad_token_id"]]
    assert len(kept) == 3
    assert_same(scores[kept], wanted[kept])


@pytest.mark.parametrize("targets", [["q_proj", "down_proj"], ["lm_head"]])
def test_a_reranker_with_an_adapter_scores_as_pefts(targets, tmp_path):
    model = make(tmp_path)
    name_tokens(tmp_path, YES, NO)
    plain = expected(model, YES, NO)
    tuned = get_peft_model(model, LoraConfig(target_modules=targets, r=4, task_type="CAUSAL_LM"))
    shake(torch.nn.ParameterList(one for name, one in tuned.named_parameters() if "lora_" in name))

    tuned.save_pretrained(str(tmp_path / "tuned"), save_embedding_layers=False)

    wanted = expected(tuned.eval(), YES, NO)
    assert (wanted - plain).abs().min() > 1e-3
    assert_same(found(tmp_path, tmp_path / "tuned"), wanted)


def test_a_reranker_generates_too(tmp_path):
    model = make(tmp_path)
    name_tokens(tmp_path, YES, NO)
    with torch.inference_mode():
        best = int(model(torch.tensor([TEXTS[0]])).logits[0, -1].argmax())

    with lorax.load(tmp_path, dtype="float32") as engine:
        completion = engine.generate(TEXTS[0], max_tokens=1, ignore_eos=True)

    assert completion.token_ids == [best]


def test_without_tokens_there_is_nothing_to_score_by(tmp_path):
    make(tmp_path)

    with (
        lorax.load(tmp_path) as engine,
        pytest.raises(lorax.RequestError, match="no head for 'sequence-classification'"),
    ):
        engine.classify(TEXTS)


def test_tokens_beyond_the_vocabulary_are_refused(tmp_path):
    make(tmp_path)
    name_tokens(tmp_path, 9693, 2152)

    with pytest.raises(lorax.CheckpointError, match="score_tokens names 9693; ids are 0 to 95"):
        lorax.load(tmp_path)


QUERY, DOCUMENTS = "who ate it", ["the dog", "a cat that sat on the mat", "x"]
SHOWN = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}{% if add_generation_prompt %}!{% endif %} so"
ASKED = {"processing_kwargs": {"chat_template": {"add_generation_prompt": True}}}


def make_texts(folder, template):
    """A tokenizer of printable characters, with a chat template."""
    signs = {chr(at): at - 32 for at in range(32, 127)} | {"[PAD]": 95}
    made = Tokenizer(models.WordLevel(signs, unk_token="?"))
    made.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=made, pad_token="[PAD]", unk_token="?")
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    return tokenizer


def ranked(folder):
    with lorax.load(folder, dtype="float32") as engine:
        return engine.rerank(QUERY, DOCUMENTS, normalize=False)


@torch.inference_mode()
def scored(model, texts):
    score = LogitScore(YES, NO)
    return torch.cat([score({"causal_logits": model(torch.tensor([text])).logits})["scores"] for text in texts])[:, 0]


def assert_ranked(found, scores):
    order = scores.argsort(descending=True).tolist()
    assert [one.index for one in found] == order
    assert_same(torch.tensor([one.score for one in found]), scores[order])


@pytest.mark.parametrize(
    ("template", "options"), [(None, {}), (SHOWN, {}), (SHOWN, ASKED)], ids=["texts", "conversation", "asked"]
)
@pytest.mark.parametrize("prompt", [None, "Judge. "])
def test_pairs_are_read_as_a_cross_encoder_reads_them(template, options, prompt, tmp_path):
    make(tmp_path / "base")
    make_texts(tmp_path / "base", template)
    said = {"prompts": {"judge": prompt}, "default_prompt_name": "judge"} if prompt else {}
    reader = Transformer(str(tmp_path / "base"), transformer_task="text-generation", **options)
    theirs = CrossEncoder(
        modules=[reader, LogitScore(YES, NO)], device="cpu", activation_fn=torch.nn.Identity(), **said
    )
    theirs.save_pretrained(str(tmp_path / "new"))
    pairs = [(QUERY, document) for document in DOCUMENTS]

    scores = theirs.predict(pairs, batch_size=1, show_progress_bar=False, convert_to_tensor=True)

    assert_ranked(ranked(tmp_path / "new"), scores)


def test_without_a_template_of_its_own_a_pair_is_put_into_qwen3s_prompt(tmp_path):
    model = make(tmp_path, max_position_embeddings=512)
    state(tmp_path, score_tokens=[YES, NO])
    tokenizer = make_texts(tmp_path, "{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}")
    readme = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
    prompt = readme.split("```text\n")[1].split("\n```")[0] + "\n\n"

    texts = [tokenizer(prompt.format(query=QUERY, document=one))["input_ids"] for one in DOCUMENTS]

    assert_ranked(ranked(tmp_path), scored(model, texts))


def test_a_template_that_leaves_out_a_pair_is_refused_where_files_name_the_tokens(tmp_path):
    make(tmp_path)
    name_tokens(tmp_path, YES, NO)
    make_texts(tmp_path, "{% for m in messages if m.role == 'query' %}{{ m.content }}{% endfor %}")
    (tmp_path / "sentence_bert_config.json").write_text(json.dumps({"modality_config": {"text": {}, "message": {}}}))

    with pytest.raises(lorax.RequestError, match="it leaves out the document") as caught:
        ranked(tmp_path)

    assert "chat_template.jinja" in caught.value.hint
