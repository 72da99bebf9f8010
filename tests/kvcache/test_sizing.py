from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from builders import change_tensors, make_qwen2, make_qwen2_model
from rigs import make_loaded, make_loop, make_sequence

import lorax_core as lorax
from lorax_core.errors import CapacityError
from lorax_core.kvcache.sizing import CacheShape, CacheSize, make_pool

SHAPE = CacheShape(layers=2, page_size=16, kv_heads=2, head_dim=16, dtype=torch.float32, device=torch.device("cpu"))


@pytest.mark.parametrize(
    ("size", "pages"),
    [
        (CacheSize(tokens=33), 3),
        (CacheSize(pages=7), 7),
        (CacheSize(bytes=5 * 16 * 2 * 2 * 2 * 16 * 4), 5),  # pages * page * layers * (K, V) * kv_heads * dim * float32
    ],
)
def test_a_cache_is_as_large_as_was_asked_for(size, pages):
    pool = make_pool(SHAPE, size)

    assert pool.pages == pages + 1  # and the scratch page
    assert pool.nbytes == (pages + 1) * SHAPE.page_bytes


def test_a_fraction_is_of_the_memory_that_is_free():
    whole, half = (make_pool(SHAPE, CacheSize(fraction=part)).pages for part in (0.002, 0.001))

    assert 1.5 < whole / half < 2.5


def test_by_default_a_cache_takes_no_more_than_a_small_server_fills():
    assert (make_pool(SHAPE, CacheSize()).pages - 1) * 16 <= 65_536


def test_a_cache_larger_than_the_memory_is_refused_with_what_fits():
    with pytest.raises(CapacityError, match="GB are free") as caught:
        make_pool(SHAPE, CacheSize(tokens=10**12))

    assert "kv_cache_tokens=" in caught.value.hint


def test_a_cache_that_a_limit_of_the_process_forbids_is_refused():
    # In a process of its own, whose limit leaves room for Python and torch and none for this cache.
    code = """
import resource, torch
from lorax_core.errors import CapacityError
from lorax_core.kvcache.sizing import CacheShape, CacheSize, make_pool
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 2**26, used + 2**26))
shape = CacheShape(layers=2, page_size=16, kv_heads=2, head_dim=16, dtype=torch.float32, device=torch.device("cpu"))
try:
    make_pool(shape, CacheSize(bytes=2**28))
except CapacityError as error:
    print(error.message.partition(":")[0], bool(error.hint))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)

    assert done.stdout == "a KV cache of 0.3 GB cannot be allocated True\n"


def test_less_than_a_page_is_refused():
    with pytest.raises(CapacityError, match="less than one page"):
        make_pool(SHAPE, CacheSize(bytes=1))


def scored(folder, prompt, **options):
    with lorax.load(folder, kv_cache_tokens=256, max_batch_tokens=8, **options) as engine:
        scores = engine.generate(prompt, max_tokens=1, prompt_logprobs=0).prompt_logprobs[1:]
    return torch.tensor([score.logprob for score in scores])


def test_an_8_bit_cache_is_a_quarter_as_large_and_close(qwen2):
    prompt = list(range(40))

    exact, rounded = scored(qwen2, prompt), scored(qwen2, prompt, kv_dtype="fp8_e4m3")

    with (
        lorax.load(qwen2, kv_cache_tokens=256, kv_dtype="fp8_e4m3") as small,
        lorax.load(qwen2, kv_cache_tokens=256) as large,
    ):
        assert small.info().kv_cache_bytes * 4 == large.info().kv_cache_bytes
    assert 0 < (exact - rounded).abs().mean() < 0.25
    assert torch.corrcoef(torch.stack((exact, rounded)))[0, 1] > 0.98


def test_scales_of_a_checkpoint_keep_large_keys_within_8_bit(tmp_path):
    """Keys a thousand times too large for 8 bit: clamped without scales, as good as before with them."""
    folder = make_qwen2(tmp_path / "plain", tokenizer=False)
    prompt = list(range(40))

    def enlarge(tensors):
        changed = dict(tensors)
        for name in tensors:
            if "self_attn.k_proj" in name:
                changed[name] = tensors[name] * 1000
            if "self_attn.q_proj" in name:
                changed[name] = tensors[name] / 1000
        return changed

    def with_scales(tensors):
        scales = {f"model.layers.{i}.self_attn.k_scale": torch.tensor(1000.0) for i in range(2)}
        return {**tensors, **scales}

    change_tensors(folder / "model.safetensors", enlarge)
    exact = scored(folder, prompt)
    clamped = scored(folder, prompt, kv_dtype="fp8_e4m3")
    change_tensors(folder / "model.safetensors", with_scales)
    scaled = scored(folder, prompt, kv_dtype="fp8_e4m3")

    assert (exact - scaled).abs().mean() < 0.25
    assert (exact - clamped).abs().mean() > 4 * (exact - scaled).abs().mean()


def test_pages_behind_every_window_are_given_back(tmp_path, host):
    changes = {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 0, "eos_token_id": None}
    loop = make_loop(make_loaded(make_qwen2(tmp_path, tokenizer=False, **changes), host), pages=32, page_size=4)
    allocator = loop.scheduler.allocator
    sequence = make_sequence([7, 3, 9], max_tokens=60)
    held = []

    loop.add(sequence)
    while loop.busy:
        loop.step()
        held.append(sum(allocator.holders(page) for page in range(1, 33)))

    assert max(held) <= 3  # a window of 6 tokens lies on three pages of 4 at most
    ids = torch.tensor([sequence.prompt])
    expected = make_qwen2_model(**changes).generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=60, do_sample=False, pad_token_id=0
    )
    assert sequence.output == expected[0, 3:].tolist()
