"""The adapters that a model holds on its device.

Decides what the two messages mean that bring an adapter there and take it away. Messages are picklable, so that the model may
be in another process. Knows nothing of names, limits or requests: the store decides which adapters are bound.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from lorax_core.adapters.base import Adapter, Bound
from lorax_core.adapters.lora_kernels.select import AutoKernel
from lorax_core.adapters.stack import StackedAdapter
from lorax_core.settings import Settings
from lorax_core.weights.loader import LoadedModel


@dataclass(frozen=True, slots=True)
class BindAdapter:
    """Put an adapter on the device."""

    identity: str
    adapter: Adapter


@dataclass(frozen=True, slots=True)
class UnbindAdapter:
    """Free an adapter's memory on the device."""

    identity: str


Message = BindAdapter | UnbindAdapter


class BoundAdapters(Mapping[str, Bound]):
    """What is bound to one model, by identity. Messages may be handled while steps run in another thread.

    `kernel` computes the low-rank products; it is chosen when the first adapter is bound, so that an engine without adapters
    compiles nothing.
    """

    def __init__(self, base: LoadedModel, settings: Settings) -> None:
        self.kernel = AutoKernel(base.model.dtype, base.model.device, settings)
        self._base = base
        self._bound: dict[str, Bound] = {}
        self._lock = threading.RLock()  # what is freed meanwhile may unbind an adapter in the same thread

    def handle(self, message: Message) -> None:
        """Do what a message says; raises AdapterError, with nothing changed, when the adapter does not fit."""
        if isinstance(message, BindAdapter):
            # Before the tensors: compiling may take long, and here it delays this adapter only, not a step.
            self.kernel.prepare()
            bound = self._bind(message.adapter)
            # Bound outside the lock: copying to the device must not hold up an unbind.
            with self._lock:  # a new dict each time: readers in other threads see the old one or the new one, whole
                self._bound = {**self._bound, message.identity: bound}
        else:
            with self._lock:
                self._bound = {key: bound for key, bound in self._bound.items() if key != message.identity}

    def _bind(self, adapter: Adapter) -> Bound:
        if isinstance(adapter, StackedAdapter):
            return adapter.bind(self._base, others=self._bound)
        return adapter.bind(self._base)

    def __getitem__(self, identity: str) -> Bound:
        return self._bound[identity]

    def __iter__(self) -> Iterator[str]:
        return iter(self._bound)

    def __len__(self) -> int:
        return len(self._bound)
