"""A package is written whole or not at all, reads as if people had written it, and passes the kit."""

from __future__ import annotations

import importlib
import json
import re
import subprocess
import sys
import tomllib

import pytest
from typer.testing import CliRunner

from lorax_core.cli.main import app
from lorax_core.errors import CheckpointError, PluginError
from lorax_core.scaffold.check import known_to
from lorax_core.scaffold.errors import NotUnderstood
from lorax_core.scaffold.package import check_name, make_package
from lorax_core.scaffold.probe import Probe
from lorax_core.scaffold.source import read_source
from lorax_core.scaffold.tiny import Tiny
from lorax_core.testing import reference, run_checks
from lorax_core.types import Task

ROOT_FILES = {"pyproject.toml", "README.md", ".github/workflows/ci.yml"}
MODULES = {
    f"src/lorax_made/{name}"
    for name in ("__init__.py", "cases.py", "config.py", "modeling.py", "plugin.py", "py.typed")
}
TESTS = {f"tests/{name}" for name in ("conftest.py", "test_conformance.py", "test_quirks.py")}


@pytest.fixture(scope="module")
def qwen3():
    # Not lorax-qwen3: a package of this repository has that name.
    return make_package("lorax-made", "transformers:Qwen3ForCausalLM")


@pytest.fixture(scope="module")
def opt():
    return make_package("lorax-opt", "transformers:OPTForCausalLM")


@pytest.fixture(scope="module")
def electra():
    return make_package("lorax-electra", "transformers:ElectraModel")


@pytest.fixture
def imported(tmp_path, monkeypatch):
    """Write a package and import modules of it; they are forgotten afterwards."""
    before = set(sys.modules)

    def load(package, module):
        if not (tmp_path / "made").exists():
            package.write(tmp_path / "made")
            monkeypatch.syspath_prepend(tmp_path / "made/src")
        return importlib.import_module(f"{package.module}.{module}")

    yield load
    for name in set(sys.modules) - before:
        if name.startswith("lorax_") and not name.startswith("lorax_core"):
            del sys.modules[name]


def test_a_package_has_all_its_files(qwen3):
    assert set(qwen3.files) == ROOT_FILES | MODULES | TESTS


def test_a_package_asks_for_core_as_those_of_this_repository_do(qwen3, repository):
    wanted = tomllib.loads(qwen3.files["pyproject.toml"])["project"]["dependencies"]
    files = [*repository.glob("lorax_*/pyproject.toml"), *repository.glob("plugins/*/pyproject.toml")]

    asked = {file.parent.name: tomllib.loads(file.read_text())["project"]["dependencies"] for file in files}

    assert len(asked) > 8
    assert asked == dict.fromkeys(asked, wanted)


@pytest.mark.parametrize("which", ["qwen3", "opt", "electra"])
def test_what_is_written_is_as_ruff_writes_it(which, request, tmp_path, repository):
    package = request.getfixturevalue(which)
    package.write(tmp_path / "made")
    # As in plugins/: its own modules and core's are sorted together.
    sources = f"src = ['{repository / 'core'}', '{tmp_path / 'made/src'}']"
    settings = ["--config", str(repository / "pyproject.toml"), "--config", sources, "--no-cache"]

    for command in (["check", tmp_path / "made/src"], ["format", "--check", tmp_path / "made"]):
        done = subprocess.run([sys.executable, "-m", "ruff", *command, *settings], capture_output=True, text=True)
        assert done.returncode == 0, done.stdout

    assert package.files[f"src/{package.module}/modeling.py"].count("\n") < 120


def test_defaults_are_those_of_transformers(qwen3, imported):
    parsed = imported(qwen3, "config").Qwen3Config.parse(
        {"model_type": "qwen3", "hidden_size": 4096, "num_hidden_layers": 3, "num_attention_heads": 32, "vocab_size": 9}
    )

    assert (parsed.intermediate_size, parsed.head_dim, parsed.num_key_value_heads) == (22016, 128, 32)
    assert (parsed.max_window_layers, parsed.sliding_window, set(parsed.layer_types)) == (28, None, {"full_attention"})


def test_the_kit_passes_on_the_base(qwen3, imported):
    (spec,) = imported(qwen3, "plugin").lorax_architectures()
    checks = ("declaration", "weights-accounted", "numbers-hidden", "numbers-generate", "config-defaults")

    results = run_checks(spec, checks=checks, variants=("base", "window_in_the_last_layer"))

    assert len(results) == 8
    assert [result.key for result in results if result.status != "passed"] == []


def test_tensors_have_a_place_whatever_a_class_calls_its_base_model(qwen3, imported):
    tiny = {**imported(qwen3, "cases").QWEN3.tiny_config, "model_type": "qwen3"}
    weight_map = imported(qwen3, "modeling").Qwen3Backbone.weight_map(imported(qwen3, "config").Qwen3Config.parse(tiny))

    for name in ("model.norm.weight", "transformer.norm.weight", "norm.weight"):
        assert weight_map.resolve(name).name == "norm.weight"
    assert weight_map.ignores("qa_outputs.bias")


@pytest.mark.parametrize("which", ["opt", "electra"])
def test_the_examples_of_a_readme_run(which, request, imported, tmp_path, monkeypatch):
    package = request.getfixturevalue(which)
    cases = getattr(imported(package, "cases"), which.upper())
    (tmp_path / "installed").mkdir()
    known_to(package, tmp_path / "installed")
    monkeypatch.syspath_prepend(tmp_path / "installed")
    task = Task.GENERATE if which == "opt" else Task.EMBED
    reference.build(cases, task, cases.tiny_config, tmp_path / "path/to/checkpoint", seed=0)
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"^```python\n(.*?)^```$", package.files["README.md"], re.DOTALL | re.MULTILINE)

    for block in blocks:
        exec(compile(block, "README.md", "exec"), {})

    assert len(blocks) == 2


def test_what_is_not_understood_is_refused_by_name(opt, imported):
    config = imported(opt, "config").OPTConfig
    tiny = {**imported(opt, "cases").OPT.tiny_config, "model_type": "opt"}

    assert list(opt.refused) == ["do_layer_norm_before", "_remove_final_layer_norm", "word_embed_proj_dim"]
    config.parse({**tiny, "word_embed_proj_dim": 128, "do_layer_norm_before": True})
    for field, value in {
        "do_layer_norm_before": False,
        "_remove_final_layer_norm": True,
        "word_embed_proj_dim": 64,
    }.items():
        with pytest.raises(CheckpointError, match=f"{field} {value} is not supported"):
            config.parse({**tiny, field: value})


def test_an_encoder_is_written_on_the_blocks_of_one(electra, imported):
    config = imported(electra, "config").ElectraConfig
    tiny = {**imported(electra, "cases").ELECTRA.tiny_config, "model_type": "electra"}

    parsed = config.parse({**tiny, "hidden_size": 64, "embedding_size": 64})

    assert "class ElectraBackbone(PostNormEncoder):" in electra.files["src/lorax_electra/modeling.py"]
    assert 'post_norm_map(\n            "electra",' in electra.files["src/lorax_electra/modeling.py"]
    assert (parsed.type_vocab_size, parsed.layer_norm_eps, parsed.max_tokens) == (2, 1e-12, 320)
    for changes in ({"hidden_size": 256}, {"embedding_size": 64}, {"embedding_size": None}, {"is_decoder": True}):
        with pytest.raises(CheckpointError, match=next(iter(changes)).replace("hidden", "embedding")):
            config.parse({**tiny, **changes})


def test_a_file_states_what_differs_from_the_defaults_in_tiny_sizes(tmp_path):
    stated = {"model_type": "llama", "hidden_size": 8192, "attention_bias": True, "auto_map": {"AutoModel": "x.Y"}}
    file = tmp_path / "config.json"
    file.write_text(json.dumps(stated))

    tiny = Tiny(read_source(str(file)))

    assert (tiny.config().attention_bias, tiny.config().hidden_size) == (True, 128)
    assert "auto_map" not in tiny.fields


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("{", "is not JSON"),
        ("[1]", "states no model_type"),
        ('{"model_type": 3}', "states no model_type"),
        ('{"model_type": "llamma"}', "no model type 'llamma'.*the nearest is 'llama'"),
        ('{"model_type": "../x", "auto_map": {"AutoConfig": "evil.py--C"}}', "its own code .auto_map. is never run"),
        ('{"model_type": ' + "[" * 200 + "]" * 200 + "}", "nested"),
        ('{"model_type": "llama", "rope_parameters": {"rope_type": "evil"}}', "transformers refuses it: .*evil"),
        ('{"model_type": "llama", "hidden_act": "evil"}', "transformers refuses it: .*evil"),
        ('{"model_type": "llama", "hidden_act": {"a": []}}', "transformers refuses it"),
    ],
)
def test_a_hostile_file_is_refused(text, told, tmp_path):
    file = tmp_path / "config.json"
    file.write_text(text)

    with pytest.raises((CheckpointError, PluginError), match=told):
        make_package("lorax-x", str(file))


def test_a_model_id_is_read_from_the_cache(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    folder = tmp_path / "models--somebody--tiny"
    for path, text in {"refs/main": "abc", "snapshots/abc/config.json": '{"model_type": "phi"}'}.items():
        (folder / path).parent.mkdir(parents=True)
        (folder / path).write_text(text)

    assert read_source("somebody/tiny").model_type == "phi"


def test_counts_of_a_file_cost_nothing_and_experts_are_not_understood(tmp_path):
    file = tmp_path / "config.json"
    file.write_text('{"model_type": "mixtral", "num_local_experts": 1000000000000, "vocab_size": 1e99, "head_dim": -1}')

    tiny = Tiny(read_source(str(file)))

    assert sum(tensor.numel() for tensor in tiny.model().parameters()) < 10_000_000
    with pytest.raises(NotUnderstood, match="a feed-forward block of 0 linear layers"):
        Probe(tiny).base()


@pytest.mark.parametrize(
    ("given", "told", "hint"),
    [
        ("transformers:Gemma2ForCausaLM", "no model class 'Gemma2ForCausaLM'", "transformers:Gemma2ForCausalLM"),
        ("transformers:__loader__", "no model class", "give transformers:"),
        ("nobody/nothing", "not in the local cache", "hf download nobody/nothing config.json"),
        ("nothing", "names no architecture", "give transformers:"),
        ("missing.json", "cannot be read", "copy it again"),
    ],
)
def test_a_source_that_is_not_there_is_refused_with_what_is(given, told, hint):
    with pytest.raises((CheckpointError, PluginError), match=told) as caught:
        read_source(given)

    assert hint in caught.value.hint


@pytest.mark.parametrize("name", ["", "Lorax", "lorax gemma", "../x", "class", "-x", "lorax--x", "1x"])
def test_a_name_that_no_package_can_have_is_refused(name):
    with pytest.raises(PluginError, match="is not a name for a package"):
        check_name(name)


@pytest.mark.parametrize("name", ["json", "torch", "lorax-core", "lorax_core", "yaml", "n" * 101])
def test_a_name_that_is_taken_or_too_long_is_refused(name):
    with pytest.raises(PluginError):
        check_name(name)


@pytest.mark.parametrize("name", ["lorax-bert", "lorax-nobody-has-this"])
def test_the_name_of_a_plugin_may_be_written_anew(name):
    assert check_name(name) == name.replace("-", "_")


def run(*arguments):
    return CliRunner().invoke(app, ["plugins", "new", *map(str, arguments)])


def test_a_folder_that_holds_something_is_left_alone(tmp_path):
    (tmp_path / "mine").write_text("kept")

    done = run("lorax-x", "--from", "transformers:LlamaForCausalLM", "--into", tmp_path)

    assert done.exit_code == 1
    assert "holds files already" in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


def test_nothing_is_written_of_what_is_not_understood(tmp_path):
    done = run("lorax-x", "--from", "transformers:CohereForCausalLM", "--into", tmp_path / "made")

    assert done.exit_code == 1
    assert "computes what core's blocks do not" in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_the_command_says_what_it_wrote_and_what_comes_next(tmp_path):
    done = run("lorax-olmo", "--from", "transformers:OlmoForCausalLM", "--into", tmp_path / "made")

    assert (done.exit_code, done.stdout) == (0, "")
    assert "12 files for 'olmo'" in done.stderr
    assert "not understood: clip_qkv: only the default is supported" in done.stderr
    assert f"pip install -e {tmp_path / 'made'}" in done.stderr.replace("\n", "")
