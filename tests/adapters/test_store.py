from __future__ import annotations

import pickle
import shutil
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest
from builders import change_json, make_lora, make_qwen2_model
from rigs import finish, make_adapters, make_loaded, make_loop, make_sequence

from lorax_core.adapters.bound import BindAdapter
from lorax_core.adapters.formats.lora import LoraAdapter
from lorax_core.adapters.residency.store import AdapterStore, _drop
from lorax_core.errors import AdapterError
from lorax_core.settings import Settings

PROMPT = [3, 1, 4, 1, 5]


@pytest.fixture(scope="module")
def base(qwen2, host):
    return make_loaded(qwen2, host)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Two adapters of unlike content."""
    root = tmp_path_factory.mktemp("adapters")
    return {
        "first": make_lora(make_qwen2_model(), root / "first", seed=1, target_modules=["q_proj", "up_proj"]),
        "second": make_lora(make_qwen2_model(), root / "second", seed=2, target_modules=["o_proj"], r=2),
    }


def written(base, adapter, count=16):
    return finish(make_loop(base), make_sequence(PROMPT, count, adapter=adapter))[0]


def started(base, adapter, count=16):
    """A loop in the middle of a text."""
    loop, sequence = make_loop(base), make_sequence(PROMPT, count, adapter=adapter)
    loop.add(sequence)
    for _ in range(count // 2):
        loop.step()
    assert 0 < len(sequence.output) < count
    return loop, sequence


def test_an_adapter_is_told_by_name_content_and_targets(base, folders):
    store = make_adapters(base, **folders)

    first, second = store.list()

    assert (first.name, first.kind, first.ranks, first.source) == ("first", "lora", (4,), str(folders["first"]))
    assert first.targets == tuple(
        f"layers.{layer}.{fused}" for layer in (0, 1) for fused in ("mlp.gate_up_proj", "self_attn.qkv_proj")
    )
    # A and B of rank 4 from 64 inputs to the outputs of each part, in 32 bit.
    assert first.nbytes == 2 * 4 * 4 * (64 + 64 + 64 + 96)
    assert second.ranks == (2,)
    assert first.identity != second.identity
    assert "first" in store
    assert "third" not in store
    assert list(store) == ["first", "second"]


def test_an_unknown_name_is_refused_with_the_nearest(base, folders):
    store = make_adapters(base, **folders)

    with pytest.raises(AdapterError) as caught:
        store.get("secnd")

    assert "'secnd'" in caught.value.message
    assert "'first', 'second'" in caught.value.message
    assert caught.value.hint == "did you mean 'second'?"


def test_unloading_forgets_a_name_once(base, folders):
    store = make_adapters(base, **folders)

    store.unload("first")

    assert [info.name for info in store.list()] == ["second"]
    with pytest.raises(AdapterError, match="no adapter is called 'first'"):
        store.unload("first")


def test_two_names_of_one_content_share_one_adapter(base, folders, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(folders["first"], copy)

    store = make_adapters(base, one=folders["first"], other=copy)

    assert store.get("one") is store.get("other")
    store.unload("one")
    assert written(base, store.get("other"))


def test_content_counts_and_not_how_it_was_trained(folders, tmp_path):
    copies = {}
    for name, changes in {
        "same": {"lora_dropout": 0.3, "r": 99, "rank_pattern": {".*": 4}},
        "scaled": {"lora_alpha": 9},
    }.items():
        shutil.copytree(folders["first"], tmp_path / name)
        change_json(tmp_path / name / "adapter_config.json", **changes)
        copies[name] = LoraAdapter(tmp_path / name)

    first = LoraAdapter(folders["first"])

    assert copies["same"].identity == first.identity
    assert copies["scaled"].identity != first.identity


def test_a_name_that_is_loaded_again_means_the_new_content(base, folders):
    store = make_adapters(base, it=folders["first"])
    before = written(base, store.get("it"))

    store.load("it", folders["second"])

    after = written(base, store.get("it"))
    assert before != after == written(base, make_adapters(base, second=folders["second"]).get("second"))
    assert len(store.list()) == 1


def test_a_request_in_flight_finishes_on_the_adapter_that_was_unloaded(base, folders):
    store = make_adapters(base, it=folders["first"])
    expected = written(base, store.get("it"))
    loop, sequence = started(base, store.get("it"))

    store.unload("it")
    finish(loop)

    assert sequence.output == expected
    assert expected != written(base, None)


def test_a_request_in_flight_finishes_on_the_content_that_its_name_had(base, folders):
    store = make_adapters(base, it=folders["first"])
    expected = written(base, store.get("it"))
    loop, sequence = started(base, store.get("it"))

    store.load("it", folders["second"])
    newer = make_sequence(PROMPT, 16, adapter=store.get("it"))
    finish(loop, newer)

    assert sequence.output == expected
    assert newer.output == written(base, store.get("it"))
    assert newer.output != expected


def test_checking_gives_the_facts_without_numbers(base, folders):
    adapter = LoraAdapter(folders["first"])

    fit = adapter.check(base)

    bound = adapter.bind(base)
    assert fit.targets == bound.targets
    assert fit.nbytes == bound.nbytes > 0
    meta = adapter.bind(base, meta=True)
    assert all(delta.a.is_meta for deltas in meta.deltas.values() for delta in deltas)


def test_an_adapter_is_a_value_that_pickles(base, folders):
    adapter = pickle.loads(pickle.dumps(BindAdapter("it", LoraAdapter(folders["first"])))).adapter

    assert adapter.identity == LoraAdapter(folders["first"]).identity
    assert adapter.bind(base).nbytes == LoraAdapter(folders["first"]).bind(base).nbytes


def test_what_nobody_can_name_or_holds_leaves_the_device(base, folders):
    store = make_adapters(base, **folders)
    held = store.get("first")

    store.unload("first")
    store.unload("second")

    assert list(store.bound) == [held.identity]
    del held
    assert list(store.bound) == []
    store.check()


def test_many_threads_may_load_and_unload(base, folders):
    store = make_adapters(base)

    def turn(number):
        name = f"adapter-{number % 5}-{number}"
        store.load(name, folders["first" if number % 2 else "second"])
        seen = name in [info.name for info in store.list()]
        if number % 3:
            store.unload(name)
        return seen

    with ThreadPoolExecutor(8) as pool:
        seen = list(pool.map(turn, range(40)))

    assert all(seen)
    assert sorted(store) == sorted(f"adapter-{number % 5}-{number}" for number in range(0, 40, 3))


def test_a_pinned_adapter_stays_pinned_when_another_of_its_names_goes(base, folders):
    store = AdapterStore(base, Settings.from_env(), max_adapters=2)
    store.load("pinned", folders["first"], pin=True)
    store.load("other", folders["first"])

    store.unload("other")

    with pytest.raises(AdapterError, match="'second' cannot be pinned"):
        store.load("second", folders["second"], pin=True)


def test_an_adapter_retired_while_a_sequence_waits_is_not_bound_again(base, folders):
    store = make_adapters(base, it=folders["first"])
    waiting = store.get("it")
    bound = store.bound[waiting.identity]
    store.unload("it")

    entered = store.acquire(waiting)

    assert entered
    assert store.bound[waiting.identity] is bound
    store.check()


def test_what_is_freed_late_leaves_content_that_was_loaded_again(base, folders):
    store = make_adapters(base, it=folders["first"])
    identity = store.get("it").identity

    _drop(weakref.ref(store), identity)  # as of a handle before this one, whose end comes late

    assert identity in store.bound
    store.check()


def test_a_closed_store_loads_nothing(base, folders):
    store = make_adapters(base)
    store.close()

    with pytest.raises(AdapterError, match="'late' was not loaded: the engine is closed"):
        store.load("late", folders["first"])

    assert len(store.bound) == 0
