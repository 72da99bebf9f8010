"""Putting an engine together.

Decides what `EngineOptions` mean on this machine: where the checkpoint is, which dtype and device, which attention backend, how
large the cache. The parts themselves know nothing of each other's files.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from typing import cast

import torch

from lorax_core.adapters.lora_kernels.triton import load_triton_kernel
from lorax_core.adapters.merging.merged import MergedCheckpoint
from lorax_core.adapters.residency.source import masked
from lorax_core.adapters.residency.sources import AdapterSources
from lorax_core.adapters.residency.store import AdapterStore
from lorax_core.attention.base import AttentionBackend, CacheLayout
from lorax_core.attention.select import Selection, select_backend
from lorax_core.engine.graphs import DecodeGraphs, decode_graphs
from lorax_core.engine.loop import EngineLoop
from lorax_core.engine.runner import Runner
from lorax_core.engine.scheduler import Scheduler
from lorax_core.engine.worker import EngineWorker
from lorax_core.errors import CheckpointError, RequestError, shown
from lorax_core.kernels.native.build import compile_ahead, sources_of
from lorax_core.kvcache.allocator import PageAllocator
from lorax_core.kvcache.pool import KVPool
from lorax_core.kvcache.sizing import CacheShape, CacheSize, make_pool
from lorax_core.linear_methods.select import LinearPolicy
from lorax_core.modeling.heads import CLASSIFICATION, EmbeddingHead
from lorax_core.modeling.model import Model
from lorax_core.options import AdapterOptions, EngineOptions
from lorax_core.plugins.host import PluginHost
from lorax_core.progress import Progress, Report, silent
from lorax_core.serving.adapter_text import AdapterTexts, with_merged
from lorax_core.serving.embedding import set_up_embedding
from lorax_core.serving.info import EngineInfo
from lorax_core.serving.limits import Limits
from lorax_core.serving.machine import choose_dtype, find_device, set_threads
from lorax_core.serving.pairs import PairReader
from lorax_core.serving.prepare import Preparer
from lorax_core.serving.structured import GrammarFactory
from lorax_core.serving.text import TextFront, load_text_front
from lorax_core.serving.trial.trusted import Trusted, may_be_captured, sixteen_bit
from lorax_core.settings import Settings
from lorax_core.types import Task
from lorax_core.weights.checkpoint import Checkpoint
from lorax_core.weights.hub import find_checkpoint
from lorax_core.weights.loader import LoadedModel, load_model, stored_dtype
from lorax_core.weights.sentence import read_reranker_files

_log = logging.getLogger(__name__)
_END_TOKENS = 1_000
_KV_DTYPES = {"fp8_e4m3": torch.float8_e4m3fn}


@dataclass(frozen=True)
class EngineParts:
    """What an engine consists of."""

    worker: EngineWorker
    preparer: Preparer
    adapters: AdapterStore
    info: EngineInfo
    options: EngineOptions


def assemble_engine(options: EngineOptions, host: PluginHost | None = None, report: Report = silent) -> EngineParts:
    """Load the checkpoint and the adapters, choose a backend, make the cache, and start the engine's thread.

    Raises CheckpointError, PluginError, AdapterError, CapacityError or RequestError, with what to do next.
    """
    # First, as loading computes too: it converts and packs weights.
    set_threads(options.threads)
    host = checked_host(host)
    settings = Settings.from_env()
    sources = AdapterSources(
        settings.cache, options.adapter_sources, options.adapter_timeout, options.max_adapter_bytes
    )
    base = _load_base(options, host, sources, report)
    if base.model.needs_kv_cache and base.model.device.type == "cpu":
        # What the rest of an engine uses; adapters may also come later, and then their product is compiled when it is needed.
        adapted = ["low_rank"] if options.adapters else []
        compile_ahead(settings, sources_of("attention", "sampling", *adapted), report)
    trusted = Trusted(base.model, settings, report)
    elementwise, why = trusted.elementwise()
    base.model.use_elementwise(elementwise)
    sentence = set_up_embedding(base, options.pooling, options.normalize, options.embedding_dim)
    text = with_merged(load_text_front(base.checkpoint, sentence), base.checkpoint)
    store = _adapters(options, base, settings, trusted, sources, AdapterTexts(text))
    _load_adapters(options, store, report)
    chosen = _attention(options, base.model, host, trusted)
    # Before the cache, which leaves no memory for trials where it takes what there is.
    eager = _why_eager(options, base.model, chosen, trusted)
    # After weights and adapters: a cache given as a fraction takes its share of what they leave free.
    pool = _cache(options, base.model, chosen.layout)
    preparer = _preparer(options, base, text, store, pool)
    graphs = _graphs(options, base.model, chosen.backend, pool, store, eager)
    worker = EngineWorker(_loop(options, base.model, chosen.backend, pool, text, store, graphs))
    store.listener = worker.adapter_came
    info = replace(
        _info(base, chosen, preparer, pool),
        elementwise=(elementwise.name, why),
        graphs=graphs if isinstance(graphs, str) else None,
        notes=_notes(options, base),
        chat_template=text.template is not None,
    )
    rate = info.load_bytes_per_second / 1e9
    _log.info("loaded %.2f GB of weights in %.1f s, %.2f GB/s", info.weight_bytes / 1e9, info.load_seconds, rate)
    return EngineParts(worker, preparer, store, info, options)


def checked_host(host: PluginHost | None) -> PluginHost:
    """The plugins to use, those installed where none are given; raises RequestError for what is no host."""
    if host is not None and not isinstance(host, PluginHost):
        raise RequestError(f"host: a PluginHost, not {shown(host)}", hint="leave it out to use the installed plugins")
    return host if host is not None else PluginHost.discover()


def _load_base(options: EngineOptions, host: PluginHost, sources: AdapterSources, report: Report) -> LoadedModel:
    device = find_device(options.device)
    token = options.token.get_secret_value() if options.token is not None else None
    if options.quantize is not None and torch.device(device).type != "cpu":
        raise RequestError(
            f"quantize={options.quantize!r} was asked for on {device!r}, but weights are quantized on a CPU alone",
            hint="leave quantize out, or use device='cpu'",
        )
    if torch.device(device).type == "cpu":
        quantized = ["quantized"] if options.quantize is not None else []
        compile_ahead(Settings.from_env(), sources_of("skinny", "elementwise", *quantized), report)
    files = Checkpoint(find_checkpoint(options.checkpoint, revision=options.revision, token=token))
    if options.merge_adapter is not None:
        files = MergedCheckpoint(files, sources.find(options.merge_adapter).folder, host)
    dtype = choose_dtype(options.dtype, files, device, sixteen_bit(device))
    policy = LinearPolicy(options.linear_methods, options.quantize)
    base = load_model(files, host, dtype=dtype, device=device, linear_policy=policy, report=report)
    if isinstance(files, MergedCheckpoint):
        files.release()
    return base


def _notes(options: EngineOptions, base: LoadedModel) -> tuple[str, ...]:
    """What is otherwise than the checkpoint states it."""
    notes: list[str] = []
    if isinstance(base.checkpoint, MergedCheckpoint):
        notes += [f"{masked(str(options.merge_adapter))!r} is merged into the weights", *base.checkpoint.notes]
    stored, dtype = stored_dtype(base.checkpoint), base.model.dtype
    if options.dtype == "auto" and stored is not dtype:
        names = [str(one).removeprefix("torch.") for one in (stored, dtype)]
        notes.append(f"the checkpoint is in {names[0]} and computed in {names[1]}; dtype={names[0]!r} keeps it")
    for note in notes:
        _log.info(note)
    return tuple(notes)


def _adapters(
    options: EngineOptions,
    base: LoadedModel,
    settings: Settings,
    trusted: Trusted,
    sources: AdapterSources,
    texts: AdapterTexts,
) -> AdapterStore:
    store = AdapterStore(
        base,
        settings,
        max_adapters=options.max_adapters,
        max_cpu_adapters=options.max_cpu_adapters,
        max_fetched=options.max_fetched_adapters,
        sources=sources,
    )
    store.bound.kernel.verify = trusted.lora
    store.texts = texts.read
    return store


def _load_adapters(options: EngineOptions, store: AdapterStore, report: Report) -> None:
    count = len(options.adapters)
    for done, (name, given) in enumerate(options.adapters.items()):
        report(Progress("loading adapters", done, count))
        one = AdapterOptions(source=given) if isinstance(given, str) else given
        token = one.token.get_secret_value() if one.token is not None else None
        about = {field: getattr(one, field) for field in ("revision", "task", "problem_type", "id2label", "pin")}
        store.load(name, one.source, token=token, **about)
    if count:
        report(Progress("loading adapters", count, count))


def _attention(options: EngineOptions, model: Model, host: PluginHost, trusted: Trusted) -> Selection:
    """The backend, which says what cache it needs."""
    return select_backend(
        host.backends,
        model.attention_specs,
        dtype=model.dtype,
        kv_dtype=_KV_DTYPES.get(options.kv_dtype, model.dtype),
        device=str(model.device),
        name=options.attention,
        verify=trusted.attention,
    )


def _cache(options: EngineOptions, model: Model, layout: CacheLayout) -> KVPool | None:
    """The cache that a backend needs for the model, of the size that was asked for."""
    size = CacheSize(options.kv_cache_tokens, options.kv_cache_pages, options.kv_cache_bytes, options.kv_cache_fraction)
    if not model.needs_kv_cache:
        if size.given or options.kv_dtype != "auto":
            raise RequestError(
                "a size or dtype of the KV cache was given, but a bidirectional model has no KV cache",
                hint="leave the kv_ options out",
            )
        return None
    # The pool is one tensor, so every layer must have the kv_heads and head_dim of the first.
    layers, spec = model.attention_layers, model.attention_specs[0]
    shape = CacheShape(
        layers=len(layers),
        page_size=layout.page_size,
        kv_heads=spec.kv_heads,
        head_dim=spec.head_dim,
        dtype=layout.dtype,
        device=model.device,
        scales=tuple((layer.k_scale, layer.v_scale) for layer in layers),
    )
    return make_pool(shape, size)


def _preparer(
    options: EngineOptions, base: LoadedModel, text: TextFront, store: AdapterStore, pool: KVPool | None
) -> Preparer:
    model = base.model
    # Page 0 is scratch and never belongs to a sequence.
    limits = Limits(model.max_tokens, (pool.pages - 1) * pool.page_size if pool is not None else None)
    generating = Task.GENERATE in model.tasks
    eos_ids = _eos_ids(base.checkpoint, text, model.config.vocab_size) if generating else frozenset()
    grammars = GrammarFactory(model.config.vocab_size)
    pairs = PairReader(text, read_reranker_files(base.checkpoint))
    default_task = base.default_task
    return Preparer(model, text, pairs, store, limits, eos_ids, options.seed, default_task, grammars, options.speculate)


@dataclass(frozen=True, slots=True)
class _Eager:
    """Why decoding is not captured: all of it, and steps with adapters."""

    every: str | None
    adapted: str | None


def _why_eager(options: EngineOptions, model: Model, chosen: Selection, trusted: Trusted) -> _Eager:
    """What trials say of captured steps; of a model that has none they say nothing."""
    if not options.cuda_graphs:
        return _Eager("cuda_graphs=False was asked for", None)
    if not may_be_captured(model):
        return _Eager(None, None)  # `decode_graphs` says why
    if (problem := trusted.graphs(chosen.backend, chosen.layout)) is not None:
        return _Eager(f"graphs are off: {problem}", None)
    return _Eager(None, trusted.graphs(chosen.backend, chosen.layout, load_triton_kernel))


def _graphs(
    options: EngineOptions,
    model: Model,
    backend: AttentionBackend,
    pool: KVPool | None,
    store: AdapterStore,
    eager: _Eager,
) -> DecodeGraphs | str:
    """Captured decoding steps, or why there are none; without a LoRA kernel where that one cannot be captured."""
    if eager.every is not None:
        return eager.every
    if eager.adapted is not None:
        _log.warning("steps with adapters are not captured: %s", eager.adapted)
    kernel = store.bound.kernel if eager.adapted is None else None
    return decode_graphs(model, backend, pool, kernel, options.max_batch_rows)


def _loop(
    options: EngineOptions,
    model: Model,
    backend: AttentionBackend,
    pool: KVPool | None,
    text: TextFront,
    store: AdapterStore,
    graphs: DecodeGraphs | str,
) -> EngineLoop:
    scheduler = Scheduler(
        max_tokens=options.max_batch_tokens,
        max_rows=options.max_batch_rows,
        allocator=PageAllocator(pool.pages, pool.page_size) if pool is not None else None,
        window=model.widest_window,
        gate=store,
    )
    runner = Runner(model, backend, pool, store.bound, store.bound.kernel, graphs)
    # A CPU computes a step while it is launched: there is nothing to be ahead of.
    ahead = model.device.type == "cuda"
    return EngineLoop(scheduler, runner, text if text.has_tokenizer else None, ahead=ahead)


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
        linear_methods=model.linears.methods,
        linear_notes=model.linears.reasons,
        vocab_size=model.config.vocab_size,
        weight_bytes=base.checkpoint.nbytes,
        linear_bytes=model.linear_bytes,
        load_seconds=base.load_seconds,
        labels=next((getattr(model.head(task), "labels", ()) for task in CLASSIFICATION if task in model.tasks), ()),
        pooling=cast("EmbeddingHead", model.head(Task.EMBED)).pooling.value if Task.EMBED in model.tasks else None,
    )


def _eos_ids(files: Checkpoint, text: TextFront, vocab: int) -> frozenset[int]:
    """Token ids that end a completion: the generation configuration's, else the model's, else the tokenizer's.

    Raises CheckpointError for what is no id. One beyond the vocabulary, as a cut vocabulary leaves behind, can never come.
    """
    generation = files.json("generation_config.json")
    if isinstance(generation, list):
        raise CheckpointError(
            f"'{files.path / 'generation_config.json'}' holds a list where a JSON object belongs",
            hint="download or copy it again",
        )
    # Instruct models such as Qwen2's list several ends in the generation configuration, and one of them in config.json.
    for where, found in (
        ("generation_config.json", (generation or {}).get("eos_token_id")),
        ("config.json", files.config.get("eos_token_id")),
        ("tokenizer_config.json", text.eos_token_id),
    ):
        if found is None:
            continue
        ids = found if isinstance(found, list) else [found]
        if len(ids) > _END_TOKENS:
            raise CheckpointError(
                f"'{files.path / where}' names {len(ids):,} end tokens; at most {_END_TOKENS:,} are read",
                hint="name those that end a text",
            )
        wrong = [one for one in ids if not isinstance(one, int) or isinstance(one, bool) or one < 0]
        if wrong:
            # A negative one would forbid another token where answers have a least length.
            raise CheckpointError(
                f"'{files.path / where}' has {shown(found)} for eos_token_id, and {shown(wrong[0])} is not a token id",
                hint=f"ids are 0 to {vocab - 1}; remove the key where no token ends a text",
            )
        beyond = [one for one in ids if one >= vocab]
        if beyond:
            _log.warning("%s names the end token %d, beyond the vocabulary of %d", files.path / where, beyond[0], vocab)
        return frozenset(ids) - frozenset(beyond)
    return frozenset()
