"""Architectures and attention backends that are wrong on purpose, each in one way, for the kit to find.

Each is a subclass of a class that is right. `ArchitectureSpec` names classes by strings, so they live in a module that can
be imported by name.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from gemma2 import Gemma2Config, Gemma2Model, ScaledEmbedding
from pydantic import PositiveInt
from torch import Tensor, nn
from transformers import Qwen2ForCausalLM

from lorax_bert.modeling import FlashBertModel
from lorax_core.attention.base import HostAndDevice, StepAttention
from lorax_core.attention.torch import TorchBackend
from lorax_core.linear_methods.quantized import QuantizedKernel
from lorax_core.modeling import (
    Embedding,
    EmbeddingHead,
    GatedMLP,
    LanguageModelHead,
    LastTokenClassificationHead,
    LayerNorm,
    Linear,
    RMSNorm,
)
from lorax_core.modeling.batch import Batch
from lorax_core.modeling.site import NoAdapters
from lorax_core.types import Pooling
from lorax_gpt2.config import GPT2Config
from lorax_qwen2.config import Qwen2Config
from lorax_qwen2.modeling import FlashQwen2Model

# --- attention backends ---


class BrokenStep(StepAttention):
    """A step of the torch backend, to be changed in one place."""

    def __init__(self, backend, rows) -> None:
        self.backend, self.rows, self.step = backend, rows, TorchBackend.plan(backend, rows)

    def write(self, layer, k, v) -> None:
        self.step.write(layer, k, v)

    def attend(self, layer, q) -> Tensor:
        return self.step.attend(layer, q)

    def encode(self, layer, q, k, v) -> Tensor:
        return self.step.encode(layer, q, k, v)


class AttendsPads(TorchBackend):
    """Fills every text of a batch up to the longest with zeros, and attends to them."""

    name = "attends-pads"

    def plan(self, rows):
        return PaddedStep(self, rows)


class PaddedStep(BrokenStep):
    """A step of `AttendsPads`."""

    def encode(self, layer, q, k, v):
        runs = list(pairwise(self.rows.query_starts.host.tolist()))
        longest = max(stop - start for start, stop in runs)
        out = torch.empty_like(q)
        for start, stop in runs:
            pads = (0, 0, 0, 0, 0, longest - (stop - start))
            rows = [F.pad(t[start:stop], pads).transpose(0, 1)[None] for t in (k, v)]
            attended = F.scaled_dot_product_attention(q[start:stop].transpose(0, 1)[None], *rows)
            out[start:stop] = attended[0].transpose(0, 1)
        return out


class SeesNeighbours(TorchBackend):
    """Lets every row attend to the whole batch."""

    name = "sees-neighbours"

    def plan(self, rows):
        return NeighbourStep(self, rows)


class NeighbourStep(BrokenStep):
    """A step of `SeesNeighbours`."""

    def encode(self, layer, q, k, v):
        q, k, v = (t.transpose(0, 1)[None] for t in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v)[0].transpose(0, 1)


class ReadsPagesInARow(TorchBackend):
    """Takes the pages of a text to lie end to end from the first one on."""

    name = "reads-pages-in-a-row"

    def plan(self, rows):
        last = len(self._cache.data[0, 0]) - 1
        table = rows.page_table.host
        straight = (table[:, :1] + torch.arange(table.shape[1], dtype=torch.int32)).clamp(max=last)
        return super().plan(replace(rows, page_table=HostAndDevice(straight, straight)))


class ForgetsLongPasts(TorchBackend):
    """Sees no more than the newest 24 keys when it goes on with a text."""

    name = "forgets-long-pasts"

    def bind(self, specs, dtype, cache):
        narrow = [replace(spec, window=min(24, spec.window or 24)) for spec in specs]
        super().bind([*specs, *narrow], dtype, cache)

    def plan(self, rows):
        return ForgetfulStep(self, rows)


class ForgetfulStep(BrokenStep):
    """A step of `ForgetsLongPasts`."""

    def attend(self, layer, q):
        new = self.rows.query_starts.host.diff()
        if bool((self.rows.kv_lengths.host > new).any()):
            layer = SimpleNamespace(
                index=layer.index, spec=replace(layer.spec, window=min(24, layer.spec.window or 24))
            )
        return self.step.attend(layer, q)


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


class NormalisesRoughly(FlashBertModel):
    """Computes the norm of its embeddings in the dtype of the rows."""

    def __init__(self, config) -> None:
        super().__init__(config)
        self.embeddings.LayerNorm = RoughNorm(config.hidden_size, config.layer_norm_eps)


class RoughNorm(LayerNorm):
    def compute(self, x, weight, bias):
        x = x - x.mean(-1, keepdim=True)
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps) * weight + bias


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


# --- references ---


class RaisesItself(Qwen2ForCausalLM):
    """A reference that does not run what its config says."""

    def forward(self, *given, **named):
        raise NotImplementedError("no windows today")


class DoesNotLoad(Qwen2ForCausalLM):
    """A reference that cannot be made."""

    def __init__(self, config):
        raise KeyError("a missing key")


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


class RoundsHeadsUp(FlashQwen2Model):
    """Scales scores as if heads were as wide as the next power of two, as a kernel that pads would."""

    def __init__(self, config) -> None:
        super().__init__(config)
        padded = 2 ** (config.head_dim - 1).bit_length()
        for layer in self.layers:
            layer.self_attn.attention.q_factor = (config.head_dim / padded) ** 0.5


class TiesByDefault(Qwen2Config):
    """Ties where the file says nothing."""

    tie_word_embeddings: bool = True


class HasAnotherBaseByDefault(Qwen2Config):
    """Turns by another base where the file says nothing."""

    @classmethod
    def normalise(cls, raw):
        stated = raw.get("rope_parameters") or raw.get("rope_scaling") or raw.get("rope_theta")
        return super().normalise(raw if stated else {**raw, "rope_theta": 1000000.0})


class HasAnotherEpsilonByDefault(Qwen2Config):
    """Has a wider epsilon where the file says nothing."""

    rms_norm_eps: float = 1e-5


class HasHeadsOf64ByDefault(Qwen2Config):
    """Has heads of 64 in a model of two heads where the file says nothing: right for the tiny model alone."""

    @classmethod
    def normalise(cls, raw):
        return super().normalise({"head_dim": 64, **raw} if raw.get("num_attention_heads") == 2 else raw)


class ActsOtherwiseByDefault(Qwen2Config):
    """Has another activation where the file says nothing."""

    hidden_act: str = "gelu"


class PadsByDefault(Qwen2Config):
    """Takes token 0 for padding where the file says nothing."""

    pad_token_id: int | None = 0


class SlidesInEveryLayerByDefault(Qwen2Config):
    """Has windows from the first layer on where the file says nothing."""

    @classmethod
    def normalise(cls, raw):
        return super().normalise({"max_window_layers": 0, **raw})


class KnowsNoBaseOutside(Qwen2Config):
    """Reads `rope_theta` in `rope_parameters` only."""

    @classmethod
    def normalise(cls, raw):
        return super().normalise({key: value for key, value in raw.items() if key != "rope_theta"})


class KnowsNoTypeOfRope(Qwen2Config):
    """Reads `rope_type`, and not the `type` that it was called before."""

    @classmethod
    def normalise(cls, raw):
        scaling = {key: value for key, value in (raw.get("rope_scaling") or {}).items() if key != "type"}
        return super().normalise({**raw, "rope_scaling": scaling})


class KnowsItsOwnNamesOnly(GPT2Config):
    """Does not know that `hidden_size` is `n_embd`."""

    @classmethod
    def parse(cls, raw):
        return super().parse({key: value for key, value in raw.items() if key not in cls.aliases.values()})


class PrefersItsOwnNames(GPT2Config):
    """Reads `n_embd` where `hidden_size` is there, too."""

    @classmethod
    def parse(cls, raw):
        doubled = {common for own, common in cls.aliases.items() if own in raw}
        return super().parse({key: value for key, value in raw.items() if key not in doubled})


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


class LosesAllRowsButTheLast(FlashQwen2Model):
    """Gives NaN for all rows but the last."""

    def forward(self, batch: Batch) -> Tensor:
        out = super().forward(batch)
        out[:-1] = float("nan")
        return out


class CountsFromTheChunk(FlashQwen2Model):
    """Counts positions from the start of each chunk, not of its text."""

    def forward(self, batch: Batch) -> Tensor:
        positions = [at for length in batch.lengths for at in range(length)]
        own = torch.tensor(positions, device=batch.position_ids.device)
        return super().forward(replace(batch, position_ids=own))


class HasAShortTable(FlashQwen2Model):
    """Knows 256 positions, and takes the last for those after."""

    def forward(self, batch: Batch) -> Tensor:
        return super().forward(replace(batch, position_ids=batch.position_ids.clamp(max=255)))


class AdaptsAllButOne(FlashQwen2Model):
    """Passes adapters by in one layer."""

    def __init__(self, config) -> None:
        super().__init__(config)
        self.layers[0].mlp = PassesAdaptersBy(config.hidden_size, config.intermediate_size, config.hidden_act)


class PassesAdaptersBy(GatedMLP):
    def forward(self, x, batch):
        return self.down_proj(self.elementwise.gated_act(self.gate_up_proj(x, batch), self.act), Nobody())


class NormalisesIn16Bits(FlashQwen2Model):
    """Computes its norms in the dtype of the rows."""

    def __init__(self, config) -> None:
        super().__init__(config)
        for module in list(self.modules()):
            for name, child in module.named_children():
                if isinstance(child, RMSNorm):
                    setattr(module, name, RoughRMSNorm(child.in_features, child.eps))


class RoughRMSNorm(RMSNorm):
    def compute(self, x, weight, bias):
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps) * weight


class TakesCodesForNumbers(FlashQwen2Model):
    """Computes one layer with rows of a quantized weight that are not its own."""

    def __init__(self, config) -> None:
        super().__init__(config)
        mlp = self.layers[0].mlp
        mlp.down_proj = Turned(mlp.down_proj.in_features, mlp.down_proj.out_features, bias=False)


class Turned(Linear):
    def compute(self, x, kernel):
        y = super().compute(x, kernel)
        return y.roll(1, dims=-1) if isinstance(kernel, QuantizedKernel) else y


class KeepsItsNorm(FlashQwen2Model):
    """Passes adapters by in the last norm."""

    def forward(self, batch: Batch) -> Tensor:
        x = self.embed_tokens(batch.input_ids, batch)
        for layer in self.layers:
            x = layer(x, batch)
        return self.norm(x, Nobody())


class KeepsItsTable(FlashQwen2Model):
    """Passes adapters by where tokens become rows."""

    def forward(self, batch: Batch) -> Tensor:
        x = self.embed_tokens(batch.input_ids, Nobody())
        for layer in self.layers:
            x = layer(x, batch)
        return self.norm(x, batch)


class KeepsItsHead(LanguageModelHead):
    """Passes adapters by in the head."""

    def forward(self, hidden, rows):
        return super().forward(hidden, Nobody())


class Nobody:
    adapters = NoAdapters()


class CountsPadding(LastTokenClassificationHead):
    """Reads the last token even where it is padding."""

    def span(self, ids, pool_from):
        return range(len(ids) - 1, len(ids))


# --- Gemma-2 ---


class HasSmallHeadsByDefault(Gemma2Config):
    """Has heads of 64 where the file says nothing."""

    head_dim: PositiveInt = 64


class HasNoCapByDefault(Gemma2Config):
    """Caps no logits where the file says nothing."""

    final_logit_softcapping: float | None = None


class SlidesInOddLayersByDefault(Gemma2Config):
    """Has its windows in the other half of the layers where the file says nothing."""

    @classmethod
    def normalise(cls, raw):
        types = super().normalise(raw)["layer_types"]
        return super().normalise({**raw, "layer_types": raw.get("layer_types") or [*types[1:], *types[:1]]})


class ScalesUnrounded(Gemma2Model):
    """Scales embeddings by a number of more bits than the model's dtype has."""

    class embedding(ScaledEmbedding):  # noqa: N801
        def compute(self, x, kernel):
            return Embedding.compute(self, x, kernel) * self.out_features**0.5


class NormalisesIn16Bit(Gemma2Model):
    """Computes its norms in the dtype of the rows."""

    class norm_class(RMSNorm):  # noqa: N801
        def compute(self, x, weight, bias):
            return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps) * (1 + weight)


class ForgetsWindows(Gemma2Config):
    """Lets every layer see everything."""

    @classmethod
    def normalise(cls, raw):
        return {**super().normalise(raw), "sliding_window": None}
