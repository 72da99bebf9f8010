"""Tiny models of an architecture of transformers: small sizes, every number random, the same in every run.

Decides which fields of a configuration are sizes, by the shapes of the tensors that they change. Knows nothing of what a model
computes.
"""

from __future__ import annotations

import contextlib
import copy
import warnings
from collections.abc import Iterator, Mapping
from typing import Any, Final, cast

import torch
from torch import Tensor, nn

from lorax_core.errors import PluginError
from lorax_core.scaffold.source import Source
from lorax_core.types import Task

VOCABULARY, WIDTH, INNER, LAYERS, HEADS, HEAD_DIM, POSITIONS = 128, 128, 256, 2, 2, 64, 320
TOKENS: Final = 20
"""How many tokens a tiny model reads."""
WINDOW: Final = 8
SPREAD: Final = 0.2
"""The deviation of tensors, as in the conformance kit."""
_LARGEST = 1024
# By the names that transformers has for all architectures; a class's `attribute_map` says what it calls them.
_SIZES: Final = {
    "vocab_size": VOCABULARY,
    "hidden_size": WIDTH,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": 1,
    "head_dim": HEAD_DIM,
    "max_position_embeddings": POSITIONS,
}
_INSISTED: Final = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads")


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Models of transformers without their advice: what it says of tiny ones helps nobody."""
    from transformers.utils import logging

    level = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(level)


class Tiny:
    """Makes tiny configurations and models of one architecture. `fields` is what a tiny configuration states; `equal` are those
    of them that are the width of word embeddings, here that of hidden rows.

    Raises PluginError for an architecture whose models cannot be made from a few sizes.
    """

    def __init__(self, source: Source) -> None:
        self.source = source
        self.spelling: Mapping[str, str] = source.config_class.attribute_map
        self.model_class = source.classes.get(Task.GENERATE) or source.classes[Task.EMBED]
        try:
            with quiet():
                self.defaults: Mapping[str, Any] = source.config_class().to_dict()
        except Exception as error:
            raise self._unusable(f"{source.config_class.__name__}() cannot be made: {error}") from error
        lacking = [name for name in _INSISTED if self.spelt(name) not in self.defaults]
        if lacking:
            raise self._unusable(f"its configuration has no {', '.join(lacking)}")
        self.fields = self._sizes()
        self.inner: dict[str, int] = {}
        self.equal: dict[str, int] = {}
        try:
            self.model()
        except Exception as error:
            raise self._unusable(f"a tiny one cannot be made: {type(error).__name__}: {error}") from error
        self._find_widths()
        self.fields |= self.inner | self.equal
        self.fields |= self._stated()

    def spelt(self, name: str) -> str:
        """What the architecture calls a field that has a name common to all."""
        return self.spelling.get(name, name)

    def config(self, **changes: Any) -> Any:
        """The tiny configuration with some changes; raises what transformers raises for values that it refuses."""
        with quiet():
            return self.source.config_class(**copy.deepcopy({**self.fields, **changes}))

    def model(self, config: Any = None, kind: Any = None) -> nn.Module:
        """A model of `kind` (the one that generates, or the base model); the same tensors always have the same numbers."""
        with quiet(), torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            made = (kind or self.model_class)._from_config(config or self.config(), attn_implementation="eager").eval()
            randomise(made)
        return cast("nn.Module", made)

    def ids(self, config: Any) -> Tensor:
        """Tokens `[1, TOKENS]`, none of them padding."""
        pad = getattr(config, "pad_token_id", None)
        usable = [token for token in range(VOCABULARY) if token != pad]
        return torch.tensor([[usable[at * 37 % len(usable)] for at in range(1, TOKENS + 1)]])

    def _unusable(self, why: str) -> PluginError:
        return PluginError(
            f"no package can be written for {self.source.model_type!r}: {why}",
            hint="write it by hand, after docs/plugins.md",
        )

    def _sizes(self) -> dict[str, Any]:
        found: dict[str, Any] = {
            self.spelt(name): size for name, size in _SIZES.items() if self.spelt(name) in self.defaults
        }
        for name, value in self.defaults.items():
            # Ids of special tokens lie inside the tiny vocabulary, or there are none.
            if name.endswith("_token_id") and isinstance(value, int) and value >= VOCABULARY:
                found[name] = None if self._is_taken(name, None) else VOCABULARY - 1
        return found

    def _is_taken(self, name: str, value: Any) -> bool:
        try:
            with quiet():
                self.source.config_class(**{name: value})
        except Exception:  # whatever transformers raises
            return False
        return True

    def _find_widths(self) -> None:
        """Fields that widen some tensors and make no new ones, those of feed-forward layers, and that widen word embeddings."""
        shapes = _shapes(self.model())
        for name, value in self.defaults.items():
            if name in self.fields or not isinstance(value, int) or isinstance(value, bool) or value < 32:
                continue
            with contextlib.suppress(Exception):
                size = INNER if value != INNER else 2 * INNER
                model = self.model(self.config(**{name: size}))
                other = _shapes(model)
                if _embedded(model) == size:
                    wider = self.config(**{self.spelt("hidden_size"): 2 * WIDTH}).to_dict()
                    # Where transformers makes it the width of hidden rows, a configuration need not.
                    self.equal |= {name: WIDTH} if wider[name] != 2 * WIDTH else {}
                elif other != shapes and other.keys() == shapes.keys():
                    self.inner[name] = INNER

    def _stated(self) -> dict[str, Any]:
        """What the file that the package is made from says otherwise than the defaults, sizes aside."""
        found: dict[str, Any] = {}
        for name, value in self.source.stated.items():
            if name not in self.defaults or name in self.fields or name in COMMON or value == self.defaults[name]:
                continue
            # A count of what takes memory, experts say: not for a tiny model.
            if isinstance(value, int) and abs(value) > _LARGEST:
                continue
            found[name] = value[:LAYERS] if isinstance(value, list) else value
        return found


def randomise(model: nn.Module) -> None:
    """New numbers for every parameter: as transformers makes them, biases are 0 and norms 1, and neither would be seen."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            if tensor.ndim < 2 and name.rpartition(".")[2] in ("weight", "gamma"):
                tensor.copy_(tensor.mean() - 0.6 + 1.2 * torch.rand(tensor.shape, generator=generator))
            else:
                tensor.copy_(SPREAD * torch.randn(tensor.shape, generator=generator))


def _embedded(model: nn.Module) -> int:
    """The width of word embeddings."""
    return int(model.get_input_embeddings().embedding_dim)  # type: ignore[operator]


def _shapes(model: nn.Module) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in model.named_parameters()}


COMMON: Final = frozenset(
    [
        "_name_or_path", "architectures", "auto_map", "chunk_size_feed_forward", "dtype", "id2label", "is_encoder_decoder",
        "label2id", "model_type", "num_labels", "output_attentions", "output_hidden_states", "problem_type", "return_dict",
        "torch_dtype", "transformers_version",
    ]
)  # fmt: skip
"""Fields that any configuration of transformers has, which say nothing of an architecture, or which core reads itself."""
