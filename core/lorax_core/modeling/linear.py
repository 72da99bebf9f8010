"""Linear layers: plain, and fused where members read the same input.

Decides the shape of each, the order of a fused layer's parts and which layers share a prepared weight. Knows nothing of how a
product is computed: a kernel from `linear_methods` does that.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from lorax_core.linear_methods.base import LinearKernel, LinearMethod
from lorax_core.linear_methods.select import LinearChoice, LinearPolicy, LinearReport, choose
from lorax_core.modeling.embedding import Embedding
from lorax_core.modeling.prepared import PreparedSite
from lorax_core.modeling.site import HasAdapters


class Linear(PreparedSite):
    """`x [rows, in] -> [rows, out]`, with the adapters of the rows applied."""

    def __init__(self, in_features: int, out_features: int, bias: bool = True) -> None:
        super().__init__()
        self.in_features = in_features
        self.out_features = out_features
        self.weight = nn.Parameter(torch.empty(out_features, in_features), requires_grad=False)
        self.bias = nn.Parameter(torch.empty(out_features), requires_grad=False) if bias else None

    def compute(self, x: Tensor, kernel: LinearKernel) -> Tensor:
        """`x W^T + bias` `[rows, out]` with the weight and bias of `kernel`."""
        return kernel(x)


class KeepsBits(nn.Module):
    """A module whose linear layers need more bits than others when a model is quantized."""

    fewest_bits: ClassVar[int]


class QKVLinear(Linear):
    """Queries, keys and values of one input in one product; output rows are q, k, v in that order."""

    def __init__(self, hidden: int, heads: int, kv_heads: int, head_dim: int, bias: bool = True) -> None:
        super().__init__(hidden, (heads + 2 * kv_heads) * head_dim, bias)
        self.heads, self.kv_heads, self.head_dim = heads, kv_heads, head_dim

    @property
    def parts(self) -> tuple[int, ...]:
        kv = self.kv_heads * self.head_dim
        # Adapters trained on q_proj, k_proj or v_proj find their rows of the fused output by this.
        return (self.heads * self.head_dim, kv, kv)

    def project(self, x: Tensor, batch: HasAdapters) -> tuple[Tensor, Tensor, Tensor]:
        """x `[tokens, hidden]` to q `[tokens, heads, dim]`, k and v `[tokens, kv_heads, dim]`."""
        qkv = self(x, batch).view(x.shape[0], -1, self.head_dim)  # [tokens, heads + 2 * kv_heads, dim]
        # Views with the row stride of all three; nothing is copied here.
        q, k, v = torch.split(qkv, [self.heads, self.kv_heads, self.kv_heads], dim=1)
        return q, k, v


class GateUpLinear(Linear):
    """The two halves of a gated feed-forward layer in one product `[rows, 2 * intermediate]`: gate, then up."""

    def __init__(self, hidden: int, intermediate: int, bias: bool = False) -> None:
        super().__init__(hidden, 2 * intermediate, bias)
        self.intermediate = intermediate

    @property
    def parts(self) -> tuple[int, ...]:
        return (self.intermediate, self.intermediate)


@dataclass
class _Shared:
    """A weight that is not prepared yet: the linear layers that share it, and the look-up table among those who do."""

    parameter: nn.Parameter
    layers: list[tuple[str, Linear]]
    table: Embedding | None


class LinearPreparer:
    """Prepares the linear layers below `root` for this device, weight by weight, as their numbers come in.

    Layers that share a parameter share one prepared weight, an embedding among them included: memory holds it once. Parameters
    may be on `meta`. Raises RequestError for a policy that names no layer.
    """

    def __init__(self, root: nn.Module, policy: LinearPolicy) -> None:
        self._policy = policy
        self._bits = _fewest_bits(root)
        sites = [(name, module) for name, module in root.named_modules() if isinstance(module, PreparedSite)]
        # Embeddings alone are left out, as a look-up gains nothing from packing; a tied one follows its head.
        linears = [(layer.path or name, layer) for name, layer in sites if isinstance(layer, Linear)]
        policy.check([path for path, _ in linears])
        # By identity: a tied embedding and its head hold the same parameter object.
        tables = {id(module.weight): module for _, module in sites if isinstance(module, Embedding)}
        self._choices: dict[str, LinearChoice | None] = {}
        self._waiting: dict[int, _Shared] = {}
        for path, layer in linears:
            if layer.weight is not None:
                key = id(layer.weight)
                shared = self._waiting.setdefault(key, _Shared(layer.weight, [], tables.get(key)))
                shared.layers.append((path, layer))
                self._choices[path] = None

    def waiting(self) -> Iterator[nn.Parameter]:
        """The weights that are not prepared yet; each must be prepared before the next is asked for."""
        # No list: that would hold every weight in memory until the last is prepared.
        while self._waiting:
            yield next(iter(self._waiting.values())).parameter

    @property
    def report(self) -> LinearReport:
        """Which method each layer got, and why."""
        return LinearReport(tuple(choice for choice in self._choices.values() if choice is not None))

    def takes(self, parameter: nn.Parameter) -> bool:
        """Whether it is the weight of a linear layer."""
        return id(parameter) in self._waiting

    def copies(self, parameter: nn.Parameter, dtype: torch.dtype, device: torch.device) -> bool:
        """Whether the numbers of this weight will be copied into another layout, so that they need no memory that lasts."""
        if not self.takes(parameter):
            return False
        shape = parameter.shape[0], parameter.shape[1]
        return next(one for one in self._candidates(parameter) if one.supports(shape, dtype, device) is None).copies

    def prepare(self, parameter: nn.Parameter, weight: Tensor, *, lent: bool = False) -> None:
        """Give the layers that share `parameter` a kernel over the numbers `weight`, of which memory may be only `lent`."""
        rows = self._waiting[id(parameter)].table is not None
        candidates = self._candidates(parameter)
        kernel, passed_over = choose(weight, candidates, rows=rows)
        kept = not next(one for one in candidates if one.name == kernel.method).copies
        if lent and (kept or (rows and kernel.no_rows is not None)):
            weight = weight.clone()
            # What failed above is known to fail, and is not tried again.
            kernel, passed_over = choose(weight, candidates, rows=rows) if kept else (kernel, passed_over)
        shared = self._waiting.pop(id(parameter))
        # A packed layout that cannot give single rows leaves the table its parameter: memory then holds the weight twice.
        note = None if shared.table is None or kernel.no_rows is None else f"a second, plain weight: {kernel.no_rows}"
        if shared.table is not None and note is None:
            shared.table.adopt(kernel)
        elif shared.table is not None:
            shared.table.weight = nn.Parameter(weight, requires_grad=False)
        for path, layer in shared.layers:
            self._choices[path] = LinearChoice(path, kernel.method, passed_over, note)
            layer.adopt(kernel.with_bias(layer.bias))

    def _candidates(self, parameter: nn.Parameter) -> tuple[LinearMethod, ...]:
        path, _ = self._waiting[id(parameter)].layers[0]
        return self._policy.candidates(path, fewest_bits=self._bits.get(id(parameter), 0))


def prepare_linears(root: nn.Module, policy: LinearPolicy | None = None) -> LinearReport:
    """Prepare every linear layer below `root` for this device, once its numbers are in; says which method each got and why."""
    preparer = LinearPreparer(root, policy or LinearPolicy())
    for parameter in preparer.waiting():
        preparer.prepare(parameter, parameter.detach())
    return preparer.report


def _fewest_bits(root: nn.Module) -> dict[int, int]:
    """How many bits the numbers of a weight need at least, by identity; of weights of heads alone."""
    found: dict[int, int] = {}
    for head in (module for module in root.modules() if isinstance(module, KeepsBits)):
        for layer in head.modules():
            if isinstance(layer, Linear):
                found[id(layer.weight)] = max(head.fewest_bits, found.get(id(layer.weight), 0))
    return found
