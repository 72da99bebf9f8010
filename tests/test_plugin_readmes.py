"""The READMEs of the plugins: the same sections in the same order, and examples that run."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from oracles import installed

from lorax_core.plugins.resolve import load_cases, load_class
from lorax_core.testing import reference

ROOT = Path(__file__).resolve().parents[1]
READMES = sorted([*ROOT.glob("lorax_*/README.md"), *ROOT.glob("plugins/*/README.md")])
PYTHON = re.compile(r"^```python\n(.*?)^```$", re.DOTALL | re.MULTILINE)
SECTIONS = ["With the engine", "Without an engine", "Tests"]


def names(path):
    return path.parent.name


@pytest.mark.parametrize("readme", READMES, ids=names)
def test_sections_are_the_same_in_every_plugin(readme):
    assert re.findall(r"^## (.*)$", readme.read_text(encoding="utf-8"), re.MULTILINE) == SECTIONS


@pytest.mark.parametrize("readme", READMES, ids=names)
def test_examples_run_offline_on_a_tiny_checkpoint(readme, tmp_path, monkeypatch):
    text = readme.read_text(encoding="utf-8")
    model_type = re.search(r"lorax plugins check (\S+)", text)[1]
    host = installed()
    spec = host.architecture(model_type)
    cases = load_cases(spec, host.owner(model_type))
    kind = re.search(r"model_class=(\w+)", text)
    task = load_class(spec.backbone.partition(":")[0] + f":{kind[1]}", None).task if kind else spec.default_task
    reference.build(cases, task, cases.tiny_config, tmp_path / "path/to/checkpoint", seed=0)
    monkeypatch.chdir(tmp_path)
    blocks = PYTHON.findall(text)

    for block in blocks:
        exec(compile(block, f"{readme.parent.name}/README.md", "exec"), {})

    assert len(blocks) == 2
