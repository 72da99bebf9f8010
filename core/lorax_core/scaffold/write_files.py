"""The other texts of a package: its declaration, its cases, its tests, its README and its metadata.

Decides their wording. Knows nothing of how a model computes.
"""

from __future__ import annotations

from typing import Any, Final

from lorax_core.plugins.spec import API_VERSION
from lorax_core.scaffold.blueprint import Blueprint
from lorax_core.scaffold.code import literal
from lorax_core.scaffold.write_modeling import heads, summary
from lorax_core.types import Task

_PYPROJECT: Final = """\
[build-system]
requires = ["setuptools>=77"]
build-backend = "setuptools.build_meta"

[project]
name = "{name}"
version = "0.1.0"
description = "{stem} for lorax-core."
readme = "README.md"
# Choose a license, and say it here: license = "Apache-2.0"
requires-python = ">=3.11"
dependencies = ["lorax-core>={core}"]

[project.optional-dependencies]
test = ["lorax-core[test]"]

[project.entry-points."lorax.plugins"]
{entry} = "{package}.plugin"

[tool.setuptools.package-data]
{package} = ["py.typed"]
"""
_README: Final = """\
# {name}

{stem} for `lorax-core`.

```sh
pip install lorax-core {name}
lorax models show {model_type}
```

Then every checkpoint whose `config.json` says `model_type: {model_type}` is supported, from a folder or the hub:
{tasks}, with LoRA adapters for each.{refused}

## With the engine

```python
import lorax_core as lorax

with lorax.load("path/to/checkpoint") as engine:
    {engine}
```

## Without an engine

A class of `modeling.py` fixes the task:

```python
import lorax_core as lorax
from {package}.modeling import {stem}{usual}

model = lorax.load_model("path/to/checkpoint", model_class={stem}{usual})
batch = lorax.make_batch(model, [[2, 7, 12, 3], [2, 5, 3]])
(answer,) = model(batch).answers  # {answer}
```

## Tests

```sh
pip install -e ".[test]"
lorax plugins check {model_type}
pytest
```
"""
_USES: Final = {
    False: {
        "engine": "completion = engine.generate([2, 7, 12, 3], max_tokens=8)  # or a text, with a tokenizer",
        "usual": "ForCausalLM",
        "answer": "logits [tokens, vocabulary]\nassert list(answer.shape) == [7, model.config.vocab_size]",
    },
    True: {
        "engine": "vectors = engine.embed([[2, 7, 12, 3], [2, 5, 3]])  # or texts, with a tokenizer",
        "usual": "ForEmbeddings",
        "answer": "the sum of the pooled rows [sequences, hidden]\nassert list(answer.shape) == [2, model.config.hidden_size]",
    },
}
"""What the examples of a README do, for a decoder and for an encoder."""
_SPOKEN: Final = {Task.GENERATE: "generation", Task.EMBED: "embeddings"}
_CI: Final = """\
name: ci
on: [push, pull_request]
jobs:
  test:
    runs-on: ubuntu-latest
    strategy:
      matrix:
        python: ["3.11", "3.13"]
    steps:
      - uses: actions/checkout@v4
      - uses: actions/setup-python@v5
        with:
          python-version: ${{ matrix.python }}
      - run: pip install -e ".[test]"
      - run: lorax plugins doctor
      - run: pytest
"""
_CONFTEST: Final = '''\
"""One thread for torch in this test process: for models as tiny as these, more threads only wait for each other."""

from __future__ import annotations

import torch

torch.set_num_threads(1)
'''
_CONFORMANCE: Final = '''\
"""The contract of a plugin, checked for every variant."""

from __future__ import annotations

from lorax_core.testing import conformance

test_conformance = conformance("{model_type}")
'''
_QUIRKS: Final = '''\
"""What is particular to {stem}: what a `config.json` may not ask for."""

from __future__ import annotations

import pytest
{imports}

@pytest.mark.parametrize(
    ("changes", "told"),
    [
{cases}
    ],
)
def test_what_cannot_be_computed_is_refused_by_name(changes, told):
    with pytest.raises(lorax.CheckpointError, match=told):
        {stem}Config.parse({{**{constant}.tiny_config, "model_type": "{model_type}", **changes}})
'''


def small_files(plan: Blueprint, name: str, package: str) -> dict[str, str]:
    """The files around the modules, by their path in the package's folder."""
    stem, model_type = plan.source.stem, plan.source.model_type
    words = {"name": name, "package": package, "stem": stem, "model_type": model_type, "entry": _entry(model_type)}
    tasks = [_SPOKEN.get(task, str(task).replace("-", " ")) for task in plan.tasks]
    told = f"{', '.join(tasks[:-1])} and {tasks[-1]}"
    refused = ""
    fields = ", ".join(f"`{field}`" for field in plan.refused if field not in plan.tiny.equal)
    if fields:
        refused = (
            f"\n\nOf a `config.json`, only the default is supported of: {fields}. Any other value is refused by name."
        )
    if plan.tiny.equal:
        refused += f"\n\n{', '.join(f'`{field}`' for field in plan.tiny.equal)} must be `hidden_size`."
    return {
        "pyproject.toml": _PYPROJECT.format(**words, core=_requirement()),
        "README.md": _README.format(**words, **_USES[plan.encodes], tasks=told, refused=refused),
        ".github/workflows/ci.yml": _CI,
        f"src/{package}/__init__.py": f'"""{stem} as a plugin of lorax-core. Importing it is light: `plugin` declares, '
        '`modeling` computes."""\n\n__version__ = "0.1.0"\n',
        f"src/{package}/py.typed": "",
        f"src/{package}/plugin.py": plugin_text(plan, package),
        f"src/{package}/cases.py": cases_text(plan),
        "tests/conftest.py": _CONFTEST,
        "tests/test_conformance.py": _CONFORMANCE.format(**words),
        "tests/test_quirks.py": _quirks(plan, package),
    }


def constant(plan: Blueprint) -> str:
    """The name of the cases: `GEMMA2`."""
    return "".join(char if char.isalnum() else "_" for char in plan.source.model_type).upper()


def plugin_text(plan: Blueprint, package: str) -> str:
    """`plugin.py`."""
    source, stem = plan.source, plan.source.stem
    tasks = ", ".join(f"Task.{task.name}" for task in plan.tasks)
    own = heads(plan, package)
    named = {source.classes[task].__name__: task for task in plan.tasks}
    rest = [kind for kind in (*source.classes.values(), *source.others) if kind.__name__ not in named]
    lines = [
        '"""Declares ' + stem + ' to lorax-core. Never imports torch."""',
        "",
        "from __future__ import annotations",
        "",
        "from collections.abc import Iterable",
        "",
        "from lorax_core.plugins import ArchitectureSpec, Task, hookimpl",
        "",
        "",
        "@hookimpl",
        "def lorax_architectures() -> Iterable[ArchitectureSpec]:",
        f'    """{stem}: {summary(plan)}."""',
        "    yield ArchitectureSpec(",
        f"        model_type={literal(source.model_type)},",
        f"        summary={literal(f'{stem} encoders.' if plan.encodes else f'{stem} decoders.')},",
        f"        api={API_VERSION},",
        f"        config={literal(f'{package}.config:{stem}Config')},",
        f"        backbone={literal(f'{package}.modeling:{stem}Backbone')},",
        f"        tasks=({tasks}{',' if len(plan.tasks) == 1 else ''}),",
    ]
    if own:
        inside = [f"            Task.{task.name}: {literal(path)}," for task, path in own.items()]
        lines += ["        heads={", *inside, "        },"]
    lines.append("        hf_architectures={")
    lines += [f"            {literal(name)}: Task.{task.name}," for name, task in named.items()]
    lines += [f"            {literal(kind.__name__)}: Task.EMBED," for kind in rest if kind not in plan.heads.mistaken]
    usual = Task.EMBED if plan.encodes else Task.GENERATE
    lines += ["        },", f"        default_task=Task.{usual.name},", f"        causal={not plan.encodes},"]
    if plan.features:
        lines.append(f"        features={literal(plan.features)},")
    lines += [f"        cases={literal(f'{package}.cases:{constant(plan)}')},", "    )", ""]
    return "\n".join(lines)


def cases_text(plan: Blueprint) -> str:
    """`cases.py`."""
    variants = [
        f"        {literal(name)}: {literal(changes, 8, 12 + len(name))}," for name, changes in plan.variants.items()
    ]
    sizes = [f"        {literal(name)}: {literal(value)}," for name, value in plan.tiny_config.items()]
    references = [
        f"        Task.{task.name}: {literal(f'transformers:{plan.source.classes[task].__name__}')},"
        for task in plan.tasks
    ]
    what = f"What the conformance kit tests {plan.source.stem} with."
    return "\n".join(
        [
            f'"""{what} Never imports torch; nothing but the kit imports it."""',
            "",
            "from __future__ import annotations",
            "",
            "from lorax_core.plugins import ArchitectureCases, Task",
            "",
            f"{constant(plan)} = ArchitectureCases(",
            "    tiny_config={",
            *sizes,
            "    },",
            "    variants={",
            *variants,
            "    },",
            "    references={",
            *references,
            "    },",
            ")",
            "",
        ]
    )


def _quirks(plan: Blueprint, package: str) -> str:
    asked: list[tuple[dict[str, Any], str]] = [
        ({name: _unlike(one.default)}, name) for name, one in plan.refused.items()
    ]
    if plan.rotary is not None:
        asked.append(({"rope_parameters": {"rope_type": "longrope", "factor": 2.0}}, "rope.type.*'longrope'"))
    if plan.windows is not None and plan.windows.by_layer:
        asked.append(({"layer_types": ["full_attention"]}, "layer_types names 1 layers"))
    asked.append(({plan.tiny.spelt("num_hidden_layers"): 0}, plan.tiny.spelt("num_hidden_layers")))
    cases = "\n".join(f"        ({literal(changes)}, {literal(told)})," for changes, told in asked)
    ours = "\n".join(
        [f"from {package}.cases import {constant(plan)}", f"from {package}.config import {plan.source.stem}Config"]
    )
    words = {"stem": plan.source.stem, "constant": constant(plan), "model_type": plan.source.model_type}
    return _QUIRKS.format(**words, cases=cases, imports=f"\nimport lorax_core as lorax\n{ours}\n")


def _unlike(value: Any) -> Any:
    """A value that is not the default, of its type."""
    match value:
        case bool():
            return not value
        case int() | float():
            return value + 3
        case str():
            return f"not {value}"
    return 3


def _entry(model_type: str) -> str:
    return model_type.replace(".", "_")


def _requirement() -> str:
    from lorax_core.version import __version__

    # No upper bound: `api` is one, and says what to do.
    return ".".join(__version__.split(".")[:2])
