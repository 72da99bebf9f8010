"""What runtimes of this kind are known to get wrong without a word, and which test here would see it.

Each case is a result that was computed wrongly, or a part of the input that was dropped or ignored, with no error. Most
are seen by tests that lie beside what they test; the others are here.
"""

from __future__ import annotations

import ast
import warnings

import pytest
import torch
import transformers as hf
from builders import (
    BERT,
    change_json,
    make_letter_tokenizer,
    make_lora,
    make_qwen2_model,
    with_lora,
)
from oracles import make_model

import lorax_core as lorax
from lorax_core.engine.stopping import StopText
from lorax_core.errors import AdapterError
from lorax_core.types import FinishReason

MATRIX = "tests/adapters/test_matrix.py::test_an_adapter_computes_what_peft_computes"
FILES = "tests/adapters/test_files.py"
MERGE = "tests/adapters/test_merge.py"
HERE = "tests/test_seeds.py"
CASES = {
    # encoders and their batches
    "padding counted as tokens: answers hang on batch mates": (
        "lorax_bert/tests/test_bert.py::test_a_row_does_not_depend_on_its_batch"
    ),
    "a cut keeps the tail and loses CLS": (
        "tests/serving/test_text.py::test_a_cut_keeps_specials_and_the_right_end_of_every_text"
    ),
    "a text is cut and nobody is told": (
        "tests/serving/test_engine.py::test_a_text_that_is_too_long_is_cut_as_asked_and_reported"
    ),
    "token types always 0": "lorax_bert/tests/test_bert.py::test_a_pair_is_embedded_with_the_types_of_its_texts",
    "prefixes known by two literal ids": (
        "tests/weights/test_loader.py::test_berts_old_names_of_norms_and_its_prefix_are_understood"
    ),
    "every gelu computed as the exact one": (
        "tests/modeling/test_activation.py::test_an_activation_is_the_one_that_transformers_means"
    ),
    "positions shifted in place: the second run differs": (
        "lorax_roberta/tests/test_quirks.py::test_the_same_texts_give_the_same_rows_again"
    ),
    "padding ids inside a text shift positions": (
        "lorax_roberta/tests/test_quirks.py::test_padding_ids_inside_a_text_attend_but_do_not_count"
    ),
    "the padding id taken for granted": (
        "lorax_roberta/tests/test_quirks.py::test_padding_is_one_unless_the_configuration_says_otherwise"
    ),
    # embeddings
    "a classifier's vector is a slice of its logits": (
        f"{HERE}::test_a_classifier_embeds_with_its_rows_and_not_with_its_scores"
    ),
    "means right for equal lengths only": (
        "lorax_qwen2/tests/test_quirks.py::test_vectors_are_means_through_the_dense_layer_of_the_length_asked_for"
    ),
    "a model that sees both sides run as causal": (
        "lorax_qwen2/tests/test_quirks.py::test_a_model_that_sees_both_sides_embeds_and_does_not_generate"
    ),
    "the normalise entry ignored": "tests/weights/test_sentence.py::test_a_normalise_entry_counts_without_a_folder",
    "the dense layer of a folder not found": "tests/weights/test_sentence.py::test_a_dense_module_projects_the_vectors",
    "adapters ignored by embeddings": (
        "tests/adapters/test_oracle.py::test_bert_with_an_adapter_computes_what_peft_computes"
    ),
    # classification
    "labels for special tokens": f"{HERE}::test_tokens_have_the_labels_scores_and_places_of_transformers",
    "labels that hang on batch mates": f"{HERE}::test_tokens_have_the_labels_scores_and_places_of_transformers",
    "entities of O, or without their first token": f"{HERE}::test_entities_are_those_of_transformers",
    "places counted in bytes, text in lower case": f"{HERE}::test_entities_are_those_of_transformers",
    "labels that are not B- or I- dropped": f"{HERE}::test_labels_of_any_name_are_reported",
    "a classifying adapter without its head": "tests/adapters/test_matrix.py::test_a_head_travels_with_its_adapter",
    # what checkpoints say
    "configuration or tokenizer of another revision": (
        "tests/weights/test_hub.py::test_main_that_moved_is_downloaded_and_its_commit_before_stays"
    ),
    "GPT-2 scales by layer ignored": "lorax_gpt2/tests/test_quirks.py::test_scores_are_scaled_as_in_transformers",
    "heads tied whatever the file holds": (
        "lorax_gpt2/tests/test_quirks.py::test_a_head_in_the_file_counts_although_the_configuration_ties_it"
    ),
    "NeoX biases ignored": "lorax_neox/tests/test_quirks.py::test_a_bias_that_the_configuration_denies_is_not_ignored",
    "one window for every layer": (
        "lorax_qwen2/tests/test_quirks.py::test_a_layer_has_the_window_that_its_place_gives_it"
    ),
    "a window that decoding forgets": (
        "lorax_qwen2/tests/test_qwen2.py::test_text_within_a_sliding_window_is_that_of_transformers"
    ),
    "scaled positions computed wrongly": (
        "lorax_qwen2/tests/test_quirks.py::test_scaled_positions_are_those_of_transformers_in_every_spelling"
    ),
    "float32 loaded as float16": (
        "tests/weights/test_loader.py::test_the_dtype_is_the_one_that_the_configuration_states"
    ),
    # adapters
    "adapters of some layers disabled": MATRIX,
    "scales wrong when ranks are mixed or small": MATRIX,
    "ranks and alphas by module ignored": MATRIX,
    "DoRA, biases, saved modules, embeddings dropped": MATRIX,
    "dense targets of an encoder dropped": MATRIX,
    "an adapter of an encoder applied twice": MATRIX,
    "converted PiSSA, OLoRA, CorDA and LoRA-GA": MATRIX,
    "an unconverted PiSSA on the wrong base": (
        f"{FILES}::test_a_setting_that_is_not_served_is_refused_by_name_and_value"
    ),
    "tensors that fit nowhere dropped": f"{FILES}::test_a_tensor_without_a_place_is_refused_by_name",
    "an adapter of nothing answers as the base": f"{FILES}::test_a_tensor_without_a_place_is_refused_by_name",
    "an adapter of another base taken": f"{FILES}::test_an_adapter_of_a_larger_base_tells_both_sizes",
    "an adapter of a resized vocabulary": f"{HERE}::test_an_adapter_of_a_resized_vocabulary_is_refused_with_both_sizes",
    "a pickle passed over": f"{FILES}::test_files_that_cannot_be_read_are_named",
    "an adapter that names no base, or one out of reach": (
        f"{HERE}::test_the_base_that_an_adapter_names_need_not_be_reached"
    ),
    "the first adapter becomes the base": "tests/serving/test_engine.py::test_one_batch_mixes_the_base_and_an_adapter",
    "an engine with adapters loads no more": (
        f"{HERE}::test_files_that_changed_are_read_again_and_nothing_of_the_old_ones_is_served"
    ),
    "changed files under the same path not read": (
        f"{HERE}::test_files_that_changed_are_read_again_and_nothing_of_the_old_ones_is_served"
    ),
    "cached rows of one adapter serve another": (
        "tests/engine/test_reuse.py::test_what_an_adapter_computed_serves_that_adapter_alone"
    ),
    "an adapter that vanished answers as the base": (
        "tests/engine/test_faults.py::test_an_adapter_that_vanished_ends_its_requests_and_never_answers_as_the_base"
    ),
    "sources of one name taken for each other": (
        "tests/serving/test_many_adapters.py::test_two_names_of_one_content_tell_their_own_sources"
    ),
    "one adapter's requests keep another's waiting": (
        "tests/serving/test_many_adapters.py::test_a_flood_for_one_adapter_does_not_keep_another_waiting"
    ),
    "a file that changed while its adapter was away": (
        "tests/serving/test_many_adapters.py::test_files_that_changed_on_the_disk_are_not_taken_for_the_adapter"
    ),
    # merging
    "pruned numbers not scaled up again": f"{MERGE}::test_the_numbers_are_peft_s",
    "scales left out, A and B merged apart": f"{MERGE}::test_an_exact_sum_is_exact_whatever_the_settings",
    "a density of nothing by default": f"{MERGE}::test_settings_that_do_not_fit_are_refused",
    "pruning without a seed": f"{MERGE}::test_seeds_decide_and_torch_s_own_numbers_are_not_touched",
    "the first adapter's settings taken for all": f"{MERGE}::test_settings_on_which_the_adapters_differ_are_reported",
    "a merged adapter applied twice": (
        "tests/adapters/test_into_base.py::test_the_merged_checkpoint_computes_what_peft_computes"
    ),
    "cross terms in a weighted sum": ("tests/serving/test_weighted_sums.py::test_a_sum_is_the_weighted_sum_of_updates"),
    # sources
    "a revision of an adapter ignored": (
        "tests/adapters/test_source.py::test_a_revision_is_fetched_by_its_name_and_one_that_is_not_there_is_refused"
    ),
    "the hub asked although offline": (
        "tests/adapters/test_source.py::test_offline_what_was_downloaded_is_the_answer_and_nobody_is_asked"
    ),
    "changed files of a store not fetched": (
        "tests/adapters/test_stores.py::test_a_file_that_changed_there_is_a_new_folder_and_the_old_one_stays"
    ),
    "short names refused": f"{HERE}::test_a_folder_may_have_a_name_of_one_letter",
    # generation
    "a stop string that ends within a token missed": (
        "tests/engine/test_loop.py::test_a_stop_string_ends_the_text_before_it_wherever_its_tokens_are_cut"
    ),
    "stop strings read as patterns": f"{HERE}::test_a_stop_string_is_no_pattern",
    "the end token at the limit told as the limit": f"{HERE}::test_an_end_token_in_the_last_place_is_an_end",
    "seeds forgotten when batches join": (
        "tests/engine/test_loop.py::test_sampled_text_is_the_same_alone_in_a_batch_and_after_it_was_computed_again"
    ),
    "temperature 0 among others": f"{HERE}::test_greedy_rows_stay_greedy_beside_sampled_ones",
    "penalties that count padding or the length": (
        "tests/engine/test_sampler.py::test_presence_and_frequency_count_generated_tokens_only"
    ),
    "log-probabilities after penalties": (
        "tests/engine/test_sampler.py::test_logprobs_are_the_models_own_whatever_the_sampling"
    ),
    "more candidates than there are tokens": (
        "tests/engine/test_sampler.py::test_whatever_the_request_may_ask_a_token_of_the_vocabulary_is_drawn"
    ),
    "drafts that change the text": "tests/engine/test_loop.py::test_drafting_writes_the_same",
    "unknown options ignored": "tests/serving/test_requests.py::test_an_unknown_option_is_refused_with_the_nearest",
    "one engine's settings in another": "tests/serving/test_engine.py::test_two_engines_live_in_one_process",
}
NAMES = ["O", "B-PER", "I-PER", "B-LOC", "I-LOC"]
TEXTS = ["Ada met Zoë Bó in PARIS.", "Köln, near Bonn", "x"]


@pytest.mark.parametrize("case", CASES)
def test_each_case_has_its_test(case, repository):
    path, _, name = CASES[case].partition("::")
    tree = ast.parse((repository / path).read_text(encoding="utf-8"))

    assert name in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


@pytest.fixture(scope="module")
def tagger(tmp_path_factory):
    """A classifier of tokens whose labels vary within a text, as (folder, model)."""
    folder = tmp_path_factory.mktemp("tagger")
    model = make_model(hf.BertForTokenClassification, BERT, num_labels=len(NAMES))
    tokenizer = make_letter_tokenizer()
    with torch.no_grad():
        rows = model(**tokenizer(TEXTS[0], return_tensors="pt")).logits[0]  # [tokens, labels]
        model.classifier.bias.sub_(rows.mean(0))
    model.config.id2label = dict(enumerate(NAMES))
    model.config.label2id = {name: at for at, name in enumerate(NAMES)}
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder, model


def theirs(model, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return hf.pipeline("token-classification", model=model, tokenizer=make_letter_tokenizer(), **options)(TEXTS)


def test_tokens_have_the_labels_scores_and_places_of_transformers(tagger):
    folder, model = tagger
    expected = theirs(model, aggregation_strategy="none", ignore_labels=[])

    with lorax.load(folder) as engine:
        answers = engine.classify(TEXTS)

    assert len({one["entity"] for one in expected[0]}) > 2
    for told, answer in zip(expected, answers, strict=True):
        assert answer.labels == [one["entity"] for one in told]
        assert answer.offsets == [(one["start"], one["end"]) for one in told]
        assert answer.scores == pytest.approx([one["score"] for one in told], abs=1e-4)


def test_entities_are_those_of_transformers(tagger):
    folder, model = tagger
    expected = theirs(model, aggregation_strategy="simple")

    with lorax.load(folder) as engine:
        answers = engine.classify(TEXTS)

    assert any(one["end"] - one["start"] > 1 for one in expected[0])
    for text, told, answer in zip(TEXTS, expected, answers, strict=True):
        places = [(one["entity_group"], one["start"], one["end"]) for one in told]
        assert [(one.label, one.start, one.end) for one in answer.entities] == places
        assert [one.score for one in answer.entities] == pytest.approx([one["score"] for one in told], abs=1e-4)
        assert [one.text for one in answer.entities] == [text[start:end] for _, start, end in places]


def test_labels_of_any_name_are_reported(tagger, tmp_path):
    _, model = tagger
    model.save_pretrained(tmp_path)
    make_letter_tokenizer().save_pretrained(tmp_path)
    change_json(tmp_path / "config.json", id2label={str(at): f"kind {at}" for at in range(len(NAMES))})
    expected = theirs(model, aggregation_strategy="none", ignore_labels=[])

    with lorax.load(tmp_path) as engine:
        answer = engine.classify(TEXTS[0])

    assert answer.labels == [f"kind {NAMES.index(one['entity'])}" for one in expected[0]]
    assert answer.entities is None


def test_a_classifier_embeds_with_its_rows_and_not_with_its_scores(tagger):
    folder, model = tagger
    with torch.no_grad():
        rows = model.bert(**make_letter_tokenizer()(TEXTS[0], return_tensors="pt")).last_hidden_state[0]

    with lorax.load(folder, pooling="mean") as engine:
        vector = torch.from_numpy(engine.embed(TEXTS[0]))

    assert vector.shape == (BERT["hidden_size"],)
    assert (vector - rows.mean(0)).abs().max() < 1e-4


PROMPT = list(b"never the same text twice, and once more")


def written(model, count=12):
    ids = torch.tensor([PROMPT])
    options = {"max_new_tokens": count, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    return model.generate(ids, attention_mask=torch.ones_like(ids), **options)[0, len(PROMPT) :].tolist()


def test_files_that_changed_are_read_again_and_nothing_of_the_old_ones_is_served(qwen2, tmp_path):
    options = {"adapter": "it", "max_tokens": 12, "ignore_eos": True}
    folder = make_lora(make_qwen2_model(), tmp_path / "it", seed=1)
    before = written(with_lora(make_qwen2_model(), folder))

    with lorax.load(qwen2, adapters={"it": folder}, kv_cache_tokens=512) as engine:
        first = engine.generate(PROMPT, **options).token_ids
        make_lora(make_qwen2_model(), folder, seed=2, r=2)
        engine.adapters.load("it", folder)
        second = engine.generate(PROMPT, **options).token_ids

    assert first == before
    assert second == written(with_lora(make_qwen2_model(), folder)) != before


@pytest.mark.parametrize("options", [{"modules_to_save": ["embed_tokens"]}, {"target_modules": ["embed_tokens"]}])
def test_an_adapter_of_a_resized_vocabulary_is_refused_with_both_sizes(qwen2, tmp_path, options):
    folder = make_lora(make_qwen2_model(vocab_size=322), tmp_path, **{"target_modules": ["q_proj"], **options})

    with lorax.load(qwen2, kv_cache_tokens=64) as engine, pytest.raises(AdapterError) as caught:
        engine.adapters.load("it", folder)

    assert "embed_tokens" in caught.value.message
    assert "322" in caught.value.message
    assert "320" in caught.value.message


@pytest.mark.parametrize("named", [None, "acme/nowhere"])
def test_the_base_that_an_adapter_names_need_not_be_reached(qwen2, tmp_path, monkeypatch, named):
    monkeypatch.chdir(tmp_path)
    folder = make_lora(make_qwen2_model(), tmp_path / "it")
    change_json(folder / "adapter_config.json", base_model_name_or_path=named)

    with lorax.load(qwen2, adapters={"it": folder}, kv_cache_tokens=512) as engine:
        found = engine.generate(PROMPT, adapter="it", max_tokens=12, ignore_eos=True).token_ids

    change_json(folder / "adapter_config.json", base_model_name_or_path=None)
    assert found == written(with_lora(make_qwen2_model(), folder))


def test_a_folder_may_have_a_name_of_one_letter(qwen2, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make_lora(make_qwen2_model(), tmp_path / "a")

    with lorax.load(qwen2, adapters={"b": "a"}, kv_cache_tokens=64) as engine:
        assert [info.name for info in engine.adapters.list()] == ["b"]


@pytest.mark.parametrize(("stop", "text", "shown"), [(".", "ab.c", "ab"), ("a+", "aaa+b", "aa")])
def test_a_stop_string_is_no_pattern(stop, text, shown):
    rule = StopText((stop,))

    pieces = [rule.feed(character) for character in text]

    assert "".join(piece for piece, _ in pieces[: [met for _, met in pieces].index(stop) + 1]) == shown


def test_an_end_token_in_the_last_place_is_an_end(qwen2):
    with lorax.load(qwen2, kv_cache_tokens=64) as engine:
        ended = engine.generate([5, 6], max_tokens=1, logit_bias={256: 100.0})

    assert ended.token_ids == [256]
    assert ended.finish_reason is FinishReason.STOP


def test_greedy_rows_stay_greedy_beside_sampled_ones(qwen2):
    prompts = [PROMPT] * 3

    with lorax.load(qwen2, kv_cache_tokens=1024) as engine:
        answers = engine.run(
            [
                lorax.GenerateRequest(prompt=ids, max_tokens=12, ignore_eos=True, temperature=heat, seed=1)
                for ids, heat in zip(prompts, [1.5, 0.0, 0.7], strict=True)
            ]
        )

    assert answers[1].token_ids == written(make_qwen2_model())
    assert answers[0].token_ids != answers[1].token_ids
