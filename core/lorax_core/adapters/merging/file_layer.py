"""A layer as a checkpoint's files have it.

Decides the orientation in which an adapter meets a stored tensor. What the adapter does to it is decided in `formats.layer`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lorax_core.adapters.formats.layer import Layer, layer_deltas
from lorax_core.adapters.formats.peft import ModuleTensors, PeftFiles


@dataclass(frozen=True)
class FileLayer(Layer):
    """A layer as the checkpoint's files have it. Its weight is stored `[in, out]` when `transposed`."""

    module: str
    weight: Tensor
    bias: Tensor | None
    transposed: bool = False
    kind = "vector"  # seen in errors only for what is no matrix
    device = torch.device("cpu")
    shifts = False

    @property
    def multiplies(self) -> bool:  # type: ignore[override]
        return self.weight.dim() == 2

    @property
    def embeds(self) -> bool:  # type: ignore[override]
        return self.weight.dim() == 2 and not self.transposed

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self._turned(self.weight).shape)

    def base(self, leaf: str) -> Tensor | None:
        return self._turned(self.weight) if leaf == "weight" else self.bias

    def saved(self, leaf: str, tensor: Tensor) -> Tensor:
        return self._turned(tensor) if leaf == "weight" else tensor

    def merged(self, files: PeftFiles, tensors: ModuleTensors) -> tuple[Tensor, Tensor | None]:
        """The new weight, stored as the old one is, and the new bias, in float32."""
        weight, bias = self._turned(self.weight).float(), self.bias.float() if self.bias is not None else None
        for delta in layer_deltas(files, tensors, self):
            weight, bias = delta.merged(weight, bias)
        return self._turned(weight), bias

    def _turned(self, weight: Tensor) -> Tensor:
        return weight.t() if self.transposed and weight.dim() == 2 else weight
