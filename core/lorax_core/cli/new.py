"""`lorax plugins new`: a package for an architecture of transformers.

Decides what is said of a package that was written. Knows nothing of how it is made; `lorax_core.scaffold` does, and is imported
when the command runs.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lorax_core.cli.render import data_only_stdout, print_message

if TYPE_CHECKING:
    from lorax_core.scaffold.package import Package


def new_plugin(
    name: Annotated[str, typer.Argument(metavar="NAME", help="Name of the package, such as lorax-gemma2.")],
    source: Annotated[
        str,
        typer.Option(
            "--from",
            metavar="SOURCE",
            help="transformers:Gemma2ForCausalLM, the path of a config.json, or a model id that is in the local cache.",
        ),
    ],
    into: Annotated[Path | None, typer.Option(help="The folder to write; NAME in this one if not given.")] = None,
    check: Annotated[
        bool, typer.Option("--check", help="Then run the conformance kit; exits with 1 when it fails.")
    ] = False,
) -> None:
    """Write a package for an architecture of transformers, from what tiny models of it compute. Offline."""
    folder = into if into is not None else Path(name)
    with data_only_stdout():
        import torch

        from lorax_core.errors import PluginError
        from lorax_core.output import check_free
        from lorax_core.scaffold.package import check_name, make_package

        # Before what takes seconds.
        check_name(name)
        check_free(folder, PluginError)
        torch.set_num_threads(1)  # for models as tiny as these, more threads only wait for each other
        package = make_package(name, source)
        package.write(folder)
    _print_written(package, folder)
    if check:
        _check(package, folder)


def _print_written(package: Package, folder: Path) -> None:
    lines = sum(text.count("\n") for path, text in package.files.items() if path.endswith("modeling.py"))
    print_message(
        f"{folder}: {len(package.files)} files for {package.model_type!r}, {lines} lines of modelling", label="written"
    )
    for field, why in package.refused.items():
        print_message(
            f"{field}: {why}",
            label="not understood",
            style="yellow",
        )
    print_message(
        "choose a license in pyproject.toml, and say in plugin.py and README.md which models these are; then:\n"
        f"  pip install -e {folder}\n"
        f"  lorax plugins check {package.model_type}",
        label="next",
    )


def _check(package: Package, folder: Path) -> None:
    from lorax_core.scaffold.check import check_package

    checked = check_package(package, folder)
    for key, detail, look in checked.failures:
        print_message(f"{key}: {detail}", f"look at {look}", label="failed", style="red")
    counts = ", ".join(f"{count} {status.replace('-', ' ')}" for status, count in checked.counts.items())
    print_message(counts, label="checked")
    if not checked.ok:
        raise typer.Exit(1)
