"""Adapters at URLs: what is fetched from stores of this machine, when, and what the cache keeps of it."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import ClassVar

import fsspec
import pytest
from buckets import Bucket
from builders import make_lora, make_qwen2_model
from fsspec.implementations.memory import MemoryFileSystem
from hubs import held, write
from rigs import make_loaded

from lorax_core.adapters.formats.peft import read_peft
from lorax_core.adapters.residency.source import find_adapter
from lorax_core.adapters.residency.store import AdapterStore
from lorax_core.errors import AdapterError
from lorax_core.settings import Settings

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
FILES = {CONFIG: '{"r": 4}', WEIGHTS: "weights"}
BESIDE = {"README.md": "text", "optimizer.pt": "code", "checkpoint-5/adapter_config.json": "{}"}


class Store(MemoryFileSystem):
    """fsspec's memory under a name of its own, which tells what was fetched and then does what a test wants done."""

    protocol = "store"
    store: ClassVar[dict] = {}
    pseudo_dirs: ClassVar[list] = [""]
    fetched: ClassVar[list[str]] = []
    after: ClassVar[list[Callable[[str, Path], None]]] = []  # with the name and the copy of each file

    @classmethod
    def _strip_protocol(cls, path):
        return super()._strip_protocol(path.replace(f"{cls.protocol}://", "memory://", 1))

    def get_file(self, rpath, lpath, **kwargs):
        Path(lpath).write_bytes(self.cat_file(rpath))  # memory's own readers share one position
        name = rpath.rpartition("/")[2]
        self.fetched.append(name)
        for act in self.after:
            act(name, Path(lpath))


class Mute(Store):
    """One that tells no versions of files."""

    protocol = "mute"

    def ls(self, path, detail=True, **kwargs):
        return [{k: v for k, v in entry.items() if k != "created"} for entry in super().ls(path, detail=True)]


@pytest.fixture
def store() -> Iterator[Store]:
    for kind in (Store, Mute):
        fsspec.register_implementation(kind.protocol, kind, clobber=True)
    yield Store()
    for state in (Store.store, Store.fetched, Store.after):
        state.clear()
    Store.pseudo_dirs[:] = [""]


@pytest.fixture
def bucket(monkeypatch) -> Iterator[Bucket]:
    bucket = Bucket()
    for name in [name for name in os.environ if name.startswith("AWS_") or "proxy" in name.lower()]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_ENDPOINT_URL", bucket.url)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "somebody")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    yield bucket
    bucket.close()


def put(store, files, folder="/lora"):
    for name, text in files.items():
        store.pipe_file(f"{folder}/{name}", text.encode())


def refused(source, cache=Path("never made"), **options):
    with pytest.raises(AdapterError) as caught:
        find_adapter(source, cache=cache, **options)
    return caught.value


def test_an_adapter_in_memory_is_the_one_that_was_put_there(tmp_path):
    folder = make_lora(make_qwen2_model(), tmp_path / "lora", target_modules=["q_proj"])
    fsspec.filesystem("memory").put(f"{folder}/", "/test-source/lora/", recursive=True)

    found = find_adapter("memory://test-source/lora", cache=tmp_path / "cache")

    assert found.folder.is_relative_to(tmp_path / "cache")
    assert read_peft(found.folder).identity() == read_peft(folder).identity()


def test_a_url_of_a_folder_is_copied_without_what_an_adapter_does_not_need(tmp_path):
    folder = write(tmp_path / "lora", {**FILES, **BESIDE})

    found = find_adapter(folder.as_uri(), cache=tmp_path / "cache")

    assert found.origin == folder.as_uri()
    assert held(found.folder) == FILES


@pytest.mark.parametrize("scheme", ["store", "mute"])
def test_one_that_is_too_large_is_refused_before_anything_is_fetched(store, tmp_path, scheme):
    put(store, {**FILES, **BESIDE})
    size = sum(map(len, FILES.values()))

    error = refused(f"{scheme}://lora", tmp_path, max_bytes=size - 1)

    assert f"has {size} bytes" in error.message
    assert Store.fetched == []
    assert held(find_adapter(f"{scheme}://lora", cache=tmp_path, max_bytes=size).folder) == FILES


def test_a_second_look_fetches_nothing_whether_or_not_a_slash_ends_the_url(store, tmp_path):
    put(store, FILES)

    first = find_adapter("store://lora", cache=tmp_path)
    again = find_adapter("store://lora/", cache=tmp_path)

    assert (again.folder, again.revision) == (first.folder, first.revision)
    assert sorted(store.fetched) == sorted(FILES)


def test_a_file_that_changed_there_is_a_new_folder_and_the_old_one_stays(store, tmp_path):
    put(store, FILES)
    before = find_adapter("store://lora", cache=tmp_path)
    put(store, {WEIGHTS: "WEIGHTS"})

    after = find_adapter("store://lora", cache=tmp_path)

    assert after.revision != before.revision
    assert held(before.folder) == FILES
    assert held(after.folder) == {**FILES, WEIGHTS: "WEIGHTS"}


def test_where_no_versions_are_told_content_is_what_counts(store, tmp_path):
    put(store, FILES)
    before = find_adapter("mute://lora", cache=tmp_path)
    same = find_adapter("mute://lora", cache=tmp_path)
    put(store, {WEIGHTS: "WEIGHTS"})  # of the same size

    after = find_adapter("mute://lora", cache=tmp_path)

    assert same == before
    assert held(after.folder) == {**FILES, WEIGHTS: "WEIGHTS"}
    assert held(before.folder) == FILES


def broken(name, copy):
    if name == WEIGHTS:
        copy.write_text("wei")
        raise ConnectionError("the line is dead")


def cut(name, copy):
    copy.write_text(copy.read_text()[:-1])


@pytest.mark.parametrize(
    ("fault", "told"),
    [(broken, "could not be downloaded: ConnectionError: the line is dead"), (cut, "has 8 bytes, of which 7 arrived")],
)
def test_a_download_that_breaks_leaves_nothing_and_the_next_one_is_whole(store, tmp_path, fault, told):
    put(store, FILES)
    store.after.append(fault)

    error = refused("store://lora", cache=tmp_path)

    assert told in error.message
    assert "'store://lora'" in error.message
    assert held(tmp_path) == {}
    store.after.clear()
    assert held(find_adapter("store://lora", cache=tmp_path).folder) == FILES


def test_an_adapter_that_changes_while_it_is_downloaded_is_not_taken(store, tmp_path):
    put(store, FILES)
    store.after.append(lambda name, copy: put(store, {WEIGHTS: "WEIGHTS"}))

    error = refused("store://lora", cache=tmp_path)

    assert "changed while it was downloaded" in error.message
    assert held(tmp_path) == {}


def test_two_that_fetch_the_same_at_the_same_time_both_have_it_whole(store, tmp_path):
    put(store, FILES)
    meeting = threading.Barrier(2, timeout=30)
    store.after.append(lambda name, copy: meeting.wait())

    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(lambda _: find_adapter("store://lora", cache=tmp_path), range(2)))

    assert sorted(store.fetched) == sorted([*FILES, *FILES])
    assert found[0] == found[1]
    assert held(found[0].folder) == FILES
    assert list((tmp_path / "adapters").iterdir()) == [found[0].folder]


def test_what_somebody_spoilt_in_the_cache_is_fetched_again(store, tmp_path):
    put(store, FILES)
    for spoil in (Path.unlink, lambda file: file.write_text("WEIGHTS"), lambda file: file.write_text("")):
        spoil(find_adapter("store://lora", cache=tmp_path).folder / WEIGHTS)

        found = find_adapter("store://lora", cache=tmp_path)

        assert held(found.folder) == FILES


def test_the_store_of_an_engine_uses_the_cache_of_its_settings(store, tmp_path, qwen2, host):
    put(store, FILES)
    adapters = AdapterStore(make_loaded(qwen2, host), Settings(cache=tmp_path / "ours"))

    with pytest.raises(AdapterError):  # these files are no adapter, but they were fetched
        adapters.load("it", "store://lora")

    assert [folder.name for folder in (tmp_path / "ours").iterdir()] == ["adapters"]


def test_a_cache_that_cannot_be_written_is_named_with_the_variable(store, tmp_path):
    put(store, FILES)
    (tmp_path / "file").touch()

    error = refused("store://lora", cache=tmp_path / "file")

    assert repr(str(tmp_path / "file/adapters")) in error.message
    assert "LORAX_CACHE" in error.hint


REFUSED = {
    "nothing there": ("store://nowhere", FILES, "cannot be listed: FileNotFoundError", "spelling"),
    "no settings": ("store://lora", {WEIGHTS: ""}, f"has no {CONFIG}", "PEFT"),
    "only a pickle": ("store://lora", {CONFIG: "{}", "adapter_model.bin": ""}, "('adapter_model.bin')", "PeftModel"),
    "a file": (f"store://lora/{CONFIG}", FILES, "is a file; the folder of the adapter is needed", "'store://lora'"),
    "no such scheme": ("memroy://lora", FILES, "Protocol not known: memroy", "did you mean 'memory://'?"),
    "a page": ("https://hub.example/acme/lora/tree/main", FILES, "is a page, not a folder", "perhaps 'acme/lora'"),
    "a scheme without its package": ("gs://bucket/lora", FILES, "needs a package that is not installed", "gs://"),
}


@pytest.mark.parametrize(("url", "files", "message", "hint"), REFUSED.values(), ids=REFUSED)
def test_a_url_that_gives_no_adapter_is_refused_by_its_name(store, tmp_path, url, files, message, hint):
    put(store, files)

    error = refused(url, cache=tmp_path)

    assert repr(url) in error.message
    assert message in error.message
    assert hint in error.hint
    assert held(tmp_path) == {}
    assert store.fetched == []


def test_the_origin_of_a_url_shows_no_credentials_when_fetched_and_when_kept(store, tmp_path):
    put(store, FILES, "/lora?token=hunter2")

    found = [find_adapter("store://lora?token=hunter2", cache=tmp_path) for _ in range(2)]

    assert [one.origin for one in found] == ["store://lora?token=***"] * 2


def test_options_of_the_hub_are_refused_for_a_url_with_what_to_use(tmp_path):
    revised = refused("s3://bucket/lora", revision="v2", cache=tmp_path)
    opened = refused("s3://bucket/lora", token="secret", cache=tmp_path)

    assert "has no revision 'v2'" in revised.message
    assert "AWS_ACCESS_KEY_ID" in opened.hint
    assert "secret" not in str(opened)


# --- S3 ---


def test_an_adapter_in_a_bucket_is_fetched_once_and_again_when_it_changed(bucket, tmp_path):
    folder = "team/lora v1"
    bucket.objects = {f"{folder}/{name}": text.encode() for name, text in {**FILES, **BESIDE}.items()}

    first = find_adapter(f"s3://models/{folder}", cache=tmp_path)
    again = find_adapter(f"s3://models/{folder}", cache=tmp_path)
    fetched = bucket.downloaded()
    bucket.objects[f"{folder}/{WEIGHTS}"] = b"WEIGHTS"
    changed = find_adapter(f"s3://models/{folder}", cache=tmp_path)

    assert held(first.folder) == FILES
    assert again == first
    assert fetched == [f"{folder}/{name}" for name in sorted(FILES)]
    assert held(changed.folder) == {**FILES, WEIGHTS: "WEIGHTS"}


def test_an_adapter_that_changes_in_a_bucket_while_it_is_downloaded_is_not_taken(bucket, tmp_path):
    bucket.objects = {f"lora/{name}": text.encode() for name, text in FILES.items()}
    bucket.after.append(lambda key: bucket.objects.update({f"lora/{CONFIG}": b"{}"}))

    error = refused("s3://models/lora", cache=tmp_path)

    assert "changed while it was downloaded" in error.message
    assert held(tmp_path) == {}


def test_a_folder_that_a_bucket_does_not_have_is_refused_by_its_url(bucket, tmp_path):
    bucket.objects = {f"lora/{CONFIG}": b"{}"}

    error = refused("s3://models/lara", cache=tmp_path)

    assert "'s3://models/lara' cannot be listed: FileNotFoundError" in error.message


UNINSTALLED = """
import sys
from pathlib import Path
sys.modules["s3fs"] = None  # as good as not installed
from lorax_core.adapters.residency.source import find_adapter
from lorax_core.errors import AdapterError

try:
    find_adapter("s3://bucket/lora", cache=Path("cache"))
except AdapterError as error:
    print(error.hint)
"""


def test_without_its_package_s3_is_refused_with_what_to_install():
    done = subprocess.run([sys.executable, "-c", UNINSTALLED], capture_output=True, text=True, timeout=60, check=True)

    assert done.stdout.strip() == "pip install 'lorax-core[s3]'"
