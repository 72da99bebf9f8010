"""The engine as users meet it.

Decides the Python face: one prompt or many, results or streams, and mixed requests in one batch. Knows nothing of how an
engine is put together; `loading` does that.
"""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Any, Self, cast, overload

import numpy as np
from numpy.typing import NDArray

from lorax_core.adapters.residency.store import AdapterStore
from lorax_core.engine.worker import EngineWorker
from lorax_core.errors import RequestError
from lorax_core.serving.cache import peak_memory
from lorax_core.serving.prepare import Preparer, Result
from lorax_core.serving.requests import (
    AdapterChoices,
    ClassifyRequest,
    EmbedRequest,
    GenerateRequest,
    Request,
    TextInput,
    TextPrompt,
    Truncate,
    make_requests,
)
from lorax_core.serving.stream import Call, Stream
from lorax_core.types import Classification, Completion, Embedding

TextPrompts = list[str] | list[list[int]] | list[list[dict[str, Any]]] | list[TextPrompt]
TextInputs = list[str] | list[list[int]] | list[tuple[str, str]] | list[TextInput]


@dataclass(frozen=True)
class EngineInfo:
    """What an engine is made of.

    `max_tokens` is the longest sequence, `max_text_tokens` the longest text to embed or classify (tokenizers and sentence
    files may allow less than the model), `kv_cache_tokens` what all sequences share. `step_bytes`, known after `warmup`: what
    the largest step took beyond weights and cache (on a CPU, the growth of the process, 0 when it had been as large before).
    """

    model_type: str
    tasks: tuple[str, ...]
    dtype: str
    device: str
    attention: str
    passed_over: tuple[tuple[str, str], ...]
    max_tokens: int
    max_text_tokens: int
    kv_cache_tokens: int | None
    kv_cache_bytes: int
    step_bytes: int | None = None


class Engine:
    """A loaded model that answers requests. Made by `load`; safe to call from any thread; also a context manager.

    Errors are of the `LoraxError` tree: a request that cannot be answered is refused before any work, and the engine goes
    on serving.
    """

    def __init__(self, worker: EngineWorker, preparer: Preparer, adapters: AdapterStore, info: EngineInfo) -> None:
        self._worker = worker
        self._preparer = preparer
        self._info = info
        self.adapters = adapters

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
        return Stream(self._submit(requests), self._worker.abort)

    def embed(
        self,
        text: TextInput | TextInputs,
        *,
        adapter: AdapterChoices = None,
        truncate: Truncate = "error",
    ) -> NDArray[np.float32]:
        """Vectors of texts: `[dim]` for one, `[n, dim]` for a list of n."""
        requests, single = make_requests(EmbedRequest, "input", text, adapter, {"truncate": truncate})
        vectors = [cast("Embedding", result).vector for result in self.run(requests)]
        if single:
            return vectors[0]
        return np.stack(vectors) if vectors else np.zeros((0, self._preparer.embedding_dim), np.float32)

    @overload
    def classify(
        self, text: TextInput, *, adapter: AdapterChoices = ..., truncate: Truncate = ...
    ) -> Classification: ...
    @overload
    def classify(
        self, text: TextInputs, *, adapter: AdapterChoices = ..., truncate: Truncate = ...
    ) -> list[Classification]: ...
    def classify(
        self, text: Any, *, adapter: AdapterChoices = None, truncate: Truncate = "error"
    ) -> Classification | list[Classification]:
        """Labels of texts, of their tokens or of each as a whole, as the checkpoint was trained."""
        requests, single = make_requests(ClassifyRequest, "input", text, adapter, {"truncate": truncate})
        results = cast("list[Classification]", self.run(requests))
        return results[0] if single else results

    def run(self, requests: SequenceOf[Request]) -> list[Result]:
        """Answer requests of any mix of tasks and adapters together; results in their order.

        When some fail while others finish, raises `StepError` whose `results` has both.
        """
        if not requests:
            return []
        call = self._submit(requests)
        try:
            return call.wait()
        except BaseException:
            self._worker.abort(call.unfinished)
            raise

    def count_tokens(self, prompt: TextPrompt | TextInput) -> int:
        """Tokens that a prompt or text comes to, special ones included; its limit is in `info()`."""
        return self._preparer.count_tokens(prompt)

    def info(self) -> EngineInfo:
        """What this engine is made of."""
        return self._info

    def warmup(self) -> int:
        """Compute the largest step once, so that what does not fit is known now and the first request finds all ready.

        Gives the tokens that the cache holds, or for a model without a cache the longest text; `info()` tells the rest.
        Raises CapacityError when the step does not fit in memory.
        """
        before = peak_memory(self._info.device)
        self._worker.call(lambda loop: loop.warmup(self._info.max_tokens))
        self._info = replace(self._info, step_bytes=peak_memory(self._info.device) - before)
        return self._info.kv_cache_tokens or self._info.max_tokens

    def close(self) -> None:
        """Stop the engine; requests still running end with an error. Idempotent."""
        self._worker.close()
        self.adapters.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _submit(self, requests: SequenceOf[Request]) -> Call:
        """All of the requests are checked before any of them starts."""
        for request in requests:
            if not isinstance(request, Request):
                raise RequestError(
                    f"run() takes GenerateRequest, EmbedRequest and ClassifyRequest, not {type(request).__name__}"
                )
        call = Call([self._preparer.prepare(request) for request in requests])
        self._worker.submit(call.sequences)
        return call
