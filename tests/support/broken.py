"""Architectures and attention backends that are wrong on purpose, each in one way, for the kit to find.

Each is a subclass of a class that is right. `ArchitectureSpec` names classes by strings, so they live in a module that can
be imported by name.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lorax_bert.modeling import FlashBertModel
from lorax_core.attention.base import AttentionSpec
from lorax_core.attention.torch import TorchBackend
from lorax_core.kernels.elementwise import gated_act
from lorax_core.modeling import EmbeddingHead, GatedMLP, LastTokenClassificationHead, LayerNorm
from lorax_core.modeling.batch import Batch, NoAdapters
from lorax_core.types import Pooling
from lorax_qwen2.config import Qwen2Config
from lorax_qwen2.modeling import FlashQwen2Model

# --- attention backends ---


class AttendsPads(TorchBackend):
    """Fills every text of a batch up to the longest with zeros, and attends to them."""

    name = "attends-pads"

    def encode(self, q, k, v, layer, batch):
        longest = max(batch.lengths)
        out = torch.empty_like(q)
        for start, stop in zip(batch.starts, batch.starts[1:], strict=False):
            pads = (0, 0, 0, 0, 0, longest - (stop - start))
            rows = [F.pad(t[start:stop], pads).transpose(0, 1)[None] for t in (k, v)]
            attended = F.scaled_dot_product_attention(q[start:stop].transpose(0, 1)[None], *rows)
            out[start:stop] = attended[0].transpose(0, 1)
        return out


class SeesNeighbours(TorchBackend):
    """Lets every row attend to the whole batch."""

    name = "sees-neighbours"

    def encode(self, q, k, v, layer, batch):
        q, k, v = (t.transpose(0, 1)[None] for t in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v)[0].transpose(0, 1)


class ReadsPagesInARow(TorchBackend):
    """Takes the pages of a text to lie end to end from the first one on."""

    name = "reads-pages-in-a-row"

    def plan(self, batch: Batch, specs: Sequence[AttentionSpec]) -> None:
        last = len(batch.kv.data[0, 0]) - 1
        straight = [tuple(min(pages[0] + at, last) for at in range(len(pages))) for pages in batch.pages]
        super().plan(replace_pages(batch, tuple(straight)), specs)


def replace_pages(batch, pages):
    """The same batch with other pages; what is planned for it is planned for the given one."""

    class View:
        def __getattr__(self, name):
            return pages if name == "pages" else getattr(batch, name)

        def __setattr__(self, name, value):
            setattr(batch, name, value)

    return View()


class ForgetsLongPasts(TorchBackend):
    """Sees no more than the newest 24 keys when it goes on with a text."""

    name = "forgets-long-pasts"

    def attend(self, q, layer, batch):
        usual = layer.spec
        if any(batch.cached):
            layer.spec = replace(usual, window=min(24, usual.window or 24))
        try:
            return super().attend(q, layer, batch)
        finally:
            layer.spec = usual


# --- BERT ---


class ShiftsPositions(FlashBertModel):
    """Counts positions up in place once it has read them, so that the next pass begins elsewhere."""

    def forward(self, batch: Batch) -> Tensor:
        out = super().forward(batch)
        batch.position_ids.add_(1).remainder_(self.embeddings.position_embeddings.in_features)
        return out


class SwapsQueryAndKey(FlashBertModel):
    """Fuses keys where queries belong."""

    @staticmethod
    def weight_map(config):
        return replace(
            FlashBertModel.weight_map(config), fuse={"layers.*.self_attn.qkv_proj": ("key", "query", "value")}
        )


class DropsABias(FlashBertModel):
    """Has no bias in the last layer's feed-forward, and takes the checkpoint's for superfluous."""

    def __init__(self, config) -> None:
        super().__init__(config)
        self.layers[-1].mlp.up_proj.bias = None

    @staticmethod
    def weight_map(config):
        usual = FlashBertModel.weight_map(config)
        return replace(usual, ignore=(*usual.ignore, "layers.*.mlp.up_proj.bias"))


class DropsANormWeight(FlashBertModel):
    """Normalises after the embeddings without the weight."""

    def __init__(self, config) -> None:
        super().__init__(config)
        self.embeddings.LayerNorm = WithoutWeight(config.hidden_size, config.layer_norm_eps)


class WithoutWeight(LayerNorm):
    def compute(self, x, weight, bias):
        return super().compute(x, None, bias)


class LooksBackOnly(FlashBertModel):
    """Is causal where the reference sees both ways."""

    def __init__(self, config) -> None:
        super().__init__(config)
        for layer in self.layers:
            layer.self_attn.attention.spec = replace(layer.self_attn.attention.spec, causal=True)


class RoundsToEightBit(FlashBertModel):
    """Loses in 16 bit, layer by layer, what numbers of 8 bit would lose."""

    def forward(self, batch: Batch) -> Tensor:
        x = self.embeddings(batch)
        for layer in self.layers:
            x = layer(x if x.dtype is torch.float32 else x.to(torch.float8_e5m2).to(x.dtype), batch)
        return x


class UsesForeignLinear(FlashBertModel):
    """Has a linear layer of torch's, which adapters cannot reach."""

    def __init__(self, config) -> None:
        super().__init__(config)
        self.layers[0].mlp.down_proj = ForeignLinear(config.intermediate_size, config.hidden_size)


class ForeignLinear(nn.Linear):
    def forward(self, x, batch):
        return super().forward(x)


class IgnoresBiases(FlashBertModel):
    """Takes any bias that it has no place for to be superfluous."""

    @staticmethod
    def weight_map(config):
        usual = FlashBertModel.weight_map(config)
        return replace(usual, ignore=(*usual.ignore, "**.bias"))


class MakesUpAMissingNorm(FlashBertModel):
    """Takes the first layer's norm where the checkpoint lacks the second's."""

    @staticmethod
    def weight_map(config):
        return replace(
            FlashBertModel.weight_map(config),
            tie={"layers.1.post_mlp_layernorm.weight": "layers.0.post_mlp_layernorm.weight"},
        )


class MissesARename(FlashBertModel):
    """Does not know by what name checkpoints call the feed-forward layer."""

    @staticmethod
    def weight_map(config):
        usual = FlashBertModel.weight_map(config)
        rename = {old: new for old, new in usual.rename.items() if "intermediate" not in old}
        return replace(usual, rename=rename)


class ReadsTheSecondRow(EmbeddingHead):
    """Pools the row after the first."""

    def span(self, ids, pool_from):
        usual = super().span(ids, pool_from)
        return range(min(1, len(ids) - 1), min(1, len(ids) - 1) + 1) if self.pooling is Pooling.CLS else usual


# --- Qwen2 ---


class WidensWindows(Qwen2Config):
    """Sees one key more than the window has."""

    def window(self, layer):
        usual = super().window(layer)
        return None if usual is None else usual + 1


class NarrowsWindows(Qwen2Config):
    """Sees one key fewer than the window has."""

    def window(self, layer):
        usual = super().window(layer)
        return None if usual is None else usual - 1


class ForgetsTheBase(Qwen2Config):
    """Turns by the usual base, whatever the checkpoint says."""

    @classmethod
    def normalise(cls, raw):
        config = super().normalise(raw)
        return {**config, "rope": {**config["rope"], "theta": 10000.0}}


class MissesATranspose(FlashQwen2Model):
    """Takes a square matrix the wrong way round."""

    @staticmethod
    def weight_map(config):
        return replace(FlashQwen2Model.weight_map(config), transpose=("layers.*.self_attn.o_proj.weight",))


class PeeksAhead(FlashQwen2Model):
    """Mixes a little of the next row into each."""

    def forward(self, batch: Batch) -> Tensor:
        out = super().forward(batch)
        return out + 0.01 * out.roll(-1, 0)


class CountsFromTheChunk(FlashQwen2Model):
    """Counts positions from the start of each chunk, not of its text."""

    def forward(self, batch: Batch) -> Tensor:
        positions = [at for length in batch.lengths for at in range(length)]
        own = torch.tensor(positions, device=batch.position_ids.device)
        return super().forward(replace(batch, position_ids=own))


class AdaptsAllButOne(FlashQwen2Model):
    """Passes adapters by in one layer."""

    def __init__(self, config) -> None:
        super().__init__(config)
        self.layers[0].mlp = PassesAdaptersBy(config.hidden_size, config.intermediate_size, config.hidden_act)


class PassesAdaptersBy(GatedMLP):
    def forward(self, x, batch):
        return self.down_proj(gated_act(self.gate_up_proj(x, batch), self.act), Nobody())


class Nobody:
    adapters = NoAdapters()


class CountsPadding(LastTokenClassificationHead):
    """Reads the last token even where it is padding."""

    def span(self, ids, pool_from):
        return range(len(ids) - 1, len(ids))
