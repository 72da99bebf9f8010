"""Linear layers: plain, and fused where members read the same input.

Decides the shape of each, the order of a fused layer's parts and which layers share a prepared weight. Knows nothing of how a
product is computed: a kernel from `linear_methods` does that.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from lorax_core.linear_methods.base import LinearKernel
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


def prepare_linears(root: nn.Module, policy: LinearPolicy | None = None) -> LinearReport:
    """Prepare every linear layer below `root` for this device, once its numbers are in; says which method each got and why.

    Layers that share a parameter share one prepared weight, an embedding among them included: memory holds it once.
    """
    policy = policy or LinearPolicy()
    bits = _fewest_bits(root)
    layers = [(name, module) for name, module in root.named_modules() if isinstance(module, PreparedSite)]
    # By identity: `_tie` made a tied embedding and its head hold the same parameter object.
    tables = {id(module.weight): module for _, module in layers if isinstance(module, Embedding)}
    prepared: dict[int, tuple[LinearKernel, LinearChoice]] = {}
    choices: list[LinearChoice] = []
    policy.check([layer.path or name for name, layer in layers if isinstance(layer, Linear)])
    for name, layer in layers:
        weight = layer.weight
        # Embeddings are skipped, as a look-up gains nothing from packing; a tied one follows its head below.
        if weight is None or not isinstance(layer, Linear):
            continue
        path = layer.path or name
        table = tables.get(id(weight))
        if id(weight) not in prepared:
            kernel, passed_over = choose(
                weight.detach(), policy.candidates(path, fewest_bits=bits.get(id(weight), 0)), rows=table is not None
            )
            # A packed layout that cannot give single rows leaves the table its parameter: memory then holds the weight twice.
            note = None if table is None or kernel.no_rows is None else f"a second, plain weight: {kernel.no_rows}"
            prepared[id(weight)] = kernel, LinearChoice(path, kernel.method, passed_over, note)
            if table is not None and kernel.no_rows is None:
                table.adopt(kernel)
        kernel, choice = prepared[id(weight)]
        choices.append(LinearChoice(path, choice.method, choice.passed_over, choice.note))
        layer.adopt(kernel.with_bias(layer.bias))
    return LinearReport(tuple(choices))


def _fewest_bits(root: nn.Module) -> dict[int, int]:
    """How many bits the numbers of a weight need at least, by identity; of weights of heads alone."""
    found: dict[int, int] = {}
    for head in (module for module in root.modules() if isinstance(module, KeepsBits)):
        for layer in head.modules():
            if isinstance(layer, Linear):
                found[id(layer.weight)] = max(head.fewest_bits, found.get(id(layer.weight), 0))
    return found
