"""Putting an engine together.

Decides what `load` means: where the checkpoint is, which dtype and device, how large the cache, which attention backend. The
parts themselves know nothing of each other's files.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from pathlib import Path

import torch

from lorax_core.adapters.residency.store import AdapterStore
from lorax_core.attention.base import AttentionBackend
from lorax_core.attention.select import Selection, select_backend
from lorax_core.engine.loop import EngineLoop
from lorax_core.engine.runner import Runner
from lorax_core.engine.scheduler import Scheduler
from lorax_core.engine.worker import EngineWorker
from lorax_core.errors import RequestError, listed
from lorax_core.kvcache.allocator import PageAllocator
from lorax_core.kvcache.pool import KVPool
from lorax_core.modeling.linear import packing_works
from lorax_core.modeling.model import Model
from lorax_core.plugins.host import PluginHost
from lorax_core.serving.cache import PAGE_SIZE, CacheSize, make_pool
from lorax_core.serving.embedding import set_up_embedding
from lorax_core.serving.engine import Engine, EngineInfo
from lorax_core.serving.prepare import Limits, Preparer
from lorax_core.serving.structured import GrammarFactory
from lorax_core.serving.text import TextFront, load_text_front
from lorax_core.settings import Settings
from lorax_core.weights.checkpoint import Checkpoint
from lorax_core.weights.hub import find_checkpoint
from lorax_core.weights.loader import LoadedModel, load_model, stored_dtype

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

_threads_lock = threading.Lock()
_threads: int | None = None


def load(
    checkpoint: str | Path,
    *,
    revision: str | None = None,
    token: str | None = None,
    dtype: str = "auto",
    device: str = "auto",
    adapters: Mapping[str, str | Path] | None = None,
    max_adapters: int | None = None,
    max_cpu_adapters: int | None = None,
    pooling: str | None = None,
    normalize: bool | None = None,
    embedding_dim: int | None = None,
    kv_cache_tokens: int | None = None,
    kv_cache_pages: int | None = None,
    kv_cache_bytes: int | None = None,
    kv_cache_fraction: float | None = None,
    kv_dtype: str = "auto",
    max_batch_tokens: int = 2048,
    max_batch_rows: int = 256,
    attention: str | None = None,
    speculate: int = 0,
    threads: int | None = None,
    seed: int = 0,
    host: PluginHost | None = None,
) -> Engine:
    """Load a checkpoint (a folder or a hub id) and its adapters, ready to answer.

    - `dtype`: "auto" keeps the checkpoint's, except that 16 bit on a CPU without fast bfloat16 becomes float32.
    - `max_adapters`: how many adapters are on the device at once, all when None; `max_cpu_adapters`: how many also keep a copy
      in host memory, four times as many when None. The least recently used makes room, and comes back when a request asks.
    - `pooling` ("cls", "mean", "last") and `normalize` override what the checkpoint's files say of embeddings.
    - `embedding_dim`: length of vectors, for checkpoints with folders `2_Dense_{length}` to choose from.
    - `kv_cache_tokens`, `_pages`, `_bytes` or `_fraction` (of the free memory): how much all running sequences share; by
      default a quarter of the free memory, up to 65,536 tokens. `kv_dtype` "fp8_e4m3" stores it in 8 bits.
    - `max_batch_tokens`, `max_batch_rows`: the most that one step computes.
    - `attention`: a backend by name, instead of the first that serves the model.
    - `speculate`: guess up to so many tokens ahead from the text itself; answers are the same, repetitive ones come faster.
    - `threads`: of the whole process, by torch's rule; a second engine cannot ask for another number.
    - `host`: the plugins to use, instead of those installed.

    Raises CheckpointError, PluginError, AdapterError, CapacityError or RequestError, with what to do next.
    """
    for option, value, least in (("threads", threads, 1), ("speculate", speculate, 0)):
        if value is not None and value < least:
            raise RequestError(f"{option} must be at least {least}, not {value}")
    _set_threads(threads)
    where = _device(device)
    files = Checkpoint(find_checkpoint(checkpoint, revision=revision, token=token))
    host = host or PluginHost.discover()
    base = load_model(files, host, dtype=_dtype(dtype, files, where), device=where)
    text = load_text_front(files, set_up_embedding(base, pooling, normalize, embedding_dim))
    settings = Settings.from_env()
    store = AdapterStore(base, settings, max_adapters=max_adapters, max_cpu_adapters=max_cpu_adapters)
    for name, source in (adapters or {}).items():
        store.load(name, source)
    size = CacheSize(kv_cache_tokens, kv_cache_pages, kv_cache_bytes, kv_cache_fraction)
    pool = make_pool(base.model, size, kv_dtype)
    chosen = select_backend(
        host.backends,
        base.model.attention_specs,
        page_size=PAGE_SIZE,
        dtype=base.model.dtype,
        device=where,
        name=attention,
    )
    loop = _loop(base.model, chosen.backend, pool, text, max_batch_tokens, max_batch_rows, store)
    limits = Limits(base.model.max_tokens, (pool.pages - 1) * PAGE_SIZE if pool is not None else None)
    eos_ids = _eos_ids(files, text)
    grammars = GrammarFactory(text.tokenizer, base.model.config.vocab_size, eos_ids)
    preparer = Preparer(base.model, text, store, limits, eos_ids, seed, base.default_task, grammars, speculate)
    worker = EngineWorker(loop)
    store.listener = worker.adapter_came
    return Engine(worker, preparer, store, _info(base, chosen, preparer, pool))


def _loop(
    model: Model,
    backend: AttentionBackend,
    pool: KVPool | None,
    text: TextFront,
    max_tokens: int,
    max_rows: int,
    store: AdapterStore,
) -> EngineLoop:
    for option, value in (("max_batch_tokens", max_tokens), ("max_batch_rows", max_rows)):
        if value < 1:
            raise RequestError(f"{option} must be at least 1, not {value}")
    allocator = PageAllocator(pool.pages, pool.page_size) if pool is not None else None
    scheduler = Scheduler(
        max_tokens=max_tokens, max_rows=max_rows, allocator=allocator, window=model.widest_window, gate=store
    )
    return EngineLoop(
        scheduler, Runner(model, backend, pool, store.bound, store.bound.kernel), text if text.has_tokenizer else None
    )


def _info(base: LoadedModel, chosen: Selection, preparer: Preparer, pool: KVPool | None) -> EngineInfo:
    model, limits = base.model, preparer.limits
    return EngineInfo(
        model_type=base.spec.model_type,
        tasks=tuple(task.value for task in model.tasks),
        dtype=str(model.dtype).removeprefix("torch."),
        device=str(model.device),
        attention=chosen.backend.name,
        passed_over=chosen.passed_over,
        max_tokens=limits.tokens,
        max_text_tokens=preparer.max_text_tokens,
        kv_cache_tokens=limits.cache_tokens,
        kv_cache_bytes=pool.nbytes if pool is not None else 0,
    )


def _set_threads(threads: int | None) -> None:
    global _threads
    if threads is None:
        return
    with _threads_lock:
        if _threads is not None and _threads != threads:
            raise RequestError(
                f"threads={threads} was asked for, but this process computes with {_threads}: the number is one for the "
                "process",
                hint=f"leave threads out, or load with threads={_threads}",
            )
        torch.set_num_threads(threads)
        _threads = threads


def _device(device: str) -> str:
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        kind = torch.device(device).type
    except RuntimeError as error:
        raise RequestError(f"{device!r} is no device: {error}", hint="use 'cpu', 'cuda' or 'auto'") from error
    if kind == "cuda" and not torch.cuda.is_available():
        raise RequestError(f"device {device!r} was asked for, but torch sees no GPU", hint="use device='cpu'")
    return device


def _dtype(name: str, files: Checkpoint, device: str) -> torch.dtype:
    if name == "auto":
        stored = stored_dtype(files)
        if stored is torch.float32 or torch.device(device).type != "cpu":
            return stored
        fast = stored is torch.bfloat16 and packing_works(torch.bfloat16) and _has_fast_bfloat16()
        return torch.bfloat16 if fast else torch.float32
    if name not in _DTYPES:
        raise RequestError(f"dtype {name!r} is not served; served are 'auto' and {listed(_DTYPES)}")
    return _DTYPES[name]


def _has_fast_bfloat16() -> bool:
    """Whether the CPU multiplies bfloat16 by itself. The question is private to torch; without an answer it is no."""
    asked = getattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", None)
    return bool(asked()) if asked is not None else False


def _eos_ids(files: Checkpoint, text: TextFront) -> frozenset[int]:
    """Token ids that end a completion: the generation configuration's, else the model's, else the tokenizer's."""
    generation = files.json("generation_config.json")
    for found in (
        generation.get("eos_token_id") if isinstance(generation, dict) else None,
        files.config.get("eos_token_id"),
        text.eos_token_id,
    ):
        if found is not None:
            return frozenset(found if isinstance(found, list) else [found])
    return frozenset()
