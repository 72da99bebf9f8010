"""A model: one backbone, its heads, and where adapters attach.

Decides how the parts hang together and runs them over a batch. Knows nothing of checkpoints, requests or scheduling.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import ClassVar, Final

import torch
from torch import Tensor, nn

from lorax_core.attention.base import AttentionSpec
from lorax_core.errors import CheckpointError, PluginError, RequestError, listed
from lorax_core.kernels.elementwise import Elementwise, HasElementwise
from lorax_core.linear_methods.select import LinearReport
from lorax_core.modeling.attention import Attention
from lorax_core.modeling.batch import Batch, HeadRows, StepOutput
from lorax_core.modeling.config import ModelConfig
from lorax_core.modeling.heads import Head
from lorax_core.modeling.linear import Linear
from lorax_core.modeling.site import Site
from lorax_core.types import Task

LACKING_HINT: Final = (
    'get the missing tensors; a head that shares the embeddings needs "tie_word_embeddings": true in config.json'
)


class Model(nn.Module):
    """A backbone and its heads, ready for batches.

    `sites` maps the dotted path of every core layer with parameters to that layer; `attention_layers` are in the order of
    the cache's layers. `forward` takes a packed `Batch` and answers what each of its sequences asked for.

    `dtype` is that of activations and `device` where they are; both are stated by the code that makes the model, for a prepared
    weight may have another dtype. `linears` says how linear layers are computed, and `lacking` what a checkpoint lacks for the
    task of the class that it names.

    A subclass may fix the `task`; loaded as such, the model has that head alone.

    Raises PluginError for a causal backbone whose layers differ in the heads that they cache.
    """

    task: ClassVar[Task | None] = None

    def __init__(
        self,
        config: ModelConfig,
        backbone: nn.Module,
        heads: Mapping[Task, Head],
        *,
        dtype: torch.dtype,
        device: str | torch.device,
    ) -> None:
        super().__init__()
        self.dtype = dtype
        self.device = torch.device(device)
        self.linears = LinearReport()
        self.lacking: Mapping[Task, str] = {}
        self.config = config
        self.backbone = backbone
        self.heads = nn.ModuleDict({task.value: head for task, head in heads.items()})
        # `modules()` walks in order of definition, so index 0 is the first layer; the cache is `[layers, 2, pages, ...]`.
        self.attention_layers = [module for module in backbone.modules() if isinstance(module, Attention)]
        for index, layer in enumerate(self.attention_layers):
            layer.index = index
        if self.needs_kv_cache:
            _refuse_uneven_cache(backbone)
        self.sites: dict[str, Site] = {}
        for path, module in self.named_parts():
            if isinstance(module, Site):
                module.path = path
                self.sites[path] = module
        self.eval()

    def named_parts(self) -> Iterator[tuple[str, nn.Module]]:
        """Modules under canonical names: those of the backbone and of each head, without a prefix."""
        for root in (self.backbone, *self.heads.values()):
            yield from root.named_modules()

    def named_tensors(self) -> dict[str, nn.Parameter]:
        """Parameters under canonical names, each its own entry even where two share storage."""
        roots = (self.backbone, *self.heads.values())
        # remove_duplicate=False: a tied weight is wanted under both of its names.
        return {name: tensor for root in roots for name, tensor in root.named_parameters(remove_duplicate=False)}

    @property
    def tasks(self) -> tuple[Task, ...]:
        """What the heads of this checkpoint can answer."""
        return tuple(Task(name) for name in self.heads)

    @property
    def needs_kv_cache(self) -> bool:
        """Whether rows attend through the paged cache: true of causal models, whatever the task."""
        return any(layer.spec.causal for layer in self.attention_layers)

    @property
    def attention_specs(self) -> tuple[AttentionSpec, ...]:
        """The distinct kinds of attention in the model, in order of appearance."""
        return tuple(dict.fromkeys(layer.spec for layer in self.attention_layers))

    @property
    def widest_window(self) -> int | None:
        """Keys that a query sees at most, itself included; None when some layer sees everything."""
        windows = [layer.spec.window for layer in self.attention_layers]
        # One layer that sees everything needs every page, so none may be released early.
        return None if None in windows else max((window for window in windows if window is not None), default=None)

    @property
    def max_tokens(self) -> int:
        """The longest sequence, prompt and answer together, in tokens."""
        return self.config.max_tokens

    @property
    def linear_bytes(self) -> int:
        """Bytes of the prepared weights of linear layers, which every step reads; the table of an embedding is none."""
        kernels = [site.kernel for site in self.sites.values() if isinstance(site, Linear) and site.is_prepared]
        return sum({id(kernel): kernel.nbytes for kernel in kernels}.values())

    def head(self, task: Task) -> Head:
        """The head that answers `task`.

        Raises CheckpointError where the checkpoint claims to have it, otherwise RequestError that says which heads there are.
        """
        if task in self.lacking:
            raise CheckpointError(self.lacking[task], hint=LACKING_HINT)
        if task.value not in self.heads:
            raise RequestError(
                f"this checkpoint has no head for {task.value!r}; it has {listed(t.value for t in self.tasks)}",
                hint="`lorax models check PATH` tells what a checkpoint holds",
            )
        head = self.heads[task.value]
        assert isinstance(head, Head)
        return head

    @torch.inference_mode()
    def forward(self, batch: Batch) -> StepOutput:
        batch.start_pass()
        hidden: Tensor = self.backbone(batch)  # [tokens, hidden]
        # Selected before the head: logits over the vocabulary for every prompt token would dwarf the activations.
        # Each [sum(group.counts), hidden].
        rows = [hidden[group.rows] for group in batch.head_rows]
        answers = tuple(self._answer(one, group) for one, group in zip(rows, batch.head_rows, strict=True))
        kept = (one if group.speculator is not None else None for one, group in zip(rows, batch.head_rows, strict=True))
        return StepOutput(answers, tuple(kept))

    def use_elementwise(self, kernels: Elementwise) -> None:
        """Let all layers compute with these kernels, once at load; other models in this process keep theirs."""
        for module in self.modules():
            if isinstance(module, HasElementwise):
                module.elementwise = kernels

    def base_logits(self, hidden: Tensor) -> Tensor:
        """Logits `[rows, vocab]` of hidden rows `[rows, hidden]`, without any adapter."""
        # Counts and sequences stay empty, as a language model's head reads neither.
        group = HeadRows(Task.GENERATE, (), (), torch.arange(len(hidden), device=hidden.device))
        return self.head(Task.GENERATE)(hidden, group)

    def _answer(self, hidden: Tensor, group: HeadRows) -> Tensor:
        if group.task is None:
            return hidden
        return (group.head or self.head(group.task))(hidden, group)


def _refuse_uneven_cache(backbone: nn.Module) -> None:
    # The cache is one tensor, so a page has the same size in every layer.
    layers: dict[tuple[int, int], str] = {}
    for name, module in backbone.named_modules():
        if isinstance(module, Attention):
            layers.setdefault((module.spec.kv_heads, module.spec.head_dim), name)
    if len(layers) > 1:
        shapes = ", ".join(f"{name!r} {heads} heads of {dim}" for (heads, dim), name in layers.items())
        raise PluginError(
            f"layers of {type(backbone).__name__} cache keys of different shapes: {shapes}",
            hint="one cache serves all layers: refuse such a configuration in a validator of the plugin",
        )
