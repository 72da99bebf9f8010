from __future__ import annotations

import os

import numpy as np
import pytest
import torch
from builders import change_json, make_bert, make_lora, make_qwen2, make_qwen2_model, make_sentence_files
from fakes import make_backend_spec, with_backends

import lorax_core as lorax


def refusal(folder, **options):
    with pytest.raises(lorax.LoraxError) as caught:
        lorax.load(folder, **options)
    return caught.value


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"dtype": "int8"}, "dtype: Input should be 'auto', 'float32', 'bfloat16' or 'float16' (found 'int8')"),
        ({"device": "tpu7"}, "'tpu7' is not a device"),
        ({"attention": "flashy"}, "no attention backend is called 'flashy'"),
        ({"pooling": "max"}, "pooling: Input should be 'cls', 'mean' or 'last' (found 'max')"),
        ({"kv_cache_tokens": 0}, "kv_cache_tokens: Input should be greater than or equal to 1 (found 0)"),
        ({"kv_cache_tokens": -16}, "kv_cache_tokens: Input should be greater than or equal to 1 (found -16)"),
        ({"kv_cache_fraction": 1.5}, "kv_cache_fraction: Input should be less than or equal to 1 (found 1.5)"),
        ({"kv_cache_tokens": 32, "kv_cache_pages": 2}, "exclude each other"),
        ({"kv_cache_bytes": 1}, "less than one page"),
        ({"kv_cache_tokens": 10**13}, "a KV cache of 10000000000000 tokens takes"),
        ({"kv_dtype": "int4"}, "kv_dtype: Input should be 'auto' or 'fp8_e4m3' (found 'int4')"),
        ({"max_batch_tokens": 0}, "max_batch_tokens: Input should be greater than or equal to 1 (found 0)"),
        ({"max_batch_rows": -1}, "max_batch_rows: Input should be greater than or equal to 1 (found -1)"),
        ({"threads": 0}, "threads: Input should be greater than or equal to 1 (found 0)"),
        ({"speculate": -1}, "speculate: Input should be greater than or equal to 0 (found -1)"),
        ({"embedding_dim": 256}, "2_Dense_256"),
    ],
)
def test_an_option_that_cannot_be_is_refused_with_its_value(qwen2, options, told):
    assert told in refusal(qwen2, **options).message


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_refused_with_the_way_out(qwen2):
    error = refusal(qwen2, device="cuda")

    assert "'cuda'" in error.message
    assert "cpu" in error.hint


def test_a_cache_for_a_model_that_has_none_is_refused(bert):
    assert "no KV cache" in refusal(bert, kv_cache_tokens=64).message


def test_a_cache_larger_than_the_memory_is_told_with_what_fits(qwen2):
    error = refusal(qwen2, kv_cache_tokens=10**13)

    assert isinstance(error, lorax.CapacityError)
    assert "GB are free" in error.message
    assert error.hint.startswith("kv_cache_tokens=")


@pytest.mark.parametrize(
    ("options", "tokens"),
    [
        ({"kv_cache_tokens": 100}, 112),  # whole pages of 16
        ({"kv_cache_pages": 5}, 80),
        ({"kv_cache_bytes": 3 * 16 * 2 * 2 * 2 * 16 * 4}, 48),
        ({}, 65_536),
    ],
)
def test_the_cache_has_the_size_that_was_asked_for(qwen2, options, tokens):
    with lorax.load(qwen2, **options) as engine:
        assert engine.info().kv_cache_tokens == tokens


def test_the_threads_of_a_process_are_one_number_for_all_engines(qwen2):
    with lorax.load(qwen2, threads=1, kv_cache_tokens=64) as engine, lorax.load(qwen2, threads=1, kv_cache_tokens=64):
        error = refusal(qwen2, threads=2)

        assert isinstance(error, lorax.RequestError)
        assert "threads=2" in error.message
        assert "threads=1" in error.hint
        assert torch.get_num_threads() == 1
        assert len(engine.generate([5], max_tokens=1).token_ids) == 1


def test_more_threads_than_a_machine_can_start_are_refused_with_how_many_it_has(qwen2):
    before = torch.get_num_threads()

    error = refusal(qwen2, threads=8 * (os.cpu_count() or 1) + 1)

    assert isinstance(error, lorax.RequestError)
    assert f"this machine has {os.cpu_count()} cores" in error.message
    assert f"threads={os.cpu_count()}" in error.hint
    assert torch.get_num_threads() == before


def test_sixteen_bits_become_thirty_two_where_the_processor_has_no_fast_ones(tmp_path):
    folder = make_qwen2(tmp_path)
    change_json(folder / "config.json", dtype="float16")

    with (
        lorax.load(folder, kv_cache_tokens=64) as kept,
        lorax.load(folder, kv_cache_tokens=64, dtype="bfloat16") as asked,
    ):
        assert kept.info().dtype == "float32"
        assert asked.info().dtype == "bfloat16"
        assert len(asked.generate([5], max_tokens=3, ignore_eos=True).token_ids) == 3


def test_the_backend_asked_for_is_used_and_those_passed_over_are_reported(qwen2, host):
    host = with_backends(
        host,
        make_backend_spec("absent", "AbsentBackend", priority=11),
        make_backend_spec("stumbling", "StumblingBackend", priority=-1),
    )

    with (
        lorax.load(qwen2, host=host, kv_cache_tokens=64) as default,
        lorax.load(qwen2, host=host, kv_cache_tokens=64, attention="stumbling") as asked,
    ):
        assert default.info().attention == "native"
        elsewhere = "runs on 'cuda', not on 'cpu'"
        passed = {"flashinfer": elsewhere, "flash_attn": elsewhere, "absent": "its library is not installed"}
        assert dict(default.info().passed_over) == passed
        assert asked.info().attention == "stumbling"


def test_adapters_are_loaded_with_the_engine(qwen2, tmp_path):
    folder = make_lora(make_qwen2_model(), tmp_path)

    with lorax.load(qwen2, adapters={"it": folder}, kv_cache_tokens=64) as engine:
        assert [adapter.name for adapter in engine.adapters.list()] == ["it"]


def test_pooling_and_normalisation_may_be_overridden_and_the_rest_of_the_files_stays(tmp_path):
    folder = make_sentence_files(make_bert(tmp_path), transformer={"max_seq_length": 12, "do_lower_case": True})
    with (
        lorax.load(folder) as plain,
        lorax.load(folder, pooling="cls") as first,
        lorax.load(folder, normalize=False) as long,
    ):
        mean, cls, raw = (engine.embed("Ab c") for engine in (plain, first, long))
        with pytest.raises(lorax.CapacityError, match="takes 12"):
            first.embed("x " * 12)
        lower = first.embed("ab c")

    assert np.linalg.norm(mean) == pytest.approx(1, abs=1e-6)
    assert np.linalg.norm(cls) == pytest.approx(1, abs=1e-6)
    assert np.linalg.norm(raw) != pytest.approx(1, abs=1e-2)
    np.testing.assert_allclose(raw / np.linalg.norm(raw), mean, atol=1e-6)
    assert np.abs(cls - mean).max() > 0.01
    np.testing.assert_array_equal(lower, cls)


def test_a_pooling_of_the_files_that_is_not_served_may_be_overridden(tmp_path):
    folder = make_sentence_files(make_bert(tmp_path), pooling={"pooling_mode": "max"})

    assert "'max'" in refusal(folder).message
    with lorax.load(folder, pooling="mean") as engine:
        assert engine.embed("ab").shape == (64,)


def test_an_8_bit_cache_and_drafting_still_write(qwen2):
    with (
        lorax.load(qwen2, kv_cache_tokens=256) as plain,
        lorax.load(qwen2, kv_cache_tokens=256, kv_dtype="fp8_e4m3") as small,
        lorax.load(qwen2, kv_cache_tokens=256, speculate=6) as drafting,
    ):
        expected = plain.generate([9, 8, 9, 8, 9], max_tokens=40, ignore_eos=True)

        assert drafting.generate([9, 8, 9, 8, 9], max_tokens=40, ignore_eos=True).token_ids == expected.token_ids
        assert small.generate([9, 8, 9, 8, 9], max_tokens=40, ignore_eos=True).token_ids[:1] == expected.token_ids[:1]
        assert small.info().kv_cache_bytes * 4 == plain.info().kv_cache_bytes


@pytest.mark.parametrize(
    ("generation", "config", "ends"),
    [
        ({"eos_token_id": [3, 9]}, 7, {3, 9}),
        ({"eos_token_id": 4}, 7, {4}),
        ({"eos_token_id": 0}, 7, {0}),
        (None, 7, {7}),
        (None, None, {256}),  # the tokenizer's
    ],
)
def test_end_tokens_are_the_generation_configurations_else_the_models_else_the_tokenizers(
    tmp_path, generation, config, ends
):
    folder = make_qwen2(tmp_path)
    (folder / "generation_config.json").unlink()
    if generation is not None:
        change_json(folder / "generation_config.json", **generation)
    change_json(folder / "config.json", eos_token_id=config)

    with lorax.load(folder, kv_cache_tokens=64) as engine:
        # Each token is made the only one that can come.
        forced = {
            token: engine.generate([5], max_tokens=2, logit_bias={token: 100.0}) for token in (0, 3, 4, 7, 9, 256)
        }

    assert {token for token, completion in forced.items() if completion.finish_reason == "stop"} == ends


def test_a_device_that_torch_knows_and_core_does_not_is_refused(qwen2):
    with pytest.raises(lorax.RequestError, match="device 'mps' is not supported"):
        lorax.load(qwen2, device="mps")


def test_an_option_names_the_linear_method_of_layers(qwen2):
    with lorax.load(qwen2, kv_cache_tokens=64, linear_methods={"layers.*": "plain"}) as engine:
        assert engine.info().linear_methods["plain"] >= 2 * 4
        named = engine.embed([1, 2, 3])
    with lorax.load(qwen2, kv_cache_tokens=64) as engine:
        np.testing.assert_allclose(named, engine.embed([1, 2, 3]), atol=1e-5)
    with pytest.raises(lorax.RequestError, match="there is no linear method 'plane'") as caught:
        lorax.load(qwen2, linear_methods={"layers.*": "plane"})
    assert caught.value.hint == "did you mean 'plain'?"


WRONG_ENDS = [-1, [256, -1], True, 1.5, "256", [[256]], {"id": 256}, [None], 256.0]


@pytest.mark.parametrize("file", ["generation_config.json", "config.json"])
@pytest.mark.parametrize("value", WRONG_ENDS, ids=str)
def test_an_end_token_that_is_none_is_refused_with_its_file_and_value(tmp_path, file, value):
    folder = make_qwen2(tmp_path)
    (folder / "generation_config.json").write_text("{}")
    change_json(folder / file, eos_token_id=value)

    with pytest.raises(lorax.CheckpointError) as caught:
        lorax.load(folder, kv_cache_tokens=64).close()

    assert "eos_token_id" in caught.value.message
    assert caught.value.hint


def test_a_generation_configuration_that_is_a_list_is_refused(tmp_path):
    folder = make_qwen2(tmp_path)
    (folder / "generation_config.json").write_text("[256]")

    with pytest.raises(lorax.CheckpointError, match="holds a list"):
        lorax.load(folder, kv_cache_tokens=64).close()


def test_end_tokens_beyond_the_vocabulary_end_nothing_and_forbid_nothing(tmp_path, caplog):
    plain, beyond = make_qwen2(tmp_path / "plain"), make_qwen2(tmp_path / "beyond")
    (plain / "generation_config.json").write_text('{"eos_token_id": [256]}')
    (beyond / "generation_config.json").write_text('{"eos_token_id": [256, 320, 151645]}')

    found = []
    for folder in (plain, beyond):
        with lorax.load(folder, kv_cache_tokens=256) as engine:
            options = {"max_tokens": 40, "min_tokens": 20, "temperature": 5.0, "seed": 3}
            found.append(engine.generate([5, 6], **options).token_ids)
            assert engine.generate([5], choice=["yes", "no"], max_tokens=9).text in ("yes", "no")

    assert found[0] == found[1]
    assert "320, beyond the vocabulary of 320" in caplog.text


def test_an_encoder_has_no_use_for_end_tokens(tmp_path):
    folder = make_bert(tmp_path)
    (folder / "generation_config.json").write_text('{"eos_token_id": -1}')

    with lorax.load(folder) as engine:
        assert engine.embed("ab").shape == (64,)


def test_a_pattern_of_linear_methods_that_names_no_layer_is_refused(qwen2):
    error = refusal(qwen2, linear_methods={"layers.*.mpl.down_proj": "plain"})

    assert "names 'layers.*.mpl.down_proj', which no linear layer's path matches" in error.message
    assert error.hint.endswith(".mlp.down_proj'?")


def test_more_end_tokens_than_a_text_could_have_are_refused(tmp_path):
    folder = make_qwen2(tmp_path)
    (folder / "generation_config.json").write_text(f'{{"eos_token_id": {[1] * 1_001}}}')

    assert "names 1,001 end tokens; at most 1,000 are read" in refusal(folder, kv_cache_tokens=64).message


def test_loading_reports_how_far_it_is(qwen2, tmp_path):
    adapter = make_lora(make_qwen2_model(), tmp_path / "adapter")
    heard = []

    with lorax.load(qwen2, adapters={"one": adapter, "two": adapter}, progress=heard.append) as engine:
        weights = [one for one in heard if one.stage == "reading weights"]
        adapters = [(one.done, one.total) for one in heard if one.stage == "loading adapters"]

        # The files hold headers beside the numbers.
        assert 0 < weights[-1].total < engine.info().weight_bytes < weights[-1].total + 10_000
    done = [one.done for one in weights]
    assert (done[0], done[-1], {one.unit for one in weights}) == (0, weights[-1].total, {"B"})
    assert done == sorted(done)
    assert adapters == [(0, 2), (1, 2), (2, 2)]


def test_a_callback_for_progress_that_fails_is_no_fault_of_the_checkpoint(qwen2):
    def fail(progress):
        raise KeyError(progress.stage)

    error = refusal(qwen2, progress=fail)

    assert isinstance(error, lorax.RequestError)
    assert "the callback for progress raised KeyError" in error.message
    assert isinstance(error.__cause__, KeyError)
