"""`lorax plugins`: what is installed, and what is wrong with it.

Decides what is shown of a plugin. Knows nothing of how plugins are validated; `doctor` loads each in a process of its own,
where nothing has imported torch yet and a crash does not affect the others.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lorax_core.cli.check import check_plugin
from lorax_core.cli.new import new_plugin
from lorax_core.cli.render import data_only_stdout, print_problems, problem_json, show_json, show_table

if TYPE_CHECKING:
    from collections.abc import Iterable
    from importlib.metadata import EntryPoint

    from lorax_core.plugins.host import PluginHost
    from lorax_core.plugins.record import PluginRecord

app = typer.Typer(help="Installed plugins, and what is wrong with them.", no_args_is_help=True, add_completion=False)
app.command("check")(check_plugin)
app.command("new")(new_plugin)

_Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]


@app.command("list")
def list_plugins(
    json: _Json = False,
    every: Annotated[bool, typer.Option("--all", help="Show also those that cannot be used.")] = False,
) -> None:
    """List installed plugins and what they provide."""
    host = _discover()
    records = [record for record in host.records if every or record.specs]
    if json:
        _show_json(records, host)
    else:
        columns = ("plugin", "package", "version", "architectures", "backends", "status")
        show_table(columns, [_row(record) for record in records])
    print_problems(host.records)


@app.command("doctor")
def doctor(
    json: _Json = False,
    timeout: Annotated[float, typer.Option(help="Maximum seconds for one plugin.", min=1)] = 120.0,
) -> None:
    """Load each plugin in its own process: does its declaration import, how fast, without torch; are its classes there."""
    from lorax_core.plugins.admission import blocked_by
    from lorax_core.plugins.host import PluginHost, installed, missing
    from lorax_core.settings import Settings

    settings = Settings.from_env()
    # What is blocked is not imported, and needs no process.
    records = [blocked_by(settings, entry) or _probe_apart(entry, timeout) for entry in installed()]
    host = PluginHost([*records, *missing(records, settings)])
    if json:
        _show_json(host.records, host)
        return
    rows = []
    for record in host.records:
        seconds = "-" if record.seconds is None else f"{record.seconds:.3f} s"
        rows.append((record.name, record.package, record.version or "-", record.status, seconds, record.cause or "-"))
    show_table(("plugin", "package", "version", "status", "import", "cause"), rows)


@app.command("probe", hidden=True)
def probe(package: str, name: str, module: str, report: Path) -> None:
    """Load one plugin in this process and write its status to a file, for doctor."""
    import json

    from lorax_core.plugins.admission import identity, make_manager, try_plugin, with_classes
    from lorax_core.plugins.host import installed
    from lorax_core.settings import Settings

    for entry in installed():
        if (identity(entry)[0], entry.name, entry.value) == (package, name, module):
            # Last the classes: whether the declaration imports torch must be known before anything else does.
            record = with_classes(try_plugin(make_manager(), entry, Settings.from_env()))
            report.write_text(json.dumps(_plugin_json(record)), encoding="utf-8")


def _probe_apart(entry: EntryPoint, timeout: float) -> PluginRecord:
    import json
    import subprocess
    import sys
    import tempfile

    from lorax_core.plugins.admission import identity
    from lorax_core.plugins.record import PluginRecord, PluginStatus

    package, version = identity(entry)
    # Broken unless its process reports something else.
    record = PluginRecord(entry.name, package, version, entry.value, PluginStatus.BROKEN)
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder, "report.json")
        # -P keeps the working directory off sys.path: a module there could stand in for the plugin.
        probing = ("-P", "-m", "lorax_core.cli.main", "plugins", "probe", package, entry.name, entry.value, str(report))
        try:
            done = subprocess.run(
                [sys.executable, *probing], capture_output=True, text=True, timeout=timeout, check=False
            )
        except subprocess.TimeoutExpired:
            return replace(record, cause=f"importing it took longer than {timeout:g} s")
        # A file and not stdout, on which the plugin may print; none means that the process died before.
        if report.exists():
            return _from_json(record, json.loads(report.read_text(encoding="utf-8")))
    last = (done.stderr.strip().splitlines() or ["no output"])[-1]
    # A negative code is the signal that ended it, by the rule of subprocess.
    how = f"signal {-done.returncode}" if done.returncode < 0 else f"exit code {done.returncode}"
    return replace(record, cause=f"importing it ended the process with {how}: {last}")


def _discover() -> PluginHost:
    from lorax_core.plugins.host import PluginHost
    from lorax_core.settings import Settings

    with data_only_stdout():
        # Never strict: the list of problems must be complete.
        return PluginHost.discover(replace(Settings.from_env(), strict=False))


def _show_json(records: Iterable[PluginRecord], host: PluginHost) -> None:
    plugins = [_plugin_json(record) for record in records]
    show_json({"plugins": plugins, "problems": [problem_json(record) for record in host.problems]})


def _plugin_json(record: PluginRecord) -> dict[str, Any]:
    return {
        **problem_json(record),
        "module": record.module,
        "import_seconds": record.seconds,
        "architectures": [spec.model_dump(mode="json") for spec in record.architectures],
        "backends": [spec.model_dump(mode="json") for spec in record.backends],
    }


def _from_json(record: PluginRecord, said: dict[str, Any]) -> PluginRecord:
    """`record` with the report of a probe."""
    from lorax_core.plugins.record import PluginStatus
    from lorax_core.plugins.spec import ArchitectureSpec, BackendSpec

    return replace(
        record,
        status=PluginStatus(said["status"]),
        cause=said["cause"],
        hint=said["hint"],
        seconds=said["import_seconds"],
        architectures=tuple(ArchitectureSpec.model_validate(spec) for spec in said["architectures"]),
        backends=tuple(BackendSpec.model_validate(spec) for spec in said["backends"]),
    )


def _row(record: PluginRecord) -> list[str]:
    architectures = ", ".join(spec.model_type for spec in record.architectures)
    backends = ", ".join(spec.name for spec in record.backends)
    return [record.name, record.package, record.version or "-", architectures or "-", backends or "-", record.status]
