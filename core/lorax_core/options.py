"""Everything that can be said of an engine.

Decides which options exist and which values they take, as far as that needs neither the checkpoint nor the machine. Knows
nothing of torch or plugins: options are plain data, so they pickle, become command-line flags, and travel to other processes.
"""

from __future__ import annotations

from collections.abc import Mapping
from os import PathLike, fspath
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    SecretStr,
    ValidationError,
    field_validator,
    model_validator,
)

from lorax_core.errors import RequestError, listed, nearest, shown
from lorax_core.untrusted import guarded, unusable

Dtype = Literal["auto", "float32", "bfloat16", "float16"]
KVDtype = Literal["auto", "fp8_e4m3"]
SOURCE_KINDS = ("folder", "hub", "url")
CACHE_SIZES = ("kv_cache_tokens", "kv_cache_pages", "kv_cache_bytes", "kv_cache_fraction")


# What other libraries call an option; None where there is no such option here, however similar another one is called.
_OTHER_NAMES: dict[str, str | None] = {
    "torch_dtype": "dtype",
    "model": "checkpoint",
    "lora_modules": "adapters",
    "max_loras": "max_adapters",
    "max_model_len": "kv_cache_tokens",
    "max_new_tokens": "max_tokens",
    "max_completion_tokens": "max_tokens",
    "max_num_seqs": "max_batch_rows",
    "max_num_batched_tokens": "max_batch_tokens",
    "kv_cache_dtype": "kv_dtype",
    "gpu_memory_utilization": "kv_cache_fraction",
    "enforce_eager": "cuda_graphs",
    "quantization": "quantize",
    "load_in_8bit": "quantize",
    "load_in_4bit": "quantize",
    "attention_backend": "attention",
    "block_size": None,
    "guided_json": "json_schema",
    "guided_regex": "regex",
    "guided_choice": "choice",
    "response_format": "json_schema",
    "chat_template_kwargs": "template_options",
    "adapter_id": "adapter",
    "best_of": "n",
    "text": "input",
    "truncate_dim": "dimensions",
    "normalize_embeddings": "normalize",
    "tensor_parallel_size": None,
    "trust_remote_code": None,
}
_SECRETS = ("token", "api_keys", "admin_key")
_EXAMPLES = {
    "adapters": 'adapters={"NAME": "FOLDER"}',
    "adapter_sources": 'adapter_sources=["folder", "hub"]',
    "dtype": 'dtype="float16"',
    "top_k": "leave it out to switch it off",
    "logprobs": "logprobs=1 gives each token's own and one alternative; leave it out for none",
    "max_tokens": "leave it out to run to the end",
}


class Checked(BaseModel):
    """What users fill in: any value at all makes one, or a RequestError that names the option and the value."""

    # strict: "5" for a number or True for a number is a mistake. Inputs are hidden, so that a traceback through pydantic's
    # own error does not show a token either.
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, hide_input_in_errors=True)
    home: ClassVar[str] = "lorax_core"
    """The module that users import it from."""

    def __init__(self, **values: Any) -> None:
        # Whatever else goes wrong with a value, such as a path that cannot say where it leads.
        name = type(self).__name__
        hint = f"help({type(self).home}.{name}) says what each option takes"
        with guarded(RequestError, f"{name} cannot be made of these options", hint):
            for option, value in values.items():
                problem = unusable([option, value])
                if problem is not None:
                    raise RequestError(
                        f"{shown(option)[1:-1]}: it {problem}", hint="give text that can be encoded as UTF-8"
                    )
            try:
                super().__init__(**values)
            except ValidationError as error:
                # Callers meet one tree of errors, and no pydantic.
                raise invalid(type(self), error) from error


def _as_secret(value: Any) -> Any:
    # What is no string must not be shown by the error about it either.
    if value is not None and not isinstance(value, (str, SecretStr)):
        raise ValueError(f"a secret is a string, not {type(value).__name__}")
    return SecretStr(value) if isinstance(value, str) else value


Secret = Annotated[SecretStr | None, BeforeValidator(_as_secret)]
"""A token or key that nothing shows."""


class AdapterOptions(Checked):
    """An adapter that is loaded with an engine: the options of `engine.adapters.load`.

    - `source`: a folder, a hub id (with `revision` and `token`), or the URL of a folder.
    - `task`, `problem_type`, `id2label` state of its head what its files do not. `pin`: once on the device it stays there.
    """

    source: str
    revision: str | None = None
    token: Secret = None
    task: str | None = None
    problem_type: str | None = None
    id2label: dict[int, str] | None = None
    pin: bool = False

    @field_validator("source", mode="before")
    @classmethod
    def _path_to_text(cls, value: Any) -> Any:
        return fspath(value) if isinstance(value, PathLike) else value

    @field_validator("id2label", mode="before")
    @classmethod
    def _keys_of_json(cls, value: Any) -> Any:
        if not isinstance(value, Mapping):
            return value
        # JSON and TOML have text for keys.
        return {int(key) if isinstance(key, str) and _is_number(key) else key: one for key, one in value.items()}


class EngineOptions(Checked):
    """The options of `load`; raises RequestError naming the option, its value and what is valid.

    - `checkpoint`: a folder, or a hub id with `revision` and `token`.
    - `dtype`: "auto" keeps the checkpoint's, except that 16 bit on a CPU without fast bfloat16 becomes float32, and that a GPU
      computes float32 in bfloat16, and everything in float16 where it has no bfloat16.
    - `device`: "auto" is a GPU where there is one, else the CPU. A GPU is the first that `CUDA_VISIBLE_DEVICES` leaves visible.
    - `adapters`: names to sources, loaded with the engine; instead of a source, `AdapterOptions` (or a dict of them) also state
      of a head what its files do not: `{"topic": {"source": "FOLDER", "id2label": {0: "no", 1: "yes"}}}`.
    - `merge_adapter`: a source, merged into the weights as they are read; all requests then have it under their own adapter.
    - `max_adapters`: how many adapters are on the device at once, all when None; `max_cpu_adapters`: how many also keep a copy
      in host memory, four times as many when None. The least recently used makes room, and is loaded again when a request
      names it.
    - `adapter_sources`: what a request may name as an adapter beside those loaded: "folder", "hub", "url", a folder
      ("/srv/adapters", with all below it) or the beginning of a URL ("s3://bucket/adapters/"). Of the adapters that requests
      brought, the `max_fetched_adapters` last used stay loaded. Any source is given up after `adapter_timeout` seconds.
    - `max_adapter_bytes`: the largest adapter, on disk, that a request or a client of a server may bring; any size when None.
    - `pooling` ("cls", "mean", "last") and `normalize` override what the checkpoint's files say of embeddings.
    - `embedding_dim`: length of vectors, for checkpoints with folders `2_Dense_{length}` to choose from.
    - `kv_cache_tokens`, `_pages`, `_bytes` or `_fraction` (of the free memory): how much all running sequences share; by
      default a quarter of the free memory, up to 65,536 tokens. `kv_dtype` "fp8_e4m3" stores it in 8 bits.
    - `max_batch_tokens`, `max_batch_rows`: the most that one step computes.
    - `attention`: a backend by name, instead of the first that supports the model.
    - `quantize`: "int8" or "int4" rounds the weights of linear layers when they are loaded, on a CPU. Classification heads keep
      their numbers, and the head of a language model has 8 bits at least.
    - `linear_methods`: patterns of module paths ("layers.*.mlp.*") to the linear method that computes those layers; `lorax
      doctor` lists the methods. Other layers take the first that supports them.
    - `speculate`: draft up to so many tokens ahead from the sequence itself; answers are the same, repetitive ones come faster.
    - `cuda_graphs`: on a GPU, decoding steps are captured once and replayed; False computes every step eagerly.
    - `threads`: of the whole process, by torch's rule; a second engine cannot ask for another number.
    - `seed`: of requests without one.
    """

    checkpoint: str
    revision: str | None = None
    token: Secret = None
    dtype: Dtype = "auto"
    device: str = "auto"
    adapters: dict[str, str | AdapterOptions] = Field(default_factory=dict)
    merge_adapter: str | None = None
    max_adapters: int | None = Field(default=None, ge=1, lt=2**31)
    max_cpu_adapters: int | None = Field(default=None, ge=0, lt=2**31)
    adapter_sources: tuple[str, ...] = ("folder", "hub")
    max_fetched_adapters: int = Field(default=64, ge=1, lt=2**31)
    adapter_timeout: float = Field(default=600.0, gt=0, le=86_400)
    max_adapter_bytes: int | None = Field(default=None, ge=1, lt=2**60)
    pooling: Literal["cls", "mean", "last"] | None = None
    normalize: bool | None = None
    embedding_dim: int | None = Field(default=None, ge=1, lt=2**31)
    kv_cache_tokens: int | None = Field(default=None, ge=1, lt=2**60)
    kv_cache_pages: int | None = Field(default=None, ge=1, lt=2**60)
    kv_cache_bytes: int | None = Field(default=None, ge=1, lt=2**60)
    kv_cache_fraction: float | None = Field(default=None, gt=0, le=1)
    kv_dtype: KVDtype = "auto"
    max_batch_tokens: int = Field(default=2048, ge=1, lt=2**31)
    max_batch_rows: int = Field(default=256, ge=1, lt=2**31)
    attention: str | None = None
    quantize: Literal["int8", "int4"] | None = None
    linear_methods: dict[str, str] = Field(default_factory=dict)
    speculate: int = Field(default=0, ge=0, le=1024)
    cuda_graphs: bool = True
    threads: int | None = Field(default=None, ge=1, le=1024)
    seed: int = Field(default=0, ge=-(2**63), lt=2**64)

    @field_validator("checkpoint", "merge_adapter", mode="before")
    @classmethod
    def _path_to_text(cls, value: Any) -> Any:
        # Before validation: strict mode would refuse a Path, and plain text is what pickles and travels.
        return fspath(value) if isinstance(value, PathLike) else value

    @field_validator("adapters", mode="before")
    @classmethod
    def _adapter_sources(cls, value: Any) -> Any:
        if value is None:
            return {}
        if not isinstance(value, Mapping):
            return value
        return {name: _adapter(given) for name, given in value.items()}

    @field_validator("adapter_sources", mode="before")
    @classmethod
    def _any_list(cls, value: Any) -> Any:
        return tuple(value) if isinstance(value, (list, set, frozenset)) else value

    @field_validator("adapter_sources")
    @classmethod
    def _kinds_or_roots(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for entry in value:
            if entry not in SOURCE_KINDS and "/" not in entry:
                close = nearest(entry, SOURCE_KINDS)
                meant = f"; did you mean {close!r}?" if close else ""
                raise ValueError(f"{entry!r:.80} is not one of {listed(SOURCE_KINDS)}, nor a folder or URL{meant}")
        return value

    @field_validator("pooling", mode="before")
    @classmethod
    def _plain_text(cls, value: Any) -> Any:
        return str(value) if isinstance(value, str) else value  # members of StrEnum too

    @field_validator("checkpoint", "merge_adapter")
    @classmethod
    def _some_source(cls, value: str | None) -> str | None:
        if value is not None and not value.strip():
            raise ValueError("Input should be a folder or a hub id, not empty")
        return value

    @field_validator("adapters")
    @classmethod
    def _adapter_names(cls, value: dict[str, str | AdapterOptions]) -> dict[str, str | AdapterOptions]:
        if any(not name.strip() for name in value):
            raise ValueError("an adapter's name must not be empty")
        return value

    @model_validator(mode="after")
    def _agree(self) -> Self:
        given = [name for name in CACHE_SIZES if getattr(self, name) is not None]
        if len(given) > 1:
            raise ValueError(f"{listed(given)} exclude each other; give one of them")
        if self.max_cpu_adapters is not None and self.max_adapters is None:
            raise ValueError("max_cpu_adapters needs max_adapters: without it every adapter stays on the device")
        return self


def _adapter(given: Any) -> Any:
    """A source as text, or the options of an adapter."""
    if isinstance(given, Mapping):
        if not all(isinstance(name, str) for name in given):
            raise ValueError("what is said of an adapter is a source, or options by their names")
        return AdapterOptions(**given)
    return fspath(given) if isinstance(given, PathLike) else given


def _is_number(key: str) -> bool:
    return key.isascii() and key.isdecimal() and len(key) < 10


def invalid(kind: type[BaseModel], error: ValidationError) -> RequestError:
    """What pydantic found wrong with the values of a model of ours, as an error with the nearest valid option."""
    found: dict[str, tuple[int, str]] = {}  # by option: how deep the problem lies, and what it is
    hint = named = None
    for problem in error.errors(include_url=False):
        option = str(problem["loc"][0]) if problem["loc"] else ""
        depth = len(problem["loc"])
        if problem["type"] == "extra_forbidden":
            found[option] = (1, f"{kind.__name__} has no option {shown(option)}")
            close = _OTHER_NAMES.get(option) or nearest(option, kind.model_fields)
            close = close if close in kind.model_fields else None
            hint = f"did you mean {close!r}?" if close else f"options are {listed(kind.model_fields, limit=40)}"
        # An option that may be several things fails as each of them; the nearest to what was meant fails deepest.
        elif option not in found or depth > found[option][0]:
            message = problem["msg"].removeprefix("Value error, ")
            # Of a missing option, or of several that do not agree, pydantic calls all options the input.
            hidden = option in ("", *_SECRETS) or problem["type"] == "missing"
            found_value = "" if hidden else f" (found {shown(problem['input'])})"
            inside = [step for step in problem["loc"][1:2] if isinstance(step, str) and kind is EngineOptions]
            found[option] = (depth, f"{'.'.join([option, *inside])}: {message}{found_value}" if option else message)
            hint = hint or _nearest_value(problem) or _EXAMPLES.get(option)
        named = named or option or getattr(problem.get("ctx", {}).get("error"), "option", None)
    told = f"help({getattr(kind, 'home', 'lorax_core')}.{kind.__name__}) says what each option takes"
    http_hint = hint or "GET /openapi.json says what each field takes"
    said = "; ".join(line for _, line in found.values())
    return RequestError(said, hint=hint or told, http_hint=http_hint, option=named)


def _nearest_value(problem: Any) -> str | None:
    """The valid word most like a misspelt one."""
    if problem["type"] != "literal_error" or not isinstance(problem["input"], str):
        return None
    expected = str(problem["ctx"]["expected"]).replace(" or ", ", ").split(", ")
    close = nearest(problem["input"], [word.strip("'") for word in expected])
    return f"did you mean {close!r}?" if close else None
