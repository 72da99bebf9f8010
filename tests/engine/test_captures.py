"""How decoding steps are captured: by which rules of CUDA, in which order, and what is kept of a capture."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from gpu.doubles.streams import Cuda
from gpu.doubles.tape import tensors
from replays import ROWS, Rig
from rigs import make_capturable, within
from torch.utils._python_dispatch import TorchDispatchMode

from lorax_core.engine.graphs import DecodeGraphs, Graph, cuda_graphs, sizes


def test_a_cuda_graph_is_captured_after_one_pass_on_its_stream_and_other_threads_go_on():
    cuda = Cuda()
    make = cuda_graphs(torch.device("cpu"), cuda)
    cuda.launch("inputs")

    def compute():
        cuda.launch("step")
        within(60, cuda.allocate)  # in another thread, as adapters are copied to the device

    for graph in (make(), make()):
        graph.capture(compute)

    first, second = cuda.graphs
    assert first.work == second.work == ["step"]
    assert first.before == ["inputs", "step"]  # warm: on the same stream, and after its inputs were there
    assert cuda.current.before[:3] == ["inputs", *first.before]  # what comes next waits for the pass before the capture
    assert first.pool is second.pool


def test_a_replay_launches_what_was_captured_on_the_current_stream():
    cuda = Cuda()
    graph = cuda_graphs(torch.device("cpu"), cuda)()
    graph.capture(lambda: cuda.launch("step"))
    before = len(cuda.current.before)

    graph.replay()

    assert cuda.current.before[before:] == ["step"]


class Making(TorchDispatchMode):
    """Tells of every tensor that is made, and keeps none."""

    def __init__(self):
        super().__init__()
        self.made = []
        self.nbytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        given = {id(one) for one in tensors((args, kwargs))}
        new = [one for one in tensors(out) if id(one) not in given]
        self.made += map(weakref.ref, new)
        self.nbytes += sum(one.nbytes for one in new)
        return out


class Pooled(Graph):
    """A capture that knows the memory which its pool gave, and whether it was given back."""

    def __init__(self):
        self.making = Making()

    def capture(self, compute):
        compute()
        with self.making:
            compute()

    def replay(self):
        raise NotImplementedError("only captured")


@pytest.fixture
def captured(qwen2, host):
    """The captures of one model, in their order."""
    made = []

    def make():
        made.append(Pooled())
        return made[-1]

    rig = Rig(make_capturable(qwen2, host))
    graphs = DecodeGraphs(rig.base.model, rig.backend, rig.pool, None, ROWS, make)
    assert graphs.prepare(adapted=False) is None
    # With the graphs, which must be alive when it is asked what they keep.
    return graphs, [graph.making for graph in made]


def test_nothing_that_a_capture_made_is_kept_so_that_the_next_has_its_memory(captured):
    _, captures = captured
    gc.collect()

    assert len(captures) == len(sizes(ROWS))
    for making in captures:
        assert making.made
        assert [one() for one in making.made if one() is not None] == []


def test_the_largest_step_is_captured_first_whose_memory_is_enough_for_all(captured):
    _, captures = captured

    taken = [making.nbytes for making in captures]

    assert taken == sorted(taken, reverse=True)
    assert taken[0] > taken[-1]
