"""Architectures of somebody else's that check nothing: what core's gates must hold by themselves.

Each is Qwen2 with one more thing of a size that only the configuration states. Class paths such as `hostile:ManyExperts` can
be declared as a plugin would declare its own.
"""

from __future__ import annotations

import torch
from torch import nn

from lorax_core.modeling import Linear, SelfAttention
from lorax_core.plugins.host import PluginHost
from lorax_core.plugins.record import PluginRecord, PluginStatus
from lorax_qwen2.config import Qwen2Config
from lorax_qwen2.modeling import FlashQwen2Model


class OpenConfig(Qwen2Config):
    """Reads numbers of which it says nothing."""

    experts: int = 0
    table: int = 0
    uneven: bool = False
    careless: str = ""

    @classmethod
    def normalise(cls, raw):
        """Attends in both directions where `encoder` is stated, whatever else is."""
        config = super().normalise(raw)
        return {**config, "is_causal": False} if raw.get("encoder") else config


class OpenModel(FlashQwen2Model):
    """Makes what the configuration asks for."""

    def __init__(self, config) -> None:
        super().__init__(config)
        if config.careless:
            raise {"type": TypeError, "key": KeyError, "assertion": AssertionError}[config.careless]("of the plugin")
        self.experts = nn.ModuleList(Linear(1, 1) for _ in range(config.experts))
        if config.table:
            self.cosines = CosineTable(config.table, config.head_dim)
        if config.uneven:
            self.layers[1].self_attn = SelfAttention(config.hidden_size, config.num_attention_heads, 1, causal=True)


class CosineTable(nn.Module):
    """A table of every position, made in advance."""

    def __init__(self, positions: int, dim: int) -> None:
        super().__init__()
        self.register_buffer("cos", torch.empty(positions, dim), persistent=False)

    def reset_buffers(self, device) -> None:
        self.cos = torch.ones(self.cos.shape, device=device)


def with_open_model(host: PluginHost) -> PluginHost:
    """The installed plugins and one more, which brings `OpenModel` for the model type `open`."""
    changes = {"model_type": "open", "config": "hostile:OpenConfig", "backbone": "hostile:OpenModel"}
    spec = host.architecture("qwen2").model_copy(update=changes)
    record = PluginRecord("open", "lorax-open", "1.0", "hostile", PluginStatus.READY, architectures=(spec,))
    return PluginHost([*host.records, record])
