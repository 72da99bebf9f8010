"""The oracle: the same architecture in transformers, with every number random.

Decides how a tiny checkpoint is made of a declaration and what the oracle answers. Knows nothing of how lorax-core computes.

Fresh transformers weights hide mistakes: biases are 0 and norm weights 1, so a dropped one changes nothing, and matrices are
so small that attention is nearly uniform and positions hardly matter. Here every tensor has new random numbers.

The oracle answers in float64. What it loses in float32 is what any right model may lose, too.
"""

from __future__ import annotations

import contextlib
import copy
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self, cast

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from lorax_core.plugins.cases import ArchitectureCases
from lorax_core.plugins.record import explain
from lorax_core.plugins.resolve import load_class
from lorax_core.testing.inputs import Input
from lorax_core.testing.result import CheckFailed
from lorax_core.types import Task

# Ten times transformers' usual 0.02, so that attention is far from uniform.
INITIALIZER_RANGE = 0.2
_LABELS = {Task.TOKEN_CLASSIFICATION: 5, Task.SEQUENCE_CLASSIFICATION: 3}


@dataclass(frozen=True, slots=True)
class Expected:
    """What the oracle says of one input: hidden rows `[tokens, hidden]`, and logits where its class has a head.

    In float64, so that no rounding is lost on the way to a comparison.
    """

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


@contextlib.contextmanager
def blamed(what: str) -> Iterator[None]:
    """An exception of the reference's own code becomes a CheckFailed that says whose it is."""
    try:
        yield
    except CheckFailed:
        raise
    except Exception as error:
        raise CheckFailed(
            f"the reference, not the plugin, fails: {what} raises {explain(error)}; does the reference take this config?"
        ) from error


def fields(task: Task, config: Mapping[str, Any]) -> dict[str, Any]:
    """What the oracle's configuration is made of: that of the variant, and what the kit decides where it says nothing."""
    # Deep: transformers writes into the rotary parameters that it is given.
    stated = {"initializer_range": INITIALIZER_RANGE, **copy.deepcopy(dict(config))}
    if task in _LABELS and "num_labels" not in stated and "id2label" not in stated:
        stated["num_labels"] = _LABELS[task]
    return stated


def build(cases: ArchitectureCases, task: Task, config: Mapping[str, Any], folder: Path, seed: int) -> Path:
    """A checkpoint of the oracle for `task`, written to `folder` as its users would."""
    oracle, stated = reference_class(cases, task), fields(task, config)
    with blamed(f"building {cases.references[task]}"), quiet(), torch.random.fork_rng(devices=[]):
        # fork_rng: building draws from the global generator, which is the caller's.
        model = oracle(oracle.config_class(**stated))
        randomise(model, seed, stated["initializer_range"])
        model.save_pretrained(folder)
    return folder


def reload(cases: ArchitectureCases, task: Task, folder: Path) -> nn.Module:
    """The oracle back from its files, in float32, with its readable attention."""
    oracle = reference_class(cases, task)
    with blamed(f"loading {cases.references[task]}"), quiet():
        model = oracle.from_pretrained(folder, attn_implementation="eager", dtype=torch.float32)
    return cast("nn.Module", model.eval())


def randomise(model: nn.Module, seed: int, spread: float = INITIALIZER_RANGE) -> None:
    """New parameters: matrices and biases spread about 0, norm weights about their neutral value, rarely near it."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            if tensor.ndim < 2 and name.rpartition(".")[2] in ("weight", "gamma"):
                # A fresh norm changes nothing, so its weight is 1, or 0 where it computes with `1 + weight`. In sum
                # 0.4 to 1.6: never 0, which would hide what the norm is given.
                drawn = tensor.mean() - 0.6 + 1.2 * torch.rand(tensor.shape, generator=generator)
            else:
                drawn = spread * torch.randn(tensor.shape, generator=generator)
            tensor.copy_(drawn)


class _Float64(TorchFunctionMode):
    """Float64 where the code of a model asks for float32, as norms and softmax do.

    Not in modules that only make tables, of the angles of positions: a right model makes them to the last bit as the reference
    does, so their rounding is no loss.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self._model = model
        self._inside = 0
        self._hooks: list[Any] = []

    def __enter__(self) -> Self:
        for module in filter(_is_table, self._model.modules()):
            self._hooks += [
                module.register_forward_pre_hook(lambda *_: self._step(1)),
                module.register_forward_hook(lambda *_: self._step(-1), always_call=True),
            ]
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)  # type: ignore[no-untyped-call]
        for hook in self._hooks:
            hook.remove()

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if self._inside:
            return func(*args, **(kwargs or {}))
        if func is torch.Tensor.float:
            func = torch.Tensor.double
        return func(*map(_wide, args), **{name: _wide(value) for name, value in (kwargs or {}).items()})

    def _step(self, by: int) -> None:
        self._inside += by


def _wide(value: Any) -> Any:
    return torch.float64 if value is torch.float32 else value


def _is_table(module: nn.Module) -> bool:
    """Whether a module has numbers, and none of them are parameters."""
    return next(module.buffers(), None) is not None and next(module.parameters(), None) is None


def widened(model: nn.Module) -> nn.Module:
    """A copy of an oracle in float64, but for its tables."""
    wide = copy.deepcopy(model).double()
    for module in filter(_is_table, wide.modules()):
        module.float()  # back again, which loses nothing
    return wide


def expect(model: nn.Module, tokens: Input, *, types: bool) -> Expected:
    """The oracle's answers for one input alone, in the oracle's dtype: no padding, nothing shared with other inputs."""
    # [1, tokens] each: the reference takes batches, ours are packed
    given = {"input_ids": torch.tensor([tokens.ids]), "attention_mask": torch.ones(1, len(tokens), dtype=torch.int64)}
    if types:
        given["token_type_ids"] = torch.tensor([tokens.types])
    hidden, logits = _observed(model, given, f"on {len(tokens)} tokens")
    return Expected(hidden[0].double(), None if logits is None else logits[0].double())


def expect_rows(model: nn.Module, ids: Sequence[int]) -> Tensor:
    """The oracle's hidden rows `[ids, hidden]` of inputs of one token each, in the oracle's dtype."""
    hidden, _ = _observed(model, {"input_ids": torch.tensor(ids)[:, None]}, "on single tokens")
    return hidden[:, 0].double()


@torch.inference_mode()
def _observed(model: nn.Module, given: Mapping[str, Tensor], where: str) -> tuple[Tensor, Tensor | None]:
    """What a batch gives: hidden rows, and logits where the class has a head."""
    base = cast("nn.Module", model.base_model)
    seen: list[Tensor] = []

    def remember(_module: nn.Module, _inputs: Any, output: Any) -> None:
        if hasattr(output, "last_hidden_state"):
            seen.append(output.last_hidden_state)

    # Classes with a head return logits and no last_hidden_state, so the base inside is listened to, and what it consists of:
    # OPT's call the decoder inside of it.
    hooks = [module.register_forward_hook(remember) for module in (base, *base.children())]
    wide = next(model.parameters()).dtype is torch.float64
    try:
        with blamed(f"{type(model).__name__} {where}"), _Float64(model) if wide else contextlib.nullcontext():
            logits = getattr(model(**given), "logits", None)
    finally:
        for hook in hooks:
            hook.remove()
    if not seen:
        raise CheckFailed(
            f"{type(model).__name__} gives no last_hidden_state: its base model, and what that consists of"
        )
    return seen[-1], logits


def with_larger_tables(model: nn.Module, factor: float) -> nn.Module:
    """A copy of an oracle whose embeddings of words are larger."""
    changed = copy.deepcopy(model)
    with torch.no_grad():
        changed.get_input_embeddings().weight.mul_(factor)  # type: ignore[operator]
    return changed


def stressed(model: nn.Module) -> nn.Module:
    """A copy of an oracle whose rows are so large that float16 cannot hold their squares, and whose layers add little to them.

    Both by powers of two, which lose nothing. What is left to lose is what norms lose.
    """
    changed = copy.deepcopy(model)
    tables = {id(module.weight) for module in changed.modules() if isinstance(module, nn.Embedding)}
    with torch.no_grad():
        for module in changed.modules():
            own = dict(module.named_parameters(recurse=False))
            flat = all(parameter.ndim < 2 for parameter in own.values())  # a norm
            for parameter in own.values():
                if id(parameter) not in tables and not flat:
                    parameter.mul_(2.0**-6)
        for parameter in changed.parameters():
            if id(parameter) in tables:
                parameter.mul_(2.0**11)
    return changed


def loss(rounded: Sequence[Expected], exact: Sequence[Expected]) -> float:
    """How far an oracle's answers in float32 are from those in float64, as a share of the largest number of each kind."""
    found = 0.0
    for kind in ("hidden", "logits"):
        pairs = [(getattr(one, kind), getattr(other, kind)) for one, other in zip(rounded, exact, strict=True)]
        pairs = [(one, other) for one, other in pairs if other is not None]
        if pairs:
            apart = max(float((one - other).abs().max()) for one, other in pairs)
            found = max(found, apart / max(float(other.abs().max()) for _, other in pairs))
    return found
