"""The oracle: the same architecture in transformers, with every number random.

Decides how a tiny checkpoint is made of a declaration and what the oracle answers. Knows nothing of how lorax-core computes.

Fresh transformers weights hide mistakes: biases are 0 and norm weights 1, so a dropped one changes nothing, and matrices are
so small that attention is nearly uniform and positions hardly matter. Here every tensor is drawn anew.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from lorax_core.plugins.cases import ArchitectureCases
from lorax_core.plugins.resolve import load_class
from lorax_core.testing.inputs import Input
from lorax_core.testing.result import CheckFailed
from lorax_core.types import Task

# Ten times transformers' usual 0.02, so that attention is far from uniform.
INITIALIZER_RANGE = 0.2
_LABELS = {Task.TOKEN_CLASSIFICATION: 5, Task.SEQUENCE_CLASSIFICATION: 3}


@dataclass(frozen=True, slots=True)
class Expected:
    """What the oracle says of one input: hidden rows `[tokens, hidden]`, and logits where its class has a head."""

    hidden: Tensor
    logits: Tensor | None


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Oracles without their progress bars and advice: what they warn of is theirs, not the plugin's."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def reference_class(cases: ArchitectureCases, task: Task) -> Any:
    """The oracle's class for a task; raises CheckFailed where the cases name none, or one that the kit cannot use."""
    path = cases.references.get(task)
    if path is None:
        raise CheckFailed(f"references names no class for {str(task)!r}, so nothing can be compared")
    found = load_class(path, None)
    lacking = [name for name in ("config_class", "from_pretrained", "save_pretrained") if not hasattr(found, name)]
    if lacking:
        raise CheckFailed(f"{path} has no {', '.join(lacking)}; references are classes like those of transformers")
    return found


def build(cases: ArchitectureCases, task: Task, config: Mapping[str, Any], folder: Path, seed: int) -> Path:
    """A checkpoint of the oracle for `task`, written to `folder` as its users would."""
    oracle = reference_class(cases, task)
    fields = {"initializer_range": INITIALIZER_RANGE, **config}
    if task in _LABELS and "num_labels" not in fields and "id2label" not in fields:
        fields["num_labels"] = _LABELS[task]
    with quiet(), torch.random.fork_rng(devices=[]):
        # fork_rng: building draws from the global generator, which is the caller's.
        model = oracle(oracle.config_class(**fields))
        randomise(model, seed)
        model.save_pretrained(folder)
    return folder


def reload(cases: ArchitectureCases, task: Task, folder: Path) -> nn.Module:
    """The oracle back from its files, in float32, with its readable attention."""
    with quiet():
        oracle = reference_class(cases, task)
        model = oracle.from_pretrained(folder, attn_implementation="eager", dtype=torch.float32)
    return cast("nn.Module", model.eval())


def randomise(model: nn.Module, seed: int) -> None:
    """Every parameter anew: matrices and biases spread about 0, norm weights about 1 but hardly ever near it."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            if tensor.ndim < 2 and name.rpartition(".")[2] in ("weight", "gamma"):
                # 0.4 to 1.6: never 0, which would hide what the norm is given.
                drawn = 0.4 + 1.2 * torch.rand(tensor.shape, generator=generator)
            else:
                drawn = INITIALIZER_RANGE * torch.randn(tensor.shape, generator=generator)
            tensor.copy_(drawn)


@torch.inference_mode()
def expect(model: nn.Module, tokens: Input, *, types: bool) -> Expected:
    """The oracle's answers for one input alone: no padding, nothing shared with other inputs."""
    # [1, tokens] each: the reference takes batches, ours are packed
    given = {"input_ids": torch.tensor([tokens.ids]), "attention_mask": torch.ones(1, len(tokens), dtype=torch.int64)}
    if types:
        given["token_type_ids"] = torch.tensor([tokens.types])
    base = cast("nn.Module", model.base_model)
    seen: list[Tensor] = []

    def remember(_module: nn.Module, _inputs: Any, output: Any) -> None:
        seen.append(output.last_hidden_state)

    # Classes with a head return logits and no last_hidden_state, so the base inside is listened to.
    hook = base.register_forward_hook(remember)
    try:
        logits = getattr(model(**given), "logits", None)
    finally:
        hook.remove()
    return Expected(seen[-1][0].float(), None if logits is None else logits[0].float())
