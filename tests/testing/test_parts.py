"""The kit's own parts: its measure, its inputs, its random checkpoints."""

from __future__ import annotations

import math

import pytest
import torch
from transformers import OPTConfig, OPTForCausalLM

from lorax_core.plugins.resolve import load_cases
from lorax_core.testing import CheckFailed
from lorax_core.testing.case import Case
from lorax_core.testing.compare import Worst, tolerance
from lorax_core.testing.inputs import Input, make_inputs
from lorax_core.testing.lora import LoraOptions, linear_layers, merged, write_adapter
from lorax_core.testing.reference import build, expect, quiet, randomise, reload
from lorax_core.types import Task


@pytest.fixture
def case(make_spec, host, tmp_path):
    spec = make_spec("qwen2")
    return Case(spec, load_cases(spec, None), host, "base", tmp_path)


# --- the measure ---


def test_the_error_is_a_share_of_the_largest_number_of_its_kind():
    worst = Worst(1e-3)
    worst.see("logits", "of one", torch.tensor([1.0, 2.5]), torch.tensor([1.0, 2.0]))
    worst.see("logits", "of another", torch.tensor([100.0]), torch.tensor([100.0]))
    worst.see("hidden rows", "of one", torch.tensor([1.001]), torch.tensor([1.0]))

    measured = worst.measured()

    assert measured.error == pytest.approx(0.005)
    assert measured.note == "largest: logits of one"
    assert not measured.ok


def test_equal_numbers_have_no_difference():
    worst = Worst(0.0)
    worst.see("rows", "here", torch.zeros(2), torch.zeros(2))

    assert worst.measured().ok
    assert worst.measured().note == "no difference"


def test_what_is_not_finite_is_never_near():
    worst = Worst(1.0)
    worst.see("rows", "here", torch.tensor([float("nan")]), torch.tensor([1.0]))
    worst.see("rows", "there", torch.tensor([1.0]), torch.tensor([1.0]))

    assert worst.measured().error == math.inf
    assert worst.measured().note == "not finite: rows here"


def test_another_shape_and_nothing_at_all_are_failures():
    with pytest.raises(CheckFailed, match=r"shape \[2\] where \[3\] belongs"):
        Worst(1.0).see("rows", "here", torch.zeros(2), torch.zeros(3))
    with pytest.raises(CheckFailed, match="nothing was compared"):
        Worst(1.0).measured()


# --- inputs ---


def test_inputs_are_of_one_token_of_a_few_and_of_as_many_as_there_may_be():
    inputs = make_inputs(vocab=50, types=2, max_tokens=64, pad=None)

    assert [len(tokens) for tokens in inputs] == [1, 2, 5, 17, 40, 64]
    assert all(len(tokens.types) == len(tokens) for tokens in inputs)
    assert {kind for tokens in inputs for kind in tokens.types} == {0, 1}


def test_no_input_is_longer_than_the_model_or_than_tests_need():
    assert len(make_inputs(vocab=50, types=1, max_tokens=9000, pad=None)[-1]) == 288
    assert [len(tokens) for tokens in make_inputs(vocab=50, types=1, max_tokens=4, pad=None)] == [1, 2, 4]


def test_padding_stands_in_one_input_only_inside_and_at_the_end():
    inputs = make_inputs(vocab=50, types=1, max_tokens=64, pad=7)

    (padded,) = [tokens for tokens in inputs if 7 in tokens.ids]
    assert [at for at, token in enumerate(padded.ids) if token == 7] == [4, 8]


# --- checkpoints ---


def test_every_tensor_of_a_checkpoint_is_random(case):
    from safetensors.torch import load_file

    tensors = load_file(case.checkpoint(Task.GENERATE) / "model.safetensors")

    for name, tensor in tensors.items():
        assert tensor.std() > 0.1, name
        assert (tensor == 0).sum() + (tensor == 1).sum() < 3, name
    norm = tensors["model.norm.weight"]
    assert 0.4 <= norm.min() < norm.max() <= 1.6
    assert (norm - 1).abs().mean() > 0.2


def test_norms_that_add_one_to_their_weight_get_weights_about_zero(make_spec, host, tmp_path):
    spec = make_spec("gemma2")
    case = Case(spec, load_cases(spec, None), host, "base", tmp_path)

    weight = case.reference(Task.GENERATE).model.norm.weight

    assert -0.6 <= weight.min() < weight.max() <= 0.6
    assert weight.abs().mean() > 0.2


def test_matrices_are_as_large_as_the_config_asks(make_spec, host, tmp_path):
    spec = make_spec(
        "qwen2", tiny_config={**load_cases(make_spec("qwen2"), None).tiny_config, "initializer_range": 0.05}
    )
    case = Case(spec, load_cases(spec, None), host, "base", tmp_path)

    assert case.reference(Task.EMBED).layers[0].mlp.up_proj.weight.std().item() == pytest.approx(0.05, rel=0.1)


def test_the_oracle_answers_in_float64_wherever_its_code_asks_for_float32(case):
    exact, rounded = case.exact(Task.GENERATE), case.reference(Task.GENERATE)
    # A norm of transformers goes to float32 and back; in float64 its result has digits that float32 lacks.
    seen = []
    hook = exact.model.layers[0].input_layernorm.register_forward_hook(lambda *given: seen.append(given[2]))
    wide = case.expect(exact, case.inputs[2:3])[0].hidden
    hook.remove()

    assert not torch.equal(seen[0].float().double(), seen[0])
    apart = (wide - case.expect(rounded, case.inputs[2:3])[0].hidden).abs().max() / wide.abs().max()
    assert 0 < apart < 1e-5


def test_angles_are_those_of_float32_in_both(case):
    exact, rounded = case.exact(Task.GENERATE), case.reference(Task.GENERATE)
    found = {}
    for oracle in (exact, rounded):
        hook = oracle.model.rotary_emb.register_forward_hook(lambda *given, key=oracle: found.update({key: given[2]}))
        case.expect(oracle, case.inputs[-1:])
        hook.remove()

    assert torch.equal(found[exact][0], found[rounded][0].double())


def test_an_oracle_that_takes_no_float64_answers_in_float32(make_spec, host, tmp_path):
    spec = make_spec("gpt2", variants={"upcast": {"reorder_and_upcast_attn": True}})
    case = Case(spec, load_cases(spec, None), host, "upcast", tmp_path)

    assert case.exact(Task.EMBED) is case.reference(Task.EMBED)
    assert case.loss < 1e-4


def test_what_the_oracle_loses_widens_the_tolerance(make_spec, host, tmp_path):
    spec = make_spec("gpt2")
    rough = Case(spec, load_cases(spec, None), host, "rough", tmp_path)

    assert 2e-5 < rough.loss < 2.5e-4
    assert rough.tolerance == 4 * rough.loss


def test_what_is_lost_in_float32_widens_the_tolerance_of_16_bit_as_much():
    # qwen2's yarn_rope: a right model is 0.051 of the largest number away from the reference in float16
    assert 0.06 < tolerance(torch.float16, 1.75e-5) < 0.08
    assert tolerance(torch.float16, 3.8e-6) == 4e-2
    assert tolerance(torch.float32, 3.8e-6) == 2e-5


def test_tied_weights_stay_tied(make_spec, host, tmp_path):
    spec = make_spec("qwen2")
    tied = Case(spec, load_cases(spec, None), host, "tied", tmp_path)

    oracle = tied.reference(Task.GENERATE)

    assert oracle.lm_head.weight is oracle.model.embed_tokens.weight


def test_making_checkpoints_leaves_the_process_as_it_was(case, tmp_path):
    from transformers.utils import logging

    before = torch.get_rng_state(), logging.get_verbosity(), logging.is_progress_bar_enabled()

    build(case.cases, Task.EMBED, case.config, tmp_path / "one", seed=1)
    reload(case.cases, Task.EMBED, tmp_path / "one")

    assert torch.equal(torch.get_rng_state(), before[0])
    assert (logging.get_verbosity(), logging.is_progress_bar_enabled()) == before[1:]


def test_one_seed_gives_one_checkpoint(case):
    first, second = torch.nn.Linear(3, 3), torch.nn.Linear(3, 3)

    randomise(first, 5)
    randomise(second, 5)

    assert torch.equal(first.weight, second.weight)
    assert torch.equal(first.bias, second.bias)


# --- adapters ---


def test_our_merge_is_that_of_peft(case, tmp_path):
    from peft import PeftModel

    oracle = case.reference(Task.GENERATE)
    recipe = LoraOptions(rank=3, alpha=5, rslora=True)
    folder = write_adapter(linear_layers(oracle, ()), recipe, tmp_path / "adapter", seed=0)

    ours = merged(oracle, folder, recipe).state_dict()
    with quiet():
        theirs = PeftModel.from_pretrained(
            reload(case.cases, Task.GENERATE, case.checkpoint(Task.GENERATE)), str(folder)
        )
        theirs = theirs.merge_and_unload().state_dict()

    assert ours.keys() == theirs.keys()
    assert all(torch.allclose(ours[name], theirs[name], atol=1e-6) for name in ours)
    assert not torch.equal(ours["lm_head.weight"], oracle.lm_head.weight)


def test_hidden_rows_are_seen_where_a_head_calls_the_decoder_inside_of_the_base_model():
    sizes = {"hidden_size": 16, "ffn_dim": 8, "num_attention_heads": 2, "num_hidden_layers": 1, "vocab_size": 32}
    model = OPTForCausalLM(OPTConfig(**sizes)).eval()
    ids = (5, 9, 3)

    found = expect(model, Input(ids, (0, 0, 0)), types=False)

    with torch.inference_mode():
        torch.testing.assert_close(found.hidden, model.model(torch.tensor([ids])).last_hidden_state[0].double())
