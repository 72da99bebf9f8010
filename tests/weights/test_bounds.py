"""Sizes that a configuration states and no tensor has: refused before anything of that size is made.

The cases run in a process with a bound on its memory and a deadline: without the gates they take gigabytes, or hours.
"""

from __future__ import annotations

import json
import subprocess
import sys
from math import prod
from pathlib import Path

import pytest
import torch
from builders import change_json, make_bert, make_qwen2
from hostile import with_open_model
from oracles import make_model, saved
from rigs import make_loaded
from safetensors import safe_open
from torch import nn
from transformers import (
    BertForSequenceClassification,
    GPT2LMHeadModel,
    GPTNeoXForCausalLM,
    Qwen2ForSequenceClassification,
)

from lorax_core.errors import CheckpointError, PluginError
from lorax_core.modeling import Linear
from lorax_core.weights.bounds import within_bounds
from lorax_core.weights.checkpoint import Checkpoint

GPT2 = {"vocab_size": 96, "n_embd": 48, "n_layer": 2, "n_head": 3, "n_positions": 64}
NEOX = {
    "vocab_size": 96,
    "hidden_size": 60,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "intermediate_size": 96,
    "max_position_embeddings": 64,
}
BERT = {"vocab_size": 96, "hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 64}
QWEN2 = {**BERT, "num_key_value_heads": 1}
KINDS = {
    "bert": (BertForSequenceClassification, BERT),
    "gpt2": (GPT2LMHeadModel, GPT2),
    "gpt_neox": (GPTNeoXForCausalLM, NEOX),
    "qwen2": (Qwen2ForSequenceClassification, QWEN2),
}
CASES = {
    "qwen2": [
        {"num_hidden_layers": 10**5, "layer_types": None},
        {"num_hidden_layers": 9_999, "layer_types": None},
        {"hidden_size": 3 * 10**9},
        {"hidden_size": 3 * 10**12},
        {"hidden_size": 3 * 10**30},
        {"vocab_size": 10**9},
        {"intermediate_size": 10**9},
        {"intermediate_size": 10**20},
        {"num_attention_heads": 10**6},
        {"num_key_value_heads": 10**9},
        {"head_dim": 10**9},
        {"id2label": None, "num_labels": 10**8},
        {"id2label": {str(at): "x" for at in range(200_000)}},
        {"max_position_embeddings": 10**30},
    ],
    "bert": [
        {"max_position_embeddings": 10**9},
        {"type_vocab_size": 10**9},
        {"num_hidden_layers": 10**8},
        {"hidden_size": 3 * 10**9},
        {"id2label": None, "num_labels": 10**8},
    ],
    "gpt2": [{"n_positions": 10**9}, {"n_inner": 10**9}, {"n_layer": 10**6}, {"n_embd": 3 * 10**9}],
    "gpt_neox": [{"num_hidden_layers": 10**5}, {"hidden_size": 3 * 10**9}, {"num_attention_heads": 10**9}],
    "open": [{"experts": 10**6}, {"table": 10**9}, {"table": 10**30}],
}
ALL = [(kind, at) for kind, cases in CASES.items() for at in range(len(cases))]
WORKER = """
import json, resource, sys
import torch
from hostile import with_open_model
from lorax_core.errors import LoraxError
from lorax_core.plugins.host import PluginHost
from lorax_core.weights.checkpoint import Checkpoint
from lorax_core.weights.loader import load_model

host = with_open_model(PluginHost.discover())
load_model(Checkpoint(sys.argv[1]), host)  # all that is imported on the way


def leave(room):
    taken = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (taken + room, taken + room))


leave(2**30)
for folder in sys.argv[2:]:
    try:
        checkpoint = Checkpoint(folder)
        if folder.endswith("large"):  # the last
            leave(2**27)
        load_model(checkpoint, host)
        said = ["loaded", "", None]
    except LoraxError as error:
        said = [type(error).__name__, error.message, error.hint]
    except BaseException as error:
        said = [type(error).__name__, str(error), None]
    print(json.dumps(said), flush=True)
"""


def make_large(folder):
    """A sound checkpoint whose embedding takes 0.27 GB as it is stored, nothing on the disk, and twice as much in float32."""
    rows = 2**21
    file = make_qwen2(folder, tokenizer=False, tie_word_embeddings=True) / "model.safetensors"
    change_json(folder / "config.json", vocab_size=rows)
    with safe_open(file, "pt") as found:
        shapes = {name: found.get_slice(name).get_shape() for name in found.keys()}  # noqa: SIM118  (not a mapping)
    shapes["model.embed_tokens.weight"] = [rows, 64]
    header, end = {}, 0
    for name, shape in shapes.items():
        start, end = end, end + 2 * prod(shape)
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    with file.open("wb") as opened:
        opened.write(len(text).to_bytes(8, "little") + text)
        opened.truncate(8 + len(text) + end)
    return folder


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    """What loading said of each case, by kind and number."""
    root = tmp_path_factory.mktemp("sizes")
    folders = []
    for kind, at in ALL:
        made, config = KINDS.get(kind, KINDS["qwen2"])
        folder = saved(make_model(made, config, num_labels=3), root / f"{kind}-{at}")
        more = {"model_type": "open"} if kind == "open" else {}
        change_json(folder / "config.json", **CASES[kind][at], **more)
        folders.append(folder)
    folders.append(make_large(root / "large"))
    sound = make_qwen2(root / "sound", tokenizer=False)
    path = [str(Path(__file__).parents[1] / "support"), *sys.path]
    done = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path[:] = {path!r}{WORKER}", str(sound), *map(str, folders)],
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    said = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(said) == len(folders), done.stderr[-2000:]
    return dict(zip([*ALL, "large"], said, strict=True))


@pytest.mark.parametrize(("kind", "at"), ALL, ids=lambda one: str(one))
def test_a_size_that_no_tensor_has_is_refused_in_bounded_memory(outcomes, kind, at):
    error, message, hint = outcomes[(kind, at)]

    assert error == "CheckpointError", message
    assert "cannot be loaded by" not in message  # the net below the checks: a check has named what is wrong
    assert len(message) < 2000
    assert hint


def test_the_tensor_and_both_shapes_are_named(outcomes):
    assert (
        "'model.embed_tokens.weight' has shape [96, 48] where the configuration asks for [1000000000, 48]"
        in (outcomes[("qwen2", 5)][1])
    )


def test_positions_that_are_computed_may_be_any_number(tmp_path, host, qwen2):
    folder = make_qwen2(tmp_path, max_position_embeddings=512)
    change_json(folder / "config.json", max_position_embeddings=10**9)

    assert make_loaded(folder, host).model.max_tokens == 10**9


@pytest.mark.parametrize(
    "changes",
    [
        {"vocab_size": 3, "hidden_size": 12, "intermediate_size": 5},
        {"num_hidden_layers": 1},
        {"num_labels": 50_000},  # of a head that is not trained yet
        {"tie_word_embeddings": True},
    ],
)
def test_an_unusual_checkpoint_is_loaded(tmp_path, host, changes):
    folder = saved(make_model(GPTNeoXForCausalLM, NEOX, **changes), tmp_path)

    assert make_loaded(folder, host).model.config.hidden_size == changes.get("hidden_size", 60)


def test_layers_that_repeat_a_few_stored_tensors_may_be_many(tmp_path):
    checkpoint = Checkpoint(make_bert(tmp_path, tokenizer=False))

    with within_bounds(checkpoint):
        layers = nn.ModuleList(Linear(8, 8) for _ in range(2_000))

    assert all(layer.weight.is_meta for layer in layers)


def test_buffers_of_a_usual_size_are_made(tmp_path, host):
    folder = make_qwen2(tmp_path)
    change_json(folder / "config.json", model_type="open", table=1000)

    model = make_loaded(folder, with_open_model(host)).model

    assert torch.equal(model.backbone.cosines.cos, torch.ones(1000, 16))


def test_buffers_that_no_tensor_confirms_are_bounded(tmp_path, host):
    folder = make_qwen2(tmp_path)
    change_json(folder / "config.json", model_type="open", table=2 * 10**7)

    with pytest.raises(CheckpointError, match=r"asks for buffers of 1\.\d GB; at most 1\.1 are made") as caught:
        make_loaded(folder, with_open_model(host))

    assert caught.value.hint


def test_weights_larger_than_the_memory_are_told_with_their_size(outcomes):
    error, message, hint = outcomes["large"]

    assert error == "CapacityError", message
    assert "the weights take 0.5 GB as float32, more than there is on 'cpu'" in message
    assert "memory" in hint


@pytest.mark.parametrize("kind", ["type", "key", "assertion"])
def test_what_a_plugin_raises_by_mistake_names_the_checkpoint_and_the_package(tmp_path, host, kind):
    folder = make_qwen2(tmp_path)
    change_json(folder / "config.json", model_type="open", careless=kind)

    with pytest.raises(CheckpointError, match=r"cannot be loaded by lorax-open: .*of the plugin") as caught:
        make_loaded(folder, with_open_model(host))

    assert str(folder) in caught.value.message
    assert "a defect of lorax-open" in caught.value.hint
    assert caught.value.__cause__ is not None


def test_layers_that_cache_other_shapes_are_the_plugins_error(tmp_path, host):
    folder = make_qwen2(tmp_path)
    change_json(folder / "config.json", model_type="open", uneven=True)

    with pytest.raises(PluginError, match=r"'layers\.0\..*' 2 heads of 16, 'layers\.1\..*' 1 heads of 16"):
        make_loaded(folder, with_open_model(host))


@pytest.mark.parametrize("kind", ["gpt2", "gpt_neox", "open"])
def test_a_mask_that_a_plugin_does_not_compute_is_refused(tmp_path, host, kind):
    made, config = KINDS.get(kind, KINDS["qwen2"])
    folder = saved(make_model(made, config), tmp_path, model_type=kind)
    told = with_open_model(host)
    make_loaded(folder, told)
    change_json(folder / "config.json", is_causal=False, is_decoder=False)

    if kind == "open":  # reads the key
        assert not make_loaded(folder, told).model.needs_kv_cache
    else:
        with pytest.raises(CheckpointError, match="states is_causal False"):
            make_loaded(folder, told)


def test_an_encoder_that_the_file_calls_a_decoder_is_refused(tmp_path, host):
    folder, told = make_qwen2(tmp_path), with_open_model(host)
    change_json(folder / "config.json", model_type="open", encoder=True, is_decoder=False)
    assert not make_loaded(folder, told).model.needs_kv_cache
    change_json(folder / "config.json", is_decoder=True)

    with pytest.raises(CheckpointError, match=r"states is_decoder True, .* attends in both directions") as caught:
        make_loaded(folder, told)

    assert caught.value.hint


def test_an_encoder_says_itself_that_it_is_not_causal(tmp_path, host, bert):
    folder = make_bert(tmp_path)
    change_json(folder / "config.json", is_causal=False)

    assert not make_loaded(folder, host).model.needs_kv_cache
