"""Sources that requests name: fetched once for all who ask, beside the threads that ask, and not for ever."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
from builders import make_lora, make_qwen2_model
from rigs import make_loaded, within

from lorax_core.adapters.residency.fetching import Fetcher
from lorax_core.adapters.residency.store import AdapterStore
from lorax_core.errors import AdapterError
from lorax_core.settings import Settings


class Slow:
    """Work that waits until the test lets it end, and counts."""

    def __init__(self):
        self.calls, self.started, self.may_end = [], threading.Event(), threading.Event()

    def __call__(self, name):
        self.calls.append(name)
        self.started.set()
        self.may_end.wait()
        if name == "bad":
            raise AdapterError("it is bad")


class Limits:
    def __init__(self, seconds=600.0):
        self.seconds = seconds

    def late(self, name):
        return AdapterError(f"{name} is late")

    def full(self, name):
        return AdapterError(f"{name} came when too many waited")


def test_many_who_want_one_name_have_it_fetched_once():
    slow = Slow()
    fetcher = Fetcher(slow, Limits(600))

    with ThreadPoolExecutor(8) as pool:
        futures = list(pool.map(lambda _: fetcher.fetch(["one"]), range(8)))
    assert not any(future.done() for future in futures)
    slow.may_end.set()

    for future in futures:
        within(60, future.result)
    assert slow.calls == ["one"]


def test_one_that_fails_fails_those_who_want_it_alone_and_can_be_fetched_again():
    slow = Slow()
    slow.may_end.set()
    fetcher = Fetcher(slow, Limits(600))

    both, good = fetcher.fetch(["good", "bad"]), fetcher.fetch(["good"])

    with pytest.raises(AdapterError, match="it is bad"):
        within(60, both.result)
    within(60, good.result)
    with pytest.raises(AdapterError, match="it is bad"):
        within(60, fetcher.fetch(["bad"]).result)
    assert slow.calls.count("bad") == 2


def test_waiting_ends_and_the_name_can_be_fetched_again():
    slow = Slow()
    fetcher = Fetcher(slow, Limits(0.01))

    with pytest.raises(AdapterError, match="one is late"):
        within(60, fetcher.fetch(["one"]).result)

    slow.may_end.set()
    again = fetcher.fetch(["one"])
    assert isinstance(within(60, again.exception), AdapterError | None)


def test_nothing_to_fetch_is_done_at_once():
    assert Fetcher(Slow(), Limits(600)).fetch([]).done()


def test_names_that_are_sources_are_missing_until_they_are_fetched(qwen2, host, tmp_path):
    folder = str(make_lora(make_qwen2_model(), tmp_path / "a", target_modules=["q_proj"]))
    store = AdapterStore(make_loaded(qwen2, host), Settings.from_env())

    assert store.missing({folder: 1.0}) == (folder,)
    with pytest.raises(AdapterError, match="no adapter is called"):
        store.get(folder)
    within(60, store.fetch(store.missing(folder)).result)

    assert store.missing(folder) == ()
    assert store.get(folder).kind == "lora"
    with pytest.raises(AdapterError, match="no adapter is called 'plain'"):
        store.missing("plain")


def test_fetches_that_hang_give_their_turns_back_when_their_time_is_over():
    slow, quick = Slow(), []
    fetcher = Fetcher(lambda name: slow(name) if name.startswith("slow") else quick.append(name), Limits(0.05))

    for number in range(4):
        with pytest.raises(AdapterError, match="is late"):
            within(60, lambda number=number: fetcher.fetch([f"slow{number}"]).result())
    patient = Fetcher(quick.append, Limits(600))
    patient._turns = fetcher._turns  # the turns of those that hang, and time enough
    within(60, lambda: patient.fetch(["good"]).result())

    assert quick == ["good"]
    slow.may_end.set()
