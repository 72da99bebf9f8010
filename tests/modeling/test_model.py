from __future__ import annotations

import pytest
import torch
from rigs import make_loaded

from lorax_core.attention.base import HostAndDevice
from lorax_core.errors import RequestError
from lorax_core.modeling import Batch, Linear
from lorax_core.types import Task


def test_layers_are_found_by_the_path_of_their_module(qwen2, host):
    model = make_loaded(qwen2, host).model

    sites = model.sites

    assert {"embed_tokens", "layers.0.self_attn.qkv_proj", "layers.1.mlp.gate_up_proj", "norm", "lm_head"} <= set(sites)
    assert all(site.path == path for path, site in sites.items())


def test_layers_of_attention_are_numbered_in_the_order_of_the_cache(qwen2, host):
    model = make_loaded(qwen2, host).model

    assert [layer.index for layer in model.attention_layers] == [0, 1]
    assert model.attention_layers[1] is model.backbone.layers[1].self_attn.attention


def test_a_causal_model_needs_a_cache_and_an_encoder_none(qwen2, bert, host):
    assert make_loaded(qwen2, host).model.needs_kv_cache
    assert not make_loaded(bert, host).model.needs_kv_cache


def test_an_untied_model_packs_its_weights_and_still_knows_dtype_and_device(qwen2, host):
    model = make_loaded(qwen2, host).model

    linear = [site for site in model.sites.values() if isinstance(site, Linear)]

    assert linear
    assert model.dtype is torch.float32
    assert model.device.type == "cpu"
    assert {"embed_tokens.weight", "norm.weight"} <= set(model.named_tensors())


def test_a_task_without_a_head_is_refused_with_those_that_have_one(bert, host):
    model = make_loaded(bert, host).model

    with pytest.raises(RequestError) as caught:
        model.head(Task.GENERATE)

    assert "'generate'" in caught.value.message
    assert "'embed'" in caught.value.message
    assert "lorax models check" in caught.value.hint


def test_lengths_count_the_rows_of_each_sequence():
    nothing = torch.zeros(0, dtype=torch.int64)
    starts = torch.tensor([0, 3, 4, 8], dtype=torch.int32)

    batch = Batch(nothing, nothing, nothing, HostAndDevice(starts, starts), HostAndDevice(starts[1:], starts[1:]))

    assert batch.lengths == (3, 1, 4)
