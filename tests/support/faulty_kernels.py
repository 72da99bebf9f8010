"""Attention and LoRA kernels with one mistake each, for trials to find; by class path, as a process of their own loads them."""

from __future__ import annotations

import itertools
import os
import signal
import subprocess
import time
from dataclasses import replace
from types import SimpleNamespace

import torch

from lorax_core.adapters.lora_kernels.torch import TorchKernel
from lorax_core.attention.base import HostAndDevice
from lorax_core.attention.torch import TorchBackend


class Changed(TorchBackend):
    """The torch backend, whose answers `change` makes wrong."""

    def plan(self, rows):
        step = super().plan(rows)
        compute = step.forward

        def forward(layer, q, k, v, angles=None):
            return self.change(compute(self.layer(layer), q, k, v, self.angles(layer, angles)), rows)

        step.forward = forward
        return step

    def layer(self, layer):
        return layer

    def angles(self, layer, angles):
        return angles

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


class EdgeOfWindow(TorchBackend):
    """A decoding row sees a key too many when it is the first that lies behind the window."""

    def plan(self, rows):
        step = super().plan(rows)
        for mask in step._decode.masks.values() if step._decode is not None else ():
            mask[..., 0] |= mask[..., 1]
        return step


class PagesInARow(TorchBackend):
    """Of each sequence the first page alone is looked up."""

    def plan(self, rows):
        table = rows.page_table.host
        table = (table[:, :1] + torch.arange(table.shape[1], dtype=torch.int32)).clamp(max=self._cache.pages - 1)
        return super().plan(replace(rows, page_table=HostAndDevice(table, table)))


class LayerZero(Changed):
    def layer(self, layer):
        return _like(layer, layer.spec, index=0)


class LastLayer(Changed):
    def layer(self, layer):
        return _like(layer, layer.spec, index=-1)


class OneLayerAKind(Changed):
    """What was found for the first layer of a kind is used for all of them."""

    def bind(self, specs, dtype, cache):
        super().bind(specs, dtype, cache)
        self._first = {}

    def layer(self, layer):
        return _like(layer, layer.spec, index=self._first.setdefault(layer.spec, layer.index))


class PartNotTurned(Changed):
    """Heads are turned whole or not at all."""

    def angles(self, layer, angles):
        return None if angles is None or 2 * angles.cos.shape[-1] < layer.spec.head_dim else angles


class AnglesOfAnotherLayer(Changed):
    _last = None

    def angles(self, layer, angles):
        self._last = angles or self._last
        return self._last


class RowsPastATile(Changed):
    most = 128

    def change(self, out, rows):
        starts = rows.query_starts.host
        for start, stop in itertools.pairwise(starts.tolist()):
            out[start + self.most : stop] = 0
        return out


class RowsOfLongChunks(RowsPastATile):
    most = 200


class SequencesPastTen(Changed):
    def change(self, out, rows):
        for start in rows.query_starts.host[10:11].tolist():
            out[start:] = 0
        return out


class ChunksOverManyKeys(Changed):
    def change(self, out, rows):
        runs = itertools.pairwise(rows.query_starts.host.tolist())
        for (start, stop), keys in zip(runs, rows.kv_lengths.host.tolist(), strict=True):
            if stop - start > 1 and keys > 4096:
                out[start:stop] = 0
        return out


class EverySixteenthRow(Changed):
    def change(self, out, rows):
        out[15::16] *= 1.04
        return out


class LostSplits(TorchBackend):
    """Of many keys the first two thousand are left out."""

    lost = slice(0, 2000)
    over = 2100

    def plan(self, rows):
        step = super().plan(rows)
        gather = self._cache.gather

        def some(layer, pages, dtype):
            k, v = gather(layer, pages, dtype)
            if pages.dim() == 1 and len(pages) * self._cache.page_size > self.over:
                v = v.clone()
                v.flatten(0, 1)[self.lost] = 0
            return k, v

        self._cache.gather = some
        return step


class KeysPastFiveThousand(LostSplits):
    lost = slice(5200, None)
    over = 5200


class ScaleForgotten(TorchBackend):
    def bind(self, specs, dtype, cache):
        if cache is not None:
            cache.scales = [(1.0, 1.0)] * len(cache.scales)
        super().bind(specs, dtype, cache)


class ScaleOfTheOther(TorchBackend):
    def bind(self, specs, dtype, cache):
        cache.scales = [(k, k) for k, _ in cache.scales]
        super().bind(specs, dtype, cache)


class ScaleOfAnotherLayer(TorchBackend):
    def bind(self, specs, dtype, cache):
        cache.scales = cache.scales[:1] * len(cache.scales)
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


class Compiles(TorchBackend):
    """Starts a compiler, which holds the file of the variable COMPILER open for as long as it runs."""

    def plan(self, rows):
        with open(os.environ["COMPILER"], "w") as held:
            # Not for hours: where nobody ends it, it ends by itself.
            subprocess.Popen(["/bin/sh", "-c", "exec sleep 120"], stdin=subprocess.DEVNULL, stdout=held, stderr=held)
            held.write("started")
        return self.end()


class HangsOverACompiler(Compiles):
    def end(self):
        time.sleep(3600)


class DiesOverACompiler(Compiles):
    def end(self):
        os.kill(os.getpid(), signal.SIGKILL)


class Prints(TorchBackend):
    """What a compiler writes to its standard output is no verdict, nor what a library writes to file 1, below Python."""

    def plan(self, rows):
        print('{"done": 0, "problem": "not ours"}')
        os.system("echo compiled")
        os.write(1, b"42")  # without an end of line
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


class ManyRowsUnwritten(TorchKernel):
    """Of a step with many rows only the first are computed."""

    def plan(self, segments):
        if sum(one.rows for one in segments) > 256:
            segments = [replace(one, stop=min(one.stop, 256)) for one in segments]
        return super().plan(segments)


class AdaptersCut(TorchKernel):
    def plan(self, segments):
        return super().plan(segments[:4])


class RanksCut(TorchKernel):
    def __init__(self, most):
        self._most = most

    def plan(self, segments):
        made = super().plan(segments)
        for site, updates in made._at.items():
            made._at[site] = [(rows, update) for rows, update in updates if len(update.a) <= self._most]
        return made


class RowBehindTheLast(TorchKernel):
    """The row behind those of the last adapter is changed too."""

    def plan(self, segments):
        return super().plan([*segments[:-1], replace(segments[-1], stop=segments[-1].stop + 1)])


class SomeRowsOff(TorchKernel):
    def plan(self, segments):
        made = super().plan(segments)
        add = made.add

        def off(site, x, y):
            add(site, x, y)
            y[15::16] *= 1.04

        made.add = off
        return made


def load_rows_unwritten(_settings, _device):
    return RowsUnwritten(), ""


def load_row_behind_the_last(_settings, _device):
    return RowBehindTheLast(), ""


def load_ranks_cut(_settings, _device):
    return RanksCut(64), ""


def load_large_ranks_cut(_settings, _device):
    return RanksCut(128), ""


def load_many_rows_unwritten(_settings, _device):
    return ManyRowsUnwritten(), ""


def load_adapters_cut(_settings, _device):
    return AdaptersCut(), ""


def load_some_rows_off(_settings, _device):
    return SomeRowsOff(), ""


def load_torch(_settings, _device):
    return TorchKernel(), ""


def load_none(_settings, _device):
    return None, "nobody is at home"


def _wider(spec):
    return replace(spec, window=spec.window and spec.window + 1)


def _like(layer, spec, index=None):
    index = layer.index if index is None else index
    return SimpleNamespace(index=index, spec=spec, elementwise=layer.elementwise)
