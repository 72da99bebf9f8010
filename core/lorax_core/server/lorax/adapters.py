"""Which adapter LoRAX's parameters mean.

Decides what `adapter_source` and `merged_adapters` mean here, and refuses what would not be the same as there. Knows nothing of
what is asked of the adapter.
"""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated, Final, Literal

from pydantic import Field, model_validator

from lorax_core.adapters.residency.source import url_scheme
from lorax_core.server.errors import Refused
from lorax_core.server.gateway import Gateway
from lorax_core.server.names import BASE
from lorax_core.server.schemas import StrictBody
from lorax_core.serving.requests import NAME_LENGTH, SUMMANDS, AdapterChoice
from lorax_core.weights.hub import is_hub_id

_BASE: Final = ("", BASE)
"""What LoRAX's clients call no adapter."""
_LINEAR: Final = (None, "linear")
_Id = Annotated[str, Field(max_length=NAME_LENGTH)]
_Source = Literal["hub", "local", "s3", "pbase"]


class MergedAdapters(StrictBody):
    """The weighted sum of adapters. `density` and `majority_sign_method` change nothing in a linear one."""

    ids: list[_Id] = Field(min_length=1, max_length=SUMMANDS)
    weights: list[float] = Field(min_length=1, max_length=SUMMANDS)
    merge_strategy: Literal["linear", "ties", "dare_linear", "dare_ties"] | None = Field(
        default=None, description="linear; the others are refused, as `lorax adapters merge` does them ahead."
    )
    density: float = Field(default=0.0, ge=0, le=1)
    majority_sign_method: Literal["total", "frequency"] | None = None

    @model_validator(mode="after")
    def _as_many(self) -> MergedAdapters:
        if len(self.ids) != len(self.weights):
            raise ValueError(f"ids are {len(self.ids)} and weights {len(self.weights)}; give one weight for each id")
        return self


class AdapterParameters(StrictBody):
    """The base where nothing is named, else one adapter or the weighted sum of several."""

    adapter_id: _Id | None = Field(default=None, description="A loaded adapter, or a source that requests may name.")
    adapter_source: _Source | None = Field(
        default=None, description="Where one that is not loaded comes from; pbase is refused."
    )
    merged_adapters: MergedAdapters | None = None
    api_token: str | None = Field(
        default=None, max_length=NAME_LENGTH, description="Of private adapters: refused for one that is not loaded."
    )


def choose_adapter(gateway: Gateway, parameters: AdapterParameters) -> AdapterChoice:
    """What the engine is to compute with; raises Refused, naming the parameter."""
    merged = parameters.merged_adapters
    if merged is None:
        return _named(gateway, parameters, parameters.adapter_id, "adapter_id")
    if parameters.adapter_id is not None:
        raise _refused("merged_adapters", "adapter_id is given too", "leave one of the two out")
    if merged.merge_strategy not in _LINEAR:
        raise _refused(
            "merged_adapters.merge_strategy", f"{merged.merge_strategy!r} cannot be had per request", _ahead(merged)
        )
    found: dict[str, float] = {}
    for one, weight in zip(merged.ids, merged.weights, strict=True):
        name = _named(gateway, parameters, one, "merged_adapters.ids")
        if name is None:
            raise _refused("merged_adapters.ids", "the base is not an adapter", "leave it out: it has weight 1 always")
        found[name] = found.get(name, 0.0) + weight
    return found


def shown_adapter(parameters: AdapterParameters) -> tuple[str, str] | None:
    """The ids of the adapters, with commas between, and their source; None for the base."""
    merged = parameters.merged_adapters
    ids = (
        merged.ids if merged is not None else [] if parameters.adapter_id in (None, *_BASE) else [parameters.adapter_id]
    )
    if not ids:
        return None
    return ",".join(str(one) for one in ids), parameters.adapter_source or _kind(str(ids[0]))


def _named(gateway: Gateway, parameters: AdapterParameters, given: str | None, field: str) -> str | None:
    """The name of one adapter; None for the base."""
    if given is None or given in _BASE:
        return None
    name = gateway.names.adapter(given, param=f"parameters.{field}")
    if name is None:
        return None
    absent = bool(gateway.engine.adapters.missing(name))
    source = parameters.adapter_source
    # A name that the operator gave means what it means, wherever its files came from; a source means one place.
    if source is not None and (absent or _is_its_source(gateway, name)) and source != (kind := _kind(name)):
        said = "Predibase's registry is not asked" if source == "pbase" else f"{name!r:.200} is of the kind {kind!r}"
        raise _refused("adapter_source", said, "load it with POST /v1/adapters, and name it as it is called there")
    if absent and parameters.api_token:
        raise _refused(
            "api_token",
            f"{name!r:.200} is not loaded, and what is fetched for one client is there for all",
            "load it with POST /v1/adapters, which takes a token",
        )
    return name


def _is_its_source(gateway: Gateway, name: str) -> bool:
    return any(one.name == name and one.source == name for one in gateway.engine.adapters.list())


def _kind(name: str) -> str:
    """What LoRAX calls the kind of a source."""
    scheme = url_scheme(name)
    if scheme is not None:
        return "s3" if scheme.lower() in ("s3", "s3a") else scheme.lower()
    return "hub" if is_hub_id(name) and not Path(name).is_dir() else "local"


def _ahead(merged: MergedAdapters) -> str:
    """The command that merges ahead what cannot be merged for one request."""
    words = ["lorax", "adapters", "merge", *(one[:200] for one in merged.ids), "--out", "DIR"]
    words += ["--strategy", str(merged.merge_strategy)]
    words += ["--density", f"{merged.density:g}"] if merged.density else []
    for weight in merged.weights:
        words += ["--weight", f"{weight:g}"]
    if merged.majority_sign_method is not None:
        words += ["--majority-sign", merged.majority_sign_method]
    return f"{shlex.join(words)} writes it as one adapter, to be loaded; give the folder or hub id of each"


def _refused(name: str, why: str, hint: str) -> Refused:
    return Refused("invalid", why, hint=hint, param=f"parameters.{name}")
