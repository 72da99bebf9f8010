"""What an adapter makes of one tensor of its base's files.

Decides the arithmetic of a merge, in float32 and in the orientation of the files. Knows nothing of which tensor it is, of ties
or of folders.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lorax_core.adapters.formats.peft import PeftFiles, Piece
from lorax_core.errors import AdapterError


@dataclass
class Change:
    """What one module's `leaf`, its weight or its bias, turns into; a module of which both change has two of these."""

    module: str
    leaf: str
    piece: Piece
    files: PeftFiles

    @property
    def holds_base(self) -> bool:
        """Whether it holds the base's weight beneath a low-rank update."""
        return self.piece.weight is not None and (self.piece.a is not None or self.piece.embedding_a is not None)

    @property
    def embeddings(self) -> int:
        """How many rows a table of embeddings has for this to be of one; 0 when it is of none, or does not say."""
        if self.leaf == "weight" and self.piece.embedding_a is not None:
            return self.piece.embedding_a.shape[1]
        return len(self.piece.weight) if self.leaf == "weight" and self.piece.weight is not None else 0

    def beneath(self, old: Tensor) -> Tensor:
        """The base's tensor, in float32, or what the adapter has in its place; raises AdapterError for another shape."""
        new = getattr(self.piece, self.leaf)
        if new is None:
            return old.float()
        if new.shape != old.shape:
            raise AdapterError(
                f"{self.files.path} holds a {self.leaf} of {self.module!r} with shape {list(new.shape)}; the base's is "
                f"{list(old.shape)}",
                hint="an adapter whose vocabulary was resized needs a base of the same size",
            )
        replaced: Tensor = new.float()
        return replaced

    def apply(self, old: Tensor, transposed: bool) -> Tensor:
        """The new tensor in float32, stored as the old one is: `[in, out]` when `transposed`.

        Raises AdapterError when shapes do not fit.
        """
        if self.piece.magnitude is not None and self.piece.b_bias is not None:
            raise AdapterError(
                f"{self.files.path} has both a magnitude and a lora_B bias for {self.module!r}, which is not served"
            )
        new = self.beneath(old)
        if self.leaf == "bias":
            if self.piece.b_bias is None or self.piece.a is None:
                return new
            self._check("lora_B.bias", [len(self.piece.b_bias)], list(new.shape))
            return new + self.files.scale(self.module, self.piece.a.shape[0]) * self.piece.b_bias.float()
        piece = self.piece
        if piece.tokens is not None:
            new = self._with_tokens(new)
        if piece.a is not None and piece.b is not None:
            new = self._updated(new.t() if transposed else new, piece.b.float(), piece.a.float(), norm_over=1)
            new = new.t() if transposed else new
        if piece.embedding_a is not None and piece.embedding_b is not None:
            new = self._updated(new, piece.embedding_a.float().t(), piece.embedding_b.float().t(), norm_over=0)
        return new

    def _updated(self, weight: Tensor, left: Tensor, right: Tensor, norm_over: int) -> Tensor:
        """weight `[n, m]` and `scale * left @ right`, each line scaled to its magnitude where there is one (DoRA)."""
        self._check("low-rank update", [left.shape[0], right.shape[1]], list(weight.shape))
        sum_ = weight + self.files.scale(self.module, left.shape[1]) * (left @ right)
        if self.piece.magnitude is None:
            return sum_
        norm = torch.linalg.vector_norm(sum_, dim=norm_over, keepdim=True)
        self._check("magnitude", [self.piece.magnitude.numel()], [norm.numel()])
        scaled: Tensor = sum_ * (self.piece.magnitude.float().reshape(norm.shape) / norm)
        return scaled

    def _with_tokens(self, weight: Tensor) -> Tensor:
        ids, rows = self.files.token_ids(self.module), self.piece.tokens
        assert rows is not None
        if list(rows.shape) != [len(ids), weight.shape[-1]] or not all(0 <= index < len(weight) for index in ids):
            raise AdapterError(
                f"{self.files.path} trains {list(rows.shape)} rows of {self.module!r} for {len(ids)} token ids; the base "
                f"has {len(weight)} rows of {weight.shape[-1]}"
            )
        return weight.index_copy(0, torch.tensor(ids, dtype=torch.long), rows.float())

    def _check(self, what: str, found: list[int], asked: list[int]) -> None:
        if found != asked:
            raise AdapterError(
                f"{self.files.path} does not fit {self.module!r}: its {what} has shape {found}, the base asks for {asked}; it "
                f"was trained on {self.files.trained_on}",
                hint="merge it into the base that it was trained on",
            )


def leaves(piece: Piece) -> list[str]:
    """Which tensors of its module a piece changes."""
    roles = {role for role, _ in piece.items()}
    return [
        *(["weight"] if roles - {"bias", "b_bias"} else []),
        *(["bias"] if roles & {"bias", "b_bias"} else []),
    ]
