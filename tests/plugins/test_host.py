"""Discovery among strangers: each is judged alone, the others go on, and what fails is told with its cause."""

from __future__ import annotations

import sys
import types
from dataclasses import replace

import pytest

from lorax_core.errors import PluginError
from lorax_core.plugins.host import PluginHost, PluginStatus
from lorax_core.settings import Settings

HOOK = "from lorax_core.plugins import ArchitectureSpec, BackendSpec, hookimpl\n@hookimpl\ndef lorax_architectures():\n"
BACKENDS = """
@hookimpl
def lorax_attention_backends():
    return [BackendSpec(name={name!r}, summary="One.", backend="a:B", device_types=("cpu",), priority={priority})]
"""


def discover(strangers, settings=Settings()):  # noqa: B008 - frozen
    return PluginHost.discover(settings, strangers.entry_points())


def record_of(host, package):
    (record,) = [record for record in host.records if record.package == package]
    return record


def make_backend(name="fast", priority=5):
    return "from lorax_core.plugins import BackendSpec, hookimpl\n" + BACKENDS.format(name=name, priority=priority)


def test_a_sound_stranger_is_ready(importable_strangers):
    importable_strangers.install(version="2.3")

    host = discover(importable_strangers)

    record = record_of(host, "lorax-stranger")
    assert (record.status, record.version, record.cause) == (PluginStatus.READY, "2.3", None)
    assert host.architecture("stranger") is host.architectures["stranger"]
    assert host.owner("stranger") is record
    assert host.problems == ()
    assert record.seconds > 0


def test_core_declares_its_backend_through_the_same_hook_and_others_line_up_by_priority(importable_strangers):
    importable_strangers.install("lorax-fast", make_backend("fast", priority=5))
    importable_strangers.install("lorax-slow", make_backend("slow", priority=-5))

    host = discover(importable_strangers)

    assert [spec.name for spec in host.backends] == ["flashinfer", "flash_attn", "native", "fast", "torch", "slow"]
    assert record_of(host, "lorax-core").status is PluginStatus.READY


BROKEN = {
    "raises at import": ("raise RuntimeError('no luck')", "RuntimeError: no luck (at lorax_bad/plugin.py:1)"),
    "imports what is not there": ("import not_there", "ModuleNotFoundError: No module named 'not_there'"),
    "is not Python": ("def (", "SyntaxError: invalid syntax (plugin.py, line 1)"),
    "leaves the process": ("import sys\nsys.exit(3)", "SystemExit: 3 (at lorax_bad/plugin.py:2)"),
    "raises in the hook": (
        HOOK + "    raise ValueError('half-way')",
        "ValueError: half-way (at lorax_bad/plugin.py:4)",
    ),
    "raises while it yields": (HOOK + "    yield 1 / 0", "ZeroDivisionError: division by zero"),
    "returns nothing": (HOOK + "    pass", "lorax_architectures returned None; it returns an iterable of Archi"),
    "returns a string": (HOOK + "    return 'bert'", "lorax_architectures returned 'bert'"),
    "returns a number": (HOOK + "    return 3", "lorax_architectures returned 3"),
    "returns rubbish": (HOOK + "    return [object()]", "which is not an instance of ArchitectureSpec"),
    "returns a dict": (
        HOOK + "    return {'model_type': 'x'}",
        "yielded 'model_type', which is not an instance of ArchitectureSpec",
    ),
    "misses fields": (
        HOOK + "    return [ArchitectureSpec(model_type='x', api=1)]",
        "ArchitectureSpec: summary: Field",
    ),
    "takes arguments": (HOOK.replace("()", "(host)") + "    return []", "PluginValidationError"),
    "misspells a hook": (
        HOOK.replace("def lorax_architectures", "def lorax_architecture") + "    return []",
        "'lorax_architecture' is not a hook; hooks are 'lorax_architectures', 'lorax_attention_backends'",
    ),
    "misspells a hook unmarked": ("def lorax_backends(): return []", "'lorax_backends' is not a hook"),
    "forgets the mark": ("def lorax_architectures(): return []", "lorax_architectures is not marked as a hook"),
    "has no hooks": ("x = 1", "implements none of the hooks"),
    "raises something unprintable": (
        "class Rude(Exception):\n    def __str__(self): raise self\nraise Rude",
        "Rude: <its message cannot be printed>",
    ),
}


@pytest.mark.parametrize(("code", "cause"), BROKEN.values(), ids=BROKEN)
def test_a_broken_stranger_is_told_and_harms_nobody(importable_strangers, code, cause):
    importable_strangers.install("lorax-bad", code)
    importable_strangers.install("lorax-stranger")

    host = discover(importable_strangers)

    record = record_of(host, "lorax-bad")
    assert record.status is PluginStatus.BROKEN
    assert cause in record.cause
    assert "\n" not in record.cause
    assert record.exception is not None
    assert record.hint
    assert host.problems == (record,)
    assert list(host.architectures) == ["stranger"]


def test_a_misspelt_hook_is_answered_with_the_nearest(importable_strangers):
    importable_strangers.install("lorax-bad", HOOK.replace("def lorax_arch", "def lorax_ach") + "    return []")

    host = discover(importable_strangers)

    assert record_of(host, "lorax-bad").hint == "did you mean 'lorax_architectures'?"


def test_a_hook_of_a_later_core_may_be_marked_optional(importable_strangers, declaration, spec_fields):
    later = "\n@hookimpl(optionalhook=True)\ndef lorax_quantizers():\n    return []\n"
    importable_strangers.install(code=declaration(spec_fields()) + later)

    host = discover(importable_strangers)

    assert "stranger" in host.architectures


def test_half_of_a_plugin_is_not_kept(importable_strangers, declaration, spec_fields):
    half = "\n@hookimpl\ndef lorax_attention_backends():\n    raise OSError('no driver')\n"
    importable_strangers.install(code=declaration(spec_fields()) + half)

    host = discover(importable_strangers)

    record = record_of(host, "lorax-stranger")
    assert record.status is PluginStatus.BROKEN
    assert record.specs == ()
    assert "stranger" not in host.architectures


def test_one_plugin_cannot_declare_a_name_twice(importable_strangers, declaration, spec_fields):
    importable_strangers.install(code=declaration(spec_fields(), spec_fields(summary="Again.")))

    host = discover(importable_strangers)

    assert "declares 'stranger' more than once" in record_of(host, "lorax-stranger").cause


def test_a_spec_made_behind_pydantic_s_back_is_judged_too(importable_strangers, declaration, spec_fields):
    behind = declaration(spec_fields()).replace("**fields)", "**fields).model_copy(update={'backbone': 3})")
    importable_strangers.install(code=behind)

    host = discover(importable_strangers)

    assert "backbone: Input should be a valid string" in record_of(host, "lorax-stranger").cause


def test_ctrl_c_goes_through(importable_strangers):
    importable_strangers.install("lorax-bad", "raise KeyboardInterrupt")

    with pytest.raises(KeyboardInterrupt):
        discover(importable_strangers)


@pytest.mark.parametrize(
    ("requires", "status"),
    [
        ("lorax-core>=99", PluginStatus.INCOMPATIBLE),
        ("Lorax_Core (<0.0.1)", PluginStatus.INCOMPATIBLE),
        ('lorax-core<0.0.1; python_version >= "3"', PluginStatus.INCOMPATIBLE),
        ('lorax-core>=99; extra == "next"', PluginStatus.READY),
        ('lorax-core>=99; python_version < "3"', PluginStatus.READY),
        ("lorax-core-extras>=99", PluginStatus.READY),
        ("lorax-core", PluginStatus.READY),
        ("lorax-core ~> 1", PluginStatus.BROKEN),
    ],
)
def test_the_plugin_s_own_requirement_decides_before_it_is_imported(
    importable_strangers, declaration, spec_fields, requires, status
):
    code = "import sys\nsys.stranger_was_imported = True\n" + declaration(spec_fields())
    importable_strangers.install(code=code, requires=("numpy", requires))

    host = discover(importable_strangers)

    assert record_of(host, "lorax-stranger").status is status
    assert sys.__dict__.pop("stranger_was_imported", False) is (status is PluginStatus.READY)


def test_incompatible_strangers_are_told_with_both_versions(importable_strangers):
    importable_strangers.install("lorax-new", requires=("lorax-core>=99",))
    importable_strangers.install("lorax-newer", api=2, model_type="newer")

    host = discover(importable_strangers)

    assert "requires lorax-core>=99; this is lorax-core" in record_of(host, "lorax-new").cause
    assert record_of(host, "lorax-new").hint == "pip install --upgrade lorax-core lorax-new"
    assert record_of(host, "lorax-newer").status is PluginStatus.INCOMPATIBLE
    assert "plugin API 2; this core implements 1" in record_of(host, "lorax-newer").cause


def make_conflict(strangers):
    strangers.install("lorax-one", model_type="contested")
    strangers.install("lorax-two", model_type="contested")


def test_two_that_claim_one_model_type_both_lose_it(importable_strangers):
    make_conflict(importable_strangers)

    host = discover(importable_strangers)

    assert [record.status for record in host.problems] == [PluginStatus.CONFLICT, PluginStatus.CONFLICT]
    assert "contested" not in host.architectures
    with pytest.raises(PluginError, match=r"claimed by lorax-two 1\.0 too, and neither gets it") as caught:
        host.architecture("contested")
    assert "LORAX_BLOCK_PLUGINS=lorax-two (or LORAX_PLUGINS=lorax-one" in caught.value.hint


@pytest.mark.parametrize(
    "settings",
    [
        Settings(plugins=frozenset({"lorax-one"})),
        Settings(plugins=frozenset({"one"})),
        Settings(block_plugins=frozenset({"lorax-two"})),
    ],
)
def test_the_user_settles_a_conflict_by_name(importable_strangers, settings):
    make_conflict(importable_strangers)

    host = discover(importable_strangers, settings)

    assert host.owner("contested").package == "lorax-one"
    assert record_of(host, "lorax-two").status is PluginStatus.BLOCKED
    assert "lorax_two" not in sys.modules


def test_a_conflict_costs_only_the_contested_name(importable_strangers, declaration, spec_fields):
    both = declaration(spec_fields(model_type="contested"), spec_fields(model_type="own"))
    importable_strangers.install("lorax-one", both)
    importable_strangers.install("lorax-two", model_type="contested")

    host = discover(importable_strangers)

    assert list(host.architectures) == ["own"]
    assert [spec.model_type for spec in record_of(host, "lorax-one").contested] == ["contested"]


def test_core_s_own_backend_cannot_be_taken(importable_strangers):
    importable_strangers.install("lorax-thief", make_backend("torch", priority=99))

    host = discover(importable_strangers)

    assert [spec.backend for spec in host.backends][-1] == "lorax_core.attention.torch:TorchBackend"
    assert [spec.name for spec in host.backends].count("torch") == 1
    assert record_of(host, "lorax-thief").cause == "attention backend 'torch' is core's own"
    assert record_of(host, "lorax-core").status is PluginStatus.READY


def test_one_entry_point_name_in_two_packages_hides_neither(importable_strangers):
    importable_strangers.install("lorax-one", name="same", model_type="first")
    importable_strangers.install("lorax-two", name="same", model_type="second")

    host = discover(importable_strangers)

    assert list(host.architectures) == ["first", "second"]


def test_a_module_that_two_packages_name_is_reported(importable_strangers):
    importable_strangers.install("lorax-one")
    entry = importable_strangers.entry_points()[0]

    host = PluginHost.discover(Settings(), [entry, entry])

    assert "was registered already, by lorax-one:one" in host.problems[0].cause


def test_a_plugin_without_metadata_has_a_name_all_the_same(importable_strangers):
    importable_strangers.install()
    (importable_strangers.folder / "lorax_stranger-1.0.dist-info/METADATA").unlink()

    host = discover(importable_strangers)

    assert [record.package for record in host.records] == ["lorax-core", "lorax-stranger"]
    assert host.records[1].title == "lorax-stranger"


def test_metadata_that_cannot_be_read_are_the_plugins_status(importable_strangers):
    importable_strangers.install(code="raise AssertionError('imported')")
    (importable_strangers.folder / "lorax_stranger-1.0.dist-info/METADATA").write_bytes(b"Name: caf\xe9\n")

    record = record_of(discover(importable_strangers), "lorax-stranger")

    assert record.status is PluginStatus.BROKEN
    assert record.cause.startswith("UnicodeDecodeError: ")
    assert isinstance(record.exception, UnicodeDecodeError)


def test_torch_that_was_there_before_is_nobody_s_slow_import(
    importable_strangers, declaration, spec_fields, monkeypatch
):
    monkeypatch.setitem(sys.modules, "torch", types.ModuleType("torch"))
    importable_strangers.install(code="import torch\n" + declaration(spec_fields()))

    host = discover(importable_strangers)

    assert host.owner("stranger").status is PluginStatus.READY


def test_a_misspelt_name_in_lorax_plugins_is_reported(importable_strangers):
    importable_strangers.install()

    host = discover(importable_strangers, Settings(plugins=frozenset({"lorax-strangr", "gpt2"})))

    assert [record.cause for record in host.problems] == [
        "LORAX_PLUGINS names 'gpt2', which is not installed",
        "LORAX_PLUGINS names 'lorax-strangr', which is not installed",
    ]
    assert [record.hint for record in host.problems] == ["pip install lorax-gpt2", "did you mean 'lorax-stranger'?"]
    assert record_of(host, "lorax-stranger").status is PluginStatus.BLOCKED


def test_the_environment_steers_discovery(importable_strangers, monkeypatch):
    importable_strangers.install()
    monkeypatch.setenv("LORAX_BLOCK_PLUGINS", "Lorax_Stranger")

    host = PluginHost.discover(entry_points=importable_strangers.entry_points())

    assert record_of(host, "lorax-stranger").status is PluginStatus.BLOCKED
    with pytest.raises(PluginError, match=r"'stranger' is unavailable: .* is blocked: LORAX_BLOCK_PLUGINS") as caught:
        host.architecture("stranger")
    assert caught.value.hint == "remove it from LORAX_BLOCK_PLUGINS"


def test_core_s_own_plugin_cannot_be_blocked(importable_strangers):
    host = discover(importable_strangers, Settings(block_plugins=frozenset({"lorax-core"})))

    assert [spec.name for spec in host.backends] == ["flashinfer", "flash_attn", "native", "torch"]


def test_strict_discovery_raises_on_the_first_failure(importable_strangers):
    importable_strangers.install("lorax-bad", "raise RuntimeError('no luck')")
    importable_strangers.install("lorax-worse", "import sys\nsys.worse_was_imported = True")

    with pytest.raises(PluginError, match=r"plugin lorax-bad 1\.0 is broken: RuntimeError: no luck") as caught:
        discover(importable_strangers, Settings(strict=True))

    assert isinstance(caught.value.__cause__, RuntimeError)
    assert not hasattr(sys, "worse_was_imported")


def test_strict_discovery_raises_on_a_conflict_but_not_on_what_the_user_blocked(importable_strangers):
    make_conflict(importable_strangers)
    strict = Settings(strict=True)

    with pytest.raises(PluginError, match="is in conflict"):
        discover(importable_strangers, strict)
    host = discover(importable_strangers, replace(strict, block_plugins=frozenset({"two"})))

    assert list(host.architectures) == ["contested"]


@pytest.mark.parametrize(
    ("model_type", "hint"),
    [
        ("strangr", "did you mean 'stranger'?"),
        ("STRANGER", "did you mean 'stranger'?"),
        ("gpt_neox", "pip install lorax-neox"),
        ("xlm_roberta", "did you mean 'xlm-roberta'? pip install lorax-roberta"),
        ("zzz", "install the plugin that provides it; `lorax models list` shows what is there"),
    ],
)
def test_an_unknown_model_type_gets_the_installed_ones_and_the_next_step(importable_strangers, model_type, hint):
    importable_strangers.install()
    host = discover(importable_strangers)

    with pytest.raises(
        PluginError, match=f"no plugin provides model type '{model_type}'; installed: 'stranger'"
    ) as caught:
        host.architecture(model_type)

    assert caught.value.hint == hint


def test_an_installed_package_that_does_not_bring_the_type_is_to_be_upgraded(importable_strangers):
    importable_strangers.install("lorax-neox", model_type="other")

    with pytest.raises(PluginError) as caught:
        discover(importable_strangers).owner("gpt_neox")

    assert caught.value.hint == "pip install --upgrade lorax-neox (1.0 does not provide it)"


@pytest.mark.parametrize(("package", "name"), [("lorax-neox", "neox"), ("other-package", "gpt-neox")])
def test_the_type_of_a_broken_plugin_is_answered_with_its_cause(importable_strangers, package, name):
    importable_strangers.install(package, "import not_there", name=name)

    with pytest.raises(PluginError, match=r"'gpt_neox' is unavailable: .* is broken: ModuleNotFoundError") as caught:
        discover(importable_strangers).architecture("gpt_neox")

    assert isinstance(caught.value.__cause__, ModuleNotFoundError)


def test_hosts_share_nothing(importable_strangers):
    importable_strangers.install()

    first, second = (
        discover(importable_strangers),
        discover(importable_strangers, Settings(plugins=frozenset({"none"}))),
    )

    assert "stranger" in first.architectures
    assert "stranger" not in second.architectures
    with pytest.raises(TypeError):
        first.architectures["other"] = first.architecture("stranger")
