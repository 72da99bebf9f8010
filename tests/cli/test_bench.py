"""`lorax bench`: what it measures and prints. How fast anything is, is not tested."""

from __future__ import annotations

import json
import sys

import pytest
from builders import make_lora, make_qwen2, make_qwen2_model
from safetensors.torch import load_file

import lorax_core
from lorax_core.cli.measuring import Figures, Workload, decode_rate, gaps, measure, percentiles, prompts_of, read_rate
from lorax_core.progress import silent

FEW = ("--prompt-tokens", "5", "--max-tokens", "3", "--repeats", "1")


def test_a_model_that_generates_has_rates_latencies_and_its_share_of_the_memory_s_limit(main, qwen2, tmp_path):
    adapter = make_lora(make_qwen2_model(), tmp_path / "adapter")

    code, out, _ = main("bench", str(qwen2), "--adapter", f"one={adapter}", "--concurrency", "3,1", "--json", *FEW)

    found = json.loads(out)
    assert code == 0
    assert (found["adapters"], found["prompt_tokens"], found["max_tokens"], found["device"]) == (["one"], 5, 3, "cpu")
    assert [one["concurrency"] for one in found["figures"]] == [1, 3]
    for one in found["figures"]:
        assert one["prompt_tokens_per_second"] > 0
        # Events may come together, and then there is no rate.
        assert (one["decode_tokens_per_second"] is None) == (one["memory_share"] is None)
        assert one["first_token_ms"]["p50"] <= one["first_token_ms"]["p99"]
        assert "further_token_ms" in one


def test_an_encoder_embeds(main, bert):
    code, out, err = main("bench", str(bert), "--concurrency", "2", *FEW)

    heading, row = out.splitlines()
    assert code == 0
    assert heading.split("  ")[-1].strip() == "TEXTS/S"
    assert row.startswith("2 ")
    assert "model type: bert" in err


def test_a_plot_is_a_picture(main, qwen2, tmp_path):
    code, _, _ = main("bench", str(qwen2), "--concurrency", "1,2", "--plot", str(tmp_path / "rates.png"), *FEW)

    assert code == 0
    assert (tmp_path / "rates.png").read_bytes().startswith(b"\x89PNG")


def test_a_plot_without_matplotlib_is_refused_before_anything_is_measured(main, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)

    code, out, err = main("bench", "no such folder", "--plot", "rates.png")

    assert (code, out) == (1, "")
    assert "pip install 'lorax-core[bench]'" in err


@pytest.mark.parametrize(
    ("options", "code", "complaint"),
    [
        (["--concurrency", "1,many"], 2, "is not a list of numbers"),
        (["--concurrency", "10000000000"], 2, "from 1 to 4,096 requests"),
        (["--concurrency", "0"], 2, "from 1 to 4,096 requests"),
        (["--plot", "no/such/folder/rates.png"], 2, "there is no folder"),
        (["--plot", "rates.gif"], 2, "is no .png"),
        (["--max-tokens", "100000"], 1, "lower --prompt-tokens or --max-tokens"),
    ],
)
def test_what_cannot_be_measured_is_refused(main, qwen2, options, code, complaint):
    found, out, err = main("bench", str(qwen2), *options)

    assert (found, out) == (code, "")
    assert complaint in " ".join(err.split())


def test_prompts_are_random_and_adapters_take_turns(qwen2):
    import random

    with lorax_core.load(qwen2) as engine:
        made = prompts_of(5, Workload(16, 1, adapters=("a", "b")), engine, random.Random(0))
        vocab = engine.info().vocab_size

    assert [adapter for _, adapter in made] == ["a", "b", "a", "b", "a"]
    assert len({tuple(prompt) for prompt, _ in made}) == 5
    assert {len(prompt) for prompt, _ in made} == {16}
    assert all(0 <= token < vocab for prompt, _ in made for token in prompt)


def test_each_number_of_requests_is_measured_once_after_a_run_to_warm_up():
    asked = []

    class Noted:
        def figures(self, count, repeats):
            asked.append((count, repeats))
            return Figures(count, 1.0)

    found = measure(Noted(), [8, 2, 8], 3, silent)

    assert asked == [(2, 1), (2, 3), (8, 3)]
    assert [one.concurrency for one in found] == [2, 8]


@pytest.mark.parametrize("tied", [True, False])
def test_what_every_step_reads_are_all_matrices_but_an_untied_table(tmp_path, tied):
    folder = make_qwen2(tmp_path, tie_word_embeddings=tied)
    stored = load_file(folder / "model.safetensors")
    matrices = [tensor for name, tensor in stored.items() if tensor.ndim == 2 and (tied or "embed_tokens" not in name)]

    with lorax_core.load(folder, linear_methods={"*": "plain"}) as engine:
        found = engine.info().linear_bytes

    assert found == sum(tensor.nbytes for tensor in matrices)


def test_percentiles_are_of_the_nearest_rank_in_milliseconds():
    assert percentiles([one / 1_000 for one in range(1, 101)]) == {"p50": 50.0, "p90": 90.0, "p99": 99.0}
    assert percentiles([one / 1_000 for one in range(1, 8)]) == {"p50": 4.0, "p90": 7.0, "p99": 7.0}
    assert percentiles([0.002]) == {"p50": 2.0, "p90": 2.0, "p99": 2.0}


def test_tokens_that_come_together_share_the_time_that_they_took():
    assert gaps([(1.0, 1), (2.0, 1), (5.0, 3)]) == [1.0, 1.0, 1.0, 1.0]
    assert percentiles(gaps([(1.0, 4)])) is None


def test_the_rate_of_decoding_is_that_of_streams_that_all_decode():
    early = [(0.0, 1), (1.0, 1), (2.0, 1), (3.0, 1)]
    late = [(1.1, 1), (2.1, 1), (3.1, 2), (8.0, 1)]

    assert decode_rate([early]) == 1.0
    assert decode_rate([early, late]) == pytest.approx(1.0 + 1.5)  # from 1 to 3 alone
    assert decode_rate([[(0.0, 1), (1.0, 1)], [(0.1, 1), (1.1, 1)]]) == pytest.approx(2.0)
    assert decode_rate([[(1.0, 4)]]) is None
    assert decode_rate([[(0.0, 1), (1.0, 1)], [(2.0, 1), (3.0, 1)]]) is None


def test_memory_is_read_at_some_rate():
    assert read_rate("cpu") > 1e8
