"""A decoder's layers hand on two summands; what comes out is what whole rows would have given, to the bit."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn
from transformers import Gemma2Config, GPTNeoXConfig, LlamaConfig, ModernBertConfig, Olmo2Config, OPTConfig, PhiConfig
from transformers.models.gemma2.modeling_gemma2 import Gemma2DecoderLayer, Gemma2TextScaledWordEmbedding
from transformers.models.gpt_neox.modeling_gpt_neox import GPTNeoXLayer
from transformers.models.llama.modeling_llama import LlamaDecoderLayer
from transformers.models.modernbert.modeling_modernbert import ModernBertEncoderLayer
from transformers.models.olmo2.modeling_olmo2 import Olmo2DecoderLayer
from transformers.models.opt.modeling_opt import OPTLearnedPositionalEmbedding
from transformers.models.phi.modeling_phi import PhiDecoderLayer

from lorax_core.kernels.elementwise import Elementwise
from lorax_core.modeling import Decoder, DecoderLayer, LayerNorm, ModelConfig, RMSNorm
from lorax_core.modeling.batch import NoAdapters
from lorax_core.modeling.blocks import Block

WIDTH = 32


class Mixed(Block):
    """Stands for attention and feed-forward: a product."""

    def __init__(self, seed):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(WIDTH, WIDTH, generator=torch.Generator().manual_seed(seed)) / 4)

    def forward(self, x, batch):
        return x @ self.weight


class Own(DecoderLayer):
    def forward(self, x, batch):
        return super().forward(x, batch) * 2


class Whole(Block):
    """A layer that is no `DecoderLayer`."""

    def forward(self, x, batch):
        return x + x.flip(1)


def make_layer(kind=DecoderLayer, seed=0, **options):
    return kind(Mixed(seed), Mixed(seed + 1), lambda: RMSNorm(WIDTH, 1e-6), **options)


def make_decoder(layers, dtype, **options):
    sizes = {"hidden_size": WIDTH, "vocab_size": 8, "num_attention_heads": 1, "num_hidden_layers": max(len(layers), 1)}
    decoder = Decoder(ModelConfig(model_type="tiny", **sizes), layers, RMSNorm(WIDTH, 1e-6), **options)
    generator = torch.Generator().manual_seed(9)
    for parameter in decoder.parameters():
        if parameter.ndim == 1 or parameter.shape == (8, WIDTH):
            parameter.data = torch.randn(parameter.shape, generator=generator)
    return decoder.to(dtype)


BATCH = SimpleNamespace(input_ids=torch.tensor([1, 5, 7]), adapters=NoAdapters())


def plainly(decoder):
    """Whole rows from layer to layer."""
    x = decoder.embed_tokens(BATCH.input_ids, BATCH)
    for layer in decoder.layers:
        x = layer(x, BATCH)
    return decoder.norm(x, BATCH)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "layers",
    {
        "layers": lambda: [make_layer(seed=at) for at in range(3)],
        "parallel": lambda: [make_layer(seed=at, parallel=True) for at in range(3)],
        "one norm for both": lambda: [make_layer(seed=at, parallel=True, norms="shared") for at in range(3)],
        "norms after": lambda: [make_layer(seed=at, norms="after") for at in range(3)],
        "a norm between": lambda: [make_layer(seed=at, norms="between") for at in range(3)],
        "norms around": lambda: [make_layer(seed=at, norms="around") for at in range(3)],
        "another kind between": lambda: [make_layer(), Whole(), make_layer(seed=4)],
        "another kind first and last": lambda: [Whole(), make_layer(), Whole()],
        "a forward of its own": lambda: [make_layer(), make_layer(Own, 2), make_layer(seed=4)],
        "none": list,
    }.items(),
    ids=lambda case: case[0],
)
@torch.inference_mode()
def test_rows_are_those_of_whole_rows_from_layer_to_layer(layers, dtype):
    decoder = make_decoder(layers[1](), dtype)

    assert torch.equal(decoder(BATCH), plainly(decoder))


class Counting(Elementwise):
    """The readable form, which tells how often a sum and a norm were one call."""

    def __init__(self):
        self.together = 0

    def add_rms_norm(self, *given):
        self.together += 1
        return super().add_rms_norm(*given)


@torch.inference_mode()
def test_each_sum_is_part_of_the_next_norm():
    decoder, counting = make_decoder([make_layer(seed=at) for at in range(3)], torch.float32), Counting()
    for module in decoder.modules():
        if isinstance(module, RMSNorm):
            module.elementwise = counting

    decoder(BATCH)

    # Two sums a layer: the second one's norm is the next layer's first, or the last of all.
    assert counting.together == 6


@torch.inference_mode()
def test_who_watches_a_layer_sees_whole_rows():
    decoder = make_decoder([make_layer(), make_layer(seed=2), make_layer(seed=4)], torch.float32)
    unwatched, seen = decoder(BATCH), []
    decoder.layers[1].register_forward_hook(lambda layer, given, made: seen.extend((given[0], made)))

    watched = decoder(BATCH)

    x = decoder.layers[0](decoder.embed_tokens(BATCH.input_ids, BATCH), BATCH)
    assert torch.equal(watched, unwatched)
    assert torch.equal(seen[0], x)
    assert torch.equal(seen[1], decoder.layers[1](x, BATCH))


@torch.inference_mode()
def test_a_layer_that_was_given_another_forward_has_it():
    decoder = make_decoder([make_layer(), make_layer(seed=2)], torch.float32)
    decoder.layers[1].forward = lambda x, batch: -x

    assert torch.equal(decoder(BATCH), plainly(decoder))
    assert torch.equal(
        decoder(BATCH), decoder.norm(-decoder.layers[0](decoder.embed_tokens(BATCH.input_ids, BATCH), BATCH), BATCH)
    )


class Theirs(nn.Module):
    """The product of a `Mixed`, as a layer of transformers calls attention and feed-forward."""

    def __init__(self, mixed, answers):
        super().__init__()
        self.weight, self.answers = mixed.weight, answers

    def forward(self, hidden_states, *_, **__):
        made = hidden_states @ self.weight
        return (made, None)[: self.answers] if self.answers else made


LAYERS = {
    "before": (LlamaDecoderLayer, LlamaConfig, RMSNorm, {"norms": "before"}),
    "before, parallel": (GPTNeoXLayer, GPTNeoXConfig, LayerNorm, {"parallel": True}),
    "shared": (PhiDecoderLayer, PhiConfig, LayerNorm, {"parallel": True, "norms": "shared"}),
    "after": (Olmo2DecoderLayer, Olmo2Config, RMSNorm, {"norms": "after"}),
    "around": (Gemma2DecoderLayer, Gemma2Config, lambda *given: RMSNorm(*given, 1.0), {"norms": "around"}),
}


@pytest.mark.parametrize(("theirs", "config", "norm", "options"), LAYERS.values(), ids=LAYERS)
@torch.inference_mode()
def test_norms_are_where_transformers_has_them(theirs, config, norm, options):
    sizes = {"hidden_size": WIDTH, "num_attention_heads": 2, "num_key_value_heads": 2, "intermediate_size": 8}
    oracle = theirs(config(**sizes, num_hidden_layers=1), layer_idx=0).eval()
    layer = DecoderLayer(Mixed(1), Mixed(2), lambda: norm(WIDTH, 1e-6), **options)
    for name, module in oracle.named_children():
        if "norm" in name.lower():
            module.eps = module.variance_epsilon = 1e-6
            for leaf, numbers in module.named_parameters():
                numbers.copy_(torch.randn(WIDTH, generator=torch.Generator().manual_seed(len(name))))
                layer.get_submodule(name).get_parameter(leaf).data = numbers.data
    blocks = {"self_attn": Theirs(layer.self_attn, 2), "mlp": Theirs(layer.mlp, 0)}
    oracle.self_attn = oracle.attention = blocks["self_attn"]
    oracle.mlp = blocks["mlp"]
    x = torch.randn(3, WIDTH, generator=torch.Generator().manual_seed(3))

    made = layer(x, BATCH)

    expected = oracle(x, attention_mask=None, position_ids=None)
    expected = expected[0] if isinstance(expected, tuple) else expected
    torch.testing.assert_close(made, expected, rtol=1e-5, atol=1e-6)


@torch.inference_mode()
def test_a_norm_between_is_that_of_modernberts_first_layer():
    sizes = {"hidden_size": WIDTH, "num_attention_heads": 2, "intermediate_size": 8, "num_hidden_layers": 1}
    oracle = ModernBertEncoderLayer(ModernBertConfig(**sizes), layer_idx=0).eval()
    layer = DecoderLayer(Mixed(1), Mixed(2), lambda: LayerNorm(WIDTH, 1e-5, bias=False), norms="between")
    oracle.attn, oracle.mlp = Theirs(layer.self_attn, 2), Theirs(layer.mlp, 0)
    oracle.mlp_norm.weight.copy_(torch.rand(WIDTH, generator=torch.Generator().manual_seed(3)))
    layer.post_attention_layernorm.weight.data = oracle.mlp_norm.weight.data
    x = torch.randn(3, WIDTH, generator=torch.Generator().manual_seed(3))

    made = layer(x, BATCH)

    torch.testing.assert_close(made, oracle(x), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "options",
    [
        {"norms": "shared"},
        {"norms": "between", "parallel": True},
        {"norms": "after", "parallel": True},
        {"norms": "around", "parallel": True},
    ],
)
def test_norms_that_a_layer_cannot_have_are_refused(options):
    with pytest.raises(ValueError, match="'shared' needs parallel=True"):
        make_layer(**options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@torch.inference_mode()
def test_scaled_rows_are_gemmas(dtype):
    decoder = make_decoder([], dtype, embed_scale=WIDTH**0.5)
    oracle = Gemma2TextScaledWordEmbedding(8, WIDTH, 0, WIDTH**0.5).to(dtype)
    oracle.weight.copy_(decoder.embed_tokens.weight)

    rows = decoder.embed_tokens(BATCH.input_ids, BATCH)

    assert torch.equal(rows, oracle(BATCH.input_ids))


@torch.inference_mode()
def test_positions_with_an_offset_are_opts():
    decoder = make_decoder([], torch.float32, max_positions=6, position_offset=2)
    decoder.embed_positions.weight.data = torch.randn(8, WIDTH, generator=torch.Generator().manual_seed(3))
    oracle = OPTLearnedPositionalEmbedding(OPTConfig(max_position_embeddings=6).max_position_embeddings, WIDTH)
    oracle.weight.copy_(decoder.embed_positions.weight)
    batch = SimpleNamespace(input_ids=BATCH.input_ids, position_ids=torch.arange(3), adapters=NoAdapters())

    made = decoder(batch)

    rows = decoder.embed_tokens(batch.input_ids, batch) + oracle(torch.ones(1, 3, dtype=torch.int64))[0]
    assert torch.equal(made, decoder.norm(rows, batch))


@torch.inference_mode()
def test_what_the_first_layer_reads_is_normalised():
    layers = [make_layer(seed=at) for at in range(2)]
    plain = make_decoder(layers, torch.float32)
    decoder = make_decoder(layers, torch.float32, embed_norm=LayerNorm(WIDTH, 1e-6))
    decoder.embed_tokens.weight = plain.embed_tokens.weight

    made = decoder(BATCH)

    rows = decoder.embed_norm(decoder.embed_tokens(BATCH.input_ids, BATCH), BATCH)
    for layer in layers:
        rows = layer(rows, BATCH)
    assert torch.equal(made, decoder.norm(rows, BATCH))
