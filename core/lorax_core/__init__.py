"""lorax-core: one runtime for a zoo of pip-installed architectures.

Decides which names are public. Every name is imported when it is first used (PEP 562), so `import lorax_core` is light and
listing models never imports torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from lorax_core.version import __version__

_HOMES = {
    "AdapterError": "errors",
    "CapacityError": "errors",
    "CheckpointError": "errors",
    "LoraxError": "errors",
    "PluginError": "errors",
    "RequestError": "errors",
    "StepError": "errors",
    "Progress": "progress",
    "Classification": "types",
    "Completion": "types",
    "Entity": "types",
    "Embedding": "types",
    "Event": "types",
    "FinishReason": "types",
    "Pooling": "types",
    "Ranked": "types",
    "Relevance": "types",
    "Task": "types",
    "Tokenized": "types",
    "Usage": "types",
    "ArchitectureCases": "plugins.cases",
    "ArchitectureSpec": "plugins.spec",
    "BackendSpec": "plugins.spec",
    "PluginHost": "plugins.host",
    "Batch": "modeling.batch",
    "Model": "modeling.model",
    "Adapter": "adapters.base",
    "merge_adapters": "adapters.merging.merge",
    "merge_into_base": "adapters.merging.into_base",
    "Engine": "serving.engine",
    "load": "serving.engine",
    "AdapterOptions": "options",
    "EngineOptions": "options",
    "load_model": "serving.model",
    "make_batch": "serving.model",
    "ClassifyRequest": "serving.requests",
    "EmbedRequest": "serving.requests",
    "GenerateRequest": "serving.requests",
    "RerankRequest": "serving.requests",
}

__all__ = ["__version__", *sorted(_HOMES)]

if TYPE_CHECKING:
    from lorax_core.adapters.base import Adapter as Adapter
    from lorax_core.adapters.merging.into_base import merge_into_base as merge_into_base
    from lorax_core.adapters.merging.merge import merge_adapters as merge_adapters
    from lorax_core.errors import AdapterError as AdapterError
    from lorax_core.errors import CapacityError as CapacityError
    from lorax_core.errors import CheckpointError as CheckpointError
    from lorax_core.errors import LoraxError as LoraxError
    from lorax_core.errors import PluginError as PluginError
    from lorax_core.errors import RequestError as RequestError
    from lorax_core.errors import StepError as StepError
    from lorax_core.modeling.batch import Batch as Batch
    from lorax_core.modeling.model import Model as Model
    from lorax_core.options import AdapterOptions as AdapterOptions
    from lorax_core.options import EngineOptions as EngineOptions
    from lorax_core.plugins.cases import ArchitectureCases as ArchitectureCases
    from lorax_core.plugins.host import PluginHost as PluginHost
    from lorax_core.plugins.spec import ArchitectureSpec as ArchitectureSpec
    from lorax_core.plugins.spec import BackendSpec as BackendSpec
    from lorax_core.progress import Progress as Progress
    from lorax_core.serving.engine import Engine as Engine
    from lorax_core.serving.engine import load as load
    from lorax_core.serving.model import load_model as load_model
    from lorax_core.serving.model import make_batch as make_batch
    from lorax_core.serving.requests import ClassifyRequest as ClassifyRequest
    from lorax_core.serving.requests import EmbedRequest as EmbedRequest
    from lorax_core.serving.requests import GenerateRequest as GenerateRequest
    from lorax_core.serving.requests import RerankRequest as RerankRequest
    from lorax_core.types import Classification as Classification
    from lorax_core.types import Completion as Completion
    from lorax_core.types import Embedding as Embedding
    from lorax_core.types import Entity as Entity
    from lorax_core.types import Event as Event
    from lorax_core.types import FinishReason as FinishReason
    from lorax_core.types import Pooling as Pooling
    from lorax_core.types import Ranked as Ranked
    from lorax_core.types import Relevance as Relevance
    from lorax_core.types import Task as Task
    from lorax_core.types import Tokenized as Tokenized
    from lorax_core.types import Usage as Usage


def __getattr__(name: str) -> object:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{home}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return list(__all__)
