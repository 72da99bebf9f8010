"""`lorax adapters` on the small checkpoint that the repository ships, and on what PEFT writes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers as hf
from builders import make_lora, make_qwen2, make_qwen2_model
from hubs import Client, Hub
from matrix import ARCHS, HEADS, make_head_cell, saved, trained
from safetensors.torch import load_file, save_file

from lorax_core.adapters.formats.lora import LoraAdapter
from lorax_core.adapters.formats.medusa import MedusaAdapter
from lorax_core.adapters.formats.peft import read_peft
from lorax_core.adapters.merging.merge import merge_adapters

QWEN2 = Path(__file__).resolve().parents[2] / "examples/tiny_qwen2"
MODEL = str(QWEN2 / "model")
UPPER, BULLETS = (str(QWEN2 / "adapters" / name) for name in ("upper", "bullets"))

LIGHT = """
import sys
from lorax_core.cli.main import main
try:
    main(["adapters", "--help"])
except SystemExit as error:
    assert not error.code, error.code
print(*sorted({"torch", "transformers", "numpy"} & set(sys.modules)), file=sys.stderr)
"""


def test_help_imports_neither_torch_nor_transformers_nor_numpy():
    done = subprocess.run([sys.executable, "-c", LIGHT], capture_output=True, text=True, timeout=60, check=True)

    assert "inspect" in done.stdout
    assert "merge" in done.stdout
    assert done.stderr.split() == []


@pytest.fixture(scope="module")
def rich_adapter(tmp_path_factory):
    """An untied Qwen2 and an adapter of nearly everything."""
    folder = tmp_path_factory.mktemp("rich")
    make_qwen2(folder / "base", tokenizer=False)
    lora = trained(
        make_qwen2_model(),
        1,
        target_modules=["q_proj", "down_proj"],
        rank_pattern={"down_proj": 2},
        alpha_pattern={"down_proj": 5},
        modules_to_save=["model.norm"],
        trainable_token_indices={"embed_tokens": [3, 1]},
        use_dora=True,
        use_rslora=True,
        bias="lora_only",
        task_type="CAUSAL_LM",
    )
    return folder / "base", saved(lora, folder / "lora")


def test_inspect_tells_what_an_adapter_holds(main, rich_adapter):
    base, folder = rich_adapter

    code, out, err = main("adapters", "inspect", str(folder), "--base", str(base), "--json")

    said = json.loads(out)
    about = said["adapter"]
    stored = load_file(folder / "adapter_model.safetensors")
    rows = {row["module"]: row for row in about["modules"]}
    assert (code, err, said["schema"]) == (0, "", 1)
    assert (about["kind"], about["task_type"], about["base_model"]) == ("lora", "CAUSAL_LM", None)
    assert (about["ranks"], about["alphas"]) == ([2, 4], [5.0, 8.0])
    assert about["features"] == ["biases", "DoRA", "rslora", "saved modules", "trained tokens"]
    assert rows["model.layers.*.mlp.down_proj"]["count"] == 2
    assert rows["model.layers.*.mlp.down_proj"]["ranks"] == [2]
    assert rows["model.layers.*.self_attn.q_proj"]["holds"] == ["low rank", "DoRA", "biases"]
    assert about["saved"] == [{"module": "model.norm", "shape": [64]}]
    assert about["tokens"] == 2
    assert about["tensors"] == len(stored)
    assert about["parameters"] == sum(tensor.numel() for tensor in stored.values())
    assert about["bytes"] == 4 * about["parameters"]
    assert about["dtypes"] == ["float32"]
    assert about["identity"] == LoraAdapter(folder).identity
    assert (about["path"], about["revision"], about["medusa"]) == (str(folder), None, None)
    assert said["base"]["fits"] is True
    assert said["base"]["head"] is None
    assert said["base"]["sites"] == [
        *("embed_tokens", "layers.0.mlp.down_proj", "layers.0.self_attn.qkv_proj"),
        *("layers.1.mlp.down_proj", "layers.1.self_attn.qkv_proj", "norm"),
    ]


def make_heads(folder, *, own_output=True):
    """Two Medusa heads of three blocks, for the tiny Qwen2."""
    tensors = {}
    for head in range(2):
        for block in range(3):
            tensors[f"{head}.{block}.linear.weight"] = torch.full((64, 64), 0.1 * block)
            tensors[f"{head}.{block}.linear.bias"] = torch.full((64,), 0.1 * head)
        if own_output:
            tensors[f"{head}.3.weight"] = torch.ones(320, 64)
    folder.mkdir(exist_ok=True)
    save_file(tensors, folder / "medusa_lm_head.safetensors")
    config = {"medusa_num_heads": 2, "medusa_num_layers": 3, "base_model_name_or_path": "qwen2"}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


def test_inspect_tells_of_medusa_s_heads(main, qwen2, tmp_path):
    folder = make_heads(tmp_path / "heads")

    code, out, err = main("adapters", "inspect", str(folder), "--base", str(qwen2), "--json")

    said = json.loads(out)
    about = said["adapter"]
    stored = load_file(folder / "medusa_lm_head.safetensors")
    assert (code, err) == (0, "")
    assert (about["kind"], about["base_model"], about["modules"], about["ranks"]) == ("medusa", "qwen2", [], [])
    assert about["medusa"] == {"heads": 2, "blocks": 3, "width": 64, "own_output": True, "vocabulary": 320}
    assert about["tensors"] == len(stored)
    assert about["parameters"] == sum(tensor.numel() for tensor in stored.values())
    assert about["identity"] == MedusaAdapter(folder).identity
    assert (said["base"]["fits"], said["base"]["sites"]) == (True, [])


def test_inspect_of_medusa_s_heads_is_a_table_for_people(main, tmp_path):
    own, shared = make_heads(tmp_path / "own"), make_heads(tmp_path / "shared", own_output=False)

    _, out, _ = main("adapters", "inspect", str(own))
    _, other, _ = main("adapters", "inspect", str(shared))

    assert "2 of 3 blocks, 64 wide, with output layers for 320 tokens" in out
    assert "2 of 3 blocks, 64 wide, with the base's output layer" in other
    assert "MODULES" not in out


def test_inspect_tells_of_heads_and_lora_in_one_folder(main, qwen2, tmp_path):
    make_lora(make_qwen2_model(), tmp_path / "both", target_modules=["o_proj"])
    alone = read_peft(tmp_path / "both")
    folder = make_heads(tmp_path / "both")

    code, out, _ = main("adapters", "inspect", str(folder), "--base", str(qwen2), "--json")
    _, table, _ = main("adapters", "inspect", str(folder))

    said = json.loads(out)
    assert code == 0
    assert (said["adapter"]["kind"], said["adapter"]["ranks"], said["adapter"]["medusa"]["heads"]) == ("medusa", [4], 2)
    assert said["adapter"]["tensors"] == len(load_file(folder / "medusa_lm_head.safetensors")) + 2 * len(alone.modules)
    assert said["base"]["sites"] == ["layers.0.self_attn.o_proj", "layers.1.self_attn.o_proj"]
    assert "medusa, lora" in table


def test_inspect_says_why_heads_do_not_fit(main, tmp_path):
    code, out, err = main("adapters", "inspect", str(make_heads(tmp_path / "heads")), "--base", MODEL, "--json")

    assert (code, json.loads(out)["base"]["fits"]) == (1, False)
    assert "the base is 128 wide" in err


@pytest.mark.parametrize("beside", [False, True])
def test_medusa_s_heads_are_not_merged(main, tmp_path, beside):
    if beside:
        make_lora(make_qwen2_model(), tmp_path / "heads", target_modules=["o_proj"])
    folder = make_heads(tmp_path / "heads")

    code, out, err = main("adapters", "merge", UPPER, str(folder), "--out", str(tmp_path / "out"))

    assert (code, out) == (1, "")
    assert f"{folder} holds Medusa heads" in " ".join(err.split())
    assert ("hint: give a folder of PEFT's files alone" in err) is beside
    assert not (tmp_path / "out").exists()


def test_a_url_is_inspected_and_merged_like_a_folder(main, tmp_path, monkeypatch):
    monkeypatch.setenv("LORAX_CACHE", str(tmp_path / "cache"))
    url = f"file://{UPPER}"

    code, out, _ = main("adapters", "inspect", url, "--json")
    merged = main("adapters", "merge", url, BULLETS, "--strategy", "cat", "--out", str(tmp_path / "out"))

    about = json.loads(out)["adapter"]
    assert (code, about["path"], merged[0]) == (0, url, 0)
    assert about["revision"]
    assert about["identity"] == LoraAdapter(UPPER).identity
    expected = merge_adapters([UPPER, BULLETS], tmp_path / "expected", strategy="cat")
    assert read_peft(tmp_path / "out").identity() == read_peft(expected.path).identity()


RUN = """
import contextlib, io, json, sys
from lorax_core.cli.main import main

said = []
for arguments in json.loads(sys.argv[1]):
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.suppress(SystemExit):
        main(arguments)
    said.append(json.loads(out.getvalue()))
print(json.dumps(said))
"""


def test_a_hub_id_has_a_revision(tmp_path):
    hub = Hub()
    (tmp_path / "home").mkdir()
    try:
        hub.add("acme/lora", Path(BULLETS))
        commit = hub.add("acme/lora", Path(UPPER), revision="v1")
        client = Client(hub, tmp_path / "home", "")
        inspect = ["adapters", "inspect", "acme/lora", "--revision", "v1", "--json"]
        sources = ["acme/lora", "acme/lora", "--revision", "v1", "--revision", ""]
        merge = ["adapters", "merge", *sources, "--strategy", "cat", "--out", str(tmp_path / "out"), "--json"]
        inspected, merged = client.run(RUN, inspect, merge)
    finally:
        hub.close()

    about = inspected["adapter"]
    assert (about["path"], about["revision"]) == ("acme/lora", commit)
    assert about["identity"] == LoraAdapter(UPPER).identity
    expected = merge_adapters([UPPER, BULLETS], tmp_path / "expected", strategy="cat")
    assert merged["merged"]["path"] == str(tmp_path / "out")
    assert read_peft(tmp_path / "out").identity() == read_peft(expected.path).identity()


def test_there_is_a_revision_for_each_adapter_that_is_merged(main):
    code, _, err = main("adapters", "merge", UPPER, BULLETS, "--revision", "v1", "--out", "out")

    assert code == 2
    assert "there are 2 adapters, but 1 revisions" in err


def test_inspect_is_a_table_for_people(main):
    code, out, err = main("adapters", "inspect", UPPER)

    assert (code, err) == (0, "")
    assert "trained on  tiny_qwen2" in out
    assert "features    -" in out
    assert "model.layers.*.mlp.down_proj     4      8      low rank" in out
    assert "fits" not in out


def test_inspect_names_the_labels_of_a_head_once_it_has_a_base(main, tmp_path):
    arch = ARCHS[0]
    model = arch.model()
    model.save_pretrained(tmp_path / "base")
    folder, _ = make_head_cell(arch, model, HEADS["text labels, every linear layer"], tmp_path / "lora")

    code, out, _ = main("adapters", "inspect", str(folder), "--base", str(tmp_path / "base"))

    assert code == 0
    assert "saved classifier" in out
    assert "sequence-classification: LABEL_0, LABEL_1, LABEL_2" in out


def test_inspect_says_why_an_adapter_does_not_fit(main, rich_adapter):
    _, folder = rich_adapter

    code, out, err = main("adapters", "inspect", str(folder), "--base", MODEL, "--json")

    fit = json.loads(out)["base"]
    assert code == 1
    assert (fit["fits"], fit["sites"]) == (False, [])
    assert fit["problem"] in " ".join(err.split())


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["inspect", "no-such-folder"], "there is no adapter folder 'no-such-folder'"),
        (["inspect", UPPER, "--revision", "v1"], "is a folder, which has no revision 'v1'"),
        (["inspect", UPPER, "--base", "no-such-folder"], "no-such-folder"),
        (["merge", UPPER, "--out", UPPER], "holds files already"),
        (["merge", UPPER, BULLETS, "--out", "out"], "needs equal ranks"),
        (["merge", UPPER, "--out", "out", "--strategy", "tie"], "did you mean 'ties'?"),
        (["merge", UPPER, "--out", "out", "--weight", "1", "--weight", "2"], "1 adapters, but 2 weights"),
        (["merge", UPPER, "--out", "out", "--base", "no-such-folder"], "no-such-folder"),
        (["merge", UPPER, "--out", MODEL, "--base", MODEL, "--overwrite"], "the base's own folder"),
    ],
)
def test_what_cannot_be_done_is_told_on_stderr(main, tmp_path, monkeypatch, arguments, told):
    monkeypatch.chdir(tmp_path)

    code, out, err = main("adapters", *arguments)

    assert (code, out) == (1, "")
    assert told in err
    assert list(tmp_path.iterdir()) == []


def test_merge_combines_as_the_python_face_does(main, tmp_path):
    settings = {"strategy": "svd", "weights": [0.5, -1.5], "rank": 6}
    expected = merge_adapters([UPPER, BULLETS], tmp_path / "expected", **settings)

    code, out, err = main(
        *("adapters", "merge", UPPER, BULLETS, "--out", str(tmp_path / "out"), "--strategy", "svd", "--rank", "6"),
        *("--weight", "0.5", "--weight", "-1.5", "--json"),
    )

    assert (code, err) == (0, "")
    assert json.loads(out)["merged"] == {
        "path": str(tmp_path / "out"),
        "strategy": "svd",
        "modules": 28,
        "ranks": [6],
        "notes": [],
    }
    assert read_peft(tmp_path / "out").identity() == read_peft(expected.path).identity()


def test_every_option_of_merge_arrives(main, tmp_path):
    settings = {"strategy": "dare_ties", "density": 0.5, "seed": 3, "majority_sign_method": "frequency"}
    expected = merge_adapters([UPPER, UPPER, UPPER], tmp_path / "out", **settings)
    identity = read_peft(expected.path).identity()
    (tmp_path / "out/mine.txt").write_text("mine")

    code, out, _ = main(
        *("adapters", "merge", UPPER, UPPER, UPPER, "--out", str(tmp_path / "out"), "--strategy", "dare_ties"),
        *("--density", "0.5", "--seed", "3", "--majority-sign", "frequency", "--overwrite"),
    )

    assert code == 0
    assert "modules   28" in out
    assert read_peft(tmp_path / "out").identity() == identity
    assert not (tmp_path / "out/mine.txt").exists()


def test_merge_into_a_base_takes_one_adapter_as_it_is(main, rich_adapter, tmp_path):
    base, folder = rich_adapter

    code, out, _ = main("adapters", "merge", str(folder), "--base", str(base), "--out", str(tmp_path / "out"), "--json")

    assert code == 0
    assert "model.norm.weight" in json.loads(out)["merged"]["changed"]  # a saved module has no sum, but a place


def test_merge_into_a_base_combines_several_first(main, tmp_path):
    merge_adapters([UPPER, BULLETS], tmp_path / "both", strategy="cat", weights=[2, 0.5])
    options = ["--base", MODEL, "--out"]
    one_by_one = main("adapters", "merge", str(tmp_path / "both"), *options, str(tmp_path / "expected"))

    code, out, err = main(
        *("adapters", "merge", UPPER, BULLETS, *options, str(tmp_path / "out"), "--strategy", "cat"),
        *("--weight", "2", "--weight", "0.5"),
    )

    assert one_by_one[0] == 0
    assert (code, err) == (0, "")
    assert "changed   28 tensors" in out
    ids = torch.tensor([[5, 9, 2, 77]])
    found, expected, base = (
        hf.AutoModelForCausalLM.from_pretrained(folder)(ids).logits
        for folder in (tmp_path / "out", tmp_path / "expected", MODEL)
    )
    assert (found - expected).abs().max() < 1e-4
    assert (found - base).abs().max() > 0.1


def test_one_adapter_is_weighted_on_its_way_into_a_base(main, tmp_path):
    main("adapters", "merge", UPPER, "--base", MODEL, "--out", str(tmp_path / "out"), "--weight", "0")

    merged, base = (load_file(folder / "model.safetensors") for folder in (tmp_path / "out", Path(MODEL)))
    assert all(torch.equal(merged[name], tensor) for name, tensor in base.items())


def test_notes_are_told_on_stderr(main, tmp_path):
    model = make_qwen2_model(tie_word_embeddings=True)
    model.save_pretrained(tmp_path / "base")
    folder = saved(trained(model, 1, target_modules=["lm_head"]), tmp_path / "lora")

    code, out, err = main(
        "adapters", "merge", str(folder), "--base", str(tmp_path / "base"), "--out", str(tmp_path / "out")
    )

    assert code == 0
    assert "tie_word_embeddings" not in out
    assert "note: 'model.embed_tokens.weight' and 'lm_head.weight' shared one weight" in err
    assert "tie_word_embeddings: false" in err
