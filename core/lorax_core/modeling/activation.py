"""Activation functions by the names that checkpoints use.

Decides which function a name means, with the numbers of transformers (several names mean near but unequal GELUs).
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from lorax_core.errors import CheckpointError, listed, nearest
from lorax_core.kernels.elementwise import Activation


def _gelu_tanh(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


def _quick_gelu(x: Tensor) -> Tensor:
    # 1.702 is the constant of the sigmoid approximation of GELU, as CLIP and transformers' QuickGELU have it.
    return x * torch.sigmoid(1.702 * x)


def _gelu_10(x: Tensor) -> Tensor:
    return F.gelu(x).clamp(-10, 10)


def _laplace(x: Tensor) -> Tensor:
    # sqrt(1/2) and sqrt(1/(4 pi)), rounded as in transformers: more digits would be other numbers.
    mu, sigma = 0.707107, 0.282095
    return 0.5 * (1.0 + torch.erf((x - mu) / (sigma * math.sqrt(2.0))))


def _relu2(x: Tensor) -> Tensor:
    return F.relu(x).square()


def _sqrt_softplus(x: Tensor) -> Tensor:
    return F.softplus(x).sqrt()


def _identity(x: Tensor) -> Tensor:
    return x


# transformers spells one function several ways. "gelu_new" and "gelu_fast" write out the tanh formula by hand;
# F.gelu's tanh form is the same up to rounding. "gelu" is the exact one with erf, and unequal to these.
_GELU = Activation("gelu", F.gelu)
_GELU_TANH = Activation("gelu_tanh", _gelu_tanh)
_SILU = Activation("silu", F.silu)
ACTIVATIONS: dict[str, Activation] = {
    "gelu": _GELU,
    "gelu_10": Activation("gelu_10", _gelu_10),
    "gelu_accurate": _GELU_TANH,
    "gelu_fast": _GELU_TANH,
    "gelu_new": _GELU_TANH,
    "gelu_python": _GELU,
    "gelu_python_tanh": _GELU_TANH,
    "gelu_pytorch_tanh": _GELU_TANH,
    "hardswish": Activation("hardswish", F.hardswish),
    "laplace": Activation("laplace", _laplace),
    "leaky_relu": Activation("leaky_relu", F.leaky_relu),
    "linear": Activation("linear", _identity),
    "mish": Activation("mish", F.mish),
    "quick_gelu": Activation("quick_gelu", _quick_gelu),
    "relu": Activation("relu", F.relu),
    "relu2": Activation("relu2", _relu2),
    "relu6": Activation("relu6", F.relu6),
    "sigmoid": Activation("sigmoid", torch.sigmoid),
    "silu": _SILU,
    "sqrtsoftplus": Activation("sqrtsoftplus", _sqrt_softplus),
    "swish": _SILU,
    "tanh": Activation("tanh", torch.tanh),
}


def get_activation(name: str) -> Activation:
    """The function called `name` in a `config.json`; raises CheckpointError for a name that is not supported."""
    found = ACTIVATIONS.get(name) if isinstance(name, str) else None
    if found is None:
        close = nearest(str(name), ACTIVATIONS)
        raise CheckpointError(
            f"activation {name!r:.60} is not supported; supported are {listed(ACTIVATIONS, limit=30)}",
            hint=f"did the checkpoint mean {close!r}?" if close else "a checkpoint with one of these is needed",
        )
    return found
