"""The engine as users meet it.

Decides the Python interface: one prompt or many, results or streams, and mixed requests in one batch. Knows nothing of how an
engine is put together; `loading` does that.
"""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self, cast, overload

import numpy as np
from numpy.typing import NDArray

from lorax_core.adapters.residency.store import AdapterStore
from lorax_core.engine.process import OwnProcess
from lorax_core.errors import LoraxError, RequestError, shown
from lorax_core.kernels.workers import end_workers
from lorax_core.kvcache.sizing import peak_memory
from lorax_core.options import EngineOptions
from lorax_core.plugins.host import PluginHost
from lorax_core.progress import Report, reporting
from lorax_core.serving.call import Call
from lorax_core.serving.info import EngineInfo
from lorax_core.serving.loading import EngineParts, assemble_engine
from lorax_core.serving.prepare import Prepared, Result
from lorax_core.serving.requests import (
    AdapterChoice,
    AdapterChoices,
    ClassifyRequest,
    EmbedRequest,
    GenerateRequest,
    Request,
    RerankRequest,
    TextInput,
    TextPrompt,
    Truncate,
    make_requests,
)
from lorax_core.serving.stream import Stream
from lorax_core.types import Classification, Completion, Embedding, Ranked, Relevance, Tokenized
from lorax_core.untrusted import guarded

TextPrompts = list[str] | list[list[int]] | list[list[dict[str, Any]]] | list[TextPrompt]
TextInputs = list[str] | list[list[int]] | list[tuple[str, str]] | list[TextInput]


class Engine:
    """A loaded model that answers requests, made by `load`. Safe to call from any thread; also a context manager.

    It belongs to the process that loaded it: in a forked child every call raises RequestError. Dropped without `close()`, it
    ends its thread by itself.

    Errors are of the `LoraxError` tree: a request that cannot be answered is refused before any work, and the engine goes
    on serving.
    """

    def __init__(self, parts: EngineParts) -> None:
        self._process = OwnProcess()
        self._worker = parts.worker
        self._preparer = parts.preparer
        self._info = parts.info
        self._adapters = parts.adapters
        self.options = parts.options
        """What it was loaded with."""

    @classmethod
    def from_options(
        cls, options: EngineOptions, host: PluginHost | None = None, *, progress: Report | None = None
    ) -> Engine:
        """An engine with these options; `host` are the plugins to use, instead of those installed.

        `progress` is called with a `Progress` again and again while it is loaded.

        Raises CheckpointError, PluginError, AdapterError, CapacityError or RequestError, with what to do next.
        """
        if not isinstance(options, EngineOptions):
            raise RequestError(
                f"options: an EngineOptions, not {shown(options)}",
                hint="lorax_core.load(checkpoint, **options) makes them",
            )
        return cls(assemble_engine(options, host, reporting(progress)))

    @property
    def adapters(self) -> AdapterStore:
        """Where adapters of the running engine are loaded, listed and dropped."""
        self._process.check()
        return self._adapters

    @overload
    def generate(self, prompt: TextPrompt, *, adapter: AdapterChoices = ..., **options: Any) -> Completion: ...
    @overload
    def generate(self, prompt: TextPrompts, *, adapter: AdapterChoices = ..., **options: Any) -> list[Completion]: ...
    def generate(self, prompt: Any, *, adapter: AdapterChoices = None, **options: Any) -> Completion | list[Completion]:
        """Continue one prompt, or several in one batch. Options are those of `GenerateRequest`."""
        requests, single = make_requests(GenerateRequest, "prompt", prompt, adapter, options)
        results = cast("list[Completion]", self.run(requests))
        return results[0] if single else results

    def stream(self, prompt: Any, *, adapter: AdapterChoices = None, **options: Any) -> Stream:
        """Continue one prompt or several, giving an `Event` for each new piece of text. Dropping the stream cancels it."""
        requests, _ = make_requests(GenerateRequest, "prompt", prompt, adapter, options)
        return Stream(self.submit(requests))

    @overload
    def embed(
        self, text: TextInputs, *, pooling: Literal["none"], adapter: AdapterChoices = ..., **options: Any
    ) -> list[NDArray[np.float32]]: ...
    @overload
    def embed(
        self, text: TextInput | TextInputs, *, adapter: AdapterChoices = ..., **options: Any
    ) -> NDArray[np.float32]: ...
    def embed(self, text: Any, *, adapter: AdapterChoices = None, **options: Any) -> Any:
        """Vectors of texts: `[dim]` for one, `[n, dim]` for a list of n. Options are those of `EmbedRequest`.

        With `pooling="none"` rows of tokens: `[tokens, dim]` for one, a list of those for a list.
        """
        requests, single = make_requests(EmbedRequest, "input", text, adapter, options)
        vectors = [cast("Embedding", result).vector for result in self.run(requests)]
        if single:
            return vectors[0]
        if options.get("pooling") == "none":
            return vectors
        if vectors:
            return np.stack(vectors)  # [n, dim]
        # No request has checked the options.
        asked = EmbedRequest(input="", **options).dimensions
        return np.zeros((0, asked or self._preparer.embedding_dim), np.float32)

    @overload
    def classify(self, text: TextInput, *, adapter: AdapterChoices = ..., **options: Any) -> Classification: ...
    @overload
    def classify(self, text: TextInputs, *, adapter: AdapterChoices = ..., **options: Any) -> list[Classification]: ...
    def classify(
        self, text: Any, *, adapter: AdapterChoices = None, **options: Any
    ) -> Classification | list[Classification]:
        """Labels of texts, of their tokens or of each as a whole, as the checkpoint was trained.

        Options are those of `ClassifyRequest`.
        """
        requests, single = make_requests(ClassifyRequest, "input", text, adapter, options)
        results = cast("list[Classification]", self.run(requests))
        return results[0] if single else results

    def rerank(
        self,
        query: str,
        documents: list[str],
        *,
        adapter: AdapterChoice = None,
        top_n: int | None = None,
        normalize: bool = True,
        truncate: Truncate = "error",
    ) -> list[Ranked]:
        """Documents by how well they answer a query, the best first and of equal ones the first; `top_n` of them, or all.

        The other options are those of `RerankRequest`.
        """
        if not isinstance(documents, (list, tuple)):
            raise RequestError(
                f"documents: a list of texts, not {shown(documents)}", hint="engine.rerank(query, [document, another])"
            )
        if top_n is not None and (type(top_n) is not int or top_n < 1):
            raise RequestError(f"top_n: 1 or more, not {shown(top_n)}", hint="leave it out to get all documents")
        options: dict[str, Any] = {"adapter": adapter, "normalize": normalize, "truncate": truncate}
        found = self.run([RerankRequest(query=query, document=document, **options) for document in documents])
        scores = [cast("Relevance", result).score for result in found]
        # Stable, so that equal scores keep the order of the documents.
        order = sorted(range(len(scores)), key=lambda at: -scores[at])
        return [Ranked(at, scores[at]) for at in order[:top_n]]

    def run(self, requests: SequenceOf[Request]) -> list[Result]:
        """Answer requests of any mix of tasks and adapters together; results in their order.

        When some fail while others finish, raises `StepError` whose `results` has both.
        """
        return self.submit(requests).wait()

    def submit(self, requests: SequenceOf[Request]) -> Call:
        """Start answering requests of any mix of tasks and adapters together; gives a `Call` to wait for or await.

        Never blocks. What is wrong with a request is raised here, before any of them starts. An adapter that must be fetched
        first (`adapter="org/name"`) is fetched beside the running engine, and the call starts when it is there; what goes wrong
        on the way ends the call with an AdapterError.
        """
        self._process.check()
        _check_requests(requests)
        end_workers()  # of the thread that loaded the engine, or computes beside it
        call = Call(len(requests), self._worker.abort)
        missing = [() if one.adapter is None else self.adapters.missing(one.adapter) for one in requests]
        if any(missing):
            self._worker.submit([])  # a closed engine refuses now, not after a download
        # Those beside one that must wait are refused now, and not when the others' adapters are there.
        prepared = [None if names else self._prepare(one) for one, names in zip(requests, missing, strict=True)]
        if not any(missing):
            call.start([one for one in prepared if one is not None], self._worker.submit)
            return call
        fetched = self.adapters.fetch(dict.fromkeys(name for names in missing for name in names))
        fetched.add_done_callback(lambda done: self._start(call, requests, prepared, done))
        return call

    def _start(
        self,
        call: Call,
        requests: SequenceOf[Request],
        prepared: SequenceOf[Prepared | None],
        fetched: Future[None],
    ) -> None:
        """Start a call whose adapters were fetched, in the thread that fetched them."""
        try:
            fetched.result()
            all_prepared = [done or self._prepare(request) for request, done in zip(requests, prepared, strict=True)]
            call.start(all_prepared, self._worker.submit)
        except LoraxError as error:
            call.fail(error)
        except BaseException as error:  # callers must not wait for ever
            failure = LoraxError(
                f"the call could not start: {type(error).__name__}: {error}",
                hint="ask again; if it fails again, report it with the traceback of its cause",
            )
            failure.__cause__ = error
            call.fail(failure)

    def _prepare(self, request: Request) -> Prepared:
        # A request is checked when it is made; what its lists hold may have been changed since.
        with guarded(RequestError, "the request cannot be prepared", hint="make a new one for every call"):
            return self._preparer.prepare(request)

    @property
    def closed(self) -> bool:
        """Whether it answers nothing any more: `close` was called, or its step loop broke."""
        return self._worker.closed

    def tokenize(self, text: TextInput, *, adapter: AdapterChoice = None) -> Tokenized:
        """Token ids of a text, special ones included as the tokenizer adds them; of a causal model's prompt as of an input.

        An adapter may have a tokenizer of its own.
        """
        asked = EmbedRequest(input=text, adapter=adapter)
        return self._preparer.tokenize(asked.input, asked.adapter)

    def detokenize(self, token_ids: list[int], *, adapter: AdapterChoice = None) -> str:
        """The text of token ids, special tokens left out."""
        return self._preparer.detokenize(token_ids, EmbedRequest(input="", adapter=adapter).adapter)

    def token_bytes(self, token_ids: list[int], *, special: bool = True) -> list[bytes]:
        """The bytes that each token stands for, which may be a part of a character; joined they are the text.

        Special tokens have their names, or nothing without `special`.
        """
        return self._preparer.token_bytes(token_ids, special=special)

    @property
    def special_ids(self) -> frozenset[int]:
        """Ids of the tokens that stand for no text, such as the one that ends a completion."""
        return self._preparer.text.special_ids

    def count_tokens(self, prompt: TextPrompt | TextInput, *, adapter: AdapterChoice = None) -> int:
        """Tokens that a prompt or text comes to, special ones included; its limit is in `info()`.

        An adapter may read it by a tokenizer or chat template of its own.
        """
        # A request checks it: a pair of texts can only be embedded or classified.
        if isinstance(prompt, tuple):
            request = EmbedRequest(input=prompt, adapter=adapter)
            return self._preparer.count_tokens(request.input, request.adapter)
        asked = GenerateRequest(prompt=prompt, adapter=adapter)
        return self._preparer.count_tokens(asked.prompt, asked.adapter)

    def info(self) -> EngineInfo:
        """What this engine is made of, and what its steps did."""
        return replace(
            self._info,
            totals=self._worker.totals,
            last_step=self._worker.last_step,
            lora_kernel=self.adapters.bound.kernel.verdict,
        )

    def warmup(self) -> int:
        """Compute the largest step once, so that what does not fit is known now and the first request finds all ready.

        Gives the tokens that the cache holds, or for a model without a cache the longest text; `info()` has the other figures.
        Raises CapacityError when the step does not fit in memory.
        """
        # The allocator's peak only grows, so the difference is what this step added.
        before = peak_memory(self._info.device)
        self._worker.call(lambda loop: loop.warmup(self._info.max_tokens))
        self._info = replace(self._info, step_bytes=peak_memory(self._info.device) - before)
        return self._info.kv_cache_tokens or self._info.max_tokens

    def close(self) -> None:
        """Stop the engine; requests still running end with an error. Idempotent."""
        # The worker first: its steps use adapters until it has stopped.
        self._worker.close()
        self._adapters.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def load(
    checkpoint: str | Path, *, host: PluginHost | None = None, progress: Report | None = None, **options: Any
) -> Engine:
    """Load a checkpoint (a folder or a hub id) and its adapters, ready to answer.

    The options are those of `EngineOptions`; `host` are the plugins to use, instead of those installed. `progress` is called
    with a `Progress` again and again while it loads.
    Raises CheckpointError, PluginError, AdapterError, CapacityError or RequestError, with what to do next.
    """
    return Engine.from_options(EngineOptions(**{"checkpoint": checkpoint, **options}), host, progress=progress)


def _check_requests(requests: Any) -> None:
    """Raises RequestError for what is no list of requests."""
    hint = "engine.run([GenerateRequest(prompt=...), EmbedRequest(input=...)])"
    if isinstance(requests, Request):
        raise RequestError(f"one {type(requests).__name__} where a list belongs", hint="give [request]")
    if not isinstance(requests, (list, tuple)):
        raise RequestError(f"requests: a list of them, not {shown(requests)}", hint=hint)
    for request in requests:
        if not isinstance(request, Request):
            raise RequestError(
                f"requests are GenerateRequest, EmbedRequest, ClassifyRequest and RerankRequest, not {type(request).__name__}",
                hint=hint,
            )
