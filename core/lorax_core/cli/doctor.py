"""`lorax doctor`: what this machine offers, and what of it is used.

Decides which facts help to find out why something is slow or missing. Knows nothing of how backends and kernels are chosen;
asks the modules that choose.
"""

from __future__ import annotations

import platform
from collections.abc import Mapping
from importlib import metadata
from typing import TYPE_CHECKING, Annotated, Any

import typer

import lorax_core
from lorax_core.cli.render import data_only_stdout, print_problems, problem_json, show_json, show_table

if TYPE_CHECKING:
    from lorax_core.plugins.host import PluginHost

app = typer.Typer(add_completion=False)

# Optional ones too: a missing one explains a backend, constrained output or s3:// that does not work.
_PACKAGES = (
    "torch",
    "transformers",
    "tokenizers",
    "safetensors",
    "peft",
    "llguidance",
    "s3fs",
    "flashinfer-python",
    "flash-attn",
    "triton",
)


@app.command()
def doctor(
    checkpoint: Annotated[
        str | None, typer.Argument(help="With --verify: the model whose shapes are tried, a folder or a hub id.")
    ] = None,
    verify: Annotated[
        bool,
        typer.Option(
            "--verify", help="Try the kernels of this machine against plain torch, and forget earlier verdicts."
        ),
    ] = False,
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show versions, devices, attention backends with reasons, and plugins. Exits with 1 when a plugin or a kernel failed."""
    from lorax_core.plugins.host import PluginHost

    if verify:
        _verify(checkpoint, json)
        return
    if checkpoint is not None:
        raise typer.BadParameter("a checkpoint is for --verify alone", param_hint="CHECKPOINT")
    with data_only_stdout():
        host = PluginHost.discover()
        versions, machine, attention, plugins = _versions(), _machine(), _attention(host), _plugins(host)
    if json:
        problems = [problem_json(record) for record in host.problems]
        facts = {"versions": versions, "machine": machine, "attention": attention, "plugins": plugins}
        show_json({**facts, "problems": problems})
    else:
        backends = {one["name"]: one["reason"] or "usable" for one in attention}
        groups = {"versions": versions, "machine": machine, "attention": backends, "plugins": plugins}
        lines = [(group, name, str(value)) for group, found in groups.items() for name, value in found.items()]
        show_table(("", "", ""), lines)
    print_problems(host.records)
    if host.problems:
        raise typer.Exit(1)


def _verify(checkpoint: str | None, json: bool) -> None:
    """A table of verdicts: what this machine would use beside plain torch, compared with it in a process of its own."""
    import torch
    from rich.console import Console

    from lorax_core.plugins.host import PluginHost
    from lorax_core.serving.trial.run import Trials, machine
    from lorax_core.serving.trial.standard import model_trials, standard_trials
    from lorax_core.settings import Settings

    settings, device = Settings.from_env(), "cuda" if torch.cuda.is_available() else "cpu"
    with data_only_stdout():
        host = PluginHost.discover()
        if checkpoint is None:
            trials, refused = standard_trials(host.backends, device, settings)
        else:
            trials, refused = model_trials(lorax_core.load_model(checkpoint, host=host), host.backends, settings)
    talk = Console(stderr=True)
    with talk.status(
        f"trying {len(trials)} kinds of kernels; the first time on a machine they may be compiled for minutes"
    ):
        facts = machine()
        tried = Trials(settings, facts)
        tried.forget()
        verdicts = tried.verdicts(trials)
    if json:
        found = [{"trial": one.trial.model_dump(mode="json"), "problem": one.problem} for one in verdicts]
        show_json({"machine": facts, "trials": found, "refused": refused})
    else:
        lines = [(one.trial.subject, str(one.trial), one.problem or "passed") for one in verdicts]
        show_table(("KERNELS", "TRIED", "VERDICT"), [*lines, *((name, "", reason) for name, reason in refused.items())])
    if any(one.problem is not None for one in verdicts):
        raise typer.Exit(1)


def _versions() -> dict[str, str]:
    found = {"lorax-core": lorax_core.__version__, "python": platform.python_version(), "system": platform.platform()}
    for name in _PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def _machine() -> dict[str, Any]:
    import torch

    from lorax_core.adapters.lora_kernels.select import select_kernel
    from lorax_core.kernels.gpu import compute_capability
    from lorax_core.kernels.select import select_elementwise
    from lorax_core.linear_methods.select import available
    from lorax_core.settings import Settings

    dtypes = {"float32": torch.float32, "bfloat16": torch.bfloat16}
    gpus = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    # What device="auto" takes.
    device = torch.device("cuda" if gpus else "cpu")
    # As an engine would: this compiles the kernel if need be, so a missing compiler shows here.
    choice = select_kernel(torch.float32, device, Settings.from_env())
    elementwise, why = select_elementwise(torch.float32, device)
    capability = compute_capability(str(device))
    return {
        "device": device.type,
        "gpus": ", ".join(gpus) or "none that torch sees",
        **({"compute capability": "{}.{}".format(*capability)} if capability is not None else {}),
        "threads": torch.get_num_threads(),
        **{f"linear methods in {name}": _methods(available(dtype, device.type)) for name, dtype in dtypes.items()},
        "low-rank kernel": f"{choice.kernel.name}: {choice.reason}",
        "elementwise kernels": f"{elementwise.name}: {why}",
    }


def _methods(available: Mapping[str, str | None]) -> str:
    """Linear methods in the order that they are asked, with reasons for those that do not compute here."""
    return "; ".join(name if reason is None else f"not {name}: {reason}" for name, reason in available.items())


def _attention(host: PluginHost) -> list[dict[str, Any]]:
    """Each declared backend, the first choice first, and why it is not usable here."""
    import torch

    from lorax_core.attention.select import why_not
    from lorax_core.serving.trial.run import Trials
    from lorax_core.settings import Settings

    device = "cuda" if torch.cuda.is_available() else "cpu"
    failed = {
        path: f"failed a trial, and is not used for such layers: {problem}"
        for path, problem in Trials(Settings.from_env()).failures().items()
    }
    reasons = {spec.name: why_not(spec, device) or failed.get(spec.backend) for spec in host.backends}
    return [{"name": spec.name, "summary": spec.summary, "reason": reasons[spec.name]} for spec in host.backends]


def _plugins(host: PluginHost) -> dict[str, str]:
    return {record.name: f"{record.package} {record.version or '-'}: {record.status}" for record in host.records}
