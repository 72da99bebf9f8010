"""Pre-norm transformers: layers that normalise what they read and add to what came in.

Decides the order of norms, residuals, attention and feed-forward. Knows nothing of which attention or feed-forward a layer
has, nor of checkpoints.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from torch import Tensor, nn

from lorax_core.modeling.batch import Batch
from lorax_core.modeling.blocks import Block
from lorax_core.modeling.config import ModelConfig
from lorax_core.modeling.embedding import Embedding
from lorax_core.modeling.norm import Norm


class DecoderLayer(Block):
    """Attention and feed-forward, each on normalised input and added to what came in.

    `norm` makes a norm. With `parallel` both read the layer's input; otherwise the feed-forward reads attention's result.
    """

    def __init__(self, attention: Block, mlp: Block, norm: Callable[[], Norm], *, parallel: bool = False) -> None:
        super().__init__()
        self.parallel = parallel
        self.input_layernorm = norm()
        self.self_attn = attention
        self.post_attention_layernorm = norm()
        self.mlp = mlp

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
        if rest is None:
            normed = self.input_layernorm(x, batch)
        else:
            normed, x = self.input_layernorm.add(rest, x, batch)
        attended = self.self_attn(normed, batch)  # [tokens, hidden]
        # GPT-NeoX: both blocks read x, so the two norms cannot be chained with a residual.
        if self.parallel:
            return x + attended, self.mlp(self.post_attention_layernorm(x, batch), batch)
        normed, x = self.post_attention_layernorm.add(attended, x, batch)
        return x, self.mlp(normed, batch)


class Decoder(nn.Module):
    """Embeddings, layers and the final norm: a batch to hidden rows `[tokens, hidden]`.

    `max_positions` is the length of a table of learned positions, None without one.
    """

    def __init__(
        self, config: ModelConfig, layers: Iterable[Block], norm: Norm, *, max_positions: int | None = None
    ) -> None:
        super().__init__()
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size)
        self.embed_positions = None if max_positions is None else Embedding(max_positions, config.hidden_size)
        self.layers = nn.ModuleList(layers)
        self.norm = norm

    def forward(self, batch: Batch) -> Tensor:
        x = self.embed_tokens(batch.input_ids, batch)  # [tokens, hidden]
        if self.embed_positions is not None:
            x = x + self.embed_positions(batch.position_ids, batch)
        rest: Tensor | None = None
        for layer in self.layers:
            if isinstance(layer, DecoderLayer) and layer.is_plain:
                x, rest = layer.parts(x, rest, batch)
            else:  # somebody's own or watched, which reads and gives whole rows
                x = layer(x if rest is None else x + rest, batch)
                rest = None
        return self.norm(x, batch) if rest is None else self.norm.add(rest, x, batch)[0]
