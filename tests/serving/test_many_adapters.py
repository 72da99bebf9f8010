from __future__ import annotations

import contextlib
import random
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numpy as np
import pytest
from builders import make_bert, make_bert_model, make_lora, make_qwen2_model
from oracles import make_model
from rigs import Inbox, make_sequence, within
from transformers import BertForTokenClassification

import lorax_core as lorax
from lorax_core.adapters.base import Adapter, Bound, Fit
from lorax_core.adapters.residency.handle import AdapterHandle
from lorax_core.errors import AdapterError, StepError
from lorax_core.serving.requests import GenerateRequest

COUNT = 9
PROMPTS = [[3, 1, 4, 1, 5, number + 10] for number in range(COUNT)]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Adapters of unlike content and rank."""
    root = tmp_path_factory.mktemp("many")
    targets = (["q_proj", "up_proj"], ["o_proj"], ["down_proj", "k_proj", "v_proj"])
    return {
        f"a{number}": make_lora(
            make_qwen2_model(), root / f"a{number}", seed=number, r=1 + number % 3, target_modules=targets[number % 3]
        )
        for number in range(COUNT)
    }


@pytest.fixture(scope="module")
def expected(qwen2, folders):
    """What each adapter writes with all of them on the device."""
    with lorax.load(qwen2, adapters=folders) as engine:
        return [
            engine.generate(prompt, adapter=name, max_tokens=12, ignore_eos=True).token_ids
            for prompt, name in zip(PROMPTS, folders, strict=True)
        ]


def requests(names, rounds=1):
    return [
        GenerateRequest(prompt=PROMPTS[number], adapter=name, max_tokens=12, ignore_eos=True)
        for _ in range(rounds)
        for number, name in enumerate(names)
    ]


def where(engine):
    return [info.where for info in engine.adapters.list()]


class SlowAdapter(Adapter):
    """An adapter that changes nothing and is bound when the test lets it, or fails with an error."""

    kind = "slow"
    task = None
    ranks = ()

    def __init__(self, identity, error=None):
        self.identity = identity
        self._error = error
        self.asked = threading.Event()
        self.may_come = threading.Event()

    @property
    def handle(self):
        return AdapterHandle.of(self, Fit((), 0, None, None))

    def bind(self, base, *, meta=False):
        self.asked.set()
        self.may_come.wait()
        if self._error is not None:
            raise self._error
        return Bound()


@pytest.mark.parametrize(("places", "copies"), [(1, 0), (2, 3), (4, None), (None, None)])
def test_answers_do_not_depend_on_how_many_adapters_are_on_the_device(qwen2, folders, expected, places, copies):
    with lorax.load(qwen2, adapters=folders, max_adapters=places, max_cpu_adapters=copies) as engine:
        results = within(60, lambda: engine.run(requests(folders, rounds=2)))

        assert [result.token_ids for result in results] == expected * 2
        engine.adapters.check()
        held = where(engine)
        assert held.count("device") == (places or COUNT)
        if places is not None:  # whoever is neither on the device nor copied is on the disk alone
            copied = 4 * places if copies is None else copies
            assert COUNT - places - copied <= held.count("disk") <= COUNT - places


def test_memory_holds_as_many_as_it_may_and_the_rest_is_read_again(qwen2, folders, expected):
    with lorax.load(qwen2, adapters=folders, max_adapters=2, max_cpu_adapters=4) as engine:
        assert where(engine).count("disk") >= COUNT - 6

        result = engine.generate(PROMPTS[2], adapter="a2", max_tokens=12, ignore_eos=True)

        assert result.token_ids == expected[2]
        assert engine.adapters.list()[2].where == "device"
        assert sum(info.nbytes > 0 for info in engine.adapters.list()) == 2


def test_a_pinned_adapter_stays(qwen2, folders):
    with lorax.load(qwen2, max_adapters=2) as engine:
        engine.adapters.load("pinned", folders["a0"], pin=True)
        for name, folder in list(folders.items())[1:]:
            engine.adapters.load(name, folder)

        within(60, lambda: engine.run(requests(list(folders)[1:])))

        assert engine.adapters.list()[-1].where == "device"
        assert engine.adapters.list()[-1].pinned
        with pytest.raises(AdapterError, match="one must be left for others"):
            engine.adapters.load("another", folders["a1"], pin=True)


def test_files_that_changed_on_the_disk_are_not_taken_for_the_adapter(qwen2, folders, expected, tmp_path):
    moving = tmp_path / "moving"
    shutil.copytree(folders["a0"], moving)
    with lorax.load(qwen2, adapters={"it": moving, "a1": folders["a1"]}, max_adapters=1, max_cpu_adapters=0) as engine:
        engine.generate(PROMPTS[1], adapter="a1", max_tokens=2)
        shutil.rmtree(moving)
        shutil.copytree(folders["a2"], moving)

        with pytest.raises(AdapterError, match="are not those that were loaded"):
            within(60, lambda: engine.generate(PROMPTS[0], adapter="it", max_tokens=2))

        assert engine.generate(PROMPTS[1], adapter="a1", max_tokens=12, ignore_eos=True).token_ids == expected[1]
        engine.adapters.load("it", moving)
        assert engine.generate(PROMPTS[2], adapter="it", max_tokens=12, ignore_eos=True).token_ids == expected[2]


def test_files_that_vanished_fail_the_requests_that_need_them_and_no_others(qwen2, folders, expected, tmp_path):
    gone = tmp_path / "gone"
    shutil.copytree(folders["a0"], gone)
    adapters = {"gone": gone, "a1": folders["a1"]}
    with lorax.load(qwen2, adapters=adapters, max_adapters=1, max_cpu_adapters=0) as engine:
        engine.generate(PROMPTS[1], adapter="a1", max_tokens=2)
        shutil.rmtree(gone)

        with pytest.raises(StepError) as caught:
            within(60, lambda: engine.run([requests(["gone"])[0], requests(["a0", "a1"])[1]]))

        failed, answered = caught.value.results
        assert "there is no adapter folder" in failed.message
        assert answered.token_ids == expected[1]
        engine.adapters.check()


def test_heads_come_back_with_their_adapters(tmp_path, host):
    base = make_bert(tmp_path / "bert")
    folders = {}
    for number, labels in enumerate((3, 5)):
        model = make_model(
            BertForTokenClassification, make_bert_model().config.to_diff_dict(), seed=4, num_labels=labels
        )
        model.bert.load_state_dict(make_bert_model().state_dict(), strict=False)
        folders[f"ner{number}"] = make_lora(
            model, tmp_path / f"ner{number}", seed=number, task_type="TOKEN_CLS", target_modules=["query"]
        )
    texts = [[5, 9, 2, 77], [30, 3, 8]]
    with lorax.load(base, adapters=folders) as engine:
        expected = [engine.classify(text, adapter=name) for text, name in zip(texts, folders, strict=True)]

    with lorax.load(base, adapters=folders, max_adapters=1, max_cpu_adapters=0) as engine:
        for _ in range(2):
            found = [
                within(60, lambda t=t, n=n: engine.classify(t, adapter=n)) for t, n in zip(texts, folders, strict=True)
            ]
            assert [one.labels for one in found] == [one.labels for one in expected]
            np.testing.assert_allclose([*found[0].scores, *found[1].scores], [*expected[0].scores, *expected[1].scores])


def test_a_request_may_name_a_source(qwen2, folders, expected):
    with lorax.load(qwen2) as engine:
        source = str(folders["a3"])

        results = within(60, lambda: engine.generate([PROMPTS[3]] * 3, adapter=source, max_tokens=12, ignore_eos=True))

        assert [result.token_ids for result in results] == [expected[3]] * 3
        assert [info.name for info in engine.adapters.list()] == [source]
        with pytest.raises(AdapterError, match="no adapter is called 'a33'"):
            engine.generate(PROMPTS[0], adapter="a33")
        with pytest.raises(AdapterError, match=r"requests may not name .*nothing.* those with an adapter_config\.json"):
            engine.generate(PROMPTS[0], adapter=source + "/nothing")


def test_an_adapter_on_its_way_stalls_no_step(qwen2, folders, expected):
    slow = SlowAdapter("slow")
    with lorax.load(qwen2, adapters=folders) as engine:
        waiting = make_sequence(PROMPTS[0], 4, adapter=slow.handle)
        engine._worker.submit([waiting])
        within(60, slow.asked.wait)

        others = within(60, lambda: engine.run(requests(folders)))

        assert [other.token_ids for other in others] == expected
        assert not waiting.output
        slow.may_come.set()
        within(60, waiting.sink.finished.wait)
        assert len(waiting.output) == 4


def test_those_who_wait_for_an_adapter_that_cannot_come_hear_why(qwen2):
    slow = SlowAdapter("slow", error=AdapterError("it broke on the way"))
    with lorax.load(qwen2) as engine:
        handle = slow.handle
        waiting = [make_sequence(PROMPTS[0], 4, adapter=handle) for _ in range(3)]
        engine._worker.submit(waiting)
        slow.may_come.set()

        for sequence in waiting:
            within(60, sequence.sink.finished.wait)

        assert [sequence.sink.error.message for sequence in waiting] == ["it broke on the way"] * 3
        assert engine.generate(PROMPTS[0], max_tokens=2).token_ids


def test_closing_does_not_wait_for_requests_without_their_adapter(qwen2):
    slow = SlowAdapter("slow")
    engine = lorax.load(qwen2)
    waiting = make_sequence(PROMPTS[0], 4, adapter=slow.handle)
    engine._worker.submit([waiting])
    within(60, slow.asked.wait)
    slow.may_come.set()

    within(60, engine.close)

    assert isinstance(waiting.sink, Inbox)
    assert waiting.sink.finished.is_set()


def test_a_changed_adapter_never_meets_the_pages_of_its_old_self(qwen2, folders):
    prompt = list(range(2, 80))
    options = {"max_tokens": 12, "ignore_eos": True}
    with lorax.load(qwen2, adapters={"new": folders["a2"]}) as fresh:
        expected = fresh.generate(prompt, adapter="new", **options).token_ids
    with lorax.load(qwen2, adapters={"it": folders["a0"]}) as engine:
        old = [engine.generate(prompt, adapter="it", **options) for _ in range(2)]
        assert old[1].usage.cached_tokens > 0

        engine.adapters.load("it", folders["a2"])
        new = [engine.generate(prompt, adapter="it", **options) for _ in range(2)]

        assert [one.usage.cached_tokens > 0 for one in new] == [False, True]
        assert [one.token_ids for one in new] == [expected] * 2
        assert old[0].token_ids == old[1].token_ids != expected
        engine.adapters.load("it", folders["a0"])  # the old content finds its own pages again
        assert engine.generate(prompt, adapter="it", **options).usage.cached_tokens > 0


def test_two_names_of_one_content_tell_their_own_sources(qwen2, folders, tmp_path):
    copy = shutil.copytree(folders["a0"], tmp_path / "copy")
    with lorax.load(qwen2, adapters={"one": folders["a0"], "other": copy}) as engine:
        one, other = engine.adapters.list()

    assert (one.source, other.source) == (str(folders["a0"]), str(copy))
    assert one.identity == other.identity


def test_a_flood_for_one_adapter_does_not_keep_another_waiting(qwen2, folders):
    """Rows are few; of many answers for one adapter, most end after a late one for another has."""
    ended = []

    class Ranked(Inbox):
        def __call__(self, update):
            if update.last:
                ended.append(self)
            super().__call__(update)

    with lorax.load(qwen2, adapters=folders, max_batch_rows=2) as engine:
        flood = [make_sequence(PROMPTS[0], 6, adapter=engine.adapters.get("a0")) for _ in range(30)]
        late = make_sequence(PROMPTS[1], 6, adapter=engine.adapters.get("a1"))
        for sequence in (*flood, late):
            sequence.sink = Ranked()
        engine._worker.submit([*flood, late])
        for sequence in (*flood, late):
            within(60, sequence.sink.finished.wait)

    assert ended.index(late.sink) < 4


@pytest.mark.parametrize("places", [1, 3, None])
def test_answers_hold_while_adapters_come_and_go(qwen2, folders, expected, places):
    """Callers in several threads, while others unload adapters and load them again, under other names too."""
    by_name = dict(zip(folders, expected, strict=True))
    wrong, refused, answered = [], [], []

    def ask(engine, seed):
        source = random.Random(seed)
        for _ in range(12):
            number = source.randrange(COUNT)
            name = f"a{number}"
            try:
                found = engine.generate(PROMPTS[number], adapter=name, max_tokens=12, ignore_eos=True)
            except AdapterError:  # nobody is called so at the moment
                refused.append(name)
                continue
            (answered if found.token_ids == by_name[name] else wrong).append(name)

    def come_and_go(engine, seed):
        source = random.Random(seed)
        for turn in range(15):
            number = source.randrange(COUNT)
            engine.adapters.load(f"other{seed}-{turn}", folders[f"a{number}"])
            if source.random() < 0.5:
                with contextlib.suppress(AdapterError):
                    engine.adapters.unload(f"a{number}")
            engine.adapters.load(f"a{number}", folders[f"a{number}"], pin=turn % 5 == 0 and places == 3 and number == 0)

    with lorax.load(qwen2, adapters=folders, max_adapters=places, max_cpu_adapters=places and 2) as engine:
        jobs = [partial(ask, engine, seed) for seed in range(3)] + [
            partial(come_and_go, engine, seed) for seed in (8, 9)
        ]
        with ThreadPoolExecutor(len(jobs)) as pool:
            within(120, lambda: [one.result() for one in [pool.submit(job) for job in jobs]])
        engine.adapters.check()

    assert wrong == []
    assert len(answered) + len(refused) == 36
    assert len(answered) > 18
