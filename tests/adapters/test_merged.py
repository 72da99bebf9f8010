"""An adapter merged while its base is loaded: the engine against PEFT with the adapter unmerged."""

from __future__ import annotations

import gc

import pytest
import torch
from builders import change_json, make_lora, make_qwen2, make_qwen2_model
from matrix import ARCHS, HEADS, ROWS, TEXTS, HeadRow, make_cell, make_head_cell, saved, trained
from oracles import TOLERANCE
from safetensors.torch import save_file

import lorax_core as lorax
from lorax_core.adapters.merging.merged import MergedCheckpoint
from lorax_core.errors import AdapterError, RequestError
from lorax_core.types import Classification, Completion, Embedding
from lorax_core.weights.checkpoint import Checkpoint
from lorax_core.weights.loader import load_model

# What differs only in how the files are spelt, or in the scale of a product, is read by the same code as for a merged folder.
LEFT_OUT = (
    "`target_modules` as",
    "`exclude_modules`",
    "`layers_to_transform`",
    "`lora_alpha` unequal",
    "`use_rslora`",
    "`rank_pattern`",
    "rank ",
    "trained on",
    '`bias="lora_only"`',
    '`modules_to_save`: norms, `bias="all"`',
    "adapter name",
    "files in shards",
    "float16 files",
)
CELLS = [name for name in ROWS if not name.startswith(LEFT_OUT) and "converted" not in name]
QWEN2 = next(arch for arch in ARCHS if arch.name == "qwen2")
TIED = next(arch for arch in ARCHS if arch.name == "qwen2, tied")


def told(result):
    """Labels and numbers of an answer."""
    match result:
        case Completion():
            return None, torch.tensor([one.logprob for one in result.prompt_logprobs[1:]])
        case Embedding():
            return None, torch.from_numpy(result.vector)
        case Classification():
            return result.labels, torch.tensor(result.scores)


def requests(kinds, adapter=None):
    make = {
        "generate": lambda ids: lorax.GenerateRequest(prompt=ids, adapter=adapter, max_tokens=1, prompt_logprobs=0),
        "embed": lambda ids: lorax.EmbedRequest(input=ids, adapter=adapter),
        "classify": lambda ids: lorax.ClassifyRequest(input=ids, adapter=adapter),
    }
    return [make[kind](ids) for kind in kinds for ids in TEXTS]


def make_engine(folder, host, **options):
    options = {"pooling": "mean", "kv_cache_tokens": 512, **options}
    if (folder / "config.json").read_text().count("bert"):
        options["kv_cache_tokens"] = None
    return lorax.load(folder, host=host, **options)


def assert_says(engine, expected):
    """The engine's answers are these, in one run."""
    found = [told(one) for one in engine.run(requests(expected))]
    wanted = [one for kind in expected for one in expected[kind]]
    for (labels, ours), (names, theirs) in zip(found, wanted, strict=True):
        assert labels == names
        assert float((ours - theirs).abs().max() / theirs.abs().max()) < TOLERANCE


def numbers(engine, kinds=("generate", "embed"), adapter=None):
    return torch.cat([told(one)[1] for one in engine.run(requests(kinds, adapter))])


@pytest.fixture(scope="module", params=ARCHS, ids=lambda arch: arch.name)
def bench(request, tmp_path_factory):
    arch, folder = request.param, tmp_path_factory.mktemp("base")
    model = arch.model()
    model.save_pretrained(folder)
    return arch, model, folder


@pytest.mark.parametrize("name", CELLS)
def test_the_merged_engine_computes_what_peft_computes(bench, tmp_path, host, name):
    arch, model, base = bench
    made = make_cell(arch, model, ROWS[name], tmp_path)
    if made is None or (name == "`lora_bias`" and arch.part == "up_proj"):
        pytest.skip("the architecture has nothing of the kind")
    folder, expected = made

    with make_engine(base, host, merge_adapter=folder) as engine:
        assert_says(engine, expected)
        assert repr(str(folder)) in engine.info().notes[0]


@pytest.mark.parametrize("name", [name for name, row in HEADS.items() if not row.load])
def test_a_head_of_the_adapter_is_the_engine_s(bench, tmp_path, host, name):
    arch, model, base = bench
    folder, expected = make_head_cell(arch, model, HEADS[name], tmp_path)

    with make_engine(base, host, merge_adapter=folder) as engine:
        assert_says(engine, expected)
        assert "the adapter's, with" in engine.info().notes[1]
        # What the base could do, the engine still can.
        assert ("generate" in engine.info().tasks) is arch.generates


def test_a_head_of_more_labels_takes_the_place_of_the_base_s(tmp_path, host):
    model = QWEN2.task_model(QWEN2.sequence, QWEN2.model(), 2)
    model.save_pretrained(tmp_path / "base")
    change_json(tmp_path / "base/config.json", problem_type="multi_label_classification")  # of the base's labels
    row = HeadRow("SEQ_CLS", 4, HEADS["text to one number"].options)
    folder, expected = make_head_cell(QWEN2, QWEN2.model(), row, tmp_path / "lora")

    with make_engine(tmp_path / "base", host, merge_adapter=folder) as engine:
        assert_says(engine, expected)


def test_merging_comes_before_quantizing(tmp_path, host):
    model = TIED.model()
    model.save_pretrained(tmp_path / "base")
    folder, _ = make_cell(TIED, model, ROWS["DoRA"], tmp_path / "lora")
    merged = lorax.merge_into_base(tmp_path / "base", folder, tmp_path / "merged").path

    with (
        make_engine(tmp_path / "base", host, merge_adapter=folder, quantize="int8") as engine,
        make_engine(merged, host, quantize="int8") as other,
        make_engine(tmp_path / "base", host, merge_adapter=folder) as plain,
    ):
        assert torch.equal(numbers(engine), numbers(other))
        assert not torch.equal(numbers(engine), numbers(plain))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_sums_are_made_in_float32_and_rounded_once(tmp_path, host, dtype):
    model = make_qwen2_model().to(torch.bfloat16)
    model.save_pretrained(tmp_path / "base")
    folder = make_lora(model.float(), tmp_path / "lora", target_modules=["q_proj", "k_proj"])
    lora = trained(model, 1, target_modules=["down_proj"], r=8)
    folder = saved(lora, tmp_path / "other")
    part = lora.base_model.model.model.layers[1].mlp.down_proj
    expected = part.base_layer.weight + part.get_delta_weight("default")

    files = MergedCheckpoint(Checkpoint(tmp_path / "base"), folder, host)
    site = load_model(files, host, dtype=dtype).model.sites["layers.1.mlp.down_proj"]

    near = (site.dense_weight().float() - expected.to(dtype).float()).abs().max()
    assert near <= (1e-6 if dtype is torch.float32 else 2**-8 * expected.abs().max())
    assert (site.dense_weight() == expected.to(dtype)).float().mean() > 0.999


def test_other_adapters_are_used_on_top(tmp_path, host):
    model = TIED.model()
    model.save_pretrained(tmp_path / "base")
    folder, _ = make_cell(TIED, model, ROWS["token embedding"], tmp_path / "lora")
    merged = lorax.merge_into_base(tmp_path / "base", folder, tmp_path / "merged").path
    over = {
        "dora": make_cell(TIED, model, ROWS["DoRA"], tmp_path / "dora", seed=4)[0],
        "head": make_cell(TIED, model, ROWS["output head"], tmp_path / "head", seed=5)[0],
        "labels": make_head_cell(TIED, model, HEADS["text labels, every linear layer"], tmp_path / "labels")[0],
    }

    with (
        make_engine(tmp_path / "base", host, merge_adapter=folder, adapters=over) as engine,
        make_engine(merged, host, adapters=over) as other,
    ):
        for name in over:
            kinds = ("classify", "embed") if name == "labels" else ("generate", "embed")
            assert torch.allclose(numbers(engine, kinds, name), numbers(other, kinds, name), rtol=1e-4, atol=1e-5)


def held():
    """Bytes of all tensors with numbers."""
    gc.collect()
    found = [one for one in gc.get_objects() if isinstance(one, torch.Tensor) and one.device.type == "cpu"]
    return sum({one.untyped_storage().data_ptr(): one.untyped_storage().nbytes() for one in found}.values())


def test_tensors_are_merged_when_they_are_read_and_not_kept(tmp_path, host):
    model = TIED.model()
    model.save_pretrained(tmp_path / "base")
    folder = saved(trained(model, 1, target_modules=["embed_tokens", "up_proj"]), tmp_path / "lora")
    before, adapter = held(), (folder / "adapter_model.safetensors").stat().st_size

    files = MergedCheckpoint(Checkpoint(tmp_path / "base"), folder, host)
    numbers = [files.tensor(name) for name in ("model.embed_tokens.weight", "lm_head.weight")]

    assert not torch.equal(*numbers)
    del numbers
    assert held() - before < 1.1 * adapter
    files.release()
    assert held() == before


def test_what_is_asked_for_after_loading_is_read_again_from_the_same_adapter(tmp_path, host):
    model = ARCHS[0].model()  # with a pooler, which heads of adapters take from the base
    model.save_pretrained(tmp_path / "base")
    below = {"target_modules": ["pooler.dense", "query"]}
    merged = saved(trained(ARCHS[0].model(), 1, **below), tmp_path / "merged")
    row = HeadRow("SEQ_CLS", 3, lambda arch: {"target_modules": [arch.part]})
    folder, _ = make_head_cell(ARCHS[0], model, row, tmp_path / "lora")
    done = lorax.merge_into_base(tmp_path / "base", merged, tmp_path / "out", host)

    with (
        make_engine(tmp_path / "base", host, merge_adapter=merged) as engine,
        make_engine(done.path, host, adapters={"labels": folder}) as other,
    ):
        engine.adapters.load("labels", folder)
        assert torch.allclose(
            numbers(engine, ["classify"], "labels"), numbers(other, ["classify"], "labels"), atol=1e-6
        )
        engine.adapters.unload("labels")
        saved(trained(ARCHS[0].model(), 2, **below), merged)
        with pytest.raises(AdapterError, match="are not those that were merged"):
            engine.adapters.load("labels", folder)


def test_what_cannot_be_merged_is_refused_by_name_before_numbers_are_read(tmp_path, host):
    base = make_qwen2(tmp_path / "base", tokenizer=False)
    model = make_qwen2_model()
    biased = saved(trained(model, 1, target_modules=["up_proj"], lora_bias=True), tmp_path / "biased")
    wide = saved(trained(make_qwen2_model(intermediate_size=48), 1, target_modules=["up_proj"]), tmp_path / "wide")
    medusa = tmp_path / "medusa"
    change_json(medusa / "config.json", medusa_num_heads=1, medusa_num_layers=1)
    save_file({"0.0.linear.weight": torch.zeros(64, 64)}, medusa / "heads.safetensors")

    for folder, words in (
        (biased, "changes the bias of 'model.layers.0.mlp.up_proj', which has none"),
        (wide, r"does not fit 'model.layers.0.mlp.up_proj': lora_A is \[4, 64\] and lora_B \[48, 4\]"),
        (medusa, "has Medusa heads, which draft tokens"),
        (tmp_path / "nothing", "there is no adapter folder"),
    ):
        with pytest.raises(AdapterError, match=words):
            make_engine(base, host, merge_adapter=folder)
    with pytest.raises(AdapterError, match=r"does not fit 'model.layers.0.mlp.up_proj'"):
        MergedCheckpoint(Checkpoint(base), wide, host)
    with pytest.raises(RequestError, match="merge_adapter: Input should be a folder or a hub id, not empty"):
        make_engine(base, host, merge_adapter="")
