"""`lorax bench`: how fast a model answers on this machine.

Decides what a command line asks to be measured, and how figures are shown. Knows nothing of how they come about, which is
`measuring.py`.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from lorax_core.cli.loading import Loading, ModelOrServer, loads_model
from lorax_core.cli.progress import shown_progress
from lorax_core.cli.render import data_only_stdout, print_message, show_json, show_table
from lorax_core.errors import RequestError

if TYPE_CHECKING:
    from lorax_core.cli.measuring import Figures, Workload
    from lorax_core.cli.served import Server
    from lorax_core.serving.info import EngineInfo

app = typer.Typer(add_completion=False)

_MOST: Final = 4_096
"""Requests at once: far more than a step computes."""


@app.command()
@loads_model
def bench(
    path: ModelOrServer,
    concurrency: Annotated[
        str, typer.Option(metavar="N,N,...", help="Numbers of requests at once; each is measured.")
    ] = "1,8",
    prompt_tokens: Annotated[int, typer.Option(min=1, help="Tokens of each prompt, or text to embed.")] = 128,
    max_tokens: Annotated[int, typer.Option(min=1, help="Tokens of each answer.")] = 32,
    use: Annotated[
        str | None,
        typer.Option("--use", metavar="NAME,NAME,...", help="The adapters of a server that take turns, or its base."),
    ] = None,
    repeats: Annotated[int, typer.Option(min=1, help="Number of measurements of each; the median counts.")] = 3,
    seed: Annotated[int, typer.Option(help="Seed of the random tokens.")] = 0,
    plot: Annotated[
        Path | None, typer.Option(metavar="FILE.png", help="Draw the figures; needs matplotlib, the extra 'bench'.")
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    *,
    loading: Loading,
) -> None:
    """Measure how fast a model answers: rates, latencies and their percentiles.

    Adapters that are loaded take turns, as requests of a server would. Nothing else should run meanwhile. A MODEL such as
    http://localhost:8000 is a server with OpenAI's API, which is measured as its clients see it.
    """
    counts = _counts(concurrency)
    if plot is not None:
        _check_plot(plot)  # before minutes of measuring
    from lorax_core.cli.measuring import Workload

    server = loading.server(path)
    if server is None and use is not None:
        raise typer.BadParameter("those that --adapter loads take turns", param_hint="--use")
    adapters = _turns(server, use) if server is not None else tuple(loading.options_of(path)["adapters"])
    workload = Workload(prompt_tokens, max_tokens, adapters, repeats, seed)
    if server is not None:
        figures, about = _measured_server(server, workload, counts)
    else:
        figures, about = _measured(loading, path, workload, counts)
    if json:
        options = {"prompt_tokens": prompt_tokens, "max_tokens": max_tokens, "repeats": repeats, "seed": seed}
        show_json({**about, **options, "figures": [one.to_json() for one in figures]})
    else:
        columns = _columns(figures[0])
        show_table([name for name, _ in columns], [[show(one) for _, show in columns] for one in figures])
        print_message(", ".join(f"{name.replace('_', ' ')}: {_shown(value)}" for name, value in about.items() if value))
    # Last: what was measured is not lost where it cannot be drawn.
    if plot is not None:
        _draw(plot, path, figures)


def _measured(
    loading: Loading, path: str, workload: Workload, counts: list[int]
) -> tuple[list[Figures], dict[str, Any]]:
    """The figures of an engine, and what they are of."""
    from lorax_core.cli.measuring import measure, read_rate, runs_of

    with loading.engine(path) as engine:
        info = engine.info()
        _check_fits(info, workload.prompt_tokens + workload.max_tokens)
        rate = read_rate(info.device)
        with data_only_stdout(), shown_progress() as report:
            figures = measure(runs_of(engine, workload, rate), counts, workload.repeats, report)
        return figures, _about(path, engine.info(), workload.adapters, rate)


def _measured_server(server: Server, workload: Workload, counts: list[int]) -> tuple[list[Figures], dict[str, Any]]:
    """The figures of a server, and what they are of."""
    from lorax_core.cli.measuring import measure
    from lorax_core.cli.measuring_server import ServedRuns

    with shown_progress() as report:
        figures = measure(ServedRuns(server, workload), counts, workload.repeats, report)
    return figures, {"url": server.url, "model": server.base, "adapters": list(workload.adapters)}


def _turns(server: Server, use: str | None) -> tuple[str, ...]:
    """The models of a server that take turns; none is its base. Raises AdapterError for one that it does not have."""
    names = [] if use is None else use.split(",")
    for name in names:
        server.chosen(name)
    return tuple(names)


def _counts(text: str) -> list[int]:
    try:
        counts = [int(one) for one in text.split(",")]
    except ValueError as error:
        raise typer.BadParameter(
            f"{text!r} is not a list of numbers such as 1,8,32", param_hint="--concurrency"
        ) from error
    if not 1 <= min(counts) <= max(counts) <= _MOST:
        raise typer.BadParameter(f"from 1 to {_MOST:,} requests are made", param_hint="--concurrency")
    return counts


def _check_fits(info: EngineInfo, tokens: int) -> None:
    most = info.max_tokens if "generate" in info.tasks else info.max_text_tokens
    if tokens > most:
        raise RequestError(
            f"a prompt with its answer has {tokens:,} tokens, and the model takes {most:,}",
            hint="lower --prompt-tokens or --max-tokens",
        )


def _about(path: str, info: EngineInfo, adapters: tuple[str, ...], rate: float) -> dict[str, Any]:
    import torch

    return {
        "model": path,
        "model_type": info.model_type,
        "dtype": info.dtype,
        "device": info.device,
        "threads": torch.get_num_threads(),
        "attention": info.attention,
        "linear_methods": dict(info.linear_methods),
        "adapters": list(adapters),
        "linear_bytes": info.linear_bytes,
        "memory_bytes_per_second": rate,
    }


def _columns(first: Figures) -> list[tuple[str, Any]]:
    """The columns of what a model does, and how each is shown."""
    found: list[tuple[str, Any]] = [
        ("requests at once", lambda one: str(one.concurrency)),
        ("prompt tokens/s", lambda one: f"{one.prompt_tokens_per_second:,.0f}"),
    ]
    if first.texts_per_second is not None:
        found.append(("texts/s", lambda one: f"{one.texts_per_second:,.1f}"))
    if first.first_token_ms is not None:  # it generates
        found.append(("decode tokens/s", lambda one: _or_dash(one.decode_tokens_per_second, ",.0f")))
        if first.memory_share is not None:
            found.append(("of memory's limit", lambda one: _or_dash(one.memory_share, ".0%")))
        found.append(("first token ms 50/90/99 %", lambda one: _latencies(one.first_token_ms)))
        found.append(("further token ms", lambda one: _latencies(one.further_token_ms)))
    return found


def _or_dash(value: float | None, form: str) -> str:
    """A figure; a dash where it could not be told."""
    return "-" if value is None else format(value, form)


def _latencies(found: dict[str, float] | None) -> str:
    return "-" if found is None else " / ".join(f"{value:,.1f}" for value in found.values())


def _shown(value: object) -> str:
    if isinstance(value, float):
        return f"{value / 1e9:,.1f} GB/s"
    if isinstance(value, dict):
        return ", ".join(f"{count} x {name}" for name, count in value.items())
    if isinstance(value, list):
        return ", ".join(value)
    return f"{value:,}" if isinstance(value, int) else str(value)


def _check_plot(file: Path) -> None:
    if file.suffix != ".png":
        raise typer.BadParameter(f"{file.name!r} is no .png", param_hint="--plot")
    if not file.parent.is_dir():
        raise typer.BadParameter(f"there is no folder {str(file.parent)!r}", param_hint="--plot")
    _pyplot()


def _pyplot() -> Any:
    try:
        import matplotlib
    except ModuleNotFoundError as error:
        raise RequestError(
            "a plot needs matplotlib, which is not installed",
            hint="pip install 'lorax-core[bench]', or leave --plot out",
        ) from error
    matplotlib.use("Agg")  # no screen
    from matplotlib import pyplot

    return pyplot


def _draw(file: Path, path: str, figures: list[Figures]) -> None:
    """Rates and latencies over the number of requests at once."""
    pyplot = _pyplot()
    counts = [one.concurrency for one in figures]
    drawn, (rates, latencies) = pyplot.subplots(1, 2, figsize=(10, 4), layout="constrained")
    rates.plot(counts, [one.prompt_tokens_per_second for one in figures], marker="o", label="prompts")
    if None not in [one.decode_tokens_per_second for one in figures]:
        rates.plot(counts, [one.decode_tokens_per_second for one in figures], marker="o", label="decoding")
    for name in ("first_token_ms", "further_token_ms"):
        found = [getattr(one, name) for one in figures]
        if None not in found:
            for percentile, style in (("p50", "-"), ("p99", "--")):
                label = f"{name.split('_')[0]} token, {percentile[1:]} %"
                latencies.plot(counts, [one[percentile] for one in found], style, marker="o", label=label)
    rates.set(xlabel="requests at once", ylabel="tokens a second", title=path)
    latencies.set(xlabel="requests at once", ylabel="milliseconds", yscale="log")
    for axes in (rates, latencies):
        if axes.lines:
            axes.legend()
    try:
        drawn.savefig(file, dpi=120)
    except (OSError, ValueError) as error:
        raise RequestError(f"the plot cannot be written to {file}: {error}", hint="give a .png file") from error
    finally:
        pyplot.close(drawn)
