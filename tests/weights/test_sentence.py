from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from builders import BERT, change_json, change_tensors, make_bert, make_sentence_files
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Dense, Normalize, Transformer
from sentence_transformers.cross_encoder.modules import LogitScore
from sentence_transformers.sentence_transformer.modules import Pooling as PoolingModule

import lorax_core as lorax
from lorax_core.errors import CheckpointError
from lorax_core.types import Pooling
from lorax_core.weights.checkpoint import Checkpoint
from lorax_core.weights.sentence import RerankerFiles, read_reranker_files, read_score_tokens, read_sentence_files

HIDDEN = BERT["hidden_size"]
TEXTS = ["Ab", "the quick brown fox", "x", "Jumps over THE lazy dog, twice!", "the quick brown fox"]
NO_CLOCK = {"show_progress_bar": False, "convert_to_numpy": True}


def make_files(folder, **files):
    return read_sentence_files(Checkpoint(make_sentence_files(make_bert(folder), **files)))


def make_new(folder, modules, **options):
    """A checkpoint as the installed sentence-transformers writes one."""
    transformer = Transformer(str(make_bert(folder / "bert")), max_seq_length=64)
    SentenceTransformer(modules=[transformer, *modules], device="cpu", **options).save_pretrained(str(folder / "new"))
    return folder / "new"


def assert_as_sentence_transformers(folder, texts=TEXTS, tolerance=3e-6):
    oracle = SentenceTransformer(str(folder), device="cpu")
    expected = oracle.encode(texts, **NO_CLOCK)

    with lorax.load(folder) as engine:
        vectors = engine.embed(texts)

    np.testing.assert_allclose(vectors, expected, atol=tolerance, rtol=0)
    assert np.abs(expected).max() > 10 * tolerance
    return vectors


def test_a_checkpoint_without_a_list_of_modules_says_nothing(bert):
    assert read_sentence_files(Checkpoint(bert)) is None


@pytest.mark.parametrize(
    ("said", "pooling"),
    [
        ({"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}, Pooling.CLS),
        ({"pooling_mode_mean_tokens": True}, Pooling.MEAN),
        ({"pooling_mode_lasttoken": True, "pooling_mode_mean_tokens": False}, Pooling.LAST),
        ({"pooling_mode": "cls"}, Pooling.CLS),
        ({"pooling_mode": "mean"}, Pooling.MEAN),
        ({"pooling_mode": ["lasttoken"]}, Pooling.LAST),
        ({"pooling_mode": "cls", "pooling_mode_mean_tokens": True}, Pooling.CLS),  # the new spelling counts
        ({}, Pooling.MEAN),
    ],
)
def test_pooling_is_read_in_both_spellings(tmp_path, said, pooling):
    assert make_files(tmp_path, pooling=said).pooling is pooling


@pytest.mark.parametrize(
    ("said", "named"),
    [
        ({"pooling_mode_max_tokens": True, "pooling_mode_mean_tokens": False}, "'max'"),
        ({"pooling_mode_mean_sqrt_len_tokens": True}, "'mean_sqrt_len_tokens'"),
        ({"pooling_mode": "weightedmean"}, "'weightedmean'"),
        ({"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": True}, "'cls', 'mean'"),
        ({"pooling_mode": ["mean", "max"]}, "'mean', 'max'"),
    ],
)
def test_a_pooling_that_is_not_served_is_refused_by_name(tmp_path, said, named):
    with pytest.raises(CheckpointError) as caught:
        make_files(tmp_path, pooling=said)

    assert named in caught.value.message
    assert "'cls', 'mean', 'lasttoken'" in caught.value.message


def test_a_normalise_entry_counts_without_a_folder(tmp_path):
    files = make_files(tmp_path)

    assert files.normalize
    assert not (tmp_path / "2_Normalize").exists()


def test_without_a_normalise_entry_vectors_keep_their_length(tmp_path):
    assert not make_files(tmp_path, modules=("Transformer", "Pooling")).normalize


@pytest.mark.parametrize("module", ["LayerNorm", "LSTM", "WeightedLayerPooling"])
def test_a_module_that_is_not_served_is_refused_by_name(tmp_path, module):
    with pytest.raises(CheckpointError) as caught:
        make_files(tmp_path, modules=("Transformer", "Pooling", module, "Normalize"))

    assert repr(module) in caught.value.message


@pytest.mark.parametrize(
    "modules", [("Pooling", "Transformer"), ("Transformer",), ("Transformer", "Normalize", "Pooling"), ()]
)
def test_modules_in_another_order_are_refused(tmp_path, modules):
    with pytest.raises(CheckpointError, match="in this order"):
        make_files(tmp_path, modules=modules)


def test_length_and_case_are_read(tmp_path):
    files = make_files(tmp_path, transformer={"max_seq_length": 17, "do_lower_case": True})

    assert files.max_tokens == 17
    assert files.lower_case


def test_the_default_prompt_is_read(tmp_path):
    files = make_files(
        tmp_path,
        sentence={"prompts": {"query": "find: ", "passage": ""}, "default_prompt_name": "query"},
        pooling={"pooling_mode": "mean", "include_prompt": False},
    )

    assert files.prompt == "find: "
    assert not files.pool_prompt


def test_prompts_without_a_default_are_left_to_the_caller(tmp_path):
    assert make_files(tmp_path, sentence={"prompts": {"query": "find: "}}).prompt == ""


def test_a_default_prompt_that_is_not_among_the_prompts_is_refused_with_those_that_are(tmp_path):
    with pytest.raises(CheckpointError, match=r"'query'.*'passage'"):
        make_files(tmp_path, sentence={"prompts": {"passage": ""}, "default_prompt_name": "query"})


@pytest.mark.parametrize("mode", ["cls", "mean", "lasttoken"])
@pytest.mark.parametrize("normalise", [True, False])
def test_vectors_are_sentence_transformers(tmp_path, mode, normalise):
    modules = [PoolingModule(HIDDEN, mode), *([Normalize()] if normalise else [])]

    vectors = assert_as_sentence_transformers(make_new(tmp_path, modules))

    lengths = np.linalg.norm(vectors, axis=1)
    assert np.allclose(lengths, 1, atol=1e-6) is normalise


@pytest.mark.parametrize("include", [True, False])
@pytest.mark.parametrize("mode", ["mean", "cls"])
def test_a_default_prompt_is_put_in_front_and_pooled_as_the_files_say(tmp_path, include, mode):
    folder = make_new(
        tmp_path,
        [PoolingModule(HIDDEN, mode, include_prompt=include)],
        prompts={"q": "find this: "},
        default_prompt_name="q",
    )

    vectors = assert_as_sentence_transformers(folder)

    change_json(folder / "config_sentence_transformers.json", default_prompt_name=None)
    with lorax.load(folder) as engine:
        assert not np.allclose(vectors, engine.embed(TEXTS), atol=1e-3)


def test_vectors_of_old_files_are_sentence_transformers(tmp_path):
    folder = make_sentence_files(make_bert(tmp_path), transformer={"max_seq_length": 64, "do_lower_case": True})

    vectors = assert_as_sentence_transformers(folder)

    change_json(folder / "sentence_bert_config.json", do_lower_case=False)
    with lorax.load(folder) as engine:
        assert not np.allclose(vectors, engine.embed(TEXTS), atol=1e-3)


def test_a_pair_of_texts_is_lower_cased_as_sentence_transformers_does(tmp_path):
    folder = make_sentence_files(make_bert(tmp_path), transformer={"max_seq_length": 64, "do_lower_case": True})

    assert_as_sentence_transformers(folder, [("Ab", "CD"), ("x", "Jumps over THE lazy dog")])


def test_a_text_longer_than_the_files_allow_is_cut_where_sentence_transformers_cuts_it(tmp_path):
    folder = make_sentence_files(make_bert(tmp_path), transformer={"max_seq_length": 12})
    long = "the quick brown fox jumps over the lazy dog"
    expected = SentenceTransformer(str(folder), device="cpu").encode(long, **NO_CLOCK)

    with lorax.load(folder) as engine:
        vector = engine.embed(long, truncate="end")

    np.testing.assert_allclose(vector, expected, atol=1e-6, rtol=0)


def make_dense(out, bias=True, activation=None):
    torch.manual_seed(6)
    return Dense(HIDDEN, out, bias=bias, activation_function=activation or torch.nn.Tanh())


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    "activation", [torch.nn.Tanh(), torch.nn.Identity(), torch.nn.GELU()], ids=["tanh", "none", "gelu"]
)
def test_a_dense_module_projects_the_vectors(tmp_path, bias, activation):
    folder = make_new(tmp_path, [PoolingModule(HIDDEN, "mean"), make_dense(24, bias, activation), Normalize()])

    vectors = assert_as_sentence_transformers(folder)

    assert vectors.shape == (len(TEXTS), 24)


@pytest.mark.parametrize(
    ("spoil", "told"),
    [
        (lambda dense: (dense / "model.safetensors").unlink(), "has no model.safetensors"),
        (lambda dense: (dense / "config.json").unlink(), "has no config.json"),
        (
            lambda dense: change_json(dense / "config.json", activation_function="torch.nn.Softplus"),
            r"'torch\.nn\.Softplus'",
        ),
        (lambda dense: change_json(dense / "config.json", activation_function="its.own.Tanh"), r"'its\.own\.Tanh'"),
        (lambda dense: change_json(dense / "config.json", activation_function=5), "5 for 'activation_function'"),
        (lambda dense: change_json(dense / "config.json", use_residual=True), "use_residual True"),
        (lambda dense: change_json(dense / "config.json", module_input_name="token_embeddings"), "'token_embeddings'"),
        (lambda dense: change_json(dense / "config.json", in_features=HIDDEN + 1), "states in_features 65, .* has 64"),
        (lambda dense: change_json(dense / "config.json", out_features="24"), "'24' for 'out_features'"),
        (lambda dense: change_json(dense / "config.json", bias=False), "states bias False"),
        (lambda dense: (dense / "config.json").write_text("[]"), "where an object belongs"),
        (lambda dense: (dense / "model.safetensors").write_bytes(b"nothing"), "not a readable safetensors"),
    ],
)
def test_a_dense_module_that_cannot_be_served_is_refused_by_what_is_wrong(tmp_path, spoil, told):
    folder = make_new(tmp_path, [PoolingModule(HIDDEN, "mean"), make_dense(24)])
    spoil(folder / "2_Dense")

    with pytest.raises(CheckpointError, match=told):
        read_sentence_files(Checkpoint(folder))


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"linear.weight": torch.ones(())}, r"'linear\.weight' has shape \[\]"),
        ({"linear.weight": torch.ones(24)}, r"'linear\.weight' has shape \[24\]"),
        ({"linear.weight": torch.ones(24, HIDDEN, 1)}, r"'linear\.weight' has shape \[24, 64, 1\]"),
        ({"linear.weight": torch.ones(0, HIDDEN)}, r"'linear\.weight' has shape \[0, 64\]"),
        ({"linear.weight": torch.ones(24, HIDDEN).int()}, r"'linear\.weight' holds I32"),
        ({"linear.weight": torch.ones(24, HIDDEN) * torch.nan}, r"'linear\.weight' holds NaN"),
        ({"linear.weight": torch.ones(24, HIDDEN).double() * 1e300}, r"'linear\.weight' holds NaN, or numbers"),
        ({"linear.bias": torch.ones(())}, r"'linear\.bias' has shape \[\], needed is \[24\]"),
        ({"linear.bias": torch.ones(25)}, r"'linear\.bias' has shape \[25\], needed is \[24\]"),
        ({"linear.bias": torch.ones(24, 1)}, r"'linear\.bias' has shape \[24, 1\], needed is \[24\]"),
        ({"linear.bias": torch.ones(24).bool()}, r"'linear\.bias' holds BOOL"),
        ({"residual.weight": torch.ones(24, HIDDEN)}, r"'residual\.weight'"),
    ],
)
def test_a_dense_tensor_that_is_none_is_named_with_what_is_needed(tmp_path, change, told):
    folder = make_new(tmp_path, [PoolingModule(HIDDEN, "mean"), make_dense(24)])
    change_tensors(folder / "2_Dense/model.safetensors", lambda tensors: {**tensors, **change})

    with pytest.raises(CheckpointError, match=told) as caught:
        read_sentence_files(Checkpoint(folder))

    assert caught.value.hint


def test_a_dense_module_that_does_not_take_the_models_vectors_is_refused(tmp_path):
    folder = make_new(tmp_path, [PoolingModule(HIDDEN, "mean"), make_dense(24)])
    change_tensors(folder / "2_Dense/model.safetensors", lambda t: {**t, "linear.weight": t["linear.weight"][:, 1:]})
    change_json(folder / "2_Dense/config.json", in_features=HIDDEN - 1)

    with pytest.raises(CheckpointError, match="takes vectors of 63, not of 64"):
        lorax.load(folder)


def test_a_dense_module_that_states_no_activation_has_the_librarys(tmp_path):
    folder = make_new(tmp_path, [PoolingModule(HIDDEN, "mean"), make_dense(24, activation=torch.nn.GELU())])
    change_json(folder / "2_Dense/config.json", activation_function=None)  # removes the key

    assert_as_sentence_transformers(folder)


@pytest.mark.parametrize(
    ("modules", "told"),
    [
        ({"0": {"type": "sentence_transformers.models.Transformer"}}, "where a list belongs"),
        ([1, 2], "1 for 'a module' where an object belongs"),
        ([None], "None for 'a module'"),
        ([[]], "where an object belongs"),
        ([{"path": ""}], "None for 'type'"),
        ([{"type": 5}], "5 for 'type'"),
        ([{"type": "sentence_transformers.models.Transformer", "path": 5}], "5 for 'path'"),
        ([{"type": "its_own.Transformer", "path": ""}, {"type": "its_own.Pooling"}], r"'its_own\.Transformer'"),
        ([{"type": "sentence_transformers.models.Pooling", "path": "../x"}], r"'\.\./x', which lies outside"),
        ([{"type": "sentence_transformers.models.Dense", "path": "/etc"}], "'/etc', which lies outside"),
        ([{"type": "sentence_transformers.models.Dense", "path": "a\0b"}], "not a file name"),
    ],
)
def test_a_list_of_modules_that_is_none_is_refused_by_what_is_wrong(tmp_path, modules, told):
    folder = make_sentence_files(make_bert(tmp_path))
    (folder / "modules.json").write_text(json.dumps(modules))

    with pytest.raises(CheckpointError, match=told) as caught:
        read_sentence_files(Checkpoint(folder))

    assert caught.value.hint


def test_a_folder_without_its_list_of_modules_is_not_taken_for_a_plain_checkpoint(tmp_path):
    folder = make_sentence_files(make_bert(tmp_path))
    (folder / "modules.json").unlink()

    with pytest.raises(CheckpointError, match=r"no modules\.json") as caught:
        read_sentence_files(Checkpoint(folder))

    assert "--pooling" in caught.value.hint
    assert read_sentence_files(Checkpoint(folder), Pooling.CLS) is None


def test_weights_in_a_folder_of_their_own_are_not_those_at_the_top(tmp_path):
    folder = make_sentence_files(make_bert(tmp_path))
    modules = json.loads((folder / "modules.json").read_text())
    modules[0]["path"] = "0_Transformer"
    (folder / "modules.json").write_text(json.dumps(modules))

    with pytest.raises(CheckpointError, match="weights lie in '0_Transformer'"):
        read_sentence_files(Checkpoint(folder))


@pytest.mark.parametrize(
    ("files", "told"),
    [
        ({"transformer": {"max_seq_length": -1}}, "-1 for 'max_seq_length'"),
        ({"transformer": {"max_seq_length": 0}}, "0 for 'max_seq_length'"),
        ({"transformer": {"max_seq_length": "64"}}, "'64' for 'max_seq_length' where a whole number belongs"),
        ({"transformer": {"max_seq_length": True}}, "True for 'max_seq_length'"),
        ({"transformer": {"max_seq_length": 64.0}}, "64.0 for 'max_seq_length'"),
        ({"transformer": {"do_lower_case": "false"}}, "'false' for 'do_lower_case' where true or false belongs"),
        ({"pooling": {"pooling_mode": 5}}, "5 for 'pooling_mode'"),
        ({"pooling": {"pooling_mode": [["mean"]]}}, "'pooling_mode'"),
        ({"pooling": {"pooling_mode": {"mean": True}}}, "'pooling_mode'"),
        ({"pooling": {"pooling_mode_mean_tokens": "false"}}, "'false' for 'pooling_mode_mean_tokens'"),
        ({"pooling": {"include_prompt": "no"}}, "'no' for 'include_prompt'"),
        ({"sentence": {"prompts": ["find"]}}, "'prompts' where an object belongs"),
        ({"sentence": {"prompts": {"query": 5}}}, "5 for 'a prompt' where a text belongs"),
        ({"sentence": {"prompts": {"q": "x"}, "default_prompt_name": ["q"]}}, "'default_prompt_name'"),
    ],
)
def test_a_value_of_another_type_is_refused_with_the_file(tmp_path, files, told):
    with pytest.raises(CheckpointError, match=told) as caught:
        make_files(tmp_path, **files)

    assert ".json" in caught.value.message
    assert caught.value.hint


@pytest.mark.parametrize("name", ["sentence_bert_config.json", "config_sentence_transformers.json"])
def test_a_file_that_holds_a_list_is_not_taken_for_empty(tmp_path, name):
    folder = make_sentence_files(make_bert(tmp_path))
    (folder / name).write_text("[]")

    with pytest.raises(CheckpointError, match="where an object belongs"):
        read_sentence_files(Checkpoint(folder))


def test_null_is_as_if_a_value_were_not_there(tmp_path):
    folder = make_sentence_files(make_bert(tmp_path))
    (folder / "sentence_bert_config.json").write_text('{"max_seq_length": null, "do_lower_case": null}')
    (folder / "config_sentence_transformers.json").write_text('{"prompts": null, "default_prompt_name": null}')

    files = read_sentence_files(Checkpoint(folder))

    assert (files.max_tokens, files.lower_case, files.prompt) == (None, False, "")


def test_both_spellings_of_module_types_name_the_same_modules(tmp_path):
    folder = make_new(tmp_path, [PoolingModule(HIDDEN, "mean"), Normalize()])
    new = [entry["type"] for entry in json.loads(Path(folder / "modules.json").read_text())]

    files = read_sentence_files(Checkpoint(folder))

    assert new[0] != "sentence_transformers.models.Transformer"
    assert files == make_files(
        tmp_path / "bert",
        pooling={"pooling_mode_mean_tokens": True},
        transformer={"do_lower_case": False},
        sentence={"prompts": {"query": "", "document": ""}},  # which the library writes where there are none
    )


def make_reranker(folder, modules=("Transformer", "LogitScore"), **said):
    """The files of sentence-transformers' rerankers beside a checkpoint."""
    make_bert(folder)
    types = [
        "sentence_transformers.base.modules.transformer.Transformer",
        "sentence_transformers.cross_encoder.modules.logit_score.LogitScore",
    ]
    entries = [
        {"idx": at, "name": str(at), "path": f"{at}_LogitScore" if at else "", "type": kind}
        for at, kind in enumerate(types[: len(modules)])
    ]
    (folder / "modules.json").write_text(json.dumps(entries))
    (folder / "1_LogitScore").mkdir()
    LogitScore(9, 4).save(str(folder / "1_LogitScore"))
    if said:
        change_json(folder / "1_LogitScore/config.json", **said)
    return Checkpoint(folder)


@pytest.mark.parametrize(
    ("said", "expected"),
    [({}, (9, 4)), ({"false_token_id": None}, (9,)), ({"module_input_name": None}, (9, 4))],
)
def test_the_tokens_of_a_reranker_are_read(tmp_path, said, expected):
    assert read_score_tokens(make_reranker(tmp_path, **said)) == expected


def test_files_of_embedding_models_name_no_tokens(tmp_path):
    assert read_score_tokens(Checkpoint(make_sentence_files(make_bert(tmp_path)))) is None


@pytest.mark.parametrize(
    ("said", "told"),
    [
        ({"true_token_id": None}, "None for 'true_token_id'"),
        ({"true_token_id": "yes"}, "'yes' for 'true_token_id'"),
        ({"false_token_id": 1.5}, "1.5 for 'false_token_id'"),
        ({"module_input_name": "scores"}, "reads 'scores'"),
    ],
)
def test_tokens_of_a_reranker_that_are_none_are_refused_by_name(tmp_path, said, told):
    with pytest.raises(CheckpointError, match=told):
        read_score_tokens(make_reranker(tmp_path, **said))


def test_a_reranker_without_its_tokens_is_refused(tmp_path):
    files = make_reranker(tmp_path)
    (tmp_path / "1_LogitScore/config.json").unlink()

    with pytest.raises(CheckpointError, match=r"lacks the config\.json of the module LogitScore"):
        read_score_tokens(files)


@pytest.mark.parametrize("modules", [("Transformer", "LogitScore"), ("Transformer",)])
def test_files_of_rerankers_say_nothing_of_vectors(tmp_path, modules):
    files = make_reranker(tmp_path, modules)
    change_json(tmp_path / "config_sentence_transformers.json", model_type="CrossEncoder")

    assert read_sentence_files(files) is None


def test_files_of_others_say_nothing_of_pairs(tmp_path, bert):
    files = make_sentence_files(make_bert(tmp_path), sentence={"prompts": {"a": "b"}, "default_prompt_name": "a"})

    assert read_reranker_files(Checkpoint(files)) is None
    assert read_reranker_files(Checkpoint(bert)) is None


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        ({}, RerankerFiles(chat=False)),
        ({"modality_config": {"text": {}}}, RerankerFiles(chat=False)),
        ({"modality_config": {"text": {}, "message": {}}}, RerankerFiles(chat=True)),
        ({"processing_kwargs": {"chat_template": {"a": 1}}}, RerankerFiles(chat=False, variables={"a": 1})),
    ],
)
def test_what_the_files_of_a_reranker_say_of_pairs_is_read(tmp_path, said, expected):
    files = make_reranker(tmp_path)
    change_json(tmp_path / "sentence_bert_config.json", **said)

    assert read_reranker_files(files) == expected


def test_a_cross_encoder_without_a_list_of_modules_does_not_say_how_it_reads_pairs(tmp_path):
    said = {"model_type": "CrossEncoder", "prompts": {"a": "find: "}, "default_prompt_name": "a"}
    change_json(make_bert(tmp_path) / "config_sentence_transformers.json", **said)

    assert read_reranker_files(Checkpoint(tmp_path)) == RerankerFiles("find: ")


@pytest.mark.parametrize(
    ("said", "told"),
    [
        ({"modality_config": ["text"]}, "for 'modality_config' where an object belongs"),
        ({"processing_kwargs": 5}, "5 for 'processing_kwargs'"),
        ({"processing_kwargs": {"chat_template": "x"}}, "'x' for 'chat_template'"),
    ],
)
def test_what_the_files_of_a_reranker_cannot_say_is_refused(tmp_path, said, told):
    files = make_reranker(tmp_path)
    change_json(tmp_path / "sentence_bert_config.json", **said)

    with pytest.raises(CheckpointError, match=told):
        read_reranker_files(files)
