"""`lorax serve`: a model and its adapters over HTTP.

Decides the flags of a server and where its keys come from. Knows nothing of HTTP: `lorax_core.server` serves, imported when the
command runs.
"""

from __future__ import annotations

import contextlib
import importlib
from pathlib import Path
from typing import Annotated, Any

import typer

from lorax_core.cli.loading import Loading, ModelPath, loads_model
from lorax_core.cli.remote import keys_in
from lorax_core.cli.render import data_only_stdout, print_message
from lorax_core.errors import RequestError
from lorax_core.settings import Settings

app = typer.Typer(add_completion=False)


# The flags, each with its help.
_AdapterSources = Annotated[
    list[str] | None,
    typer.Option(
        "--adapter-sources",
        metavar="KIND|FOLDER|URL",
        help="What requests may name unloaded: hub, folder, url, a folder, a URL's start. Repeatable.",
    ),
]
_Host = Annotated[str, typer.Option(help="The address to listen on; 0.0.0.0 is all of this machine.")]
_Port = Annotated[int, typer.Option(help="The port; 0 takes a free one.")]
_ModelName = Annotated[str | None, typer.Option(metavar="NAME", help="What clients call the base, instead of PATH.")]
_ApiKeyFile = Annotated[
    Path | None, typer.Option(metavar="FILE", help="API keys, one a line; or set LORAX_API_KEYS, separated by commas.")
]
_AdminKeyFile = Annotated[
    Path | None, typer.Option(metavar="FILE", help="The key that may load adapters; or set LORAX_ADMIN_KEY.")
]
_MaxQueue = Annotated[
    int | None,
    typer.Option(metavar="N", help="Sequences that may wait; more are refused with 429."),
]
_MaxBodyBytes = Annotated[int | None, typer.Option(metavar="N", help="The largest body.")]
_MaxBatch = Annotated[int | None, typer.Option(metavar="N", help="The most inputs of one request.")]
_RequestTimeout = Annotated[
    float | None,
    typer.Option(metavar="SECONDS", help="The longest that an answer may take."),
]
_BodyTimeout = Annotated[
    float | None, typer.Option(metavar="SECONDS", help="The longest that headers may take to arrive, and a body.")
]
_DrainTimeout = Annotated[
    float | None, typer.Option(metavar="SECONDS", help="What running requests have to finish after SIGTERM.")
]
_CorsOrigin = Annotated[
    list[str] | None, typer.Option(metavar="ORIGIN", help="Web pages of this origin may ask. Repeatable.")
]
_LogFormat = Annotated[str, typer.Option(metavar="text|json", help="How requests are logged, on stderr.")]
_Pooling = Annotated[str | None, typer.Option(help="How rows become one vector: cls, mean or last.")]
_KvCacheTokens = Annotated[int | None, typer.Option(metavar="N", help="Tokens that all running sequences share.")]
_MaxBatchTokens = Annotated[int | None, typer.Option(metavar="N", help="The most tokens of one step.")]
_MaxBatchRows = Annotated[int | None, typer.Option(metavar="N", help="The most sequences of one step.")]
_MaxAdapters = Annotated[
    int | None, typer.Option(metavar="N", help="Adapters that are on the device at once; all by default.")
]
_MaxAdapterBytes = Annotated[
    int | None, typer.Option(metavar="N", help="The largest adapter, on disk, that clients may bring; any by default.")
]


@app.command()
@loads_model
def serve(
    path: ModelPath,
    adapter_sources: _AdapterSources = None,
    host: _Host = "127.0.0.1",
    port: _Port = 8000,
    model_name: _ModelName = None,
    api_key_file: _ApiKeyFile = None,
    admin_key_file: _AdminKeyFile = None,
    max_queue: _MaxQueue = None,
    max_body_bytes: _MaxBodyBytes = None,
    max_batch: _MaxBatch = None,
    request_timeout: _RequestTimeout = None,
    body_timeout: _BodyTimeout = None,
    drain_timeout: _DrainTimeout = None,
    cors_origin: _CorsOrigin = None,
    log_format: _LogFormat = "text",
    pooling: _Pooling = None,
    kv_cache_tokens: _KvCacheTokens = None,
    max_batch_tokens: _MaxBatchTokens = None,
    max_batch_rows: _MaxBatchRows = None,
    max_adapters: _MaxAdapters = None,
    max_adapter_bytes: _MaxAdapterBytes = None,
    *,
    loading: Loading,
) -> None:
    """Serve a model over HTTP: the APIs of OpenAI, LoRAX and TEI, and every task of one base at once.

    SIGTERM and Ctrl-C finish what runs, then end. Logs are on stderr.
    """
    server = _server()
    options = _given(
        host=host, port=port, model_name=model_name, max_queue=max_queue, max_body_bytes=max_body_bytes,
        max_batch=max_batch, request_timeout=request_timeout, body_timeout=body_timeout, drain_timeout=drain_timeout,
        cors_origins=cors_origin, log_format=log_format,
    )  # fmt: skip
    # Unlike an engine in Python, a server lets requests name nothing that was not loaded, unless somebody says so.
    sources = adapter_sources or loading.options_of(path).get("adapter_sources", [])
    for_engine = {
        "adapter_sources": sources, "pooling": pooling, "kv_cache_tokens": kv_cache_tokens,
        "max_batch_tokens": max_batch_tokens, "max_batch_rows": max_batch_rows, "max_adapters": max_adapters,
        "max_adapter_bytes": max_adapter_bytes,
    }  # fmt: skip
    settings = Settings.from_env()
    keys = [*settings.api_keys, *(keys_in(api_key_file) if api_key_file else [])]
    admin = next(iter(keys_in(admin_key_file)), None) if admin_key_file else settings.admin_key
    chosen = server.ServerOptions(**options, api_keys=keys, admin_key=admin)
    with contextlib.closing(server.listen(chosen)) as bound, data_only_stdout():
        print_message(f"loading {path}")
        with loading.engine(path, **for_engine) as engine:
            engine.warmup()
            name = chosen.model_name or path
            print_message(f"serving {name!r} at {server.address(bound)}; Ctrl-C stops")
            server.serve(engine, chosen, bound, model_name=name)


def _given(**options: Any) -> dict[str, Any]:
    """Without the flags that were left out, whose defaults are those of the Python interface."""
    return {name: value for name, value in options.items() if value is not None}


def _server() -> Any:
    """The module that serves; raises RequestError where its libraries are not installed."""
    try:
        return importlib.import_module("lorax_core.server.run")
    except ModuleNotFoundError as error:
        if error.name is None or error.name.startswith("lorax_core"):
            raise
        raise RequestError(
            f"lorax serve needs {error.name}, which is not installed", hint="pip install 'lorax-core[server]'"
        ) from error
