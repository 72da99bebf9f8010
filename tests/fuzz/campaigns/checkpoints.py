"""What a folder of a checkpoint may hold: configurations, tokenizers, sentence-transformers files, tensors, an index."""

from __future__ import annotations

import contextlib
import json
import math
import shutil
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

import torch

from fuzz.bases import BASES
from fuzz.house import PROBE, House, our_answer, read_reference, their_answer
from fuzz.judge import Answer, Attempt, CannotJudge
from fuzz.mutations import change_header, change_json_file, change_tensor_values, dump_json, nested, odd_value
from fuzz.verdicts import Finding

ACTIVATIONS = ["gelu", "gelu_new", "relu", "silu", "swish", "quick_gelu", "tanh", "gelu_fast", "gelu_pytorch_tanh",
    "GELU", "nope", 5, None]  # fmt: skip
ROPES: list[Any] = [
    None, {}, {"rope_type": "default"}, {"type": "linear", "factor": 4.0}, {"rope_type": "linear", "factor": 0.5},
    {"rope_type": "dynamic", "factor": 2.0}, {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16},
    {"rope_type": "yarn", "factor": 4.0, "attention_factor": 1.3}, {"rope_type": "yarn", "factor": 4.0, "mscale": 2.0},
    {"rope_type": "yarn", "factor": 4.0, "mscale": 1.0, "mscale_all_dim": 0.5, "beta_fast": 16, "beta_slow": 2},
    {"rope_type": "yarn", "factor": 4.0, "beta_fast": 1, "beta_slow": 32}, {"rope_type": "yarn", "factor": 4.0,
        "truncate": False},
    {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16},
    {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 4.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16},
    {"rope_type": "longrope", "factor": 8.0}, {"rope_type": "proportional"}, {"rope_theta": 500.0},
        {"rope_type": "linear", "factor": 0},
    {"rope_type": "linear", "factor": -1.0}, {"rope_type": "linear", "factor": math.nan}, {"rope_type": "yarn",
        "factor": math.inf},
    {"rope_type": "linear"}, {"rope_type": "yarn", "factor": 4.0, "attention_factor": 0}, {"rope_type": 5}, "linear", [1],
]  # fmt: skip
SIZES = [1, 2, 3, 4, 8, 16, 20, 32, 64, 96, 128, 10**5, 10**8, 10**9, 0, -1, 2.0, 2.5, "2", True]
LABELS: list[Any] = [
    {"0": "A", "1": "B", "2": "C"}, {"0": "A", "1": "A", "2": "A"}, {"2": "C", "0": "A", "1": "B"}, {"0": "A"},
        {"1": "A", "2": "B", "3": "C"},
    {"0": "A", "1": "B", "2": None}, ["A", "B", "C"], {}, {"x": "A"}, {"0": "A", "1": "B", "2": "C", "3": "D"},
        {0.5: "A"}, "ABC",
]  # fmt: skip
# What a configuration's keys may plausibly say, right and wrong; keys that an architecture does not know change nothing.
PLAUSIBLE: dict[str, list[Any]] = {
    "hidden_act": ACTIVATIONS, "activation_function": ACTIVATIONS, "activation": ACTIVATIONS,
    "rope_scaling": ROPES, "rope_parameters": ROPES, "rope_theta": [1.0, 500.0, 1e6, 0, -1, math.nan, math.inf,
        "10000", None],
    "rotary_pct": [0.0, 0.25, 0.3, 0.5, 1.0, 1.5, -0.5, math.nan, None], "partial_rotary_factor": [0.25, 0.5, 1.0, 2, 0],
    "rotary_emb_base": [500, 0, -1, 1e300], "use_parallel_residual": [True, False, None, 1, "false"],
        "attention_bias": [True, False],
    "rms_norm_eps": [1e-6, 0.1, 0, -1.0, math.nan, math.inf, 1e300, "1e-6", None], "layer_norm_eps": [1e-12, 0.1,
        0, -1, math.nan, math.inf, "x"],
    "layer_norm_epsilon": [1e-5, 0.1, 0, -1, math.nan, math.inf], "head_dim": [16, 32, 8, 15, 0, 10**9, None],
    "num_key_value_heads": [1, 2, 4, 3, 0, None, 10**9], "num_attention_heads": [1, 2, 4, 8, 3, 0, 10**9],
        "n_head": [1, 2, 4, 8, 0], "n_heads": [1, 2, 4, 8],
    "hidden_size": SIZES, "n_embd": SIZES, "dim": SIZES, "num_hidden_layers": SIZES, "n_layer": SIZES, "n_layers": SIZES,
    "intermediate_size": SIZES, "n_inner": [*SIZES, 256, None], "hidden_dim": SIZES, "vocab_size": [*SIZES, 200,
        320, 319, 321],
    "max_position_embeddings": [*SIZES, 95, 97, 512, 10**6], "n_positions": [*SIZES, 95, 96],
        "type_vocab_size": [0, 1, 2, 3, 10**9],
    "sliding_window": [None, 1, 4, 8, 0, -1, 10**12, 2.5], "use_sliding_window": [True, False, None],
        "max_window_layers": [0, 1, 2, -1, 28],
    "layer_types": [["full_attention"] * 2, ["sliding_attention", "full_attention"], ["sliding_attention"] * 2,
        ["full_attention"], ["x", "y"], "full", None],
    "tie_word_embeddings": [True, False, None, "yes", 1], "is_causal": [True, False, None], "is_decoder": [True,
        False], "add_cross_attention": [True, False],
    "scale_attn_weights": [True, False], "scale_attn_by_inverse_layer_idx": [True, False],
        "reorder_and_upcast_attn": [True, False],
    "sinusoidal_pos_embds": [True, False], "position_embedding_type": ["absolute", "relative_key", None],
        "pad_token_id": [None, 0, 1, 5, 94, 95, -1, 10**9, "0"],
    "id2label": LABELS, "num_labels": [None, 1, 2, 3, 0, -1, 10**8], "problem_type": [None, "regression",
        "single_label_classification", "multi_label_classification", "x"],
    "architectures": [None, [], ["Qwen2ForCausalLM"], ["BertModel"], ["BertForMaskedLM"], ["Nope"], "Qwen2Model", [5]],
    "dtype": ["float32", "float16", "bfloat16", "float64", "int8", 5, None], "torch_dtype": ["float32",
        "torch.float32", "half", None],
    "eos_token_id": [None, 256, [256, 3], -1, 10**9, "256", [], [None]], "quantization_config": [None, {},
        {"quant_method": "gptq"}, "x"],
    "model_type": ["qwen2", "bert", "gpt2", "gpt_neox", "Qwen2", "", None, 5, ["qwen2"], "__init__", "../x"],
    "auto_map": [{"AutoModel": "evil.Evil", "AutoConfig": "evil.Evil", "AutoTokenizer": ["evil.Evil", None]}],
    "tokenizer_class": ["Qwen2Tokenizer", "Evil", "PreTrainedTokenizerFast", 5],
}  # fmt: skip
# Changes that leave a configuration right for its tensors, and the answer another one.
_ACTS = ["gelu", "gelu_new", "relu", "silu", "quick_gelu", "gelu_fast"]
_ENCODER = {"layer_norm_eps": [0.1, 1e-3, 2.0], "hidden_act": _ACTS, "num_attention_heads": [1, 2, 8]}
_CLASSES = {"id2label": LABELS[:3], "problem_type": PLAUSIBLE["problem_type"][:4]}
_QWEN2 = {
    "rms_norm_eps": [0.1, 1e-3],
    "hidden_act": _ACTS,
    "rope_theta": [500.0, 1e6],
    "rope_parameters": ROPES[:13],
    "rope_scaling": ROPES[:13],
    "use_sliding_window": [True],
    "sliding_window": [4, 8],
    "max_window_layers": [0, 1],
    "is_causal": [False, True],
    "layer_types": [["sliding_attention", "full_attention"], ["full_attention"] * 2],
    "pad_token_id": [0, 5, None],
}
RIGHT: dict[str, dict[str, list[Any]]] = {
    "bert": _ENCODER, "bert-tokens": {**_ENCODER, **_CLASSES}, "bert-texts": {**_ENCODER, **_CLASSES},
        "roberta": {**_ENCODER, "pad_token_id": [0, 1, 5]},
    "distilbert": {"activation": ["gelu", "relu"], "n_heads": [1, 2, 8], "sinusoidal_pos_embds": [True, False]},
        "qwen2": _QWEN2, "qwen2-texts": {**_QWEN2, **_CLASSES},
    "gpt2": {"layer_norm_epsilon": [0.1, 1e-3], "activation_function": _ACTS, "n_head": [1, 2, 8],
        "scale_attn_weights": [False, True], "scale_attn_by_inverse_layer_idx": [True],
        "reorder_and_upcast_attn": [True], "is_causal": [False, True]},
    "neox": {"layer_norm_eps": [0.1, 1e-3], "hidden_act": _ACTS, "rope_parameters": [*ROPES[:13],
        {"rope_type": "default", "partial_rotary_factor": 0.5}], "use_parallel_residual": [False, True],
        "num_attention_heads": [2, 8], "rotary_pct": [0.5, 1.0]},
}  # fmt: skip
HARMLESS: dict[str, list[Any]] = {
    "use_cache": [True, False], "initializer_range": [0.5], "transformers_version": ["4.0.0", "99.0"],
        "_name_or_path": ["x/y"],
    "attention_dropout": [0.5], "hidden_dropout_prob": [0.3], "resid_pdrop": [0.3], "output_attentions": [True],
        "x_unknown": [1, [], {"a": 1}],
    "gradient_checkpointing": [False], "unsloth_version": ["2025.1"],
        "task_specific_params": [{"text": {"a": 1}}], "finetuning_task": ["x"],
}  # fmt: skip


def put_code(folder: Path) -> None:
    """A module in the folder that leaves a mark there when it is run, wherever transformers copies it to."""
    (folder / "evil.py").write_text(f"open({str(folder / 'ran')!r}, 'w').close()\nclass Evil: pass\n")


def ran_code(folder: Path) -> tuple[Finding, str] | None:
    """Whether the file of code that lies in a folder was run."""
    return (Finding.CODE, "the module that auto_map names was imported") if (folder / "ran").exists() else None


def config(house: House, random: Random) -> Attempt:
    """`config.json` of every architecture."""
    name = random.choice(sorted(RIGHT))
    folder = house.copy(name)
    file = folder / "config.json"
    same = random.random() < 0.12
    if same:
        changes = _harmless(file, random)
    elif random.random() < 0.3:
        changes = _set(file, random, RIGHT[name], random.choice([1, 2, 3]))
    elif random.random() < 0.55:
        changes = _plausible(file, random)
    else:
        changes = change_json_file(file, random, random.choice([1, 1, 2, 4]))
    if any("auto_map" in change for change in changes):
        put_code(folder)
    options: dict[str, Any] = {} if random.random() < 0.85 else {"kv_cache_tokens": None}
    return of_checkpoint(house, name, folder, [f"base {name}", *changes], same=same, **options)


def of_checkpoint(
    house: House,
    name: str,
    folder: Path,
    changes: list[str],
    *,
    same: bool = False,
    must_refuse: str = "",
    **options: Any,
) -> Attempt:
    """Load a folder and compare with transformers' model of the same files, or of the base where nothing changed."""
    base = BASES["qwen2" if name == "sharded" else name]

    def ask() -> Answer:
        with house.load(folder, name, **options) as engine:
            return our_answer(engine)

    def refer(answer: Answer, seed: int, dtype: torch.dtype = torch.float32) -> Answer:
        stated = json.loads((folder / "config.json").read_text(encoding="utf-8-sig")).get("architectures")
        if "labels 0" in answer and stated != [base.oracle.__name__]:
            raise CannotJudge("the file does not say whether tokens or texts have the labels")
        model = house.reference(base.name) if same else read_reference(base, folder, seed, dtype)
        return their_answer(model, answer)

    exactly = None if same else partial(refer, dtype=torch.float64)
    return Attempt(
        ask, refer, exactly, changes=changes, same=same, must_refuse=must_refuse, check=lambda: ran_code(folder)
    )


def _harmless(file: Path, random: Random) -> list[str]:
    found = json.loads(file.read_text())
    for key in random.sample(sorted(HARMLESS), 3):
        found[key] = random.choice(HARMLESS[key])
    keys = list(found)
    random.shuffle(keys)
    file.write_text(json.dumps({key: found[key] for key in keys}, indent=random.choice([None, 2])))
    return ["config.json: keys that inference does not read, in another order"]


def _set(file: Path, random: Random, values: dict[str, list[Any]], count: int) -> list[str]:
    found = json.loads(file.read_text())
    chosen = {key: random.choice(values[key]) for key in random.sample(sorted(values), min(count, len(values)))}
    file.write_text(dump_json({**found, **chosen}))
    return [f"config.json: {key} = {value!r:.80}" for key, value in chosen.items()]


def _plausible(file: Path, random: Random) -> list[str]:
    found = json.loads(file.read_text())
    known = [key for key in sorted(PLAUSIBLE) if key in found]
    done = []
    for _ in range(random.choice([1, 1, 2, 3])):
        key = random.choice(known if random.random() < 0.6 else sorted(PLAUSIBLE))
        if random.random() < 0.12:
            found.pop(key, None)
            done.append(f"config.json: {key} deleted")
            continue
        found[key] = random.choice(PLAUSIBLE[key])
        done.append(f"config.json: {key} = {found[key]!r:.80}")
        if random.random() < 0.05:
            found[key] = odd_value(random)
            done[-1] = f"config.json: {key} = {found[key]!r:.60}"
    file.write_text(dump_json(found))
    return done


def generation(house: House, random: Random) -> Attempt:
    """`generation_config.json`, of which the end tokens count."""
    folder = house.copy("qwen2")
    file = folder / "generation_config.json"
    # Ends that the greedy answer runs into, and others.
    path = _greedy(house)
    pool: list[Any] = [*path[:12], -1, 320, 10**9, "256", 2.0, True, None, [], [None], ["x"], [[3]], {}, math.nan, 256]
    if random.random() < 0.75:
        value = random.choice([random.choice(pool), random.sample(path, 2), [random.choice(pool), random.choice(pool)]])
        file.write_text(
            dump_json({"eos_token_id": value, "do_sample": random.choice([True, False]), "temperature": 0.7})
        )
        changes = [f"generation_config.json: eos_token_id = {value!r:.80}"]
    else:
        changes = change_json_file(file, random)

    def ask() -> Answer:
        with house.load(folder, "qwen2") as engine:
            done = engine.generate(PROBE, max_tokens=24)
            return {"tokens": list(done.token_ids), "why": str(done.finish_reason)}

    def refer(answer: Answer, seed: int) -> Answer:
        found = json.loads(file.read_text())
        ends = found.get("eos_token_id")
        ends = json.loads((folder / "config.json").read_text())["eos_token_id"] if ends is None else ends
        ends = ends if isinstance(ends, list) else [ends]
        if not all(type(end) is int and 0 <= end < 320 for end in ends):
            raise CannotJudge(f"ends {ends!r:.60} are no token ids")
        cut = next((at for at, token in enumerate(path) if token in ends), None)
        return {"tokens": path if cut is None else path[: cut + 1], "why": "length" if cut is None else "stop"}

    return Attempt(ask, refer, changes=changes)


@torch.inference_mode()
def _greedy(house: House) -> list[int]:
    """transformers' greedy continuation of the probe."""
    model, ids = house.reference("qwen2"), list(PROBE)
    if not hasattr(model, "fuzz_greedy"):
        for _ in range(24):
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
        model.fuzz_greedy = ids[len(PROBE) :]
    return list(model.fuzz_greedy)


def tensors(house: House, random: Random) -> Attempt:
    """`model.safetensors`: its header, and the numbers, shapes and names in it."""
    name = random.choice(sorted(RIGHT))
    folder = house.copy(name)
    file = folder / "model.safetensors"
    changes = [f"base {name}"]
    for _ in range(random.choice([1, 1, 1, 2])):
        with contextlib.suppress(Exception):  # the second change may find nothing that it can read
            changes.append((change_header if random.random() < 0.35 else change_tensor_values)(file, random))
    return of_checkpoint(house, name, folder, changes, same=len(changes) == 1)


def index(house: House, random: Random) -> Attempt:
    """`model.safetensors.index.json` and its shards."""
    folder = house.copy("sharded")
    file = folder / "model.safetensors.index.json"
    found = json.loads(file.read_text())
    shard = "model-00001-of-00005.safetensors"
    must_refuse = ""
    how = random.choice(["json", "json", "shard", "outside", "outside", "link", "count", "names"])
    if how == "outside":
        elsewhere = folder.parent / "elsewhere"
        elsewhere.mkdir()
        shutil.move(folder / shard, elsewhere / shard)
        target = random.choice(
            [f"../elsewhere/{shard}", str(elsewhere / shard), f"x/../../elsewhere/{shard}", f"./../elsewhere/{shard}"]
        )
        found["weight_map"] = {key: target if value == shard else value for key, value in found["weight_map"].items()}
        file.write_text(json.dumps(found))
        changes, must_refuse = [f"the index names {target!r}"], "a shard that lies outside of the folder was followed"
    elif how == "link":  # as a hub's snapshot
        blobs = folder.parent / "blobs"
        blobs.mkdir()
        shutil.move(folder / shard, blobs / "1")
        (folder / shard).symlink_to(blobs / "1")
        return of_checkpoint(house, "sharded", folder, ["a shard is a link into blobs"], same=True)
    elif how == "shard":
        file = folder / random.choice(sorted(path.name for path in folder.glob("*.safetensors")))
        changes = [(change_header if random.random() < 0.5 else change_tensor_values)(file, random)]
    elif how == "count":
        (folder / shard).unlink()
        changes = [f"{shard} is gone"]
    elif how == "names":
        value = random.choice(
            [None, 5, "", ".", "..", "a\0b", "config.json", [shard], nested(3), "x" * 5000, "\ud800.safetensors"]
        )
        found["weight_map"][random.choice(sorted(found["weight_map"]))] = value
        file.write_text(json.dumps(found))
        changes = [f"the index names {value!r:.60}"]
    else:
        changes = change_json_file(file, random, random.choice([1, 2]))
    return of_checkpoint(house, "sharded", folder, changes, must_refuse=must_refuse)
