"""A model without an engine: loaded by its class, and run over token ids in one forward pass.

Decides how such a model is prepared and how plain sequences become a batch. Knows nothing of requests, schedules or adapters;
`serving/loading.py` puts an engine together.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any, TypeVar, cast

import torch

from lorax_core.attention.torch import PAGE_SIZE, TorchBackend
from lorax_core.engine.batcher import Batcher
from lorax_core.engine.step_input import ChunkInput, HeadRead, StepInput
from lorax_core.errors import CapacityError, CheckpointError, RequestError, shown
from lorax_core.kvcache.pool import KVPool
from lorax_core.modeling.batch import Batch
from lorax_core.modeling.model import Model
from lorax_core.options import EngineOptions
from lorax_core.plugins.host import PluginHost
from lorax_core.serving.embedding import set_up_embedding
from lorax_core.serving.loading import checked_host
from lorax_core.serving.machine import choose_dtype, find_device
from lorax_core.serving.trial.trusted import sixteen_bit
from lorax_core.types import Task
from lorax_core.weights.checkpoint import Checkpoint
from lorax_core.weights.hub import find_checkpoint
from lorax_core.weights.loader import load_model as load_weights

M = TypeVar("M", bound=Model)


def load_model(
    checkpoint: str | Path,
    model_class: type[M] = Model,  # type: ignore[assignment]
    *,
    revision: str | None = None,
    token: str | None = None,
    dtype: str = "auto",
    device: str = "auto",
    host: PluginHost | None = None,
) -> M:
    """The model of a checkpoint (a folder or a hub id), filled and prepared for the device, without an engine.

    `model_class` is a class of the plugin's `modeling.py`, such as `FlashGPT2ForCausalLM`, which fixes the task; a plain
    `Model` has every head that the checkpoint holds. `dtype`, `device` and `host` are those of `load`.

    Raises CheckpointError, PluginError or RequestError, with what to do next.
    """
    given: dict[str, Any] = {"revision": revision, "token": token, "dtype": dtype, "device": device}
    options = EngineOptions(**{"checkpoint": checkpoint, **given})
    if not (isinstance(model_class, type) and issubclass(model_class, Model)):
        raise RequestError(
            f"model_class: a class of a plugin's modeling.py, not {shown(model_class)}",
            hint="leave it out to get every head that the checkpoint holds",
        )
    host = checked_host(host)
    where = find_device(options.device)
    secret = options.token.get_secret_value() if options.token is not None else None
    files = Checkpoint(find_checkpoint(options.checkpoint, revision=options.revision, token=secret))
    # Before the weights are read, which may take minutes.
    _check_class(model_class, files.config["model_type"], host)
    chosen = choose_dtype(options.dtype, files, where, sixteen_bit(where))
    base = load_weights(files, host, dtype=chosen, device=where, model_class=model_class)
    set_up_embedding(base, None, None, None)
    return cast("M", base.model)


def _check_class(model_class: type[Model], model_type: str, host: PluginHost) -> None:
    """Raises CheckpointError for a class of another architecture's package."""
    package = model_class.__module__.partition(".")[0]
    others = {spec.backbone.partition(".")[0]: spec for spec in host.architectures.values()}
    if package in others and host.architecture(model_type).backbone.partition(".")[0] != package:
        raise CheckpointError(
            f"{model_class.__name__} is a class for {others[package].model_type!r}; the checkpoint is {model_type!r}",
            hint=f"use a class of {host.architecture(model_type).backbone.partition(':')[0]}",
        )


@torch.inference_mode()
def make_batch(model: Model, sequences: Sequence[Sequence[int]]) -> Batch:
    """One batch of whole sequences of token ids, for one call `model(batch)`.

    `batch.head_rows` has one entry for each task of the model, and `model(batch).answers` runs parallel to it:

    - generation, token classification: one row for each token, the sequences end to end (`batch.lengths`): logits
      `[tokens, vocab]` or `[tokens, labels]`;
    - sequence classification: logits `[sequences, labels]`;
    - embeddings: the sum of the pooled rows `[sequences, hidden]`, which `finish` of the head turns into vectors.

    Attention is core's reference, on the model's device; the cache of a causal model is as large as the sequences need.

    Raises RequestError for no or an empty sequence or an id outside the vocabulary, CapacityError for one that is too long.
    """
    _check_sequences(model, sequences)
    # Without a cache, pages are neither allocated nor written: counts and firsts are then not used.
    backend, page = TorchBackend(), PAGE_SIZE if model.needs_kv_cache else None
    counts = [-(-len(ids) // PAGE_SIZE) for ids in sequences]
    firsts = list(accumulate(counts, initial=1))  # [seqs + 1] first page of each sequence; page 0 is scratch
    backend.bind(model.attention_specs, model.dtype, _cache(model, firsts[-1]) if page is not None else None)
    chunks = tuple(
        _chunk(model, at, ids, range(firsts[at], firsts[at + 1]) if page is not None else range(0))
        for at, ids in enumerate(sequences)
    )
    batch = Batcher(model, page, {}).pack(StepInput(chunks))
    batch.attention = backend.plan(batch)
    return batch


def _check_sequences(model: Model, sequences: Sequence[Sequence[int]]) -> None:
    hint = "make_batch(model, [[5, 6, 7], [8, 9]])"
    if not isinstance(model, Model):
        raise RequestError(f"make_batch takes a model of load_model, not {shown(model)}", hint=hint)
    plain = isinstance(sequences, (list, tuple)) and all(isinstance(ids, (list, tuple, range)) for ids in sequences)
    if not plain or not all(isinstance(token, int) for ids in sequences for token in ids):
        raise RequestError(f"make_batch takes sequences of token ids, not {shown(sequences)}", hint=hint)
    if not sequences or not all(sequences):
        raise RequestError("make_batch needs at least one sequence, and each needs at least one token id", hint=hint)
    # An id or position outside its table would read out of bounds: on a GPU that ends the whole process's context.
    longest = max(len(ids) for ids in sequences)
    if longest > model.max_tokens:
        raise CapacityError(f"a sequence has {longest} tokens; the model takes at most {model.max_tokens}")
    vocab = model.config.vocab_size
    outside = next((token for ids in sequences for token in ids if not 0 <= token < vocab), None)
    if outside is not None:
        raise RequestError(f"token id {outside} is outside the vocabulary of {vocab}", hint=f"ids are 0 to {vocab - 1}")


def _chunk(model: Model, at: int, ids: Sequence[int], pages: range) -> ChunkInput:
    """One whole sequence; to generate, every row is read, else the head's span."""
    spans = [
        (task, range(len(ids)) if task is Task.GENERATE else model.head(task).span(ids, 0)) for task in model.tasks
    ]
    return ChunkInput(
        sequence=at,
        start=0,
        # "q" is int64 and "i" int32, which the batcher reads as numpy buffers without copying.
        tokens=array("q", ids),
        reads=tuple(HeadRead(task, span) for task, span in spans),
        pages=array("i", pages),
    )


def _cache(model: Model, pages: int) -> KVPool:
    spec = model.attention_specs[0]
    return KVPool(
        layers=len(model.attention_layers),
        pages=pages,
        page_size=PAGE_SIZE,
        kv_heads=spec.kv_heads,
        head_dim=spec.head_dim,
        dtype=model.dtype,
        device=model.device,
    )
