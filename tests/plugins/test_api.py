"""What core promises plugins between its versions.

A plugin and a listing of all public names were frozen with version 1 of the plugin API. They stand for the wheel of core that
this plugin was written against: a plugin holds none of core, and what it can lean on is the names, their parameters and what
they compute. A wheel made from a tag would test the same, and needs a tag, which no shallow clone has, and a build.
`tests/scaffold/kits` runs the whole kit on that plugin.
"""

from __future__ import annotations

import ast
import copy
import json
import sys

import frozen
import pytest
from public_api import breaks, describe

from lorax_core.plugins.host import PluginHost
from lorax_core.plugins.record import PluginStatus
from lorax_core.plugins.spec import API_VERSION
from lorax_core.settings import Settings
from lorax_core.testing import run_checks

API1 = json.loads((frozen.FOLDER / "api.json").read_text(encoding="utf-8"))
CHECKSUM = "9b3e5deb7df228389a448902466a159328b0b9752b43da53f8dd983c6ca8a235"
CHECKS = ("weights-accounted", "numbers-hidden", "numbers-embed", "cache-decode", "adapter-identity")


@pytest.fixture
def frozen_host(tmp_path, monkeypatch):
    """A host with the frozen plugin alone, whose modules are forgotten afterwards."""
    frozen.write_metadata(tmp_path)
    monkeypatch.syspath_prepend(frozen.SOURCES)
    yield PluginHost.discover(Settings(strict=True), frozen.entry_points(tmp_path))
    for name in [name for name in sys.modules if name.partition(".")[0] == "lorax_frozen"]:
        del sys.modules[name]


def test_what_is_frozen_is_never_edited():
    assert frozen.checksum() == CHECKSUM, "undo the edit: a plugin that somebody published does not change with core"


def test_api_1_is_kept():
    broken = breaks(API1, describe())

    assert API_VERSION == 1
    assert broken == [], (
        "plugins that were written for plugin API 1 break. Keep what they use: a new parameter or field needs a default, "
        "an old name stays beside a new one. Where that is worse than a break, raise API_VERSION in plugins/spec.py, freeze "
        "a plugin and a listing for it beside tests/api1, and say in CHANGELOG.md and docs/plugins.md what authors change"
    )


def test_the_frozen_plugin_uses_every_public_name():
    used = {module: set() for module in API1}
    for file in frozen.PLUGIN.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.module in used:
                used[node.module] |= {name.name for name in node.names}

    assert used == {module: set(names) for module, names in API1.items()}


@pytest.mark.parametrize("model_type", ["gemma2", "opt", "bert"])
def test_the_frozen_plugin_computes_what_it_did(frozen_host, model_type):
    results = run_checks(model_type, host=frozen_host, checks=CHECKS, variants=("base",))

    assert [result.key for result in results if result.status == "failed"] == []
    assert sum(result.status == "passed" for result in results) >= 4


def test_a_plugin_for_a_later_api_is_told_what_to_do(importable_strangers):
    later = (frozen.SOURCES / "lorax_frozen/plugin.py").read_text(encoding="utf-8").replace("api=1", "api=2")
    importable_strangers.install("lorax-later", later)

    host = PluginHost.discover(Settings(), importable_strangers.entry_points())

    [record] = host.problems
    assert record.status is PluginStatus.INCOMPATIBLE
    assert "plugin API 2; this core implements 1" in record.cause
    assert record.hint == "pip install --upgrade lorax-core"


def changed(edit):
    """API 1 with an edit made to a copy of it."""
    present = copy.deepcopy(API1)
    edit(present["lorax_core.plugins"], present["lorax_core.modeling"])
    return breaks(API1, present)


NEW = {"name": "more", "how": "keyword-only", "type": "int"}


@pytest.mark.parametrize(
    ("edit", "told"),
    [
        (lambda plugins, modeling: modeling.pop("MLP"), "lorax_core.modeling.MLP is gone"),
        (lambda plugins, modeling: modeling["MLP"].update(kind="function"), "is no longer a class"),
        (lambda plugins, modeling: modeling["RMSNorm"]["bases"].remove("Norm"), "RMSNorm is no longer a Norm"),
        (lambda plugins, modeling: modeling["MLP"]["made"].append(NEW), "'more' is new, and has no default"),
        (lambda plugins, modeling: modeling["MLP"]["made"].pop(), "'bias' is gone, or another"),
        (lambda plugins, modeling: modeling["MLP"]["made"][-1].update(default="False"), "'bias' is gone, or another"),
        (lambda plugins, modeling: modeling["MLP"]["made"].reverse(), "another order"),
        (lambda plugins, modeling: modeling["Norm"]["methods"].pop("compute"), "Norm.compute is gone"),
        (
            lambda plugins, modeling: modeling["Norm"]["methods"]["compute"]["parameters"].append(
                {**NEW, "default": "1"}
            ),
            "plugins override the method without it",
        ),
        (lambda plugins, modeling: modeling["Norm"]["methods"]["compute"].update(returns="None"), "returns None"),
        (lambda plugins, modeling: plugins["Task"]["members"].pop("EMBED"), "Task.EMBED is gone"),
        (
            lambda plugins, modeling: plugins["ArchitectureSpec"]["fields"].pop("heads"),
            "ArchitectureSpec.heads is gone",
        ),
        (
            lambda plugins, modeling: plugins["ArchitectureSpec"]["fields"].update(
                x={"type": "int", "default": "required"}
            ),
            "a field that plugins do not give",
        ),
    ],
)
def test_what_breaks_plugins_is_found(edit, told):
    found = changed(edit)

    assert found
    assert told in found[0]


def test_what_plugins_need_not_know_may_be_added():
    def edit(plugins, modeling):
        modeling["Another"] = modeling["MLP"]
        modeling["MLP"] = {**modeling["MLP"], "made": [*modeling["MLP"]["made"], {**NEW, "default": "1"}]}
        plugins["ArchitectureSpec"]["fields"]["x"] = {"type": "int", "default": "1"}
        plugins["ArchitectureSpec"]["methods"]["head"]["parameters"].append({**NEW, "default": "1"})
        plugins["Task"]["members"]["RERANK"] = "rerank"

    assert changed(edit) == []
