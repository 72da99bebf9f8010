"""Kernels with one mistake each, for trials to find; by class path, as a process of their own loads them."""

from __future__ import annotations

import itertools
import os
import signal
import time
from dataclasses import replace
from types import SimpleNamespace

import torch
from captured import CapturableBackend, CapturableKernel, CapturedAttention

from lorax_core.adapters.lora_kernels.torch import TorchKernel
from lorax_core.attention.torch import TorchBackend
from lorax_core.engine.graphs import Graph
from lorax_core.kernels.elementwise import Elementwise


class Changed(TorchBackend):
    """The torch backend, whose answers `change` makes wrong."""

    def plan(self, rows):
        step = super().plan(rows)
        compute = step.forward

        def forward(layer, q, k, v, angles=None):
            return self.change(compute(self.layer(layer), q, k, v, angles), rows)

        step.forward = forward
        return step

    def layer(self, layer):
        return layer

    def change(self, out, rows):
        return out


class WindowOffByOne(TorchBackend):
    def bind(self, specs, dtype, cache):
        super().bind([_wider(spec) for spec in specs], dtype, cache)

    def plan(self, rows):
        step = super().plan(rows)
        compute = step.forward
        step.forward = lambda layer, *rest: compute(_like(layer, _wider(layer.spec)), *rest)
        return step


class CapForgotten(Changed):
    def layer(self, layer):
        return _like(layer, replace(layer.spec, soft_cap=None))


class RowsPastATile(Changed):
    def change(self, out, rows):
        starts = rows.query_starts.host
        for start, stop in itertools.pairwise(starts.tolist()):
            out[start + 128 : stop] = 0
        return out


class LostSplits(TorchBackend):
    """Of many keys the first two thousand are left out."""

    def plan(self, rows):
        step = super().plan(rows)
        gather = self._cache.gather

        def some(layer, pages, dtype):
            k, v = gather(layer, pages, dtype)
            if pages.dim() == 1 and len(pages) * self._cache.page_size > 2100:
                v = v.clone()
                v[: 2000 // self._cache.page_size] = 0
            return k, v

        self._cache.gather = some
        return step


class ScaleForgotten(TorchBackend):
    def bind(self, specs, dtype, cache):
        if cache is not None:
            cache.scales = [(1.0, 1.0)]
        super().bind(specs, dtype, cache)


class GivesNaN(Changed):
    name = "faulty"

    def change(self, out, rows):
        out[-1, 0, 0] = torch.nan
        return out


class Raises(TorchBackend):
    def plan(self, rows):
        raise RuntimeError("nvcc: no such architecture")


class Refuses(TorchBackend):
    def layout(self, specs, dtype, kv_dtype, device, page_size=None):
        return "not today"


class Aborts(TorchBackend):
    def plan(self, rows):
        os.abort()


class Hangs(TorchBackend):
    def plan(self, rows):
        time.sleep(3600)


class Prints(TorchBackend):
    """What a compiler writes to its standard output is no verdict."""

    def plan(self, rows):
        print('{"done": 0, "problem": "not ours"}')
        os.system("echo compiled")
        return super().plan(rows)


class PrintsBelow(TorchBackend):
    """What a library writes to file 1, below Python and without an end of line."""

    def plan(self, rows):
        os.write(1, b"42")
        return super().plan(rows)


class OutOfMemory(TorchBackend):
    def plan(self, rows):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB")


class Killed(TorchBackend):
    def plan(self, rows):
        os.kill(os.getpid(), signal.SIGKILL)


class BreaksItsProcess(TorchBackend):
    """As a fault of a GPU's memory: every use of torch fails from then on."""

    def plan(self, rows):
        def fail(*_, **__):
            raise RuntimeError("CUDA error: an illegal memory access was encountered")

        torch.randn = torch.zeros = torch.rand = fail
        fail()


class RowsUnwritten(TorchKernel):
    """Rows past the first tile of an adapter are left as they were."""

    def plan(self, segments):
        return super().plan([replace(one, stop=min(one.stop, one.start + 32)) for one in segments])


class RanksCut(TorchKernel):
    def plan(self, segments):
        made = super().plan(segments)
        for site, updates in made._at.items():
            made._at[site] = [(rows, update) for rows, update in updates if len(update.a) <= 64]
        return made


def load_rows_unwritten(_settings, _device):
    return RowsUnwritten(), ""


def load_ranks_cut(_settings, _device):
    return RanksCut(), ""


def load_torch(_settings, _device):
    return TorchKernel(), ""


def load_capturable(_settings, _device):
    return CapturableKernel(), ""


def load_none(_settings, _device):
    return None, "nobody is at home"


class OffsetForgotten(Elementwise):
    def rms_norm(self, x, weight, eps, offset=0.0):
        return super().rms_norm(x, weight, eps)


class GateAndUpExchanged(Elementwise):
    def gated_act(self, gate_up, act):
        gate, up = gate_up.chunk(2, dim=-1)
        return gate * act(up)


class LastRowNotStored(Elementwise):
    def rotate_and_store(self, q, k, v, angles, k_cache, v_cache, slots):
        q, k = self.rotate(q, k, angles)
        for cache, rows in ((k_cache, k), (v_cache, v)):
            cache.view(-1, *cache.shape[2:]).index_copy_(0, slots[:-1], rows[:-1])
        return q


class Again(Graph):
    """A graph in name: a replay computes anew, from the memory that was captured."""

    def __init__(self, device):
        self._compute = None

    def capture(self, compute):
        compute()
        self._compute = compute

    def replay(self):
        self._compute()


def again(device):
    return lambda: Again(device)


class NotReplanned(CapturableBackend):
    """A captured step that keeps the lengths of its capture."""

    def plan_graph(self, rows):
        made = super().plan_graph(rows)
        done = []

        def once(rows):
            if not done:
                done.append(CapturedAttention.replan(made, rows))

        made.replan = once
        return made


def _wider(spec):
    return replace(spec, window=spec.window and spec.window + 1)


def _like(layer, spec):
    return SimpleNamespace(index=layer.index, spec=spec, elementwise=layer.elementwise)
