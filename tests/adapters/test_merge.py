"""Adapters combined into one, against PEFT's `add_weighted_adapter`."""

from __future__ import annotations

import copy
import math
import warnings

import pytest
import torch
from builders import change_json, change_tensors, make_lora, make_qwen2_model
from matrix import ARCHS, TEXTS, answers, saved, trained
from peft import PeftModel
from peft.utils import merge_utils

import lorax_core as lorax
from lorax_core.adapters.formats.peft import read_peft
from lorax_core.adapters.merging.combining import STRATEGIES, seeded_mask
from lorax_core.adapters.merging.merge import combine, merge_adapters, merge_options
from lorax_core.errors import AdapterError

TOLERANCE = 1e-5
PRECISE = ("svd", "cat")
SETTINGS = {
    "linear": {},
    "ties": {"density": 0.6},
    "dare_linear": {"density": 0.6, "seed": 5},
    "dare_ties": {"density": 0.7, "seed": 5, "majority_sign_method": "frequency"},
    "svd": {},
    "cat": {},
}


def make_adapters(model, folder, *options):
    """A random adapter for each of the options, trained on copies of the model."""
    return [
        saved(trained(copy.deepcopy(model), seed, **some), folder / f"lora{seed}")
        for seed, some in enumerate(options, start=1)
    ]


def on_peft(model, folders):
    """A copy of the model with all adapters on it, by number."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        lora = PeftModel.from_pretrained(copy.deepcopy(model), str(folders[0]), adapter_name="0")
        for at, folder in enumerate(folders[1:], start=1):
            lora.load_adapter(str(folder), adapter_name=str(at))
    return lora.eval()


def by_peft(model, folders, strategy, weights, *, seed=0, rank=None, **settings):
    """PEFT's own merged adapter, active on a copy of the model."""
    lora = on_peft(model, folders)
    with warnings.catch_warnings(), pytest.MonkeyPatch.context() as patch:
        warnings.simplefilter("ignore")
        if strategy.startswith("dare"):
            chosen = merge_options(folders, strategy, weights, seed=seed, **settings)
            patch.setattr(merge_utils, "random_pruning", with_our_masks(folders, chosen))
        names = [str(at) for at in range(len(folders))]
        lora.add_weighted_adapter(names, weights, "merged", combination_type=strategy, svd_rank=rank, **settings)
    lora.set_adapter("merged")
    return lora


def with_our_masks(folders, options):
    """PEFT's random pruning with the masks that our seed draws for the same tensors: streams of random numbers are our own."""
    draw, masks = seeded_mask(options.seed), {}

    def recorded(tensor, density):
        masks[tensor.contiguous().numpy().tobytes()] = mask = draw(tensor, density)
        return mask

    combine([read_peft(folder) for folder in folders], options, mask=recorded)

    def pruned(tensor, density, rescale):
        mask = masks[tensor.detach().contiguous().numpy().tobytes()]
        return tensor * mask / density if rescale else tensor * mask

    return pruned


def from_files(model, folder):
    """PEFT's own reading of a folder, which has nothing to warn of."""
    return PeftModel.from_pretrained(copy.deepcopy(model), str(folder)).eval()


def deltas(folder):
    """What a folder's adapter adds to the weight of each module."""
    files = read_peft(folder)
    found = {}
    for module, tensors in files.modules.items():
        a, b = (tensors.a, tensors.b) if tensors.a is not None else (tensors.embedding_a, tensors.embedding_b)
        found[module] = files.settings.scale(module, a.shape[0]) * b.float() @ a.float()
    return found


def peft_deltas(lora, name="merged"):
    """The same of an adapter in PEFT's memory."""
    found = {}
    for path, layer in lora.base_model.model.named_modules():
        for one, other in (("lora_A", "lora_B"), ("lora_embedding_A", "lora_embedding_B")):
            if name in getattr(layer, one, {}):
                a, b = (getattr(layer, which)[name] for which in (one, other))
                a, b = (getattr(which, "weight", which) for which in (a, b))
                found[path] = (layer.scaling[name] * b @ a).detach()
    return found


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for module, theirs in expected.items():
        assert (found[module] - theirs).abs().max() <= TOLERANCE * theirs.abs().max(), module


@pytest.fixture(scope="module", params=ARCHS[:5], ids=lambda arch: arch.name)
def trio(request, tmp_path_factory):
    """A model and adapters that overlap: by rank 4 on two layers, by rank 4 on one and the embedding, by rank 3."""
    arch, folder = request.param, tmp_path_factory.mktemp("trio")
    model = arch.model()
    model.save_pretrained(folder / "base")
    adapters = make_adapters(
        model,
        folder,
        {"target_modules": [arch.part, arch.dense], "r": 4, "lora_alpha": 6},
        {"target_modules": [arch.dense, arch.embedding], "r": 4, "lora_alpha": 2, "use_rslora": True},
        {
            "target_modules": [arch.part, arch.dense],
            "r": 3,
            "rank_pattern": {arch.dense: 2},
            "alpha_pattern": {rf".*\.0\..*{arch.dense}": 3},
        },
    )
    return model, folder / "base", adapters


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_the_numbers_are_peft_s(trio, tmp_path, host, strategy):
    model, base, adapters = trio
    adapters = adapters if strategy in PRECISE else adapters[:2]
    weights = [0.7, -0.4, 1.3][: len(adapters)]
    expected = by_peft(model, adapters, strategy, weights, **SETTINGS[strategy])

    done = merge_adapters(adapters, tmp_path / "out", strategy=strategy, weights=weights, **SETTINGS[strategy])

    assert_same(deltas(done.path), peft_deltas(expected))
    reloaded = [vector for _, vector in answers(from_files(model, done.path))["embed"]]
    with lorax.load(base, adapters={"merged": done.path}, pooling="mean", host=host) as engine:
        ours = [torch.from_numpy(engine.embed(ids, adapter="merged")) for ids in TEXTS]
    for (_, theirs), *found in zip(answers(expected)["embed"], reloaded, ours, strict=True):
        assert max((one - theirs).abs().max() for one in found) <= TOLERANCE * theirs.abs().max()


@pytest.fixture(scope="module")
def model():
    return make_qwen2_model()


@pytest.fixture(scope="module")
def pair(model, tmp_path_factory):
    """Two plain adapters of the same modules and rank."""
    folder = tmp_path_factory.mktemp("pair")
    return [make_lora(model, folder / str(seed), seed, target_modules=["q_proj", "down_proj"]) for seed in (1, 2)]


def summed(model, folders, weights):
    """The weighted sum of what PEFT adds with each adapter alone."""
    lora = on_peft(model, folders)
    found = {}
    for at, weight in enumerate(weights):
        for module, delta in peft_deltas(lora, str(at)).items():
            found[module] = found.get(module, 0) + weight * delta
    return found


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (
            {"use_rslora": True},
            {},
        ),  # PEFT gives the result the first one's `use_rslora`, so it comes out twice as large
        ({"layers_to_transform": [0]}, {}),  # and its `layers_to_transform`, so the other one loses layers
        ({"exclude_modules": ["q_proj"]}, {}),
        (
            {"target_modules": r".*\.1\..*q_proj"},
            {"target_modules": ["down_proj"]},
        ),  # which PEFT does not take together
        ({"target_modules": ["v_proj"]}, {"target_modules": "all-linear", "r": 2}),
    ],
    ids=["rslora", "layers", "excluded", "a pattern and a list", "other modules"],
)
@pytest.mark.parametrize("strategy", PRECISE)
def test_an_exact_sum_is_exact_whatever_the_settings(model, tmp_path, strategy, first, second):
    options = [{"r": 4, "target_modules": ["q_proj", "down_proj"], **some} for some in (first, second)]
    adapters = make_adapters(model, tmp_path, *options)
    rank = {"rank": 64} if strategy == "svd" else {}

    done = merge_adapters(adapters, tmp_path / "out", strategy=strategy, weights=[0.5, -2], **rank)

    expected = summed(model, adapters, [0.5, -2])
    assert_same(deltas(done.path), expected)
    assert_same(peft_deltas(from_files(model, done.path), "default"), expected)


def test_without_weights_every_adapter_counts_fully(model, pair, tmp_path):
    done = merge_adapters(pair, tmp_path / "out", strategy="cat")

    assert_same(deltas(done.path), summed(model, pair, [1, 1]))
    assert (done.modules, done.ranks) == (4, (8,))


@pytest.mark.parametrize("rank", [1, 3, 200])
def test_svd_keeps_as_many_ranks_as_are_asked_for(model, pair, tmp_path, rank):
    done = merge_adapters(pair, tmp_path / "out", strategy="svd", weights=[1, 0.5], rank=rank)

    whole = summed(model, pair, [1, 0.5])
    assert done.ranks == (min(rank, 8),)
    for module, delta in deltas(done.path).items():
        values = torch.linalg.svdvals(whole[module])
        off = torch.linalg.matrix_norm(delta - whole[module])
        assert off == pytest.approx(math.sqrt((values[min(rank, 8) :] ** 2).sum()), abs=1e-4)


def test_one_adapter_alone_is_pruned_as_asked_for(pair, tmp_path):
    done = merge_adapters(pair[:1], tmp_path / "out", strategy="ties", density=0.25)  # PEFT silently takes 'linear'

    for tensors in read_peft(done.path).modules.values():
        assert int((tensors.a != 0).sum()) == tensors.a.numel() // 4


@pytest.mark.parametrize("method", ["total", "frequency"])
@pytest.mark.parametrize("density", [0.3, 1])
@pytest.mark.parametrize("strategy", ["ties", "dare_ties"])
def test_the_majority_is_counted_as_peft_counts_it(model, tmp_path, strategy, density, method):
    adapters = make_adapters(model, tmp_path, *[{"target_modules": ["q_proj"]}] * 3)
    settings = {"density": density, "majority_sign_method": method}
    expected = by_peft(model, adapters, strategy, [1, 2, -1], **settings)

    done = merge_adapters(adapters, tmp_path / "out", strategy=strategy, weights=[1, 2, -1], **settings)

    assert_same(deltas(done.path), peft_deltas(expected))


def test_seeds_decide_and_torch_s_own_numbers_are_not_touched(pair, tmp_path):
    before = torch.get_rng_state()

    one, again, other = (
        deltas(merge_adapters(pair, tmp_path / name, strategy="dare_linear", density=0.5, seed=seed).path)
        for name, seed in (("one", 3), ("again", 3), ("other", 4))
    )

    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(one[module], again[module]) for module in one)
    assert not any(torch.equal(one[module], other[module]) for module in one)


def test_half_precision_files_are_combined_in_float32(model, pair, tmp_path):
    halves = []
    for folder in pair:
        halves.append(tmp_path / folder.name)
        merge_adapters([folder], halves[-1])
        change_tensors(halves[-1] / "adapter_model.safetensors", lambda found: {k: t.half() for k, t in found.items()})

    done = merge_adapters(halves, tmp_path / "out", weights=[0.5, 3])

    assert_same(deltas(done.path), peft_deltas(by_peft(model, halves, "linear", [0.5, 3])))


def test_a_base_weight_that_all_save_is_carried_along(tmp_path):
    model = make_qwen2_model()
    adapters = make_adapters(model, tmp_path, *[{"target_modules": ["embed_tokens"]}] * 2)
    name, weight = "base_model.model.model.embed_tokens.base_layer.weight", model.model.embed_tokens.weight.detach()
    for folder in adapters:
        change_tensors(folder / "adapter_model.safetensors", lambda found: {**found, name: weight})

    done = merge_adapters(adapters, tmp_path / "out")

    assert torch.equal(read_peft(done.path).modules["model.embed_tokens"].weight, weight)
    change_tensors(adapters[1] / "adapter_model.safetensors", lambda found: {**found, name: weight + 1})
    with pytest.raises(AdapterError, match=r"same base weight under 'model\.embed_tokens'"):
        merge_adapters(adapters, tmp_path / "other")


NO_SUM = {
    "DoRA": ({"use_dora": True}, "a DoRA magnitude for 'model.layers.0.self_attn.q_proj'"),
    "lora_bias": ({"lora_bias": True}, "a bias of lora_B (lora_bias) for 'model.layers.0.self_attn.q_proj'"),
    "bias": ({"bias": "lora_only"}, "a bias for 'model.layers.0.self_attn.q_proj'"),
    "saved module": ({"modules_to_save": ["model.norm"]}, "(modules_to_save) or a head for 'model.norm'"),
    "trained tokens": ({"trainable_token_indices": [3]}, "trained token rows for 'model.embed_tokens'"),
}


@pytest.mark.parametrize(("options", "named"), NO_SUM.values(), ids=NO_SUM)
@pytest.mark.parametrize("at", [0, 1])
def test_what_has_no_sum_is_refused_by_name(model, pair, tmp_path, options, named, at):
    (odd,) = make_adapters(model, tmp_path, {"target_modules": ["q_proj"], **options})
    adapters = [odd, pair[0]] if at == 0 else [pair[0], odd]

    with pytest.raises(AdapterError) as caught:
        merge_adapters(adapters, tmp_path / "out", strategy="cat")

    assert named in caught.value.message
    assert str(odd) in caught.value.message
    assert not (tmp_path / "out").exists()


REFUSED = {
    "no such strategy": ({"strategy": "tie"}, "there is no strategy 'tie'.*did you mean 'ties'"),
    "no such method": (
        {"strategy": "ties", "density": 0.5, "majority_sign_method": "sum"},
        "majority_sign_method 'sum'",
    ),
    "too few weights": ({"weights": [1]}, r"2 adapters, but 1 weights: \[1\]"),
    "a weight that is no number": ({"weights": [1, math.nan]}, "nan"),
    "no density": ({"strategy": "dare_ties"}, "'dare_ties' needs a density"),
    "density for others": ({"density": 0.5}, "'linear' takes no density"),
    "density 0": ({"strategy": "ties", "density": 0}, "density is above 0 and at most 1; this is 0"),
    "density above 1": ({"strategy": "ties", "density": 1.5}, "this is 1.5"),
    "nothing kept": ({"strategy": "ties", "density": 1e-4}, "keeps none of the 384 numbers.*at least 1/384"),
    "a seed for others": ({"strategy": "ties", "density": 0.5, "seed": 1}, "'ties' takes no seed"),
    "a rank for others": ({"strategy": "cat", "rank": 3}, "'cat' takes no rank"),
    "no rank": ({"strategy": "svd", "rank": 0}, "rank is at least 1"),
}


@pytest.mark.parametrize(("settings", "told"), REFUSED.values(), ids=REFUSED)
def test_settings_that_do_not_fit_are_refused(pair, tmp_path, settings, told):
    with pytest.raises(AdapterError, match=rf"(?s){told}"):
        merge_adapters(pair, tmp_path / "out", **settings)

    assert list(tmp_path.iterdir()) == []


def test_nothing_to_merge_is_refused(tmp_path):
    with pytest.raises(AdapterError, match="there is no adapter to merge"):
        merge_adapters([], tmp_path / "out")


def test_ranks_that_differ_are_refused_where_factors_are_summed(model, pair, tmp_path):
    (odd,) = make_adapters(model, tmp_path, {"target_modules": ["q_proj"], "r": 3})

    with pytest.raises(AdapterError, match=r"needs equal ranks, but '.*q_proj' has rank 4 in .* and 3 in"):
        merge_adapters([pair[0], odd], tmp_path / "out")


def test_adapters_of_different_bases_are_refused(model, pair, tmp_path):
    other = make_lora(make_qwen2_model(hidden_size=128), tmp_path / "wide", target_modules=["q_proj"])
    bare = make_lora(model.model, tmp_path / "bare", target_modules=["v_proj"])

    with pytest.raises(AdapterError, match=r"q_proj' is a layer from 64 to 64 in .* and a layer from 128 to 128"):
        merge_adapters([pair[0], other], tmp_path / "out", strategy="cat")
    with pytest.raises(AdapterError, match=r"calls layers 'layers' and .* calls them 'model.layers'"):
        merge_adapters([pair[0], bare], tmp_path / "out", strategy="cat")


def test_two_towers_of_one_model_are_not_taken_for_two_spellings(model, pair, tmp_path):
    towers = tmp_path / "towers"
    merge_adapters(pair[:1], towers)
    change_tensors(
        towers / "adapter_model.safetensors",
        lambda found: (
            found | {name.replace(".model.layers", ".model.text.model.layers"): t for name, t in found.items()}
        ),
    )
    (short,) = make_adapters(model, tmp_path, {"target_modules": ["q_proj"]})

    done = merge_adapters([towers, short], tmp_path / "out", strategy="cat")

    one, other = deltas(towers), deltas(short)
    assert_same(deltas(done.path), {module: delta + other.get(module, 0) for module, delta in one.items()})


def test_settings_on_which_the_adapters_differ_are_reported(pair, tmp_path):
    adapters = [tmp_path / "a", tmp_path / "b"]
    for folder, source in zip(adapters, pair, strict=True):
        merge_adapters([source], folder)
    change_json(adapters[0] / "adapter_config.json", base_model_name_or_path="first/base", task_type="CAUSAL_LM")
    change_json(adapters[1] / "adapter_config.json", base_model_name_or_path="second/base")

    done = merge_adapters(adapters, tmp_path / "out")

    assert read_peft(done.path).settings.base_model_name_or_path == "first/base"
    assert read_peft(done.path).settings.task_type is None
    assert "'first/base', 'second/base'; written is 'first/base'" in done.notes[0]
    assert "'CAUSAL_LM', None; written is None" in done.notes[1]


def test_a_folder_that_holds_files_is_left_alone_unless_it_may_be_overwritten(model, pair, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/mine.txt").write_text("mine")

    with pytest.raises(AdapterError, match="holds files already"):
        merge_adapters(pair, tmp_path / "out")

    assert (tmp_path / "out/mine.txt").read_text() == "mine"
    with pytest.raises(AdapterError, match="needs equal ranks"):
        merge_adapters(
            [pair[0], *make_adapters(model, tmp_path, {"r": 2, "target_modules": ["q_proj"]})],
            tmp_path / "out",
            overwrite=True,
        )
    assert (tmp_path / "out/mine.txt").read_text() == "mine"
    merge_adapters(pair, tmp_path / "out", overwrite=True)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["lora1", "out"]


def test_progress_is_reported_module_by_module(pair, tmp_path):
    heard = []

    merge_adapters(pair, tmp_path / "out", progress=heard.append)

    assert [(one.stage, one.done, one.total) for one in heard] == [("combining modules", done, 4) for done in range(5)]


def test_a_result_that_would_replace_an_adapter_that_is_read_is_refused(tmp_path):
    one = make_lora(make_qwen2_model(), tmp_path / "out/one", target_modules=["q_proj"])

    for out in (tmp_path / "out", one):
        with pytest.raises(AdapterError, match="is read from, and would be replaced"):
            merge_adapters([one], out, overwrite=True)

    assert (one / "adapter_config.json").exists()


WRONG = {
    "adapters of no type": {"adapters": object()},
    "one adapter": {"adapters": "folder"},
    "adapters of numbers": {"adapters": [1, 2]},
    "no adapters": {"adapters": []},
    "out of no type": {"out": object()},
    "out with a NUL": {"out": "a\0b"},
    "weights of one number": {"weights": 5},
    "weights in words": {"weights": ["a", "b"]},
    "density in words": {"density": "half", "strategy": "ties"},
    "rank in words": {"rank": "four", "strategy": "svd"},
    "strategy of no type": {"strategy": object()},
    "sign of no type": {"majority_sign_method": 5},
}


@pytest.mark.parametrize("changes", WRONG.values(), ids=WRONG)
def test_what_merging_is_given_wrongly_is_an_error_of_ours_and_writes_nothing(tmp_path, changes):
    one = make_lora(make_qwen2_model(), tmp_path / "one", target_modules=["q_proj"])

    with pytest.raises(AdapterError) as caught:
        merge_adapters(**{"adapters": [one, one], "out": tmp_path / "out", **changes})

    assert caught.value.hint
    assert [path.name for path in tmp_path.iterdir()] == ["one"]
