from __future__ import annotations

import json
import math
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from builders import change_json, change_tensors, make_bert_model, make_lora, make_qwen2_model, with_lora
from peft import LoraConfig
from peft.tuners.tuners_utils import check_target_module_exists
from safetensors.torch import load_file

import lorax_core as lorax
from lorax_core.adapters.formats.lora import LoraAdapter
from lorax_core.adapters.formats.settings import PeftSettings
from lorax_core.errors import AdapterError

MODULE = "base_model.model.model.layers.0.self_attn.q_proj"
A, B = f"{MODULE}.lora_A.weight", f"{MODULE}.lora_B.weight"


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    """An adapter without fault, for each test to spoil a copy of."""
    return make_lora(make_qwen2_model(), tmp_path_factory.mktemp("sound"), target_modules=["q_proj", "down_proj"])


@pytest.fixture(scope="module")
def engine(qwen2, sound):
    with lorax.load(qwen2, adapters={"sound": sound}, kv_cache_tokens=256) as engine:
        yield engine


def make_copy(sound, tmp_path):
    folder = tmp_path / "adapter"
    shutil.copytree(sound, folder)
    return folder


def refusal(engine, folder):
    """The error of loading a folder; the engine must not have noticed."""
    before = engine.adapters.list()
    served = engine.generate([1, 2, 3], adapter="sound", max_tokens=4)

    with pytest.raises(AdapterError) as caught:
        engine.adapters.load("spoilt", folder)

    assert engine.adapters.list() == before
    assert engine.generate([1, 2, 3], adapter="sound", max_tokens=4) == served
    return caught.value


TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
SETTINGS = {
    "dora": ({"use_dora": True}, "use_dora=True"),
    "lora's own biases": ({"lora_bias": True}, "lora_bias=True"),
    "new tokens": ({"trainable_token_indices": [5]}, "trainable_token_indices=[5]"),
    "saved modules that are not there": ({"modules_to_save": ["lm_head"]}, "modules_to_save=['lm_head']"),
    "bare parameters": ({"target_parameters": ["mlp.weight"]}, "target_parameters=['mlp.weight']"),
    "copied layers": ({"layer_replication": [[0, 2]]}, "layer_replication=[[0, 2]]"),
    "an activation": ({"alora_invocation_tokens": [1]}, "alora_invocation_tokens=[1]"),
    "what is not invented yet": ({"use_quantum_lora": True}, "use_quantum_lora=True"),
    "another kind": ({"peft_type": "IA3"}, "'IA3'"),
    "no kind": ({"peft_type": None}, "None"),
    "pissa": ({"init_lora_weights": "pissa_niter_4"}, "'pissa_niter_4'"),
    "olora": ({"init_lora_weights": "olora"}, "'olora'"),
    "loftq": ({"init_lora_weights": "loftq"}, "'loftq'"),
    "corda": ({"init_lora_weights": "corda"}, "'corda'"),
    "lora_ga": ({"init_lora_weights": "lora_ga"}, "'lora_ga'"),
    "olora in another case": ({"init_lora_weights": "OLoRA"}, "'OLoRA'"),
    "modules that are updated and not targets": ({"target_modules": ["k_proj"]}, "target_modules=['k_proj']"),
    "an expression that names other modules": ({"target_modules": ".*mlp.*"}, "target_modules='.*mlp.*'"),
    "no target modules": ({"target_modules": None}, "names no target_modules"),
    "excluded modules that are updated": ({"exclude_modules": ["q_proj"]}, "exclude_modules=['q_proj']"),
    "saved modules that are updated": ({"modules_to_save": ["self_attn"]}, "modules_to_save=['self_attn']"),
    "layers that are updated and not transformed": (
        {"target_modules": ["q_proj", "down_proj"], "layers_to_transform": [1]},
        "layers_to_transform=[1]",
    ),
    "another rank": ({"r": 8}, "r=8"),
    "another rank of a module": ({"rank_pattern": {"q_proj": 2}}, "rank_pattern={'q_proj': 2}"),
    "rank zero": ({"r": 0}, "(found 0)"),
    "a rank in words": ({"r": "four"}, "'four'"),
    "an infinite alpha of a module": ({"alpha_pattern": {"q_proj": float("inf")}}, "inf"),
    "an expression that nothing can match": ({"alpha_pattern": {"(a": 1.0}}, "alpha_pattern of"),
    "an expression that looks around": ({"target_modules": "(?!x).*"}, "target_modules of"),
    "a switch in words": ({"use_rslora": "yes"}, "use_rslora"),
    "token ids below zero": ({"trainable_token_indices": [-1]}, "-1"),
    "no alpha": ({"lora_alpha": None}, "lora_alpha"),
    "alpha in words": ({"lora_alpha": "eight"}, "'eight'"),
    "alphas of modules in a list": ({"alpha_pattern": ["q_proj"]}, "['q_proj']"),
    "a module's alpha in words": ({"alpha_pattern": {"q_proj": "eight"}}, "'eight'"),
    "alpha that is no number": ({"lora_alpha": float("nan")}, "nan"),
}


@pytest.mark.parametrize(("changes", "named"), SETTINGS.values(), ids=SETTINGS)
def test_a_setting_that_is_not_served_is_refused_by_name_and_value(engine, sound, tmp_path, changes, named):
    folder = make_copy(sound, tmp_path)
    change_json(folder / "adapter_config.json", **changes)

    error = refusal(engine, folder)

    assert named in error.message
    assert str(folder) in error.message


@pytest.mark.parametrize(
    "changes",
    [
        {"target_modules": ".*_proj"},
        {"target_modules": "all-linear"},
        {"target_modules": [*TARGETS, "of_no_model"]},
        {"target_modules": TARGETS, "layers_to_transform": [0, 1]},
        {"target_modules": TARGETS, "layers_to_transform": [0, 1], "layers_pattern": ["layers"]},
        {"r": 64, "rank_pattern": {r"layers\.\d+\.self_attn\..*": 4, "mlp.*": 4}},
        {"exclude_modules": ".*lm_head"},
    ],
    ids=str,
)
def test_settings_that_say_the_same_otherwise_are_the_same_adapter(sound, tmp_path, changes):
    folder = make_copy(sound, tmp_path)
    change_json(folder / "adapter_config.json", **changes)

    assert LoraAdapter(folder).identity == LoraAdapter(sound).identity


def test_what_settings_leave_out_is_what_peft_drops(tmp_path):
    model = make_qwen2_model()
    folder = make_lora(model, tmp_path / "lora", target_modules=["q_proj", "v_proj"])
    statements = [
        {"target_modules": ["v_proj"]},
        {"target_modules": r".*\.0\..*"},
        {"exclude_modules": ["q_proj"]},
        {"exclude_modules": r".*v_proj"},
        {"target_modules": ["q_proj", "v_proj"], "layers_to_transform": 1},
        {"target_modules": ["v_proj"], "layers_to_transform": [1], "layers_pattern": "layers"},
        {"target_modules": ["v_proj"], "layers_to_transform": [1], "layers_pattern": ["ayers"]},
        {"modules_to_save": ["layers.1"]},
    ]
    modules = [name for name, _ in model.named_modules() if name.endswith(("q_proj", "v_proj"))]
    stated = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))

    for statement in statements:
        changed = {**stated, **statement}
        settings = PeftSettings(path=folder, **changed)
        config = LoraConfig(**{name: changed[name] for name in (*statement, "target_modules")})
        left_out = [name for name in modules if not bool(check_target_module_exists(config, name))]

        assert [name for name in modules if settings.leaves_out(name) is not None] == left_out, statement
        assert left_out


def test_the_first_number_in_a_modules_name_is_that_of_its_layer():
    module = "model.layers.1.experts.0.q_proj"
    config = {"target_modules": ["q_proj"], "layers_to_transform": [1], "lora_alpha": 8, "peft_type": "LORA"}

    assert bool(check_target_module_exists(LoraConfig(target_modules=["q_proj"], layers_to_transform=[1]), module))
    assert PeftSettings(path=Path("x"), **config).leaves_out(module) is None
    assert (
        PeftSettings(path=Path("x"), **{**config, "layers_to_transform": [0]}).leaves_out(module)
        == "layers_to_transform=[0]"
    )


def test_a_setting_called_path_does_not_stand_in_for_the_folder(sound, tmp_path):
    folder = make_copy(sound, tmp_path)
    change_json(folder / "adapter_config.json", path="/etc/other", r=8)

    with pytest.raises(AdapterError) as caught:
        LoraAdapter(folder)

    assert str(folder) in caught.value.message
    assert "/etc/other" not in caught.value.message


def without(name):
    return lambda tensors: {key: t for key, t in tensors.items() if key != name}


def with_one(name, make):
    return lambda tensors: {**tensors, name: make(tensors)}


TENSORS = {
    "an unknown layer": (
        lambda tensors: {key.replace("q_proj", "g_proj"): t for key, t in tensors.items()},
        [
            "self_attn.g_proj'",
            "'qwen2'",
            "trained on a base that it does not name",
            "the nearest layer here is 'layers.",
        ],
    ),
    "a layer too deep": (
        lambda tensors: {key.replace("layers.1.", "layers.7."): t for key, t in tensors.items()},
        ["layers.7."],
    ),
    "another base": (
        lambda tensors: {key: t[:, :32] if "lora_A" in key else t for key, t in tensors.items()},
        ["lora_A is [4, 32]", "the base maps"],
    ),
    "a norm": (
        lambda tensors: {key.replace("self_attn.q_proj", "input_layernorm"): t for key, t in tensors.items()},
        ["input_layernorm", "RMSNorm"],
    ),
    "an embedding": (with_one(f"{MODULE}.lora_embedding_A", lambda t: t[A]), ["lora_embedding_A"]),
    "the base's own weight": (
        with_one(f"{MODULE}.base_layer.weight", lambda t: t[A]),
        ["q_proj'", "[4, 64]", "[64, 64]"],
    ),
    "a bias": (with_one(f"{MODULE}.lora_B.bias", lambda t: t[B][:, 0]), ["lora_B.bias"]),
    "a magnitude": (with_one(f"{MODULE}.lora_magnitude_vector", lambda t: t[B][:, 0]), ["lora_magnitude_vector"]),
    "half a pair": (without(B), ["q_proj", "{'lora_A': [4, 64]}"]),
    "the other half": (without(A), ["q_proj", "{'lora_B': [64, 4]}"]),
    "no tensors": (lambda tensors: {}, ["no tensors"]),
    "ranks that differ": (with_one(B, lambda t: t[B][:, :3]), ["[64, 3]"]),
    "one dimension": (with_one(B, lambda t: t[B][:, 0]), ["[64]"]),
    "no dimension": (with_one(A, lambda t: t[A][0, 0]), ["'a' of ", "has shape []"]),
    "four dimensions": (lambda tensors: {key: t[:, :, None, None] for key, t in tensors.items()}, [", 1, 1]"]),
    "NaN": (with_one(A, lambda t: t[A].masked_fill(t[A] == t[A].max(), torch.nan)), [repr(A), "NaN"]),
    "infinity": (with_one(B, lambda t: t[B].masked_fill(t[B] == t[B].max(), torch.inf)), [repr(B), "infinite"]),
    "integers": (with_one(A, lambda t: t[A].int()), [repr(A), "I32"]),
    "8 bit": (with_one(A, lambda t: t[A].to(torch.float8_e4m3fn)), [repr(A), "F8_E4M3"]),
    "a layer under two spellings": (
        lambda tensors: (
            tensors | {key.replace("model.model.model.", "model.model."): t * 2 for key, t in tensors.items()}
        ),
        ["_proj' twice, under two spellings"],
    ),
    "two adapters in one file": (
        lambda tensors: tensors | {key.replace(".weight", ".default.weight"): t * 2 for key, t in tensors.items()},
        ["weight' is there twice, under two spellings"],
    ),
}


@pytest.mark.parametrize(("change", "named"), TENSORS.values(), ids=TENSORS)
def test_a_tensor_without_a_place_is_refused_by_name(engine, sound, tmp_path, change, named):
    folder = make_copy(sound, tmp_path)
    change_tensors(folder / "adapter_model.safetensors", change)
    change_json(folder / "adapter_config.json", target_modules=".*")  # so that the base alone decides

    told = str(refusal(engine, folder))

    for part in named:
        assert part in told


FILES = {
    "a pickle": (
        lambda folder: (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin"),
        "adapter_model.bin is a pickle",
    ),
    "no tensors at all": (
        lambda folder: (folder / "adapter_model.safetensors").unlink(),
        "has no adapter_model.safetensors",
    ),
    "half a file": (
        lambda folder: (folder / "adapter_model.safetensors").write_bytes(b"\x40\0\0\0\0\0\0\0{"),
        "not a readable safetensors file",
    ),
    "no settings": (lambda folder: (folder / "adapter_config.json").unlink(), "has no adapter_config.json"),
    "settings cut short": (lambda folder: (folder / "adapter_config.json").write_text('{"r": '), "is not JSON"),
    "settings that are a list": (lambda folder: (folder / "adapter_config.json").write_text("[]"), "'list'"),
    "nothing there": (shutil.rmtree, "there is no adapter folder"),
}


@pytest.mark.parametrize(("spoil", "named"), FILES.values(), ids=FILES)
def test_files_that_cannot_be_read_are_named(engine, sound, tmp_path, spoil, named):
    folder = make_copy(sound, tmp_path)
    spoil(folder)

    error = refusal(engine, folder)

    assert named in error.message
    assert str(folder) in error.message


def test_an_adapter_of_another_architecture_names_the_base_that_it_was_trained_on(engine, tmp_path):
    folder = make_lora(make_bert_model(), tmp_path)
    change_json(folder / "adapter_config.json", base_model_name_or_path="google-bert/bert-base-uncased")

    error = refusal(engine, folder)

    assert "trained on 'google-bert/bert-base-uncased'" in error.message
    assert "encoder.layer" in error.message


def test_an_adapter_of_a_larger_base_tells_both_sizes(engine, tmp_path):
    folder = make_lora(make_qwen2_model(hidden_size=128), tmp_path, target_modules=["down_proj"])

    error = refusal(engine, folder)

    assert "lora_B [128, 4]" in error.message
    assert "maps 96 to 64" in error.message
    assert "trained on" in error.hint


def test_the_base_s_own_weight_beside_an_adapter_changes_nothing(engine, tmp_path):
    model = make_qwen2_model()
    folder = make_lora(model, tmp_path, target_modules=["lm_head"])
    engine.adapters.load("without", folder)
    weight = model.lm_head.weight.detach()
    change_tensors(
        folder / "adapter_model.safetensors",
        with_one("base_model.model.lm_head.base_layer.weight", lambda tensors: weight),
    )

    engine.adapters.load("with", folder)

    one, other = engine.generate([[1, 2, 3]] * 2, adapter=["with", "without"], max_tokens=4)
    assert one.token_ids == other.token_ids
    engine.adapters.unload("with")
    engine.adapters.unload("without")


def test_a_module_that_no_loaded_task_reads_is_listed_and_logged_once(bert, tmp_path, caplog):
    folder = make_lora(make_bert_model(), tmp_path / "all")  # "all-linear" has the pooler too
    ids = [5, 9, 2, 77]
    with torch.no_grad():
        expected = with_lora(make_bert_model(), folder)(torch.tensor([ids])).last_hidden_state[0].mean(0)

    with lorax.load(bert, adapters={"all": folder}, pooling="mean", normalize=False) as engine:
        found = engine.embed(ids, adapter="all")
        engine.adapters.load("again", folder)
        listed = engine.adapters.list()

    assert [info.unread for info in listed] == [("pooler.dense",)] * 2
    assert [record.message for record in caplog.records] == [
        f"{folder} changes 'pooler.dense', which no loaded task reads"
    ]
    torch.testing.assert_close(torch.from_numpy(found), expected, rtol=1e-4, atol=1e-5)


def test_a_saved_module_that_no_loaded_task_reads_is_listed_too(bert, tmp_path):
    model = make_bert_model()
    with torch.no_grad():
        folder = make_lora(model, tmp_path / "it", target_modules=["query"], modules_to_save=["pooler"])

    with lorax.load(bert, adapters={"it": folder}) as engine:
        assert [info.unread for info in engine.adapters.list()] == [("pooler.dense",)]


def test_a_module_that_the_checkpoint_lacks_is_refused_and_not_unread(tmp_path):
    whole = make_bert_model()
    whole.save_pretrained(tmp_path / "base")
    change_tensors(
        tmp_path / "base/model.safetensors",
        lambda found: {name: tensor for name, tensor in found.items() if not name.startswith("pooler.")},
    )
    folder = make_lora(whole, tmp_path / "all")

    with pytest.raises(AdapterError, match=r"changes 'pooler\.dense', which 'bert' does not have"):
        lorax.load(tmp_path / "base", adapters={"all": folder})


@pytest.mark.parametrize("saved", ["lm_head", "embed_tokens", "norm"])
@pytest.mark.parametrize("lost", [0, -1])
def test_a_saved_module_that_was_cut_short_is_refused_by_name(tmp_path, saved, lost):
    model = make_qwen2_model()
    model.save_pretrained(tmp_path / "base")
    folder = make_lora(model, tmp_path / "it", target_modules=["q_proj"], modules_to_save=[saved, "v_proj"])
    held = sorted(name for name in load_file(folder / "adapter_model.safetensors") if "lora_" not in name)
    change_tensors(
        folder / "adapter_model.safetensors", lambda found: {n: t for n, t in found.items() if n != held[lost]}
    )

    with pytest.raises(AdapterError, match=r"modules_to_save=.*but does not hold '") as caught:
        lorax.load(tmp_path / "base", adapters={"it": folder})

    assert repr(held[lost].removeprefix("base_model.model.")) in caught.value.message


def write_header(file, tensors):
    """A safetensors file of these shapes whose numbers take no room on the disk."""
    header, at = {}, 0
    for name, shape in tensors.items():
        size = 4 * math.prod(shape)
        header[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(header).encode()
    with file.open("wb") as opened:
        opened.write(len(text).to_bytes(8, "little") + text)
        opened.truncate(8 + len(text) + at)


LARGE = {
    "a module that the base lacks": ({"model.nonsense.weight": (2**24, 2**10)}, {}, "does not say for which task"),
    "another shape": ({f"{MODULE.removeprefix('base_model.model.')}.weight": (2**24, 2**10)}, {}, "[16777216, 1024]"),
    "a rank": (
        {A.removeprefix("base_model.model."): (2**26, 64), B.removeprefix("base_model.model."): (64, 2**26)},
        {"r": 2**26, "target_modules": ["q_proj"]},
        "its rank is 67,108,864, more than 4,096",
    ),
}


@pytest.mark.parametrize(("tensors", "changes", "told"), LARGE.values(), ids=LARGE)
def test_what_does_not_fit_is_refused_by_its_header_before_it_takes_memory(
    sound, qwen2, tmp_path, tensors, changes, told
):
    folder = make_copy(sound, tmp_path)
    change_json(folder / "adapter_config.json", **{"target_modules": ".*", **changes})
    write_header(
        folder / "adapter_model.safetensors", {f"base_model.model.{name}": shape for name, shape in tensors.items()}
    )
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    with lorax.load(qwen2) as engine, pytest.raises(AdapterError) as caught:
        engine.adapters.load("large", folder)

    assert told in caught.value.message
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300 * 1024  # KiB; the file says tens of GiB


CUT = """
import sys
from pathlib import Path
from lorax_core.adapters.formats import tensors

folder = Path(sys.argv[1])
file = folder / "adapter_model.safetensors"
found = dict(tensors.read_tensors([file]))
file.write_bytes(b"")  # a page that was mapped from it would now end the process
print(all(bool(tensor.isfinite().all()) for tensor in found.values()))
"""


def test_a_file_that_is_cut_short_after_it_was_read_ends_nothing(sound, tmp_path):
    folder = make_copy(sound, tmp_path)

    done = subprocess.run([sys.executable, "-c", CUT, str(folder)], capture_output=True, text=True, check=False)

    assert (done.returncode, done.stdout) == (0, "True\n"), done.stderr


def raised(word, by):
    """Adds to the numbers of the tensors whose names have a word."""
    return lambda tensors: {name: tensor + by * (word in name) for name, tensor in tensors.items()}


def test_a_token_that_is_trained_twice_is_refused(engine, tmp_path):
    folder = make_lora(
        make_qwen2_model(), tmp_path / "it", target_modules=["q_proj"], trainable_token_indices=[5, 7, 9]
    )
    change_json(folder / "adapter_config.json", trainable_token_indices=[5, 7, 5])

    error = refusal(engine, folder)

    assert "has 5 more than once" in error.message


BEYOND = {  # in float64 or float32, what the base's dtype cannot hold
    "A": ("float32", {}, lambda t: t | {A: t[A].double() * 1e300}),
    "B": ("float16", {}, raised(B, 1e6)),
    "a scale": ("float16", {"lora_alpha": 1e9}, lambda t: t),
    "a magnitude": ("float16", {"use_dora": True}, raised("magnitude", 1e9)),
    "a saved weight": (
        "float16",
        {"modules_to_save": ["o_proj"]},
        raised("o_proj", 1e6),
    ),
    "tokens": (
        "float16",
        {"trainable_token_indices": [3]},
        raised("tokens", 1e6),
    ),
}


@pytest.mark.parametrize(("dtype", "options", "change"), BEYOND.values(), ids=BEYOND)
def test_numbers_that_the_bases_dtype_cannot_hold_are_refused(qwen2, tmp_path, dtype, options, change):
    settings = {name: value for name, value in options.items() if name != "lora_alpha"}
    folder = make_lora(make_qwen2_model(), tmp_path / "it", target_modules=["q_proj"], **settings)
    change_tensors(folder / "adapter_model.safetensors", change)
    change_json(folder / "adapter_config.json", **{name: options[name] for name in options if name == "lora_alpha"})

    with lorax.load(qwen2, dtype=dtype) as engine:
        before = engine.generate([1, 2, 3], max_tokens=4)
        with pytest.raises(AdapterError, match=rf"larger than {dtype} can hold") as caught:
            engine.adapters.load("it", folder)
        assert engine.generate([1, 2, 3], max_tokens=4) == before

    assert str(folder) in caught.value.message
    assert caught.value.hint


@pytest.mark.parametrize("name", ["", "  ", None, 7, "a\0", "a\nb", "a\rb", "\x1b[2J", "a\u202eb", "a\u2028b"])
def test_a_name_that_is_none_is_refused(engine, sound, name):
    with pytest.raises(AdapterError, match="non-empty string"):
        engine.adapters.load(name, sound)


LOADED = """
import sys
import lorax_core
with lorax_core.load(sys.argv[1], adapters={"upper": sys.argv[2]}) as engine:
    engine.generate("text", adapter="upper", max_tokens=1)
print("torch._dynamo" in sys.modules)
"""


def test_an_adapter_is_loaded_without_the_compiler_of_torch(repository):
    folders = [str(repository / "examples/tiny_qwen2" / one) for one in ("model", "adapters/upper")]

    command = [sys.executable, "-c", LOADED, *folders]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)

    # Importing it takes a second, and looking at shapes alone does it.
    assert done.stdout == "False\n"
