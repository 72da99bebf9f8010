"""`docs/architectures.md`, generated from what plugins declare: `python -m lorax_core.cli.architectures lorax-bert lorax-gpt2`.

Decides what the page says about an architecture. Knows nothing that a spec and its cases do not say; a test compares the
committed page with what is generated here.
"""

from __future__ import annotations

import sys
from collections.abc import Collection, Iterable, Iterator
from dataclasses import replace

from lorax_core.plugins.cases import ArchitectureCases
from lorax_core.plugins.host import PluginHost
from lorax_core.plugins.record import PluginRecord
from lorax_core.plugins.resolve import load_cases
from lorax_core.plugins.spec import ArchitectureSpec
from lorax_core.settings import Settings
from lorax_core.types import Task

_TOP = """# Architectures

What each package supports. Every dot is tested against the reference by the [conformance kit](conformance.md), on every
variant named below, and every linear layer takes LoRA adapters. The page is generated from the plugins' declarations and
cases, and a test compares it with them:

```sh
{command} > docs/architectures.md
```
"""


def page(packages: Collection[str]) -> str:
    """The page about the architectures of these packages. Raises PluginError when one of them cannot be used."""
    # Settings() and not from_env: the page must not depend on this machine's variables.
    host = PluginHost.discover(replace(Settings(), plugins=frozenset(packages), strict=True))
    found = [(spec, host.owner(model_type)) for model_type, spec in host.architectures.items()]
    command = " ".join(["python -m lorax_core.cli.architectures", *sorted(packages)])
    blocks = [
        _TOP.format(command=command),
        *_overview(found),
        *(line for spec, owner in found for line in _section(spec, load_cases(spec, owner))),
    ]
    return "\n".join(blocks)


def _overview(found: Iterable[tuple[ArchitectureSpec, PluginRecord]]) -> Iterator[str]:
    yield f"| model type | package | {' | '.join(str(task).replace('-', ' ') for task in Task)} | attention |"
    yield "| --- | --- |" + " :-: |" * len(Task) + " --- |"
    for spec, owner in found:
        cells = " | ".join("•" if task in spec.tasks else " " for task in Task)
        attention = "causal" if spec.causal else "bidirectional"
        yield f"| [{spec.model_type}](#{spec.model_type}) | `{owner.package}` | {cells} | {attention} |"
    yield ""


def _section(spec: ArchitectureSpec, cases: ArchitectureCases) -> Iterator[str]:
    yield f"## {spec.model_type}\n\n{spec.summary}\n"
    yield "| task | checkpoints saved as | reference |\n| --- | --- | --- |"
    for task in spec.tasks:
        names = ", ".join(f"`{name}`" for name, stated in spec.hf_architectures.items() if stated == task)
        reference = f"`{cases.references[task].replace(':', '.')}`" if task in cases.references else "none"
        default = " (default)" if task == spec.default_task else ""
        yield f"| {str(task).replace('-', ' ')}{default} | {names or '-'} | {reference} |"
    lines = {
        "Such as": ", ".join(f"`{name}`" for name in spec.examples),
        "Features": ", ".join(feature.replace("_", " ") for feature in spec.features),
        "Variants": ", ".join(f"`{name}`" for name in ("base", *cases.variants)),
        "Known failures": "; ".join(f"`{name}`: {reason}" for name, reason in cases.known_failures.items()),
    }
    yield "\n" + "\n".join(f"- {name}: {value}" for name, value in lines.items() if value) + "\n"


if __name__ == "__main__":
    sys.stdout.write(page(sys.argv[1:]))
