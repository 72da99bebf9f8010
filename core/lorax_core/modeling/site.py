"""Where adapters attach.

Decides what every core layer with parameters has in common: a path that names it, one place where adapters change its result,
and the base's own numbers for those who need them. Knows nothing of what an adapter is.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol, final

from torch import Tensor, nn


class AdapterRows(Protocol):
    """What a site asks of the adapters of a set of rows."""

    def start(self, site: Site, x: Tensor) -> None:
        """`apply` comes next, for the same x: what needs no y may be launched beside the base layer."""

    def apply(self, site: Site, x: Tensor, y: Tensor) -> Tensor:
        """y `[rows, out]` of the base layer for x `[rows, in]`, with each row's adapter added (y may be changed in place)."""


class NoAdapters:
    """Every row is the base model's: sites pay two calls and nothing else."""

    def start(self, site: Site, x: Tensor) -> None:
        pass

    def apply(self, site: Site, x: Tensor, y: Tensor) -> Tensor:
        return y


class HasAdapters(Protocol):
    """Rows that adapters may change: a whole `Batch`, or the `HeadRows` of one head."""

    @property
    def adapters(self) -> AdapterRows: ...


class Site(nn.Module):
    """A layer with parameters.

    `path` is the dotted module name in the model (`layers.0.self_attn.qkv_proj`), set when a `Model` is put together. A
    fused layer gives `parts`, the output rows of each of its members in order; others have one part.

    `forward` is final, so that no layer loses its adapters. A subclass with other arithmetic overrides `compute`, through which
    the base's numbers and those of adapters both go; a subclass that defines `forward` or `__call__`, and a layer that is given
    one, raises TypeError.
    """

    path: str = ""
    in_features: int
    out_features: int
    bias: Tensor | None

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        # `@final` marks its function with `__final__`. Type checkers see it, but plugins need not run one.
        # torch's own entry points count as well, for a class may override those instead of `forward`.
        ours = {"__call__": nn.Module.__call__, "_call_impl": nn.Module._call_impl}
        for parent in cls.__mro__:  # mixins included: what counts is what the class ends up with
            ours |= {name: value for name, value in vars(parent).items() if getattr(value, "__final__", False)}
        defined = next((name for name, value in ours.items() if getattr(cls, name) is not value), None)
        if defined is not None:
            raise TypeError(
                f"{cls.__name__} defines {defined!r}, which would bypass the adapters of its rows; override 'compute' instead: "
                f"it takes the rows and the numbers to compute with, the base's or an adapter's"
            )

    def __setattr__(self, name: str, value: Any) -> None:
        # Patching the layers of a model is common elsewhere, and would bypass the adapters as a subclass would.
        if name in ("forward", "_call_impl"):
            raise TypeError(
                f"{self.path or type(self).__name__} cannot be given another {name!r}, which would bypass the adapters of its "
                f"rows; override 'compute' in a subclass instead"
            )
        super().__setattr__(name, value)

    @property
    def parts(self) -> tuple[int, ...]:
        return (self.out_features,)

    if TYPE_CHECKING:

        def __call__(self, x: Tensor, batch: HasAdapters) -> Tensor: ...

    @final  # type: ignore[misc]  # torch declares forward as an attribute, to be replaced by a method
    def forward(self, x: Tensor, batch: HasAdapters) -> Tensor:
        batch.adapters.start(self, x)
        # After the base, bias included: what an adapter adds is a delta to y, and replaced numbers are computed from x.
        return batch.adapters.apply(self, x, self._base(x))

    def computed_with(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """What the layer makes of x with another weight `[out, in]` and bias, for adapters that replace them."""
        raise NotImplementedError

    def dense_weight(self) -> Tensor:
        """The base's weight `[out, in]`, in the layer's dtype; may be a copy."""
        raise NotImplementedError

    def _base(self, x: Tensor) -> Tensor:
        """What the base makes of x, without adapters."""
        raise NotImplementedError
