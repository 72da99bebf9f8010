"""Where adapters attach.

Decides what every core layer with parameters has in common: a path that names it and the base's own numbers for those who
need them. Knows nothing of what an adapter is.
"""

from __future__ import annotations

from torch import Tensor, nn


class Site(nn.Module):
    """A layer with parameters.

    `path` is the dotted module name in the model (`layers.0.self_attn.qkv_proj`), set when a `Model` is put together. A
    fused layer gives `parts`, the output rows of each of its members in order; others have one part.
    """

    path: str = ""
    in_features: int
    out_features: int

    @property
    def parts(self) -> tuple[int, ...]:
        return (self.out_features,)

    def dense_weight(self) -> Tensor:
        """The base's weight `[out, in]`, unpacked and in the layer's dtype."""
        raise NotImplementedError

    def compute(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """What the layer makes of x with another weight `[out, in]` and bias, for adapters that replace them."""
        raise NotImplementedError
