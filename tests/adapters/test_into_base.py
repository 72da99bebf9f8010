"""An adapter merged into its base: transformers on the new checkpoint against PEFT on the old one, unmerged."""

from __future__ import annotations

import copy
import json
import shutil
from dataclasses import replace

import pytest
import torch
import transformers as hf
from builders import change_json, change_tensors, make_byte_tokenizer, make_lora, make_qwen2, make_qwen2_model
from matrix import ARCHS, ROWS, TEXTS, HeadRow, answers, make_cell, make_head_cell, saved, trained
from oracles import TOLERANCE, add_tensors, rename_tensors
from safetensors import safe_open
from safetensors.torch import load_file

import lorax_core as lorax
from lorax_core.adapters.merging.into_base import merge_into_base
from lorax_core.errors import AdapterError, CheckpointError, PluginError
from lorax_core.progress import Progress

# transformers calls the module by another name than the file does.
ARCHS = [replace(arch, head="lm_head") if arch.head else arch for arch in ARCHS]
# Those that differ only in how the adapter's files spell things, or in which layers there are, change nothing here.
LEFT_OUT = (
    "`target_modules` as",
    "`exclude_modules`",
    "`layers_to_transform`",
    "rank 1",
    "rank 256",
    "`lora_alpha` unequal",
    "adapter name",
    "files in shards",
    "a fused layer",
    "float16 files",
)
CELLS = [name for name in ROWS if not name.startswith(LEFT_OUT) and "converted" not in name]
OURS = ("every linear layer (`all-linear`)", "token embedding", "output head", "`trainable_token_indices`")


def loaded(arch, folder):
    """The merged checkpoint, of transformers."""
    kind = hf.AutoModelForCausalLM if arch.generates else hf.AutoModel
    return kind.from_pretrained(folder, attn_implementation="eager").eval()


def difference(found, expected):
    """The largest difference of two models' answers, as a share of the largest number."""
    assert found.keys() == expected.keys()
    pairs = [(a, b) for kind in expected for (_, a), (_, b) in zip(found[kind], expected[kind], strict=True)]
    return max(float((a - b).abs().max() / b.abs().max()) for a, b in pairs)


def our_answers(arch, folder, host):
    """What our own engine says of a checkpoint."""
    with lorax.load(folder, pooling="mean", kv_cache_tokens=512 if arch.generates else None, host=host) as engine:
        found = {"embed": [(None, torch.from_numpy(engine.embed(ids))) for ids in TEXTS]}
        if arch.generates:
            asked = [lorax.GenerateRequest(prompt=ids, max_tokens=1, prompt_logprobs=0) for ids in TEXTS]
            chances = [[one.logprob for one in result.prompt_logprobs[1:]] for result in engine.run(asked)]
            found["generate"] = [(None, torch.tensor(numbers)) for numbers in chances]
        return found


@pytest.fixture(scope="module", params=ARCHS, ids=lambda arch: arch.name)
def bench(request, tmp_path_factory):
    arch, folder = request.param, tmp_path_factory.mktemp("base")
    model = arch.model()
    model.save_pretrained(folder)
    worst = []
    yield arch, model, folder, worst
    print(f"\n{arch.name}: the largest difference is {max(worst):.1e}")


@pytest.mark.parametrize("name", CELLS)
def test_the_merged_checkpoint_computes_what_peft_computes(bench, tmp_path, host, name):
    arch, model, base, worst = bench
    made = make_cell(arch, model, ROWS[name], tmp_path / "lora")
    if made is None or (name == "`lora_bias`" and arch.part == "up_proj"):
        pytest.skip("the architecture has nothing of the kind")
    folder, expected = made

    done = merge_into_base(base, folder, tmp_path / "out", host)

    worst.append(difference(answers(loaded(arch, done.path)), expected))
    if name in OURS:
        worst.append(difference(our_answers(arch, done.path, host), expected))
    assert max(worst) < TOLERANCE
    assert difference(answers(model), expected) > 1e-3


def make_adapter(model, folder, seed=1, **options):
    """A random adapter, trained on a copy of the model; what PEFT computes with it."""
    lora = trained(copy.deepcopy(model), seed, **{"target_modules": ["q_proj"], **options})
    return saved(lora, folder), answers(lora)


def dealt(folder):
    """All tensors of a checkpoint, by name."""
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


NEOX = next(arch for arch in ARCHS if arch.name == "gpt_neox")
TIED = [arch for arch in ARCHS if arch.tied] + [replace(NEOX, config={**NEOX.config, "tie_word_embeddings": True})]
SIDES = {"embedding": ("embedding", "target_modules"), "head": ("head", "modules_to_save")}


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("arch", TIED, ids=lambda arch: arch.name)
def test_a_change_of_one_side_of_a_tie_unties(arch, side, tmp_path, host):
    model = arch.model()
    model.save_pretrained(tmp_path / "base")
    before = dealt(tmp_path / "base")
    place, option = SIDES[side]
    folder, expected = make_adapter(
        model, tmp_path / "lora", **{"target_modules": [arch.part], option: [getattr(arch, place)]}
    )

    done = merge_into_base(tmp_path / "base", folder, tmp_path / "out", host)

    (added,) = dealt(done.path).keys() - before.keys()
    assert added == ("embed_out.weight" if arch.name == "gpt_neox" else "lm_head.weight")
    changed = {
        name for name, tensor in dealt(done.path).items() if not torch.equal(tensor, before.get(name, tensor[:0]))
    }
    assert set(done.changed) == changed
    assert f"and {added!r} shared one weight and do not any more" in done.notes[0]
    assert json.loads((done.path / "config.json").read_text())["tie_word_embeddings"] is False
    assert difference(answers(loaded(arch, done.path)), expected) < TOLERANCE
    assert difference(our_answers(arch, done.path, host), expected) < TOLERANCE


@pytest.mark.parametrize("arch", TIED, ids=lambda arch: arch.name)
def test_trained_tokens_change_both_sides_of_a_tie_which_stays(arch, tmp_path, host):
    model = arch.model()
    model.save_pretrained(tmp_path / "base")
    tokens = {arch.embedding: [9, 2, 5]}
    folder, expected = make_adapter(
        model, tmp_path / "lora", target_modules=[arch.part], trainable_token_indices=tokens
    )

    done = merge_into_base(tmp_path / "base", folder, tmp_path / "out", host)

    assert dealt(done.path).keys() == dealt(tmp_path / "base").keys()
    assert (done.path / "config.json").read_bytes() == (tmp_path / "base/config.json").read_bytes()
    assert done.notes == ()
    assert difference(answers(loaded(arch, done.path)), expected) < TOLERANCE


@pytest.mark.parametrize(("updated", "stored"), [("e", "e"), ("h", "h"), ("eh", "e"), ("eh", "h"), ("eh", "eh")])
@pytest.mark.parametrize("arch", TIED[:-1], ids=lambda arch: arch.name)
def test_a_weight_beneath_an_update_of_one_side_is_that_of_both(arch, updated, stored, tmp_path, host):
    model = arch.model()
    model.save_pretrained(tmp_path / "base")
    names = {"e": arch.embedding, "h": arch.head}
    lora = trained(model, 1, target_modules=[names[side] for side in updated])
    layers = dict(lora.named_modules(remove_duplicate=False))
    under = {side: next(path for path in layers if path.endswith(f"{names[side]}.base_layer")) for side in stored}
    weight = layers[under[stored[0]]].weight.data.mul_(1.5)
    folder = saved(lora, tmp_path / "lora")
    change_tensors(
        folder / "adapter_model.safetensors",
        lambda found: {**found, **{f"{path}.weight": weight for path in under.values()}},
    )

    done = merge_into_base(tmp_path / "base", folder, tmp_path / "out", host)

    assert difference(answers(loaded(arch, done.path)), answers(lora)) < TOLERANCE


def test_two_weights_beneath_the_sides_of_a_tie_are_refused(tmp_path, host):
    arch = TIED[0]
    model = arch.model()
    model.save_pretrained(tmp_path / "base")
    folder, _ = make_adapter(model, tmp_path / "lora", target_modules=[arch.embedding, arch.head])
    change_tensors(
        folder / "adapter_model.safetensors",
        lambda found: {
            **found,
            "base_model.model.transformer.wte.base_layer.weight": torch.zeros(200, 64),
            "base_model.model.lm_head.base_layer.weight": torch.ones(200, 64),
        },
    )

    with pytest.raises(AdapterError, match=r"under the update of 'transformer\.wte\.weight' and another"):
        merge_into_base(tmp_path / "base", folder, tmp_path / "out", host)

    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("arch", TIED[:-1], ids=lambda arch: arch.name)
def test_trained_tokens_lie_beneath_an_update_of_the_tied_head(arch, tmp_path, host):
    model = arch.model()
    model.save_pretrained(tmp_path / "base")
    folder, expected = make_adapter(
        model, tmp_path / "lora", target_modules=[arch.head], trainable_token_indices={arch.embedding: [9, 2, 5]}
    )

    done = merge_into_base(tmp_path / "base", folder, tmp_path / "out", host)

    assert difference(answers(loaded(arch, done.path)), expected) < TOLERANCE


def test_a_head_that_is_stored_although_it_is_tied_stays_what_it_was(tmp_path, host):
    arch = TIED[-2]
    model = arch.model()
    model.save_pretrained(tmp_path / "base")
    head = model.lm_head.weight.detach().clone()
    add_tensors(tmp_path / "base", **{"lm_head.weight": head})
    folder, expected = make_adapter(model, tmp_path / "lora", target_modules=[arch.embedding])

    done = merge_into_base(tmp_path / "base", folder, tmp_path / "out", host)

    assert torch.equal(dealt(done.path)["lm_head.weight"], head)
    assert done.changed == ("model.embed_tokens.weight",)
    assert difference(answers(loaded(arch, done.path)), expected) < TOLERANCE


def test_a_change_that_rounding_takes_away_leaves_the_tie(tmp_path, host):
    model = TIED[1].model()
    copy.deepcopy(model).to(torch.bfloat16).save_pretrained(tmp_path / "base")
    folder, _ = make_adapter(model, tmp_path / "lora", target_modules=[TIED[1].embedding], lora_alpha=1e-5)

    done = merge_into_base(tmp_path / "base", folder, tmp_path / "out", host)

    assert done.changed == ()
    assert done.notes == ()
    assert dealt(done.path).keys() == dealt(tmp_path / "base").keys()


def test_a_checkpoint_without_a_head_has_nothing_to_untie(tmp_path, host):
    arch = next(arch for arch in ARCHS if arch.name == "qwen2, tied")
    model = arch.model()
    model.model.save_pretrained(tmp_path / "base")  # names without `model.`, which the adapter's have
    folder, expected = make_adapter(model, tmp_path / "lora", target_modules=[arch.embedding, arch.part])

    done = merge_into_base(tmp_path / "base", folder, tmp_path / "out", host)

    assert done.notes == ()
    found = answers(hf.AutoModel.from_pretrained(done.path).eval())
    assert difference(found, {"embed": expected["embed"]}) < TOLERANCE


def test_files_names_and_dtypes_are_the_base_s(tmp_path, host):
    model = make_qwen2_model(tie_word_embeddings=True)
    model.to(torch.bfloat16).save_pretrained(tmp_path / "base", max_shard_size="40KB")
    make_byte_tokenizer().save_pretrained(tmp_path / "base")
    for name in ("pytorch_model.bin", "onnx/model.onnx", "2_Dense/model.safetensors", ".cache/lock"):
        (tmp_path / "base" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "base" / name).write_text(name)
    folder, _ = make_adapter(model.float(), tmp_path / "lora", target_modules=["embed_tokens", "k_proj"])
    (folder / "chat_template.jinja").write_text("of the adapter")

    done = merge_into_base(tmp_path / "base", folder, tmp_path / "out", host)

    old, new = dealt(tmp_path / "base"), dealt(done.path)
    assert {name: (t.dtype, t.shape) for name, t in new.items() if name in old} == {
        name: (t.dtype, t.shape) for name, t in old.items()
    }
    index, was = (
        json.loads((root / "model.safetensors.index.json").read_text()) for root in (done.path, tmp_path / "base")
    )
    assert index["weight_map"] == {
        **was["weight_map"],
        "lm_head.weight": was["weight_map"]["model.embed_tokens.weight"],
    }
    assert index["metadata"]["total_size"] == was["metadata"]["total_size"] + new["lm_head.weight"].nbytes
    for name, file in index["weight_map"].items():
        with safe_open(done.path / file, framework="pt") as tensors:
            assert name in tensors.keys()  # noqa: SIM118  (not a mapping)
            assert tensors.metadata() == {"format": "pt"}
    changed = {name for name in old if not torch.equal(old[name], new[name])} | {"lm_head.weight"}
    assert changed == set(done.changed)
    files = {path.relative_to(tmp_path / "base") for path in (tmp_path / "base").rglob("*") if path.is_file()}
    left = {path for path in files if path.name in ("pytorch_model.bin", "model.onnx", "lock")}
    assert {path.relative_to(done.path) for path in done.path.rglob("*") if path.is_file()} == files - left
    assert (done.path / "tokenizer.json").read_bytes() == (tmp_path / "base/tokenizer.json").read_bytes()
    assert "the adapter's were not copied: 'chat_template.jinja'" in done.notes[1]
    assert "'onnx/model.onnx', 'pytorch_model.bin'" in done.notes[2]


def test_a_class_that_has_the_adapter_s_head_takes_it(tmp_path, host):
    arch = ARCHS[0]
    model = arch.task_model(arch.sequence, arch.model(), 3)
    model.save_pretrained(tmp_path / "base")
    row = HeadRow("SEQ_CLS", 3, lambda arch: {"target_modules": [arch.part]})
    folder, expected = make_head_cell(arch, arch.model(), row, tmp_path / "lora")

    done = merge_into_base(tmp_path / "base", folder, tmp_path / "out", host)

    merged = hf.AutoModelForSequenceClassification.from_pretrained(done.path).eval()
    assert difference(answers(merged, row), expected) < TOLERANCE
    assert "classifier.weight" in done.changed
    assert done.notes == ("'classifier' is the adapter's now, and its 3 labels are still named as in the base",)


@pytest.mark.parametrize("arch", ARCHS, ids=lambda arch: arch.name)
@pytest.mark.parametrize("task", ["SEQ_CLS", "TOKEN_CLS"])
def test_a_head_of_the_adapter_s_own_becomes_the_checkpoint_s(arch, task, tmp_path, host):
    model = arch.model()
    if hasattr(model, "pooler"):
        model.pooler = None  # of a checkpoint for tokens; the others read it
    (model if task == "TOKEN_CLS" else arch.model()).save_pretrained(tmp_path / "base")
    row = HeadRow(task, 3, lambda arch: {"target_modules": [arch.part]})
    folder, expected = make_head_cell(arch, arch.model(), row, tmp_path / "lora")

    done = merge_into_base(tmp_path / "base", folder, tmp_path / "out", host)

    kind = hf.AutoModelForSequenceClassification if task == "SEQ_CLS" else hf.AutoModelForTokenClassification
    merged, missing = kind.from_pretrained(done.path, output_loading_info=True)
    assert not missing["missing_keys"]
    assert difference(answers(merged.eval(), row), expected) < TOLERANCE
    assert merged.config.id2label == {0: "LABEL_0", 1: "LABEL_1", 2: "LABEL_2"}
    assert "is the adapter's, with 3 labels: 'LABEL_0', 'LABEL_1', 'LABEL_2'" in done.notes[-1]


def test_names_of_old_checkpoints_are_kept(tmp_path, host):
    arch = ARCHS[0]
    model = arch.model()
    model.save_pretrained(tmp_path / "base")
    rename_tensors(tmp_path / "base", lambda name: "bert." + name.replace("LayerNorm.weight", "LayerNorm.gamma"))
    folder, expected = make_adapter(model, tmp_path / "lora", target_modules=["value"], modules_to_save=[arch.norm])

    done = merge_into_base(tmp_path / "base", folder, tmp_path / "out", host)

    assert "bert.encoder.layer.0.attention.output.LayerNorm.gamma" in done.changed
    assert dealt(done.path).keys() == dealt(tmp_path / "base").keys()
    assert difference(our_answers(arch, done.path, host), expected) < TOLERANCE


def test_heads_that_are_not_served_are_told_when_they_may_be_tied(tmp_path, host):
    arch = ARCHS[0]
    hf.BertForMaskedLM(hf.BertConfig(**arch.config)).save_pretrained(tmp_path / "base")
    folder, _ = make_adapter(arch.model(), tmp_path / "lora", target_modules=[arch.embedding])
    quiet, _ = make_adapter(arch.model(), tmp_path / "quiet", target_modules=[arch.part])

    told = merge_into_base(tmp_path / "base", folder, tmp_path / "out", host)
    untold = merge_into_base(tmp_path / "base", quiet, tmp_path / "other", host)

    assert "may be tied to the embedding: 'cls.predictions.bias'" in told.notes[0]
    assert untold.notes == ()


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """An untied Qwen2, its folder, and a sound adapter for tests to spoil."""
    folder = tmp_path_factory.mktemp("plain")
    model = make_qwen2_model()
    make_qwen2(folder / "base", tokenizer=False)
    return model, folder / "base"


def extra(name, make):
    return lambda found: {**found, f"base_model.model.{name}": make(found)}


Q = "model.layers.0.self_attn.q_proj"
SPOILT = {
    "a module that the base lacks": (
        {},
        lambda found: {name.replace("q_proj", "g_proj"): t for name, t in found.items()},
        r"changes 'model.layers.0.self_attn.g_proj', which the 'qwen2' checkpoint .* does not have.*nearest layer here is",
    ),
    "another width": (
        {},
        lambda found: {name: t[:, :32] if "lora_A" in name else t for name, t in found.items()},
        rf"does not fit '{Q}': lora_A is \[4, 32\] and lora_B \[64, 4\], the base maps 64 to 64",
    ),
    "another magnitude": (
        {"use_dora": True},
        lambda found: {name: t[:32] if "magnitude" in name else t for name, t in found.items()},
        r"its magnitude has shape \[32\]",
    ),
    "another vocabulary": (
        {"modules_to_save": ["embed_tokens"]},
        lambda found: {name: t[:300] if "embed" in name else t for name, t in found.items()},
        r"a weight of 'model.embed_tokens' with shape \[300, 64\]; the base's is \[320, 64\]",
    ),
    "tokens beyond the vocabulary": (
        {"trainable_token_indices": [3]},
        None,
        "adds 1 token to the base's vocabulary of 320, and does not hold all rows of 'lm_head'",
    ),
    "a bias that the base lacks": (
        {},
        extra("model.layers.0.mlp.up_proj.bias", lambda found: torch.ones(96)),
        "changes the bias of 'model.layers.0.mlp.up_proj', which has none",
    ),
    "a head of its own": (
        {},
        extra("score.weight", lambda found: torch.ones(3, 64)),
        "holds 'score' whole, which .* does not have, and does not say that it is a head",
    ),
    "a module twice": (
        {},
        lambda found: found | {name.replace("model.model.model.", "model.model."): t for name, t in found.items()},
        "twice, under two spellings",
    ),
    "a magnitude and a bias": (
        {"use_dora": True, "layers_to_transform": [0]},
        extra(f"{Q}.lora_B.bias", lambda found: torch.ones(64)),
        "both a magnitude and a lora_B bias",
    ),
}


@pytest.mark.parametrize(("options", "change", "told"), SPOILT.values(), ids=SPOILT)
def test_what_has_no_place_is_refused_and_leaves_nothing(plain, tmp_path, host, options, change, told):
    model, base = plain
    folder, _ = make_adapter(model, tmp_path / "lora", **options)
    if change is not None:
        change_tensors(folder / "adapter_model.safetensors", change)
    said = {"lora_bias": "lora_B bias" in told, "trainable_token_indices": [320] if change is None else None}
    said = {name: value for name, value in said.items() if value}
    # With all modules as targets the base alone decides what has a place.
    change_json(folder / "adapter_config.json", target_modules=".*", **said)

    with pytest.raises(AdapterError, match=rf"(?s){told}"):
        merge_into_base(base, folder, tmp_path / "out", host)

    assert [path.name for path in tmp_path.iterdir()] == ["lora"]


def test_numbers_beyond_the_base_s_dtype_are_refused(plain, tmp_path, host):
    model, _ = plain
    copy.deepcopy(model).half().save_pretrained(tmp_path / "base")
    folder, _ = make_adapter(model, tmp_path / "lora", lora_alpha=10**7)

    with pytest.raises(AdapterError, match=rf"(?s)'{Q}.weight' larger than torch.float16 can hold.*bfloat16"):
        merge_into_base(tmp_path / "base", folder, tmp_path / "out", host)

    assert not (tmp_path / "out").exists()


def test_the_base_and_folders_that_hold_files_are_left_alone(plain, tmp_path, host):
    model, base = plain
    folder, _ = make_adapter(model, tmp_path / "lora")
    before = dealt(base)

    for out in (base, base / "merged"):
        with pytest.raises(AdapterError, match="is the base's own folder, or inside it"):
            merge_into_base(base, folder, out, host, overwrite=True)
    with pytest.raises(AdapterError, match="holds files already"):
        merge_into_base(base, folder, folder, host)

    assert all(torch.equal(before[name], tensor) for name, tensor in dealt(base).items())
    assert not (base / "merged").exists()


def test_what_somebody_else_writes_meanwhile_is_left_alone(plain, tmp_path, host):
    folder, _ = make_adapter(plain[0], tmp_path / "lora")

    def write(progress):
        (tmp_path / "out").mkdir(exist_ok=True)
        (tmp_path / "out/mine.txt").write_text("mine")

    with pytest.raises(AdapterError, match="holds files already"):
        merge_into_base(plain[1], folder, tmp_path / "out", host, progress=write)

    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mine.txt"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["lora", "out"]


def test_bases_that_cannot_be_read_or_served_are_refused(plain, tmp_path, host):
    folder, _ = make_adapter(plain[0], tmp_path / "lora")
    (tmp_path / "empty").mkdir()
    change_json(tmp_path / "strange/config.json", model_type="strange")
    (tmp_path / "strange/model.safetensors").write_bytes((plain[1] / "model.safetensors").read_bytes())

    with pytest.raises(CheckpointError, match=r"no config\.json"):
        merge_into_base(tmp_path / "empty", folder, tmp_path / "out", host)
    with pytest.raises(PluginError, match="'strange'"):
        merge_into_base(tmp_path / "strange", folder, tmp_path / "out", host)


def test_progress_is_reported_shard_by_shard(plain, tmp_path, host):
    folder, _ = make_adapter(plain[0], tmp_path / "lora")
    heard = []

    merge_into_base(plain[1], folder, tmp_path / "out", host, progress=heard.append)

    assert heard == [Progress("writing files", 0, 1), Progress("writing files", 1, 1)]


def test_the_public_face_takes_the_installed_plugins(plain, tmp_path):
    model, base = plain
    adapter = make_lora(model, tmp_path / "adapter", target_modules=["q_proj"])

    done = lorax.merge_into_base(base, adapter, tmp_path / "out")

    assert done.path == tmp_path / "out"
    assert done.changed == tuple(f"model.layers.{layer}.self_attn.q_proj.weight" for layer in (0, 1))


def test_a_saved_module_that_was_cut_short_is_refused_as_in_loading(plain, tmp_path, host):
    model, base = plain
    folder, _ = make_adapter(model, tmp_path / "lora", modules_to_save=["post_attention_layernorm"])
    lost = "base_model.model.model.layers.0.post_attention_layernorm.weight"
    change_tensors(folder / "adapter_model.safetensors", lambda found: {n: t for n, t in found.items() if n != lost})

    with pytest.raises(AdapterError, match=r"does not hold 'model\.layers\.0\.post_attention_layernorm\.weight'"):
        merge_into_base(base, folder, tmp_path / "out", host)

    assert not (tmp_path / "out").exists()


def as_snapshot(base, root):
    """A checkpoint as the hub's cache has it: a folder of links into `blobs/`."""
    snapshot = root / "models--acme--base/snapshots/0123abcd"
    blobs = root / "models--acme--base/blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for number, file in enumerate(sorted(base.iterdir())):
        (blobs / f"blob{number}").write_bytes(file.read_bytes())
        (snapshot / file.name).symlink_to(f"../../blobs/blob{number}")
    return snapshot


def test_a_snapshot_of_the_hubs_cache_is_merged_whole(plain, tmp_path, host):
    model, base = plain
    folder, expected = make_adapter(model, tmp_path / "lora")
    snapshot = as_snapshot(base, tmp_path)
    (snapshot / "notes.txt").symlink_to("../../blobs/blob0")

    done = merge_into_base(snapshot, folder, tmp_path / "out", host)

    written = {file.name for file in (tmp_path / "out").iterdir()}
    assert written == {file.name for file in base.iterdir()} | {"notes.txt"}
    assert not any(file.is_symlink() for file in (tmp_path / "out").iterdir())
    assert done.notes == ()
    assert difference(answers(loaded(ARCHS[2], tmp_path / "out")), expected) < TOLERANCE


def test_a_link_out_of_the_base_is_not_copied_and_named(plain, tmp_path, host):
    model, base = plain
    folder, _ = make_adapter(model, tmp_path / "lora")
    (tmp_path / "secret").write_text("secret")
    snapshot = as_snapshot(base, tmp_path)
    (snapshot / "vocab.txt").symlink_to(tmp_path / "secret")
    (snapshot / "merges.txt").symlink_to("../../../secret")

    done = merge_into_base(snapshot, folder, tmp_path / "out", host)

    assert "secret" not in [file.read_text(errors="replace") for file in (tmp_path / "out").iterdir()]
    assert done.notes == ("not copied, for they are links out of the base's folder: 'merges.txt', 'vocab.txt'",)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_a_base_whose_own_files_are_links_out_of_it_is_refused(plain, tmp_path, host, name):
    model, base = plain
    folder, _ = make_adapter(model, tmp_path / "lora")
    snapshot = as_snapshot(base, tmp_path)
    (snapshot / name).unlink()
    (snapshot / name).symlink_to(base / name)

    with pytest.raises(AdapterError, match="is a link out of the base's folder") as caught:
        merge_into_base(snapshot, folder, tmp_path / "out", host)

    assert caught.value.hint
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("inside", ["base", "lora"])
def test_a_result_that_would_replace_what_is_read_from_is_refused(plain, tmp_path, host, inside):
    model, base = plain
    places = {"base": tmp_path / "base", "lora": tmp_path / "lora"} | {inside: tmp_path / "out" / inside}
    folder, _ = make_adapter(model, places["lora"])
    shutil.copytree(base, places["base"])
    (tmp_path / "out/mine.txt").write_text("mine")

    with pytest.raises(AdapterError, match="is read from, and would be replaced"):
        merge_into_base(places["base"], folder, tmp_path / "out", host, overwrite=True)

    assert (tmp_path / "out/mine.txt").exists()
    assert (places[inside]).exists()


def test_a_link_that_is_overwritten_leaves_what_it_leads_to(plain, tmp_path, host):
    model, base = plain
    folder, _ = make_adapter(model, tmp_path / "lora")
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept/mine.txt").write_text("mine")
    (tmp_path / "out").symlink_to("kept")

    merge_into_base(base, folder, tmp_path / "out", host, overwrite=True)

    assert not (tmp_path / "out").is_symlink()
    assert (tmp_path / "kept/mine.txt").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["kept", "lora", "out"]


@pytest.mark.parametrize("name", ["../stolen.safetensors", "{root}/stolen.safetensors", "a/../../stolen.safetensors"])
def test_an_index_that_names_files_elsewhere_is_refused_and_nothing_is_written_there(plain, tmp_path, host, name):
    model, base = plain
    folder, _ = make_adapter(model, tmp_path / "lora")
    shutil.copytree(base, tmp_path / "base")
    (tmp_path / "base/model.safetensors").rename(tmp_path / "stolen.safetensors")
    before = (tmp_path / "stolen.safetensors").read_bytes()
    names = load_file(tmp_path / "stolen.safetensors")
    index = {"weight_map": dict.fromkeys(names, name.format(root=tmp_path))}
    (tmp_path / "base/model.safetensors.index.json").write_text(json.dumps(index))

    with pytest.raises(CheckpointError, match="which lies outside that folder"):
        merge_into_base(tmp_path / "base", folder, tmp_path / "out", host)

    assert not (tmp_path / "out").exists()
    assert (tmp_path / "stolen.safetensors").read_bytes() == before
