"""Decides how a step is taken: Muon for the base model's matrices, AdamW for everything else.

Muon (Jordan et al., 2024) makes the momentum of a weight matrix near-orthogonal before it is applied.  For a model this
small and a corpus this short it halves the steps that AdamW needs for the same loss.  torch has a Muon of its own, but
works in bfloat16, matrix by matrix, which many CPUs emulate; this one works in fp32 on all matrices of a shape at once.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import torch

# The coefficients of the Newton-Schulz iteration, and its number of iterations, are those of the method's authors.
_A, _B, _C = 3.4445, -4.7750, 2.0315
_ITERATIONS = 5


def orthogonalize(matrices: torch.Tensor) -> torch.Tensor:
    """Each matrix of [count, rows, columns] with its singular values pushed near one."""
    tall = matrices.shape[-2] > matrices.shape[-1]
    x = matrices.mT if tall else matrices
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(_ITERATIONS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=_B, alpha=_C), x, beta=_A)
    return x.mT if tall else x


class Muon(torch.optim.Optimizer):
    """Nesterov momentum, orthogonalised, with decoupled weight decay."""

    def __init__(
        self, parameters: Sequence[torch.nn.Parameter], lr: float, momentum: float = 0.95, weight_decay: float = 0.1
    ) -> None:
        super().__init__(parameters, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            by_shape: dict[torch.Size, list[torch.nn.Parameter]] = defaultdict(list)
            for parameter in group["params"]:
                by_shape[parameter.shape].append(parameter)
            for shape, parameters in by_shape.items():
                updates = orthogonalize(torch.stack([self._momentum(p, group["momentum"]) for p in parameters]))
                # A tall matrix gets a larger step, so that the size of its output changes as a square one's does.
                rate = group["lr"] * max(1.0, shape[0] / shape[1]) ** 0.5
                for parameter, update in zip(parameters, updates, strict=True):
                    parameter.mul_(1 - group["lr"] * group["weight_decay"]).sub_(update, alpha=rate)

    def _momentum(self, parameter: torch.nn.Parameter, momentum: float) -> torch.Tensor:
        assert parameter.grad is not None
        buffer = self.state[parameter].setdefault("momentum", torch.zeros_like(parameter))
        buffer.lerp_(parameter.grad, 1 - momentum)
        update: torch.Tensor = parameter.grad.lerp(buffer, momentum)
        return update
