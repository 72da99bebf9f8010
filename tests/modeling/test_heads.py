from __future__ import annotations

import pytest
import torch
from sentence_transformers.cross_encoder.modules import LogitScore
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    ModernBertConfig,
    ModernBertForSequenceClassification,
    ModernBertForTokenClassification,
    PhiConfig,
    PhiForCausalLM,
)

from lorax_core.errors import CheckpointError
from lorax_core.modeling import (
    EmbeddingHead,
    HeadTransform,
    LanguageModelHead,
    LastTokenClassificationHead,
    LayerNorm,
    LogitScoreHead,
    ModelConfig,
    PooledClassificationHead,
    TokenClassificationHead,
)
from lorax_core.modeling.batch import HeadRows
from lorax_core.types import Pooling, Task

HIDDEN = 8


def make_config(**changes):
    fields = {
        "model_type": "x",
        "hidden_size": HIDDEN,
        "vocab_size": 5,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    return ModelConfig(**{**fields, **changes})


def make_text(length, seed=0):
    return torch.randn(length, HIDDEN, generator=torch.Generator().manual_seed(seed))


def embedded(head, texts, pool_from=0, chunks=None):
    """Each text's vector, its rows read in chunks of `chunks` tokens as the engine would."""
    parts, counts = [], []
    for text in texts:
        span = head.span(list(range(1, len(text) + 1)), pool_from)
        total = torch.zeros(HIDDEN)
        for start in range(0, len(text), chunks or len(text)):
            stop = min(start + (chunks or len(text)), len(text))
            rows = [row for row in span if start <= row < stop]
            if rows:
                group = HeadRows(Task.EMBED, (0,), (len(rows),), torch.tensor(rows))
                total += head(text[rows], group)[0]
        parts.append(total)
        counts.append(len(span))
    return head.finish(parts, counts)


@pytest.mark.parametrize(
    ("pooling", "oracle"),
    [
        (Pooling.CLS, lambda text: text[0]),
        (Pooling.LAST, lambda text: text[-1]),
        (Pooling.MEAN, lambda text: text.mean(0)),
    ],
)
@pytest.mark.parametrize("chunks", [None, 1, 3])
def test_pooling_reads_the_rows_that_it_names_whatever_the_chunks(pooling, oracle, chunks):
    head = EmbeddingHead(HIDDEN, pooling, normalize=False)
    texts = [make_text(length, seed=length) for length in (1, 2, 7)]

    vectors = embedded(head, texts, chunks=chunks)

    for vector, text in zip(vectors, texts, strict=True):
        torch.testing.assert_close(vector, oracle(text))


def test_the_mean_leaves_out_a_prompt():
    head = EmbeddingHead(HIDDEN, Pooling.MEAN, normalize=False)
    text = make_text(7)

    [vector] = embedded(head, [text], pool_from=3)

    torch.testing.assert_close(vector, text[3:].mean(0))


def test_the_mean_of_a_text_that_is_all_prompt_is_its_last_row():
    head = EmbeddingHead(HIDDEN, Pooling.MEAN, normalize=False)
    text = make_text(3)

    [vector] = embedded(head, [text], pool_from=9)

    torch.testing.assert_close(vector, text[-1])


def test_normalised_vectors_have_unit_length():
    head = EmbeddingHead(HIDDEN, Pooling.MEAN, normalize=True)

    [vector] = embedded(head, [make_text(4) * 50])

    assert vector.norm().item() == pytest.approx(1, abs=1e-6)


def test_sums_of_16_bit_rows_are_taken_in_32():
    head = EmbeddingHead(HIDDEN, Pooling.MEAN, normalize=False)
    rows = torch.full((3000, HIDDEN), 1.0, dtype=torch.bfloat16)  # bfloat16 counts to 256

    sums = head(rows, HeadRows(Task.EMBED, (0,), (3000,), torch.arange(3000)))

    assert sums.dtype is torch.float32
    assert sums[0, 0].item() == 3000


def test_a_language_model_head_gives_logits_in_32_bit():
    head = LanguageModelHead(make_config()).to(torch.bfloat16)
    head.lm_head.weight.data = torch.ones_like(head.lm_head.weight)
    hidden = make_text(2).to(torch.bfloat16)

    logits = head(hidden, HeadRows(Task.GENERATE, (0, 1), (1, 1), torch.arange(2)))

    assert logits.dtype is torch.float32
    assert logits.shape == (2, 5)


@pytest.mark.parametrize(
    ("tied", "names", "built"),
    [(True, set(), True), (False, {"lm_head.weight"}, True), (False, {"norm.weight"}, False)],
)
def test_a_checkpoint_generates_when_it_has_output_weights_or_ties_them(tied, names, built):
    head = LanguageModelHead.build(make_config(tie_word_embeddings=tied), names, None)

    assert (head is not None) is built


class HeadWithBias(LanguageModelHead):
    bias = True


@pytest.mark.parametrize(
    ("theirs", "config", "kind", "options"),
    [
        (Gemma2ForCausalLM, Gemma2Config(final_logit_softcapping=0.5), LanguageModelHead, {"soft_cap": 0.5}),
        (PhiForCausalLM, PhiConfig(), HeadWithBias, {}),
    ],
)
@torch.inference_mode()
def test_logits_with_a_cap_or_a_bias_are_those_of_transformers(theirs, config, kind, options):
    sizes = {"hidden_size": HIDDEN, "vocab_size": 5, "num_hidden_layers": 1, "num_attention_heads": 2, "head_dim": 4}
    for name, value in {**sizes, "num_key_value_heads": 2, "intermediate_size": 4, "pad_token_id": None}.items():
        setattr(config, name, value)
    oracle, head = theirs(config).eval(), kind(make_config(), **options)
    for name, numbers in oracle.lm_head.named_parameters():
        numbers.copy_(torch.randn(numbers.shape, generator=torch.Generator().manual_seed(len(name))))
        head.lm_head.get_parameter(name).data = numbers.data

    logits = head(oracle.model(torch.tensor([[1, 4, 2]])).last_hidden_state[0], HeadRows(Task.GENERATE, (), (), None))

    torch.testing.assert_close(logits, oracle(torch.tensor([[1, 4, 2]])).logits[0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("cap", [0, -1.0, float("nan"), "30", True])
def test_a_cap_that_is_no_number_above_zero_is_refused(cap):
    with pytest.raises(ValueError, match="a soft cap of"):
        LanguageModelHead(make_config(), soft_cap=cap)


@pytest.mark.parametrize(
    ("names", "built"),
    [({"lm_head.weight", "lm_head.bias"}, True), ({"lm_head.bias"}, True), ({"lm_head.weight"}, False), (set(), False)],
)
def test_a_head_with_a_bias_needs_it_in_the_checkpoint_though_its_weight_may_be_tied(names, built):
    head = HeadWithBias.build(make_config(tie_word_embeddings=True), names, None)

    assert (head is not None) == built


@pytest.mark.parametrize("ids", [(3, 1), (3,)])
def test_scores_by_tokens_are_those_of_sentence_transformers(ids):
    head = LogitScoreHead(make_config(score_tokens=ids))
    head.lm_head.weight.data = make_text(5, seed=1)
    hidden = make_text(2)
    oracle = LogitScore(*ids)({"causal_logits": (hidden @ head.lm_head.weight.T)[:, None]})["scores"]

    scores = head(hidden, HeadRows(Task.SEQUENCE_CLASSIFICATION, (0, 1), (1, 1), torch.arange(2)))

    torch.testing.assert_close(torch.stack(head.finish(list(scores), [1, 1])), oracle)
    assert head.labels == ("LABEL_0",)


def test_logits_of_16_bit_are_subtracted_in_32():
    head = LogitScoreHead(make_config(score_tokens=(0, 1))).to(torch.bfloat16)
    head.lm_head.weight.data = torch.tensor([[32.0], [0.0625], [0.0], [0.0], [0.0]]).expand(5, HIDDEN).bfloat16()
    rows = HeadRows(Task.SEQUENCE_CLASSIFICATION, (0,), (1,), torch.arange(1))

    scores = head(torch.ones(1, HIDDEN, dtype=torch.bfloat16), rows)

    assert scores.tolist() == [[255.5]]  # of 8 bits, 256


@pytest.mark.parametrize(
    ("changes", "names", "kind"),
    [
        ({"score_tokens": (3, 1)}, {"lm_head.weight"}, LogitScoreHead),
        ({"score_tokens": (3, 1), "tie_word_embeddings": True}, set(), LogitScoreHead),
        ({"score_tokens": (3, 1)}, {"norm.weight"}, None),
        ({"score_tokens": (3, 1)}, {"lm_head.weight", "score.weight"}, LastTokenClassificationHead),
        ({}, {"score.weight"}, LastTokenClassificationHead),
        ({}, {"lm_head.weight"}, None),
    ],
)
def test_tokens_score_a_text_where_they_are_stated_and_there_is_no_classifier(changes, names, kind):
    head = LogitScoreHead.build(make_config(**changes), names, None)

    assert (None if head is None else type(head)) is kind


@pytest.mark.parametrize("ids", [(), (1, 2, 3), (5,), (-1, 2), (True,)])
def test_tokens_that_score_nothing_are_refused(ids):
    raw = {"model_type": "x", "hidden_size": 8, "vocab_size": 5, "num_hidden_layers": 1, "num_attention_heads": 2}

    with pytest.raises(CheckpointError, match="score_tokens"):
        ModelConfig.parse({**raw, "score_tokens": ids})


def make_transform(bias=True):
    return HeadTransform(HIDDEN, "gelu", LayerNorm(HIDDEN, 1e-5, bias), bias=bias)


class TransformedTokens(TokenClassificationHead):
    def __init__(self, config):
        super().__init__(config, make_transform())


class TransformedMeans(PooledClassificationHead):
    def __init__(self, config):
        super().__init__(config, make_transform(), pooling="mean")


class TransformedFirsts(PooledClassificationHead):
    def __init__(self, config):
        super().__init__(config, make_transform())


@pytest.mark.parametrize(
    ("theirs", "kind", "pooling"),
    [
        (ModernBertForTokenClassification, TransformedTokens, "cls"),
        (ModernBertForSequenceClassification, TransformedFirsts, "cls"),
        (ModernBertForSequenceClassification, TransformedMeans, "mean"),
    ],
)
@torch.inference_mode()
def test_heads_with_a_transform_are_those_of_transformers(theirs, kind, pooling):
    sizes = {"hidden_size": HIDDEN, "vocab_size": 9, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = ModernBertConfig(
        **sizes, intermediate_size=4, pad_token_id=0, classifier_pooling=pooling, classifier_bias=True, norm_bias=True
    )
    oracle, head = theirs(config).eval(), kind(make_config())
    for name, numbers in [*oracle.head.named_parameters(), *oracle.classifier.named_parameters()]:
        numbers.copy_(torch.randn(numbers.shape, generator=torch.Generator().manual_seed(len(name))))
    for name, numbers in head.named_parameters():
        numbers.data = oracle.get_parameter(name.replace("transform.", "head.")).data
    texts = [[1, 4, 2], [3], [5, 1, 6, 7]]
    hidden = [oracle.model(torch.tensor([ids])).last_hidden_state[0] for ids in texts]
    read = [rows[list(head.span(ids, 0))] for ids, rows in zip(texts, hidden, strict=True)]

    logits = head(torch.cat(read), HeadRows(head.task, (0, 1, 2), tuple(map(len, read)), torch.arange(8)))

    expected = torch.cat([oracle(torch.tensor([ids])).logits.flatten(0, -2) for ids in texts])
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-6)


def test_a_mean_of_16_bit_rows_is_taken_in_32():
    head = TransformedMeans(make_config()).to(torch.bfloat16)
    rows, seen = torch.full((3000, HIDDEN), 1.0, dtype=torch.bfloat16), []
    head.logits = lambda hidden, _: seen.append(hidden) or hidden

    head(rows, HeadRows(Task.SEQUENCE_CLASSIFICATION, (0,), (3000,), torch.arange(3000)))

    assert torch.equal(seen[0], torch.ones(1, HIDDEN, dtype=torch.bfloat16))


@pytest.mark.parametrize("kind", [TransformedTokens, TransformedMeans])
@pytest.mark.parametrize("lacking", [None, "transform.dense.weight", "classifier.weight", "classifier.bias"])
def test_a_head_with_a_transform_is_there_when_all_of_it_is(kind, lacking):
    names = {name for name, _ in kind(make_config()).named_parameters()} - {lacking}

    assert (kind.build(make_config(), names, None) is not None) == (lacking is None)
