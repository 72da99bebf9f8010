"""An engine and its thread: it ends with the engine, and a forked child is told that it has none."""

from __future__ import annotations

import gc
import subprocess
import sys
import threading
import weakref

import pytest
from builders import make_lora, make_qwen2_model

import lorax_core as lorax

LIMIT = 60  # seconds: for a thread that does not end
CHILD = """
import os, sys, threading, warnings
warnings.filterwarnings("ignore", message=".*fork.*", category=DeprecationWarning)
import lorax_core as lorax

engine = lorax.load(sys.argv[1], kv_cache_tokens=4096, adapters={"a": sys.argv[2]}, max_adapters=1)
request = lorax.GenerateRequest(prompt=[5, 6], max_tokens=3, ignore_eos=True)
expected = engine.run([request])[0].token_ids
call = engine.submit([lorax.GenerateRequest(prompt=[5], max_tokens=400, ignore_eos=True)])
stream = engine.stream([7], max_tokens=400, ignore_eos=True)
next(stream)
# Every lock that a thread of the parent could hold when it forks.
held = [call._taking, call._changed, engine._worker._stepper._changed, engine.adapters._lock]
ready, go = threading.Event(), threading.Event()

def hold():
    for lock in held:
        lock.acquire()
    ready.set()
    go.wait()
    for lock in reversed(held):
        lock.release()

holder = threading.Thread(target=hold)
holder.start()
ready.wait()
child = os.fork()
if child == 0:
    uses = {
        "run": lambda: engine.run([request]),
        "generate": lambda: engine.generate([5], max_tokens=2),
        "embed": lambda: engine.embed([5]),
        "submit": lambda: engine.submit([request]),
        "stream": lambda: engine.stream([5]),
        "fetch": lambda: engine.generate([5], adapter="org/name"),
        "load": lambda: engine.adapters.load("b", sys.argv[2]),
        "list": lambda: engine.adapters.list(),
        "warmup": engine.warmup,
        "close": engine.close,
        "wait": call.wait,
        "cancel": call.cancel,
        "done": lambda: call.done,
        "next": lambda: next(stream),
        "close stream": stream.close,
    }
    for name, use in uses.items():
        try:
            use()
            print(name, "answered", flush=True)
        except lorax.RequestError as error:
            good = error.hint and ("process" in error.message)
            print(name, "refused" if good else repr(error), flush=True)
    del uses, use
    stream = call = engine = None
    import gc
    gc.collect()
    sys.exit(7)  # as a program ends, with all that runs at its end
go.set()
_, status = os.waitpid(child, 0)
print("child", os.waitstatus_to_exitcode(status), flush=True)
assert engine.run([request])[0].token_ids == expected
print("tokens", len(call.wait()[0].token_ids), len(list(stream)) > 0, flush=True)
engine.close()
"""


def test_a_forked_child_is_told_that_it_has_no_engine_and_ends(qwen2, tmp_path):
    adapter = make_lora(make_qwen2_model(), tmp_path)

    done = subprocess.run(
        [sys.executable, "-c", CHILD, str(qwen2), str(adapter)],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )

    lines = done.stdout.splitlines()
    assert done.returncode == 0, done.stderr
    assert lines[-2:] == ["child 7", "tokens 400 True"]
    assert len(lines) == 17
    assert [line for line in lines[:-2] if not line.endswith(" refused")] == []


def engine_threads():
    return [thread for thread in threading.enumerate() if thread.name == "lorax-engine"]


@pytest.mark.parametrize("used", ["not at all", "run", "streamed", "warmed up", "with a call that failed"])
def test_an_engine_that_is_dropped_ends_its_thread(qwen2, used):
    before = set(engine_threads())
    engine = lorax.load(qwen2, kv_cache_tokens=256)
    (thread,) = set(engine_threads()) - before
    model = weakref.ref(engine._preparer.model)
    if used == "run":
        engine.generate([5], max_tokens=3)
    elif used == "streamed":
        next(engine.stream([5], max_tokens=100, ignore_eos=True))
    elif used == "warmed up":
        engine.warmup()
    elif used == "with a call that failed":
        with pytest.raises(lorax.LoraxError):
            engine.generate([5], adapter="nobody")

    del engine
    gc.collect()
    thread.join(LIMIT)

    assert not thread.is_alive()
    gc.collect()
    assert model() is None


def test_a_call_whose_engine_was_dropped_is_answered_and_then_the_thread_ends(qwen2):
    before = set(engine_threads())
    call = lorax.load(qwen2, kv_cache_tokens=512).submit(
        [lorax.GenerateRequest(prompt=[5], max_tokens=300, ignore_eos=True)]
    )
    (thread,) = set(engine_threads()) - before

    (completion,) = call.wait(LIMIT)
    del call
    gc.collect()
    thread.join(LIMIT)

    assert len(completion.token_ids) == 300
    assert not thread.is_alive()
