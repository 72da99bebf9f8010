"""What a configuration may ask for.

Decides how far a model is built before it is known to fit its file: on `meta`, with no more parameters than the file's tensors
could fill. And what no plugin needs to check by itself: buffers of any size, and masks that a plugin does not compute.
Holds for every architecture, also those of other packages.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final

import torch
from torch.overrides import TorchFunctionMode

from lorax_core.errors import CheckpointError, plain
from lorax_core.modeling.model import Model
from lorax_core.weights.checkpoint import Checkpoint

BUFFER_BYTES: Final = 2**30
"""What the buffers of a model may take beside its parameters: cosines of 1,000,000 positions, for one."""
# Calls of torch that building may take: a layer makes some for each of its tensors. Enough for any model that repeats a few
# stored tensors in many layers, and done in seconds.
_CALLS, _CALLS_PER_TENSOR = 50_000, 100
_COMPARE = "compare it with the config.json that transformers writes for this architecture"


@contextmanager
def within_bounds(checkpoint: Checkpoint) -> Iterator[None]:
    """Build a model inside: tensors are made on `meta`; raises CheckpointError where the configuration asks for too many."""
    with as_config_error(checkpoint), torch.device("meta"), _Calls(checkpoint):
        yield


@contextmanager
def as_config_error(checkpoint: Checkpoint) -> Iterator[None]:
    """What blocks raise for sizes and numbers that they cannot have becomes a CheckpointError that names the configuration."""
    try:
        yield
    # ValueError by core's blocks and by plugins, the others by torch and Python for sizes that overflow.
    except (ValueError, RuntimeError, ArithmeticError) as error:
        raise CheckpointError(
            f"{checkpoint.path} has a config.json that no model can be built from: {plain(error)}", hint=_COMPARE
        ) from error


def refuse_large_buffers(checkpoint: Checkpoint, model: Model) -> None:
    """Raises CheckpointError when buffers, whose sizes no tensor of the file confirms, take more than BUFFER_BYTES."""
    sizes = {name: buffer.nbytes for name, buffer in model.named_buffers()}
    if sum(sizes.values()) > BUFFER_BYTES:
        name = max(sizes, key=lambda one: sizes[one])
        raise CheckpointError(
            f"{checkpoint.path} has a config.json that asks for buffers of {sum(sizes.values()) / 1e9:.1f} GB; at most "
            f"{BUFFER_BYTES / 1e9:.1f} are made. The largest is {name!r}",
            hint=f"is max_position_embeddings {checkpoint.config.get('max_position_embeddings')!r:.40} meant?",
        )


def refuse_other_masks(checkpoint: Checkpoint, model: Model) -> None:
    """Raises CheckpointError when the file states another direction of attention than the model computes.

    transformers applies these keys in every architecture; a plugin that does not read them would give other numbers.
    """
    causal = {layer.spec.causal for layer in model.attention_layers}
    config = checkpoint.config
    if True in causal and not config.get("is_causal", True):
        stated, seen = f"is_causal {config['is_causal']!r:.20}", "attends to earlier tokens only"
    elif False in causal and config.get("is_causal", True) and config.get("is_decoder", False):
        stated, seen = f"is_decoder {config['is_decoder']!r:.20}", "attends in both directions"
    else:
        return
    raise CheckpointError(
        f"{checkpoint.path} states {stated}, and {checkpoint.config['model_type']!r} {seen} here",
        hint="remove the key from config.json where the checkpoint was trained otherwise",
    )


class _Calls(TorchFunctionMode):
    """Counts calls of torch, by which tensors and parameters are made."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        super().__init__()
        self._checkpoint = checkpoint
        self._left = _CALLS + _CALLS_PER_TENSOR * len(checkpoint.tensors)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self._left -= 1
        if self._left < 0:
            raise CheckpointError(
                f"{self._checkpoint.path} has a config.json that asks for far more parameters than its "
                f"{len(self._checkpoint.tensors)} tensors can fill",
                hint=_COMPARE,
            )
        return func(*args, **(kwargs or {}))
