"""Decoders: layers that add to what came in, and normalise what they read, what they add, or both.

Decides the order of norms, residuals, attention and feed-forward. Knows nothing of which attention or feed-forward a layer
has, nor of checkpoints. Encoders of that form (ModernBERT) are decoders whose attention sees both sides.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Literal

from torch import Tensor, nn

from lorax_core.modeling.batch import Batch
from lorax_core.modeling.blocks import Block
from lorax_core.modeling.config import ModelConfig
from lorax_core.modeling.embedding import Embedding
from lorax_core.modeling.norm import Norm

Norms = Literal["before", "between", "shared", "after", "around"]
"""Where a layer's norms are: before each block (Llama), before the second alone (ModernBERT's first layer), one before both
(Phi), after each (OLMo 2), or before and after each (Gemma 2)."""
_NORMS: Mapping[str, tuple[str, ...]] = {
    "before": ("input_layernorm", "post_attention_layernorm"),
    "between": ("post_attention_layernorm",),
    "shared": ("input_layernorm",),
    "after": ("post_attention_layernorm", "post_feedforward_layernorm"),
    "around": (
        "input_layernorm",
        "post_attention_layernorm",
        "pre_feedforward_layernorm",
        "post_feedforward_layernorm",
    ),
}


class DecoderLayer(Block):
    """Attention and feed-forward, each added to what came in.

    `norm` makes a norm, and `norms` says where they are. With `parallel` both blocks read the layer's input; otherwise the
    feed-forward reads attention's result. Norms have the names of Llama, and those after a block the names of Gemma 2.

    Raises ValueError for norms that such a layer cannot have.
    """

    input_layernorm: Norm
    post_attention_layernorm: Norm
    pre_feedforward_layernorm: Norm
    post_feedforward_layernorm: Norm

    def __init__(
        self,
        attention: Block,
        mlp: Block,
        norm: Callable[[], Norm],
        *,
        parallel: bool = False,
        norms: Norms = "before",
    ) -> None:
        super().__init__()
        if norms not in _NORMS or (norms != "before" and parallel != (norms == "shared")):
            raise ValueError(
                f"norms {norms!r} with parallel={parallel}; 'before' takes either, 'shared' needs parallel=True, "
                "'between', 'after' and 'around' parallel=False"
            )
        self.parallel = parallel
        self.norms = norms
        self.self_attn = attention
        self.mlp = mlp
        for name in _NORMS[norms]:
            self.add_module(name, norm())

    @property
    def is_plain(self) -> bool:
        """Whether `parts` may stand for a call: nobody gave the layer or its class a `forward`, nor hooked it."""
        watched = bool(self._forward_hooks or self._forward_pre_hooks)
        return getattr(self.forward, "__func__", None) is DecoderLayer.forward and not watched

    def forward(self, x: Tensor, batch: Batch) -> Tensor:
        x, rest = self.parts(x, None, batch)
        return x + rest

    def parts(self, x: Tensor, rest: Tensor | None, batch: Batch) -> tuple[Tensor, Tensor]:
        """The layer's result as two summands `[tokens, hidden]`; `rest` is the second summand of x, None where x is whole.

        The next norm adds them in its own launch.
        """
        if self.norms == "after":
            x = x if rest is None else x + rest
            x = x + self.post_attention_layernorm(self.self_attn(x, batch), batch)
            return x, self.post_feedforward_layernorm(self.mlp(x, batch), batch)
        if self.norms == "between":
            normed = x = x if rest is None else x + rest
        elif rest is None:
            normed = self.input_layernorm(x, batch)
        else:
            normed, x = self.input_layernorm.add(rest, x, batch)
        attended = self.self_attn(normed, batch)  # [tokens, hidden]
        # Both blocks read x, so the two norms cannot be chained with a residual.
        if self.parallel:
            read = normed if self.norms == "shared" else self.post_attention_layernorm(x, batch)
            return x + attended, self.mlp(read, batch)
        if self.norms == "around":
            attended = self.post_attention_layernorm(attended, batch)
            normed, x = self.pre_feedforward_layernorm.add(attended, x, batch)
            return x, self.post_feedforward_layernorm(self.mlp(normed, batch), batch)
        normed, x = self.post_attention_layernorm.add(attended, x, batch)
        return x, self.mlp(normed, batch)


class Decoder(nn.Module):
    """Embeddings, layers and the final norm: a batch to hidden rows `[tokens, hidden]`.

    `max_positions` is the length of a table of learned positions, None without one; its row for position 0 is
    `position_offset` (2 for OPT), and rows before it are not read. Rows of tokens are multiplied by `embed_scale`. `embed_norm`
    normalises what the first layer is given (ModernBERT).
    """

    def __init__(
        self,
        config: ModelConfig,
        layers: Iterable[Block],
        norm: Norm,
        *,
        max_positions: int | None = None,
        position_offset: int = 0,
        embed_scale: float = 1.0,
        embed_norm: Norm | None = None,
    ) -> None:
        super().__init__()
        hidden = config.hidden_size
        self.embed_tokens = Embedding(config.vocab_size, hidden, embed_scale)
        self.position_offset = position_offset
        self.embed_positions = None if max_positions is None else Embedding(max_positions + position_offset, hidden)
        self.embed_norm = embed_norm
        self.layers = nn.ModuleList(layers)
        self.norm = norm

    def forward(self, batch: Batch) -> Tensor:
        x = self.embed_tokens(batch.input_ids, batch)  # [tokens, hidden]
        if self.embed_positions is not None:
            offset = self.position_offset
            rows = batch.position_ids + offset if offset else batch.position_ids
            x = x + self.embed_positions(rows, batch)
        if self.embed_norm is not None:
            x = self.embed_norm(x, batch)
        rest: Tensor | None = None
        for layer in self.layers:
            if isinstance(layer, DecoderLayer) and layer.is_plain:
                x, rest = layer.parts(x, rest, batch)
            else:  # somebody's own or watched, which reads and gives whole rows
                x = layer(x if rest is None else x + rest, batch)
                rest = None
        return self.norm(x, batch) if rest is None else self.norm.add(rest, x, batch)[0]
