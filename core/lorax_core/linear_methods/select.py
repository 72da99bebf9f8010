"""Which method computes which linear layer, and why.

Decides by module path, shape, dtype and device, never by a stopwatch. A method other than the plain one is compared with the
plain product before it is used, once for each shape and dtype in a process. Knows nothing of modules or checkpoints.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase

import torch
from torch import Tensor

from lorax_core.errors import RequestError, listed, nearest
from lorax_core.kernels import onednn
from lorax_core.linear_methods.base import LinearKernel, LinearMethod
from lorax_core.linear_methods.onednn import OneDnn
from lorax_core.linear_methods.plain import Plain, PlainKernel
from lorax_core.linear_methods.quantized import Int4, Int8, Quantization

METHODS: tuple[LinearMethod, ...] = (OneDnn(), Plain())
"""What core offers, the first choice first. The last one supports everything."""

QUANTIZED: tuple[Quantization, ...] = (Int4(), Int8())
"""Methods that round weights: for layers that ask for them, by `LinearPolicy`. The fewest bits first."""

_TINY = 1e-30
"""Numbers of this size say nothing of a method: products of such ones are rounded to 0, by some earlier than by others."""

_tried: dict[tuple[str, tuple[int, ...], torch.dtype], str | None] = {}


@dataclass(frozen=True, slots=True)
class LinearPolicy:
    """Which methods may compute a layer: patterns of module paths (`layers.*.mlp.*`) to a method's name, the first match wins.

    A layer that no pattern names is computed in the format that `quantize` names ("int8", "int4") or, where it needs more bits,
    in one that has them; without `quantize` by the first method that supports it.
    """

    methods: Mapping[str, str] = field(default_factory=dict)
    quantize: str | None = None

    def check(self, paths: Sequence[str]) -> None:
        """Raises RequestError for a pattern that names none of the layers at `paths`: it was meant to change something."""
        for pattern in self.methods:
            if not any(fnmatchcase(path, pattern) for path in paths):
                close = nearest(pattern, paths)
                raise RequestError(
                    f"linear_methods names {pattern!r}, which no linear layer's path matches",
                    hint=f"did you mean {close!r}?" if close else f"paths are such as {listed(paths, limit=3)}",
                )

    def candidates(
        self, path: str, offered: Sequence[LinearMethod] = METHODS, *, fewest_bits: int = 0
    ) -> tuple[LinearMethod, ...]:
        """The methods to ask for the layer at `path`, in order, the plain one last. Raises RequestError for an unknown name.

        `fewest_bits` is how many bits the numbers of its weight need when a model is quantized.
        """
        named = (*offered, *QUANTIZED)
        name = next((name for pattern, name in self.methods.items() if fnmatchcase(path, pattern)), None)
        if name is None:
            asked = next((one.format.bits for one in QUANTIZED if one.name == self.quantize), 32)
            narrow = [one for one in QUANTIZED if one.format.bits >= max(fewest_bits, asked)]
            return (*narrow[:1], *offered)
        found = next((method for method in named if method.name == name), None)
        if found is None:
            names = [method.name for method in named]
            close = nearest(name, names)
            raise RequestError(
                f"there is no linear method {name!r}; there are {listed(names)}",
                hint=f"did you mean {close!r}?" if close else "`lorax doctor` lists the linear methods of this machine",
            )
        # The plain one stays behind a named one: a layer must be computed even where that cannot.
        return (found,) if found is offered[-1] else (found, offered[-1])


@dataclass(frozen=True, slots=True)
class LinearChoice:
    """The method of one layer, the reason for each method passed over, and what else there is to say of it."""

    path: str
    method: str
    passed_over: Mapping[str, str]
    note: str | None = None


@dataclass(frozen=True, slots=True)
class LinearReport:
    """How the linear layers of a model are computed."""

    choices: tuple[LinearChoice, ...] = ()

    @property
    def methods(self) -> dict[str, int]:
        """Method to the number of layers that it computes."""
        return dict(Counter(choice.method for choice in self.choices))

    @property
    def reasons(self) -> tuple[str, ...]:
        """Each reason once: why a method was passed over, and notes of layers."""
        found: dict[str, None] = {}
        for choice in self.choices:
            found |= dict.fromkeys(f"{name}: {reason}" for name, reason in choice.passed_over.items())
            if choice.note is not None:
                found[f"{choice.path}: {choice.note}"] = None
        return tuple(found)


def choose(
    weight: Tensor, candidates: Sequence[LinearMethod], *, rows: bool = False
) -> tuple[LinearKernel, dict[str, str]]:
    """The kernel of the first candidate that supports a weight `[out, in]` and computes it rightly; reasons for the others.

    The last candidate must support everything; it is not compared with anything.
    """
    out, width = weight.shape
    passed_over: dict[str, str] = {}
    for method in candidates[:-1]:
        # Asked first: trying would raise, and the reason would be torch's and not ours.
        reason = method.supports((out, width), weight.dtype, weight.device)
        if reason is None:
            kernel = _tried_kernel(method, weight, rows)
            if isinstance(kernel, LinearKernel):
                return kernel, passed_over
            reason = kernel
        passed_over[method.name] = reason
    return candidates[-1].prepare(weight, None, rows=rows), passed_over


def _tried_kernel(method: LinearMethod, weight: Tensor, rows: bool) -> LinearKernel | str:
    """The method's kernel, or why it is not to be used: it fails, or gives other numbers than the plain product."""
    key = method.name, tuple(weight.shape), weight.dtype
    if (known := _tried.get(key)) is not None:
        return known
    try:
        kernel = method.prepare(weight, None, rows=rows)
        tolerance = method.tolerance(weight.dtype)
        if key not in _tried:
            # Compared once a key: a model has many layers of one shape.
            _tried[key] = None if tolerance is None else _difference(kernel, weight, tolerance)
    except (RuntimeError, NotImplementedError) as error:
        if "can't allocate memory" in str(error):  # says nothing of the method, which later models may use
            raise MemoryError(str(error)) from error
        _tried[key] = f"failed when it was tried: {error}"
        return f"failed when it was tried: {error}"
    return _tried[key] or kernel


def _difference(kernel: LinearKernel, weight: Tensor, tolerance: float) -> str | None:
    """How a kernel differs from the plain product on a few rows; None when it does not."""
    width, some = weight.shape[1], onednn.spread(weight.shape[0]).to(weight.device)
    shape, weight = list(weight.shape), weight.detach()[some]
    x = torch.linspace(-1, 1, 3 * width, device=weight.device).view(3, width).cos().to(weight.dtype)  # [3, in]
    expected = PlainKernel(weight, None)(x).float()  # [3, some]
    # In 64 bits: squares of the numbers of a dead row have no place in 32.
    lengths = torch.linalg.vector_norm(weight, dim=1, dtype=torch.float64)  # [some]
    # [3, some]; |x| |w| bounds each sum, which may itself cancel to nearly 0. What has no normal number may be lost whole.
    scale = torch.linalg.vector_norm(x, dim=1, dtype=torch.float64)[:, None] * (lengths + width * _TINY)
    for count in (1, 3):  # one row and several are often computed by different code
        off = (kernel(x[:count])[:, some].float() - expected[:count]).abs().double() - tolerance * scale[:count]
        # A weight that is not finite says nothing about the method.
        if not bool(((off <= 0) | ~expected[:count].isfinite()).all()):
            return f"gives other numbers than the plain product for a weight of {shape}"
    return None


def available(dtype: torch.dtype, device: str = "cpu") -> dict[str, str | None]:
    """Each method to None where it computes `dtype` on `device`, else to the reason why not."""
    # Any shape will do: what core offers does not look at it.
    return {
        method.name: method.supports((64, 64), dtype, torch.device(device)) for method in (*METHODS, *QUANTIZED[::-1])
    }


def fast_in_bfloat16(device: str) -> bool:
    """Whether products in bfloat16 run at full speed on `device`, so that 16 bit is worth keeping."""
    return torch.device(device).type != "cpu" or onednn.multiplies_bfloat16()
