"""One variant of one architecture, with all that checks ask of it.

Decides which tasks a variant has, and keeps what is costly to make: checkpoints, oracles, loaded models, answers. Knows
nothing of what is checked.
"""

from __future__ import annotations

import json
import tempfile
import zlib
from collections.abc import Collection, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from lorax_core.attention.select import Selection, select_backend
from lorax_core.errors import LoraxError
from lorax_core.kernels.select import select_elementwise
from lorax_core.modeling.heads import EmbeddingHead
from lorax_core.modeling.linear import prepare_linears
from lorax_core.modeling.model import Model
from lorax_core.plugins.cases import ArchitectureCases
from lorax_core.plugins.host import PluginHost
from lorax_core.plugins.spec import ArchitectureSpec
from lorax_core.testing import reference
from lorax_core.testing.compare import TOLERANCES, tolerance
from lorax_core.testing.inputs import Input, make_inputs
from lorax_core.testing.packed import Bench, PackedAnswer
from lorax_core.testing.reference import Expected
from lorax_core.testing.result import CheckFailed, NotApplicable
from lorax_core.types import Pooling, Task
from lorax_core.weights.account import Account
from lorax_core.weights.checkpoint import Checkpoint
from lorax_core.weights.loader import LoadedModel, assemble, load_model

BASE = "base"
"""The variant that is `tiny_config` itself."""

PAGE_SIZES = (16, 1, 5, 64, 256)
"""Page sizes to try, the usual one first; a backend may refuse some."""


class Case:
    """A variant's checkpoints, one for each task, and the models loaded from them. Everything is made on first use.

    `failure_keys` are the names that `known_failures` may use.
    """

    def __init__(
        self,
        spec: ArchitectureSpec,
        cases: ArchitectureCases,
        host: PluginHost,
        variant: str,
        folder: Path,
        *,
        failure_keys: Collection[str] = (),
        device: str = "cpu",
        backend: str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        self.spec = spec
        self.cases = cases
        self.failure_keys = failure_keys
        self.host = host
        self.variant = variant
        self.folder = folder
        self.device = device
        self.backend = backend
        self.config: dict[str, Any] = cases.config(variant)
        self._dtype = dtype
        self._made: dict[tuple[Any, ...], Any] = {}

    # --- what there is ---

    @cached_property
    def tasks(self) -> tuple[Task, ...]:
        """The tasks that can be compared, the architecture's default first.

        A checkpoint that attends in both directions (`is_causal` false) generates nothing.
        """
        refused = {Task.GENERATE} if self.config.get("is_causal") is False else set()
        preferred = (self.spec.default_task, *self.spec.tasks)
        found = tuple(
            task for task in dict.fromkeys(preferred) if task in self.cases.references and task not in refused
        )
        if not found:
            raise CheckFailed(
                "references names no class for any task of this variant: there is nothing to build it with"
            )
        return found

    @property
    def main(self) -> Task:
        """The task whose checkpoint stands for the variant where one is enough."""
        return self.tasks[0]

    @property
    def chosen(self) -> tuple[Task, ...]:
        """The tasks that costly checks run on: all of them on the base variant, the main one on the others."""
        return self.tasks if self.variant == BASE else self.tasks[:1]

    @cached_property
    def inputs(self) -> list[Input]:
        """What the models read. The last one is the longest that the model takes, 288 tokens at most."""
        config = self.reference(self.main).config
        return make_inputs(
            vocab=config.vocab_size,
            types=self.type_count,
            max_tokens=self.loaded(self.main).model.max_tokens,
            pad=getattr(config, "pad_token_id", None),
        )

    @property
    def long_input(self) -> Input:
        """The longest of the inputs."""
        return self.inputs[-1]

    @property
    def type_count(self) -> int:
        """How many token types there are; one where the architecture has none."""
        if "token_types" not in self.spec.features:
            return 1
        return int(self.reference(self.main).config.type_vocab_size)

    # --- the oracle ---

    def checkpoint(self, task: Task) -> Path:
        """The folder of a checkpoint for `task`, every number in it random."""
        # Written once and read by both sides, so that ours and theirs start from the same files.
        folder = self.folder / task
        if not folder.exists():
            # hash() of a string differs from process to process; a failure must come back with the same numbers.
            seed = zlib.crc32(f"{self.variant} {task}".encode())
            reference.build(self.cases, task, self.config, folder, seed)
        return folder

    def stated(self, task: Task) -> dict[str, Any]:
        """The `config.json` of a checkpoint for `task`, as the oracle writes it: every key, default or not."""
        return dict(json.loads((self.checkpoint(task) / "config.json").read_text(encoding="utf-8")))

    def reference(self, task: Task) -> Any:
        """The oracle, reloaded from that folder."""
        key = ("reference", task)
        if key not in self._made:
            self._made[key] = reference.reload(self.cases, task, self.checkpoint(task))
        return self._made[key]

    def exact(self, task: Task) -> nn.Module:
        """The oracle in float64; in float32 where its code takes nothing else (GPT-2's upcast attention)."""
        key = ("exact", task)
        if key not in self._made:
            self._made[key] = self._widened(self.reference(task))
        return cast("nn.Module", self._made[key])

    def expected(self, task: Task) -> list[Expected]:
        """What the oracle says of each input, in float64."""
        key = ("expected", task)
        if key not in self._made:
            self._made[key] = self.expect(self.exact(task), self.inputs)
        return cast("list[Expected]", self._made[key])

    @cached_property
    def loss(self) -> float:
        """What the oracle itself loses in float32, of all that the checks compare with it."""
        return max(
            reference.loss(self.expect(self.reference(task), self.inputs), self.expected(task)) for task in self.chosen
        )

    def judge(self, oracle: nn.Module, inputs: Sequence[Input]) -> tuple[list[Expected], float]:
        """What any oracle says of some inputs in float64, and what it loses in float32."""
        exact = self.expect(self._widened(oracle), inputs)
        return exact, reference.loss(self.expect(oracle, inputs), exact)

    def _widened(self, oracle: nn.Module) -> nn.Module:
        wide = reference.widened(oracle)
        try:
            self.expect(wide, self.inputs[:1])
        except CheckFailed:
            return oracle
        return wide

    def expect(self, oracle: nn.Module, inputs: Sequence[Input]) -> list[Expected]:
        """What an oracle says of some inputs, one by one."""
        types = "token_types" in self.spec.features
        with reference.quiet():
            return [reference.expect(oracle, tokens, types=types) for tokens in inputs]

    # --- ours ---

    def assemble(self, folder: Path, dtype: torch.dtype | None = None) -> tuple[LoadedModel, Account]:
        """Our model filled as far as the checkpoint goes, and the account of what was not."""
        return assemble(Checkpoint(folder), self.host, dtype, self.device)

    def account(self, task: Task) -> Account:
        """Which tensors of the task's checkpoint went where."""
        return self._filled(task, self.dtype)[1]

    def loaded(self, task: Task, dtype: torch.dtype | None = None) -> LoadedModel:
        """Our model of the task's checkpoint, in the case's dtype unless another is given."""
        base, account = self._filled(task, dtype or self.dtype)
        if account.problems:
            raise CheckFailed(f"the checkpoint for {task!s} cannot be loaded: {'; '.join(account.problems)}")
        return base

    def load(self, folder: Path, dtype: torch.dtype | None = None) -> LoadedModel:
        """Our model of any whole checkpoint of this architecture."""
        return _mean(load_model(Checkpoint(folder), self.host, dtype=dtype or self.dtype, device=self.device))

    def respelt(self, task: Task, config: Mapping[str, Any]) -> LoadedModel:
        """Our model of the task's checkpoint under another `config.json`."""
        source = self.checkpoint(task)
        with tempfile.TemporaryDirectory(dir=self.folder) as name:
            folder = Path(name)
            (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
            for file in source.glob("*.safetensors"):
                (folder / file.name).hardlink_to(file)
            return self.load(folder)

    def _filled(self, task: Task, dtype: torch.dtype) -> tuple[LoadedModel, Account]:
        key = ("filled", task, dtype)
        if key not in self._made:
            base, account = self.assemble(self.checkpoint(task), dtype)
            if not account.problems:
                model = _mean(base).model
                prepare_linears(model)
                if model.device.type == "cpu":  # as an engine does; on a GPU trials stand before these kernels
                    model.use_elementwise(select_elementwise(model.dtype, model.device)[0])
            self._made[key] = base, account
        return cast("tuple[LoadedModel, Account]", self._made[key])

    @cached_property
    def dtype(self) -> torch.dtype:
        """What the checks compute in: float32 where the backend takes it, else a 16-bit type."""
        if self._dtype is not None:
            return self._dtype
        model = self.assemble(self.checkpoint(self.main))[0].model
        # Float32 comes first: its tolerance is small enough to show a mistake in a single layer.
        for dtype in TOLERANCES:
            if any(self._select(model, size, dtype) is not None for size in PAGE_SIZES):
                return dtype
        raise CheckFailed(self._refusal(model, tuple(TOLERANCES)))

    @cached_property
    def refusal(self) -> str | None:
        """Why the named attention backend does not support this variant; None when it does, or when none was named."""
        if self.backend is None:
            return None
        model = self.assemble(self.checkpoint(self.main))[0].model
        dtypes = tuple(TOLERANCES) if self._dtype is None else (self._dtype,)
        if any(self._select(model, size, dtype) is not None for dtype in dtypes for size in PAGE_SIZES):
            return None
        return self._refusal(model, dtypes)

    @property
    def tolerance(self) -> float:
        """How large a difference may be, as a share of the reference's largest number."""
        return tolerance(self.dtype, self.loss)

    def page_sizes(self, model: Model) -> list[int]:
        """The page sizes that the backend takes, of those to try."""
        return [size for size in PAGE_SIZES if self._select(model, size, model.dtype) is not None]

    def bench(self, base: LoadedModel, page_size: int | None = None, inputs: Sequence[Input] | None = None) -> Bench:
        """A bench for a model, with room for some inputs (those of the case unless given)."""
        model = base.model
        # A backend may refuse some sizes; the first that it takes will do.
        for size in PAGE_SIZES if page_size is None else (page_size,):
            chosen = self._select(model, size, model.dtype)
            if chosen is not None:
                return Bench(model, chosen.backend, chosen.layout, self.inputs if inputs is None else inputs)
        # The backend's limits are not the architecture's mistakes.
        raise NotApplicable(self._refusal(model, (model.dtype,)))

    def alone(self, task: Task) -> list[PackedAnswer]:
        """Our answers of each input, every one in a batch of its own: what all other ways must come to."""
        key = ("alone", task)
        if key not in self._made:
            bench = self.bench(self.loaded(task))
            # Kept: nearly every check compares with these.
            self._made[key] = [bench.whole([tokens])[0] for tokens in self.inputs]
        return cast("list[PackedAnswer]", self._made[key])

    def _select(self, model: Model, page_size: int, dtype: torch.dtype) -> Selection | None:
        try:
            return self._backend(model, page_size, dtype)
        except LoraxError:
            return None

    def _backend(self, model: Model, page_size: int | None, dtype: torch.dtype) -> Selection:
        specs, declared = model.attention_specs, self.host.backends
        return select_backend(declared, specs, page_size=page_size, dtype=dtype, device=self.device, name=self.backend)

    def _refusal(self, model: Model, dtypes: Sequence[torch.dtype]) -> str:
        # Of the last dtype: that the others are no dtypes of the backend says nothing of the model.
        dtype = dtypes[-1]
        for size in (None, PAGE_SIZES[0]):
            try:
                self._backend(model, size, dtype)
            except LoraxError as error:
                return error.message
        return f"no attention backend supports pages of any of {PAGE_SIZES} tokens"


def _mean(base: LoadedModel) -> LoadedModel:
    """The same model, pooling by the mean, in which every row has a part."""
    for head in base.model.heads.values():
        # CLS or last would leave all other rows unseen.
        if isinstance(head, EmbeddingHead):
            head.pooling = Pooling.MEAN
    return base
