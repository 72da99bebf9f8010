"""`lorax adapters`: what an adapter holds and whether it fits a base, and merging several into one or into their base.

Decides what is shown of an adapter. Knows nothing of tensors beyond their sizes: finding, reading, fitting and merging are
those of `lorax_core.adapters`, imported when a command runs.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lorax_core.cli.progress import shown_progress
from lorax_core.cli.remote import admin_key_in, ask, root_of, rows_of
from lorax_core.cli.render import data_only_stdout, print_error, print_message, show_json, show_table
from lorax_core.errors import AdapterError

if TYPE_CHECKING:
    from torch import Tensor

    from lorax_core.adapters.formats.lora import LoraAdapter
    from lorax_core.adapters.formats.medusa import MedusaAdapter
    from lorax_core.adapters.formats.peft import PeftFiles
    from lorax_core.plugins.host import PluginHost

app = typer.Typer(
    help="Adapters: list a server's, look into them, combine them, merge them into their base.",
    no_args_is_help=True,
    add_completion=False,
)

_Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
_FORMS = "a folder, a hub id or the URL of a folder"

# What a part of an adapter is called, by its role in the files.
_FEATURES = {
    "magnitude": "DoRA",
    "b_bias": "lora_bias",
    "embedding_a": "embeddings",
    "tokens": "trained tokens",
    "bias": "biases",
}


@app.command("list")
def list_adapters(
    url: Annotated[str, typer.Option(metavar="URL", help="Address of a server that `lorax serve` started.")],
    admin_key_file: Annotated[
        Path | None, typer.Option(metavar="FILE", help="The server's admin key; or set LORAX_ADMIN_KEY.")
    ] = None,
    json: _Json = False,
) -> None:
    """List the adapters that a running server has loaded.

    Without an admin key their sources and ranks are hidden.
    """
    from lorax_core.settings import Settings

    settings = Settings.from_env()
    admin = admin_key_in(admin_key_file) if admin_key_file is not None else settings.admin_key
    url = root_of(url)
    # What the server's page asks: any key of the API opens it, and a server without an admin key has no other list.
    path, key = ("/v1/adapters", admin) if admin is not None else ("/stats", next(iter(settings.api_keys), None))
    found = rows_of(url, ask(url, path, key), "adapters")
    if json:
        show_json({"url": url, "adapters": found})
    elif found:
        columns = ("name", "source", "kind", "task", "ranks", "nbytes", "where")
        show_table(columns, [[_listed(one.get(name) or "-") for name in columns] for one in found])
    else:
        print_message(f"no adapter is loaded at {url}")


@app.command("inspect")
def inspect_adapter(
    source: Annotated[str, typer.Argument(metavar="ADAPTER", help=f"What PEFT or Medusa wrote: {_FORMS}.")],
    base: Annotated[
        str | None, typer.Option(metavar="CHECKPOINT", help="A folder or hub id: does the adapter fit it, and where.")
    ] = None,
    revision: Annotated[str | None, typer.Option(metavar="REV", help="Branch, tag or commit of a hub id.")] = None,
    json: _Json = False,
) -> None:
    """Show what an adapter holds. Exits with 1 when it cannot be read, or does not fit the base."""
    from lorax_core.adapters.formats.medusa import read_adapter
    from lorax_core.adapters.residency.source import find_adapter

    found = find_adapter(source, revision=revision, cache=_cache())
    adapter = read_adapter(found.folder)
    about = {"path": found.origin, "revision": found.revision, **_about(adapter)}
    fit, error = _fit(adapter, base) if base is not None else (None, None)
    if json:
        show_json({"adapter": about, "base": fit})
    else:
        show_table(("", ""), [*_summary(about), *(_fit_rows(fit) if fit else [])])
        _show_modules(about["modules"])
    # After what was found: the listing helps to see why it does not fit.
    if error is not None:
        print_error(error)
        raise typer.Exit(1)


def _show_modules(modules: list[dict[str, Any]]) -> None:
    if not modules:
        return
    print()
    rows = [[row["module"], *map(_listed, (row["count"], row["ranks"], row["holds"]))] for row in modules]
    show_table(("modules", "count", "ranks", "holds"), rows)


@app.command("merge")
def merge(
    adapters: Annotated[list[str], typer.Argument(metavar="ADAPTER...", help=f"What PEFT wrote, each {_FORMS}.")],
    out: Annotated[Path, typer.Option(metavar="DIR", help="Folder of the result.")],
    strategy: Annotated[str, typer.Option(help="linear, ties, dare_linear, dare_ties, svd or cat.")] = "linear",
    weight: Annotated[
        list[float] | None, typer.Option(metavar="W", help="Once for each adapter, in order; 1 by default.")
    ] = None,
    density: Annotated[
        float | None, typer.Option(metavar="D", help="Fraction of the numbers that ties and dare keep.")
    ] = None,
    seed: Annotated[int | None, typer.Option(metavar="S", help="Seed of what dare drops; 0 by default.")] = None,
    rank: Annotated[
        int | None, typer.Option(metavar="R", help="Rank of svd's result; by default the largest one.")
    ] = None,
    majority_sign: Annotated[str, typer.Option(help="How ties counts: total or frequency.")] = "total",
    base: Annotated[
        str | None, typer.Option(metavar="CHECKPOINT", help="Merge into this folder or hub id, not into an adapter.")
    ] = None,
    revision: Annotated[
        list[str] | None, typer.Option(metavar="REV", help="Revision of hub ids; once for each adapter, '' for none.")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace what DIR holds.")] = False,
    json: _Json = False,
) -> None:
    """Combine adapters into a new one, or merge them into a copy of their base."""
    settings: dict[str, Any] = {"strategy": strategy, "weights": weight, "density": density, "seed": seed, "rank": rank}
    settings["majority_sign_method"] = majority_sign
    if revision is not None and len(revision) != len(adapters):
        message = f"there are {len(adapters)} adapters, but {len(revision)} revisions"
        raise typer.BadParameter(message, param_hint="--revision")
    # A wrong command line comes first, then a taken folder: both are known before anything is downloaded.
    _check_out(out, overwrite)
    about: dict[str, Any] = {"path": str(out), "strategy": strategy}
    folders = [_find_lora(*one) for one in zip(adapters, revision or [""] * len(adapters), strict=True)]
    if base is not None:
        done = _merge_into_base(folders, out, base, settings, overwrite)
        _show_merged({**about, "base": base, "adapters": adapters, **done}, json)
        return
    from lorax_core.adapters.merging.merge import merge_adapters

    with shown_progress() as progress:
        merged = merge_adapters(folders, out, **settings, overwrite=overwrite, progress=progress)
    about |= {"modules": merged.modules, "ranks": list(merged.ranks), "notes": list(merged.notes)}
    _show_merged(about, json)


def _check_out(out: Path, overwrite: bool) -> None:
    """Before anything is fetched or read."""
    from lorax_core.output import check_free

    check_free(out, AdapterError, overwrite)


def _find_lora(source: str, revision: str) -> Path:
    """The folder of a source that PEFT wrote; Medusa's heads cannot be merged."""
    from lorax_core.adapters.formats.medusa import is_medusa
    from lorax_core.adapters.residency.source import find_adapter

    found = find_adapter(source, revision=revision or None, cache=_cache())
    if is_medusa(found.folder):
        beside = (found.folder / "adapter_config.json").is_file()
        hint = (
            "give a folder of PEFT's files alone: adapter_config.json and adapter_model.safetensors" if beside else None
        )
        raise AdapterError(
            f"{source} holds Medusa heads, which draft tokens; they have no sum and no place in a base", hint=hint
        )
    return found.folder


def _merge_into_base(
    adapters: Sequence[Path], out: Path, base: str, settings: dict[str, Any], overwrite: bool
) -> dict[str, Any]:
    """What of the JSON is known only afterwards."""
    from lorax_core.adapters.formats.peft import read_peft
    from lorax_core.adapters.merging.into_base import merge_into_base
    from lorax_core.adapters.merging.merge import combine, merge_options
    from lorax_core.weights.hub import find_checkpoint

    # Before files are read, so that a wrong option costs no wait.
    options = merge_options(adapters, **settings)
    files, notes = [read_peft(path) for path in adapters], list[str]()
    # One adapter as it is may hold what has no sum.
    if len(files) > 1 or options.weights != (1.0,) or options.strategy not in ("linear", "cat"):
        with shown_progress() as progress:
            together, notes = combine(files, options, report=progress)
    else:
        together = files[0]
    host = _discover()
    with shown_progress() as progress:
        done = merge_into_base(find_checkpoint(base), together, out, host, overwrite=overwrite, progress=progress)
    return {"changed": list(done.changed), "notes": [*notes, *done.notes]}


def _show_merged(about: dict[str, Any], json: bool) -> None:
    if json:
        show_json({"merged": about})
        return
    rows = {name: value for name, value in about.items() if name != "notes"}
    # JSON lists them all; in a table their number must do.
    if "changed" in rows:
        rows["changed"] = f"{len(rows['changed']):,} tensors"
    show_table(("", ""), [(name, _listed(value)) for name, value in rows.items()])
    for note in about["notes"]:
        print_message(note, label="note", style="yellow")


def _cache() -> Path:
    from lorax_core.settings import Settings

    return Settings.from_env().cache


def _discover() -> PluginHost:
    from lorax_core.plugins.host import PluginHost

    with data_only_stdout():
        return PluginHost.discover()


def _about(adapter: LoraAdapter | MedusaAdapter) -> dict[str, Any]:
    """The "adapter" of the JSON: what its files say, and what is in them. Of Medusa's heads alone, LoRA's fields are empty."""
    from lorax_core.adapters.formats.medusa import MedusaAdapter

    # A Medusa adapter may bring a LoRA adapter in the same folder.
    medusa = adapter if isinstance(adapter, MedusaAdapter) else None
    lora = adapter.lora if isinstance(adapter, MedusaAdapter) else adapter
    files = lora.files if lora is not None else None
    held = files.modules if files is not None else {}
    settings = files.settings if files is not None else None
    modules = _modules(files) if files is not None else []
    tensors = [tensor for one in held.values() for _, tensor in one.items()]
    tensors += [tensor for head in (medusa.heads if medusa is not None else ()) for tensor in head.tensors]
    return {
        "kind": adapter.kind,
        "task_type": settings.task_type if settings is not None else None,
        "base_model": (settings and settings.base_model_name_or_path)
        or (medusa.trained_on if medusa is not None else None),
        "ranks": sorted({rank for row in modules for rank in row["ranks"]}),
        "alphas": sorted({alpha for row in modules for alpha in row["alphas"]}),
        "features": _features(files) if files is not None else [],
        "modules": modules,
        "saved": [
            {"module": module, "shape": list(one.weight.shape)}
            for module, one in held.items()
            if one.weight is not None and one.rank is None
        ],
        "tokens": sum(len(one.tokens) for one in held.values() if one.tokens is not None),
        "medusa": _heads(medusa) if medusa is not None else None,
        **_sizes(tensors),
        "identity": adapter.identity,
    }


def _heads(adapter: MedusaAdapter) -> dict[str, Any]:
    first = adapter.heads[0]
    weight, _ = first.blocks[0]
    return {
        "heads": len(adapter.heads),
        "blocks": len(first.blocks),
        "width": weight.shape[0],
        "own_output": first.out is not None,  # all heads have one, or none
        "vocabulary": first.out.shape[0] if first.out is not None else None,
    }


def _sizes(tensors: list[Tensor]) -> dict[str, Any]:
    return {
        "tensors": len(tensors),
        "parameters": sum(tensor.numel() for tensor in tensors),
        "bytes": sum(tensor.nbytes for tensor in tensors),
        "dtypes": sorted({str(tensor.dtype).removeprefix("torch.") for tensor in tensors}),
    }


def _modules(files: PeftFiles) -> list[dict[str, Any]]:
    """Modules that differ only in the number of their layer, together."""
    rows: dict[str, dict[str, Any]] = {}
    root = bool(files.settings.use_rslora)
    for module, tensors in files.modules.items():
        # Only a number that is a whole part of the path: the 1 of `fc1` stays.
        name = re.sub(r"(?<=\.)\d+(?=\.)|^\d+(?=\.)", "*", module)
        row = rows.setdefault(name, {"module": name, "count": 0, "ranks": set(), "alphas": set(), "holds": []})
        row["count"] += 1
        rank = tensors.rank
        if rank is not None:
            row["ranks"].add(rank)
            # The scale times its divisor is alpha again; rounded, since the root makes 15.999999.
            row["alphas"].add(round(files.settings.scale(module, rank) * (math.sqrt(rank) if root else rank), 6))
        # What has no name of its own is A or B.
        holds = [_FEATURES.get(role, "weight" if role == "weight" else "low rank") for role, _ in tensors.items()]
        row["holds"] += [one for one in dict.fromkeys(holds) if one not in row["holds"]]
    return [{**row, "ranks": sorted(row["ranks"]), "alphas": sorted(row["alphas"])} for _, row in sorted(rows.items())]


def _features(files: PeftFiles) -> list[str]:
    found = {_FEATURES[role] for tensors in files.modules.values() for role, _ in tensors.items() if role in _FEATURES}
    for tensors in files.modules.values():
        if tensors.weight is not None:
            # A weight beside a low-rank update is the base's, which PEFT saves under it.
            found.add("saved modules" if tensors.rank is None else "base weights")
    if files.settings.use_rslora:
        found.add("rslora")
    return sorted(found, key=str.lower)


def _summary(about: dict[str, Any]) -> list[tuple[str, str]]:
    return [
        ("adapter", about["path"]),
        *([("revision", about["revision"])] if about["revision"] else []),
        ("kind", "medusa, lora" if about["medusa"] and about["modules"] else about["kind"]),
        ("task type", about["task_type"] or "-"),
        ("trained on", about["base_model"] or "-"),
        ("ranks", _listed(about["ranks"])),
        ("alphas", _listed(about["alphas"])),
        ("features", _listed(about["features"])),
        *((f"saved {one['module']}", " x ".join(map(str, one["shape"]))) for one in about["saved"]),
        *([("trained tokens", f"{about['tokens']:,}")] if about["tokens"] else []),
        *([("medusa heads", _describe_heads(about["medusa"]))] if about["medusa"] else []),
        ("tensors", f"{about['tensors']:,}"),
        ("parameters", f"{about['parameters']:,}"),
        ("bytes", f"{about['bytes']:,}"),
        ("dtype", _listed(about["dtypes"])),
        ("identity", about["identity"]),
    ]


def _describe_heads(heads: dict[str, Any]) -> str:
    blocks = "1 block" if heads["blocks"] == 1 else f"{heads['blocks']} blocks"
    out = (
        f"with output layers for {heads['vocabulary']:,} tokens"
        if heads["own_output"]
        else "with the base's output layer"
    )
    return f"{heads['heads']} of {blocks}, {heads['width']:,} wide, {out}"


def _listed(value: object) -> str:
    if not isinstance(value, list):
        return f"{value:,}" if isinstance(value, int) else str(value)
    return ", ".join(f"{one:g}" if isinstance(one, float) else str(one) for one in value) or "-"


def _fit(adapter: LoraAdapter | MedusaAdapter, base: str) -> tuple[dict[str, Any], AdapterError | None]:
    """The "base" of the JSON, and the error that says why the adapter does not fit; raises when the base cannot be loaded."""
    host = _discover()
    from lorax_core.weights.checkpoint import Checkpoint
    from lorax_core.weights.hub import find_checkpoint
    from lorax_core.weights.loader import load_model

    # The real base, not its config: a saved weight is compared with the base's numbers.
    loaded = load_model(Checkpoint(find_checkpoint(base)), host)
    facts: dict[str, Any] = {"path": base, "model_type": loaded.spec.model_type, "fits": True, "problem": None}
    try:
        found = adapter.check(loaded)
    except AdapterError as error:
        return {**facts, "fits": False, "problem": error.message, "sites": [], "unread": [], "head": None}, error
    head = found.head
    labels = list(getattr(head, "labels", ()))
    about = {"task": str(head.task), "labels": labels} if head is not None else None
    return {**facts, "sites": sorted(found.targets), "unread": list(found.unread), "head": about}, None


def _fit_rows(fit: dict[str, Any]) -> Iterator[tuple[str, str]]:
    yield "base", f"{fit['path']} ({fit['model_type']})"
    layers = f", at {len(fit['sites']):,} layers" if fit["sites"] else ""
    yield "fits", f"yes{layers}" if fit["fits"] else "no"
    if fit["unread"]:
        yield "not read", ", ".join(fit["unread"])
    if fit["head"]:
        yield "head", f"{fit['head']['task']}: {_listed(fit['head']['labels'])}"
