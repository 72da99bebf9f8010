"""What requests may name, how long it is awaited, and what errors about it show."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import fsspec
import pytest
from builders import make_lora, make_qwen2_model
from fsspec.implementations.memory import MemoryFileSystem
from rigs import make_loaded, within

import lorax_core as lorax
from lorax_core.adapters.residency.fetching import WAITING, Fetcher
from lorax_core.adapters.residency.source import find_adapter, masked
from lorax_core.adapters.residency.sources import AdapterSources
from lorax_core.adapters.residency.store import AdapterStore
from lorax_core.errors import AdapterError, RequestError
from lorax_core.settings import Settings

LIMIT = 60.0
SECRET = "hunter2"


def refused(call):
    with pytest.raises(AdapterError) as caught:
        call()
    assert caught.value.hint
    return caught.value


@pytest.fixture
def roots(tmp_path):
    """Two folders of adapters, one of which is allowed, and a link out of that one."""
    for name in ("allowed/a", "allowed-too/b", "other/c"):
        (tmp_path / name).mkdir(parents=True)
    for name in ("allowed", "allowed/a", "allowed-too/b", "other/c"):
        (tmp_path / name / "adapter_config.json").write_text("{}")
    (tmp_path / "allowed/medusa").mkdir()
    (tmp_path / "allowed/medusa/config.json").write_text('{"medusa_num_heads": 1}')
    (tmp_path / "allowed/model").mkdir()
    (tmp_path / "allowed/model/config.json").write_text("{}")
    (tmp_path / "allowed/link").symlink_to(tmp_path / "other/c")
    return tmp_path


ALLOWED = {
    "any folder": (["folder"], "{root}/other/c"),
    "any hub id": (["hub"], "acme/lora"),
    "any url": (["url"], "s3://any/where"),
    "a folder below a root": (["{root}/allowed"], "{root}/allowed/a"),
    "the root itself": (["{root}/allowed"], "{root}/allowed"),
    "heads of Medusa": (["folder"], "{root}/allowed/medusa"),
    "a url below a root": (["s3://bucket/team"], "s3://bucket/team/lora"),
}
REFUSED = {
    "nothing allowed": ([], "acme/lora"),
    "a folder where hub ids are": (["hub"], "{root}/other/c"),
    "a hub id where folders below a root are": (["{root}/allowed"], "acme/lora"),
    "a url where folders are": (["folder"], "file://{root}/other/c"),
    "a folder beside a root": (["{root}/allowed"], "{root}/allowed-too/b"),
    "a way out of a root": (["{root}/allowed"], "{root}/allowed/../other/c"),
    "a way out of a root and back": (["{root}/allowed"], "{root}/other/../allowed/a"),
    "a way from somewhere else": (["folder"], "{root}/other/../allowed/a"),
    "what is not there": (["folder"], "{root}/allowed/new"),
    "a file": (["folder"], "{root}/allowed/adapter_config.json"),
    "a folder without an adapter": (["folder"], "{root}/allowed-too"),
    "a folder of a model": (["folder"], "{root}/allowed/model"),
    "a home that nobody has where folders are": (["folder"], "~nobody-of-this-name/x"),
    "a link out of a root": (["{root}/allowed"], "{root}/allowed/link"),
    "a url beside a root": (["s3://bucket/team"], "s3://bucket/team-of-another/lora"),
    "a url out of a root": (["file://{root}/allowed/"], "file://{root}/allowed/../other/c"),
    "a relative way out": (["{root}/allowed"], "../../etc/"),
    "no name at all": (["{root}/allowed"], "a\0b/c"),
    "a home that nobody has": (["{root}/allowed"], "~nobody-of-this-name/x"),
}


@pytest.mark.parametrize(("entries", "source"), ALLOWED.values(), ids=ALLOWED)
def test_what_the_list_names_is_allowed(roots, entries, source):
    AdapterSources(roots, [entry.format(root=roots) for entry in entries]).check(source.format(root=roots))


@pytest.mark.parametrize(("entries", "source"), REFUSED.values(), ids=REFUSED)
def test_what_the_list_does_not_name_is_refused(roots, entries, source):
    sources = AdapterSources(roots, [entry.format(root=roots) for entry in entries])

    error = refused(lambda: sources.check(source.format(root=roots)))

    assert "requests may not name" in error.message or "\0" in source


def test_a_folder_with_the_spelling_of_a_hub_id_is_a_folder(roots, monkeypatch):
    monkeypatch.chdir(roots)

    AdapterSources(roots, ["folder"]).check("other/c")
    error = refused(lambda: AdapterSources(roots, ["hub"]).check("other/c"))

    assert error.message == "requests may not name 'other/c' as an adapter; they may name 'hub'"


def test_an_engine_takes_from_requests_what_its_options_allow(qwen2, tmp_path):
    folder = str(make_lora(make_qwen2_model(), tmp_path / "in/it", target_modules=["q_proj"]))
    other = str(make_lora(make_qwen2_model(), tmp_path / "out/it", target_modules=["q_proj"]))
    with lorax.load(qwen2, adapter_sources=[str(tmp_path / "in")], adapters={"named": other}) as engine:
        assert engine.generate([1, 2], adapter=folder, max_tokens=2)
        error = refused(lambda: engine.generate([1, 2], adapter=other, max_tokens=2))
        assert engine.generate([1, 2], adapter="named", max_tokens=2)  # an operator may load any

    assert "requests may not name" in error.message
    with pytest.raises(RequestError, match=r"adapter_sources.*'fodler'.*did you mean 'folder'"):
        lorax.EngineOptions(checkpoint="x", adapter_sources=["fodler"])


def test_a_source_that_cannot_be_shown_is_no_name(qwen2, tmp_path):
    folder = str(make_lora(make_qwen2_model(), tmp_path / "a\nb", target_modules=["q_proj"]))
    with lorax.load(qwen2) as engine:
        error = refused(lambda: engine.generate([1], adapter=folder, max_tokens=1))

    assert "printable" in error.message


def test_an_error_about_a_folder_of_a_request_lists_nothing_of_it(qwen2, tmp_path):
    (tmp_path / "private").mkdir()
    (tmp_path / "private/secret.txt").touch()
    with lorax.load(qwen2) as engine:
        for source in (tmp_path / "private", tmp_path / "privat", tmp_path / "private/secret.tx"):
            error = refused(lambda source=source: engine.generate([1], adapter=str(source), max_tokens=1))

            assert "secret.txt" not in str(error)
            assert "did you mean" not in str(error)


@pytest.mark.parametrize(
    "url",
    [
        "zip://lora::https://hub.example/a.zip",
        "simplecache::memory://lora",
        "blockcache::memory://lora",
        "reference://lora",
        "dir://lora",
        "zip://lora",
        "tar://lora",
        "ZIP://lora",
    ],
)
def test_filesystems_over_others_are_refused_before_they_are_made(url, tmp_path):
    error = refused(lambda: find_adapter(url, cache=tmp_path))

    assert repr(url) in error.message
    assert "chains filesystems" in error.message


@pytest.mark.parametrize(
    "url",
    [f"fail://user:{SECRET}@host/lora", f"fail://host/lora?token={SECRET}&b={SECRET}", f"fail://{SECRET}@host/lora"],
)
def test_credentials_of_a_url_are_in_no_error(url, tmp_path):
    class Failing(MemoryFileSystem):
        protocol = "fail"

        def ls(self, path, detail=True, **kwargs):
            raise OSError(f"cannot reach {url}")

    fsspec.register_implementation("fail", Failing, clobber=True)

    error = refused(lambda: find_adapter(url, cache=tmp_path))

    assert SECRET not in str(error)
    assert "***" in error.message
    assert "host/lora" in error.message
    assert SECRET not in str(refused(lambda: AdapterSources(tmp_path).check(url)))


@pytest.mark.parametrize(
    "source",
    [
        f"sftp://h/x#token={SECRET}",
        f"ftp://user:{SECRET}/2@h/x",
        f"s3:/%2e/user:{SECRET}@x/y",
        f"user:{SECRET}@x/y",
        f"ht tp://user:{SECRET}@host/lora",
        f"https ://host/a?token={SECRET}",
        f"/nowhere/x://user:{SECRET}@host/a",
    ],
)
def test_credentials_of_what_is_nearly_a_url_are_in_no_error_either(source, tmp_path):
    error = refused(lambda: find_adapter(source, cache=tmp_path))

    assert SECRET not in str(error)
    assert "***" in error.message


def test_credentials_that_a_library_quotes_without_their_url_are_in_no_error(tmp_path):
    class Quoting(MemoryFileSystem):
        protocol = "quote"

        def ls(self, path, detail=True, **kwargs):
            raise OSError(f'Invalid bucket name "user:{SECRET}@host"')

    fsspec.register_implementation("quote", Quoting, clobber=True)

    error = refused(lambda: find_adapter(f"quote://user:{SECRET}@host/lora", cache=tmp_path))

    assert 'Invalid bucket name "***@host"' in error.message


def test_a_text_without_credentials_is_not_changed():
    for text in ("s3://bucket/a@b", "see 's3://bucket/lora'", "acme/lora", "/srv/x?y"):
        assert masked(text) == text


def test_a_server_that_does_not_answer_is_not_awaited_for_ever(qwen2, host, tmp_path):
    answered = threading.Event()

    class Silent(MemoryFileSystem):
        protocol = "silent"

        def ls(self, path, detail=True, **kwargs):
            answered.wait()
            raise OSError

    fsspec.register_implementation("silent", Silent, clobber=True)
    store = AdapterStore(make_loaded(qwen2, host), Settings(), sources=AdapterSources(tmp_path, ["url"], 0.01))

    error = refused(lambda: within(LIMIT, lambda: store.load("it", "silent://host/lora")))
    answered.set()

    assert error.message == "'silent://host/lora' was not loaded within 0.01 seconds"
    assert store.list() == []


class Limits:
    seconds = 600.0

    def late(self, name):
        return AdapterError(f"{name} is late", hint="-")

    def full(self, name):
        return AdapterError(f"{name} came when too many waited", hint="-")


def test_only_so_many_sources_are_fetched_at_once():
    may_end = threading.Event()
    fetcher = Fetcher(lambda name: may_end.wait(), Limits())
    waiting = [fetcher.fetch([f"source{number}"]) for number in range(WAITING)]

    error = refused(fetcher.fetch(["one more"]).result)
    shared = fetcher.fetch(["source0"])  # no new work
    may_end.set()

    assert error.message == "one more came when too many waited"
    for future in [*waiting, shared]:
        assert within(LIMIT, future.result) is None
    assert within(LIMIT, fetcher.fetch(["one more"]).result) is None


def test_one_who_was_waiting_may_fetch_again_from_where_it_is_told():
    """As a call does whose adapter was forgotten again meanwhile; the turn must be free by then."""
    fetcher = Fetcher(lambda name: None, Limits())
    done = []

    def again(number):
        done.append(fetcher.fetch([f"again{number}"]).result(LIMIT))

    with ThreadPoolExecutor(8) as pool:
        for number in range(8):
            fetcher.fetch([f"first{number}"]).add_done_callback(lambda _, number=number: pool.submit(again, number))

    assert done == [None] * 8


def test_sources_that_requests_brought_are_forgotten_in_the_order_of_their_use(qwen2, host, tmp_path):
    model = make_qwen2_model()
    folders = [str(make_lora(model, tmp_path / f"{n}", seed=n, target_modules=["q_proj"])) for n in range(4)]
    store = AdapterStore(make_loaded(qwen2, host), Settings(), max_fetched=2)
    store.load("mine", folders[0])
    for folder in folders[1:3]:
        within(LIMIT, store.fetch([folder]).result)
    in_flight = store.get(folders[2])
    store.get(folders[1])  # used last

    within(LIMIT, store.fetch([folders[3]]).result)

    assert list(store) == sorted(["mine", folders[1], folders[3]])
    assert in_flight.read().identity == in_flight.identity  # a sequence keeps what it started with
    store.check()
    within(LIMIT, store.fetch(store.missing(folders[2])).result)
    assert list(store) == sorted(["mine", folders[2], folders[3]])


def test_an_adapter_that_the_operator_loads_is_not_forgotten(qwen2, host, tmp_path):
    model = make_qwen2_model()
    folders = [str(make_lora(model, tmp_path / f"{n}", seed=n, target_modules=["q_proj"])) for n in range(3)]
    store = AdapterStore(make_loaded(qwen2, host), Settings(), max_fetched=1)
    within(LIMIT, store.fetch([folders[0]]).result)
    store.load(folders[0], folders[0])

    for folder in folders[1:]:
        within(LIMIT, store.fetch([folder]).result)

    assert list(store) == sorted([folders[0], folders[2]])


@pytest.mark.parametrize("name", [None, 5, ["it"], {}, object()])
def test_what_is_no_name_means_nothing(qwen2, host, tmp_path, name):
    store = AdapterStore(make_loaded(qwen2, host), Settings())

    assert "no adapter is called" in refused(lambda: store.unload(name)).message


WRONG = {
    "source none": {"source": None},
    "source a number": {"source": 5},
    "source empty": {"source": ""},
    "source a NUL": {"source": "a\0b"},
    "source too long": {"source": "a" * 5000},
    "source nobody's home": {"source": "~nobody-of-this-name/x"},
    "source a surrogate": {"source": "\ud800/x"},
    "revision a number": {"revision": 5},
    "token a number": {"token": 5},
    "task a number": {"task": 5},
    "problem a list": {"problem_type": ["x"]},
    "labels a number": {"id2label": 5},
    "labels of words": {"id2label": {"a": "b"}},
    "labels a name": {"id2label": "LABEL_0"},
    "pin in words": {"pin": "yes"},
}


@pytest.mark.parametrize("changes", WRONG.values(), ids=WRONG)
def test_what_load_is_given_wrongly_is_an_error_of_ours_and_loses_nothing(qwen2, host, tmp_path, changes):
    folder = str(make_lora(make_qwen2_model(), tmp_path / "it", target_modules=["q_proj"]))
    store = AdapterStore(make_loaded(qwen2, host), Settings())
    store.load("before", folder)

    refused(lambda: store.load("it", **{"source": folder, **changes}))

    assert list(store) == ["before"]
    store.check()
