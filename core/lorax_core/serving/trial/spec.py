"""What is tried.

Decides which facts a trial needs: plain data, so that it travels to another process and keys the verdicts that are kept. Knows
nothing of how a trial is run.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter

from lorax_core.attention.base import AttentionSpec

Dtype = Literal["float32", "bfloat16", "float16", "float8_e4m3fn"]


class _Plain(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class LayerKind(_Plain):
    """The kind of one attention layer: an `AttentionSpec` as plain data."""

    heads: int
    kv_heads: int
    head_dim: int
    causal: bool
    window: int | None = None
    soft_cap: float | None = None

    @classmethod
    def of(cls, spec: AttentionSpec) -> LayerKind:
        """The same kind as plain data."""
        return cls(
            heads=spec.heads,
            kv_heads=spec.kv_heads,
            head_dim=spec.head_dim,
            causal=spec.causal,
            window=spec.window,
            soft_cap=spec.soft_cap,
        )

    @property
    def spec(self) -> AttentionSpec:
        return AttentionSpec(self.heads, self.kv_heads, self.head_dim, self.causal, self.window, self.soft_cap)

    def __str__(self) -> str:
        told = f"{self.heads} heads over {self.kv_heads} of {self.head_dim}"
        told += "" if self.causal else ", both directions"
        told += f", window {self.window}" if self.window is not None else ""
        return told + (f", cap {self.soft_cap:g}" if self.soft_cap is not None else "")


class _OnDevice(_Plain):
    device: str
    dtype: Dtype

    @property
    def path(self) -> str:
        """What is tried, as `module:name`."""
        raise NotImplementedError

    @property
    def subject(self) -> str:
        """What is tried, by its own name."""
        return self.path.rpartition(":")[2]

    @property
    def torch_dtype(self) -> torch.dtype:
        found: torch.dtype = getattr(torch, self.dtype)
        return found


class AttentionTrial(_OnDevice):
    """A backend, by class path, over all kinds of layers of a model; `kv_dtype` and `page_size` are its cache's."""

    kind: Literal["attention"] = "attention"
    backend: str
    layers: tuple[LayerKind, ...]
    kv_dtype: Dtype
    page_size: int

    @property
    def path(self) -> str:
        return self.backend

    def __str__(self) -> str:
        return (
            f"attention, {self.dtype}, pages of {self.page_size} in {self.kv_dtype}: {'; '.join(map(str, self.layers))}"
        )


class LoraTrial(_OnDevice):
    """A LoRA kernel, by the path of the function that loads it, at layers `in` to `out` wide."""

    kind: Literal["lora"] = "lora"
    kernel: str
    sizes: tuple[tuple[int, int], ...]

    @property
    def path(self) -> str:
        return self.kernel

    def __str__(self) -> str:
        return f"LoRA, {self.dtype}: layers {', '.join(f'{width} to {out}' for width, out in self.sizes)}"


class ElementwiseTrial(_OnDevice):
    """An `Elementwise`, by class path: norms of rows of `widths`, gates and activations of `gates`, and heads of `layers`.

    `turned` are the dimensions of a head that are rotated, 0 where none is.
    """

    kind: Literal["elementwise"] = "elementwise"
    form: str
    widths: tuple[int, ...]
    gates: tuple[int, ...]
    layers: tuple[LayerKind, ...]
    turned: tuple[int, ...]

    @property
    def path(self) -> str:
        return self.form

    def __str__(self) -> str:
        gates = f", gates of {', '.join(map(str, self.gates))}" if self.gates else ""
        return f"elementwise, {self.dtype}: rows of {', '.join(map(str, self.widths))}{gates}"


class GraphTrial(_OnDevice):
    """Captured decoding steps of a small model with these layers; `graph` makes one of a device, CUDA's when None."""

    kind: Literal["graphs"] = "graphs"
    backend: str
    layers: tuple[LayerKind, ...]
    kv_dtype: Dtype
    page_size: int
    kernel: str | None = None
    graph: str | None = None

    @property
    def path(self) -> str:
        return self.backend

    def __str__(self) -> str:
        return f"graphs, {self.dtype}, pages of {self.page_size} in {self.kv_dtype}: {'; '.join(map(str, self.layers))}"


Trial = Annotated[AttentionTrial | LoraTrial | ElementwiseTrial | GraphTrial, Field(discriminator="kind")]
TRIAL: TypeAdapter[Trial] = TypeAdapter(Trial)
"""A trial to JSON and back."""


def dtype_name(dtype: torch.dtype) -> Dtype:
    """A dtype as trials name it."""
    name: Dtype = str(dtype).removeprefix("torch.")  # type: ignore[assignment]  # pydantic refuses any other
    return name


def layers_of(specs: Sequence[AttentionSpec]) -> tuple[LayerKind, ...]:
    """The distinct kinds of layers, in order."""
    return tuple(LayerKind.of(spec) for spec in dict.fromkeys(specs))
