"""What a plugin author builds a backbone from: layers, the batch, heads and configuration.

Decides which names an author may rely on. Each is imported when first used, so naming this package costs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

# Name to the module that defines it. A table instead of imports: `plugin.py` must not pull in torch, and a
# `config.py` that needs `ModelConfig` alone should not pay for every layer.
_HOMES = {
    "Attention": "attention",
    "AttentionOptions": "blocks",
    "Batch": "batch",
    "Block": "blocks",
    "Decoder": "decoder",
    "DecoderLayer": "decoder",
    "Embedding": "embedding",
    "EmbeddingHead": "heads",
    "FirstTokenClassificationHead": "heads",
    "GatedMLP": "blocks",
    "GateUpLinear": "linear",
    "get_activation": "activation",
    "HasAdapters": "site",
    "Head": "heads",
    "HeadRows": "batch",
    "HeadTransform": "heads",
    "LanguageModelHead": "heads",
    "LastTokenClassificationHead": "heads",
    "LayerNorm": "norm",
    "Linear": "linear",
    "LogitScoreHead": "heads",
    "MLP": "blocks",
    "Model": "model",
    "ModelConfig": "config",
    "Norm": "norm",
    "PooledClassificationHead": "heads",
    "PostNormConfig": "encoder",
    "PostNormEmbeddings": "encoder",
    "PostNormEncoder": "encoder",
    "PostNormLayer": "encoder",
    "QKVLinear": "linear",
    "read_rope": "rope",
    "RMSNorm": "norm",
    "Rope": "rope",
    "RotaryAttention": "blocks",
    "RotaryEmbedding": "rotary",
    "SelfAttention": "blocks",
    "SequenceClassificationHead": "heads",
    "Task": "model",
    "TokenClassificationHead": "heads",
}

__all__ = sorted(_HOMES)

# Type checkers cannot follow `__getattr__`; `X as X` marks a re-export for them (PEP 484).
if TYPE_CHECKING:
    from lorax_core.modeling.activation import get_activation as get_activation
    from lorax_core.modeling.attention import Attention as Attention
    from lorax_core.modeling.batch import Batch as Batch
    from lorax_core.modeling.batch import HeadRows as HeadRows
    from lorax_core.modeling.blocks import MLP as MLP
    from lorax_core.modeling.blocks import AttentionOptions as AttentionOptions
    from lorax_core.modeling.blocks import Block as Block
    from lorax_core.modeling.blocks import GatedMLP as GatedMLP
    from lorax_core.modeling.blocks import RotaryAttention as RotaryAttention
    from lorax_core.modeling.blocks import SelfAttention as SelfAttention
    from lorax_core.modeling.config import ModelConfig as ModelConfig
    from lorax_core.modeling.decoder import Decoder as Decoder
    from lorax_core.modeling.decoder import DecoderLayer as DecoderLayer
    from lorax_core.modeling.embedding import Embedding as Embedding
    from lorax_core.modeling.encoder import PostNormConfig as PostNormConfig
    from lorax_core.modeling.encoder import PostNormEmbeddings as PostNormEmbeddings
    from lorax_core.modeling.encoder import PostNormEncoder as PostNormEncoder
    from lorax_core.modeling.encoder import PostNormLayer as PostNormLayer
    from lorax_core.modeling.heads import EmbeddingHead as EmbeddingHead
    from lorax_core.modeling.heads import FirstTokenClassificationHead as FirstTokenClassificationHead
    from lorax_core.modeling.heads import Head as Head
    from lorax_core.modeling.heads import HeadTransform as HeadTransform
    from lorax_core.modeling.heads import LanguageModelHead as LanguageModelHead
    from lorax_core.modeling.heads import LastTokenClassificationHead as LastTokenClassificationHead
    from lorax_core.modeling.heads import LogitScoreHead as LogitScoreHead
    from lorax_core.modeling.heads import PooledClassificationHead as PooledClassificationHead
    from lorax_core.modeling.heads import SequenceClassificationHead as SequenceClassificationHead
    from lorax_core.modeling.heads import TokenClassificationHead as TokenClassificationHead
    from lorax_core.modeling.linear import GateUpLinear as GateUpLinear
    from lorax_core.modeling.linear import Linear as Linear
    from lorax_core.modeling.linear import QKVLinear as QKVLinear
    from lorax_core.modeling.model import Model as Model
    from lorax_core.modeling.norm import LayerNorm as LayerNorm
    from lorax_core.modeling.norm import Norm as Norm
    from lorax_core.modeling.norm import RMSNorm as RMSNorm
    from lorax_core.modeling.rope import Rope as Rope
    from lorax_core.modeling.rope import read_rope as read_rope
    from lorax_core.modeling.rotary import RotaryEmbedding as RotaryEmbedding
    from lorax_core.modeling.site import HasAdapters as HasAdapters
    from lorax_core.types import Task as Task


def __getattr__(name: str) -> object:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{home}"), name)
