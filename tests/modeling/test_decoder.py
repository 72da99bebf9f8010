"""A decoder's layers hand on two summands; what comes out is what whole rows would have given, to the bit."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from lorax_core.kernels.elementwise import Elementwise
from lorax_core.modeling import Decoder, DecoderLayer, ModelConfig, RMSNorm
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


def make_layer(kind=DecoderLayer, seed=0, *, parallel=False):
    return kind(Mixed(seed), Mixed(seed + 1), lambda: RMSNorm(WIDTH, 1e-6), parallel=parallel)


def make_decoder(layers, dtype):
    sizes = {"hidden_size": WIDTH, "vocab_size": 8, "num_attention_heads": 1, "num_hidden_layers": max(len(layers), 1)}
    decoder = Decoder(ModelConfig(model_type="tiny", **sizes), layers, RMSNorm(WIDTH, 1e-6))
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
