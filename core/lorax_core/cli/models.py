"""`lorax models`: which architectures are installed, what one of them is, and whether a checkpoint can be loaded.

Decides what is shown of an architecture. Knows nothing of discovery or of weights; imports them when a command runs.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lorax_core.cli.render import data_only_stdout, print_message, print_problems, problem_json, show_json, show_table
from lorax_core.types import Task

if TYPE_CHECKING:
    from collections.abc import Iterator

    from lorax_core.plugins.host import PluginHost
    from lorax_core.plugins.record import PluginRecord
    from lorax_core.plugins.spec import ArchitectureSpec

app = typer.Typer(
    help="Installed architectures, and checkpoints against them.", no_args_is_help=True, add_completion=False
)

_COLUMNS = ("model type", "tasks", "attention", "LoRA", "package", "version", "status")
_Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]


@app.command("list")
def list_models(
    task: Annotated[Task | None, typer.Option(help="Only architectures that support this task.")] = None,
    json: _Json = False,
    every: Annotated[bool, typer.Option("--all", help="Show also those that cannot be used.")] = False,
    strict: Annotated[bool, typer.Option("--strict", help="Exit with 1 when a plugin has failed.")] = False,
) -> None:
    """List the architectures of installed plugins. Never imports torch."""
    host = _discover()
    models = [entry for entry in _entries(host, every) if task is None or task in entry["tasks"]]
    if json:
        show_json({"models": models, "problems": [problem_json(record) for record in host.problems]})
    elif models:
        show_table(_COLUMNS, [_row(entry) for entry in models])
    # Two reasons for an empty list: none of this task, or none at all, which only an installation mends.
    elif task is not None and host.architectures:
        print_message(f"no installed architecture supports the task '{task}'")
    else:
        print_message(
            "no architecture can be used", "pip install lorax-qwen2; `lorax plugins list --all` shows what is there"
        )
    print_problems(host.records)
    if strict and host.problems:
        raise typer.Exit(1)


@app.command("show")
def show_model(
    model_type: Annotated[str, typer.Argument(metavar="TYPE", help="As in a checkpoint's config.json.")],
    json: _Json = False,
) -> None:
    """Show one architecture: its tasks, and the plugin that provides it."""
    host = _discover()
    spec, record = host.architecture(model_type), host.owner(model_type)
    entry = _entry(spec, record, _usable_status(record))
    if json:
        show_json({"model": {**entry, "spec": spec.model_dump(mode="json")}})
        return
    row = dict(zip(_COLUMNS, _row(entry), strict=True))
    row["tasks"] = ", ".join(f"{task} (default)" if task == spec.default_task else task for task in spec.tasks)
    details = {
        "summary": spec.summary,
        "examples": ", ".join(spec.examples) or "-",
        "checkpoints": ", ".join(f"{name}: {task}" for name, task in spec.hf_architectures.items()) or "-",
        "features": ", ".join(spec.features) or "-",
        "config": spec.config,
        "backbone": spec.backbone,
        "heads": ", ".join(spec.head(task) for task in spec.tasks),
    }
    show_table(("", ""), [*row.items(), *details.items()])


@app.command("check")
def check_model(
    path: Annotated[Path, typer.Argument(metavar="PATH", help="A checkpoint folder.")], json: _Json = False
) -> None:
    """Check a checkpoint: is its architecture installed, and is every tensor accounted for. Exits with 1 if not."""
    from lorax_core.plugins.resolve import read_config

    # Of config.json alone, so that an unknown type is refused before torch is imported.
    model_type = read_config(path)["model_type"]
    host = _discover()
    host.architecture(model_type)
    from lorax_core.weights.check import check_checkpoint  # late: not needed to reject an unknown model type

    report = check_checkpoint(path, host)
    if json:
        show_json(report.to_json())
    else:
        show_table(
            ("", ""),
            [
                ("checkpoint", str(path)),
                ("model type", report.model_type),
                ("tasks", ", ".join(report.tasks)),
                ("tensors", f"{report.tensors:,} ({len(report.ignored):,} ignored)"),
                ("parameters", f"{report.parameters:,}"),
                ("dtype", report.dtype),
                ("verdict", report.verdict),
            ],
        )
    for problem in report.problems:
        print_message(problem, label="problem", style="red")
    if not report.ok:
        raise typer.Exit(1)


def _discover() -> PluginHost:
    from lorax_core.plugins.host import PluginHost

    with data_only_stdout():
        return PluginHost.discover()


def _entries(host: PluginHost, every: bool) -> Iterator[dict[str, Any]]:
    from lorax_core.plugins.record import PluginStatus
    from lorax_core.plugins.spec import ArchitectureSpec

    for model_type, spec in host.architectures.items():
        record = host.owner(model_type)
        yield _entry(spec, record, _usable_status(record))
    # Contested or broken ones are not in host.architectures: none of them can be loaded.
    for record in host.records if every else ():
        contested = [spec for spec in record.contested if isinstance(spec, ArchitectureSpec)]
        for spec in contested:
            yield _entry(spec, record, record.status)
        if record.status in (PluginStatus.BROKEN, PluginStatus.INCOMPATIBLE, PluginStatus.BLOCKED):
            yield _entry(None, record, record.status)


def _usable_status(record: PluginRecord) -> str:
    # A conflict over another name does not concern this one.
    return "ready" if record.status == "conflict" else record.status


def _entry(spec: ArchitectureSpec | None, record: PluginRecord, status: str) -> dict[str, Any]:
    """One of "models" in JSON; what a broken plugin would have provided is not known."""
    return {
        "model_type": spec and spec.model_type,
        "summary": spec and spec.summary,
        "tasks": [str(task) for task in spec.tasks] if spec else [],
        "default_task": spec and str(spec.default_task),
        "attention": spec and ("causal" if spec.causal else "bidirectional"),
        "lora": spec is not None,  # core's layers support it, so every architecture does
        "plugin": record.name,
        "package": record.package,
        "version": record.version,
        "status": str(status),
    }


def _row(entry: dict[str, Any]) -> list[str]:
    return [
        entry["model_type"] or "?",
        ", ".join(entry["tasks"]) or "-",
        entry["attention"] or "-",
        "yes" if entry["lora"] else "-",
        entry["package"],
        entry["version"] or "-",
        entry["status"],
    ]
