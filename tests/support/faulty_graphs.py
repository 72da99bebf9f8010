"""Captured steps with one mistake each, for trials to find; by path, as a process of their own loads them."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

from captured import CapturableBackend, CapturableKernel, CapturedAttention, CapturedLora

from lorax_core.adapters.lora_kernels.base import Updates
from lorax_core.engine.graphs import Graph


class Again(Graph):
    """A graph in name: a replay computes again, from the memory that was captured."""

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


class RowsPastEightKept(CapturedAttention):
    def replan_window(self, window, rows):
        before = self.masks[window][8:].clone()
        super().replan_window(window, rows)
        if self.replans > 1:
            self.masks[window][8:] = before


class RowsPastEight(CapturableBackend):
    attention = RowsPastEightKept


class FirstLayerAlways(CapturedAttention):
    def forward(self, layer, q, k, v, angles=None):
        first = SimpleNamespace(index=0, spec=layer.spec, elementwise=layer.elementwise)
        return super().forward(first, q, k, v, angles)


class LayerZero(CapturableBackend):
    attention = FirstLayerAlways


class NothingStored(CapturedAttention):
    def write(self, layer, k, v):
        pass


class NotStored(CapturableBackend):
    attention = NothingStored


class FirstRowAlone(CapturedLora):
    """Of the rows of an adapter the first one."""

    def set(self, segments):
        super().set([replace(one, stop=one.start + 1) for one in segments])


class RanksAtOnce(CapturedLora):
    """As if programs did not walk on from the ranks that they begin with."""

    def set(self, segments):
        super().set(segments)
        for table in self.a.values():
            table[:, 64:] = 0


class KeepsTheFirstRow(CapturedLora):
    """The first row keeps its adapter when it goes back to the base."""

    def set(self, segments):
        tables = (*self.a.values(), *self.b.values())
        before = [table[0].clone() for table in tables]
        super().set(segments)
        if segments and segments[0].start > 0:
            for table, kept in zip(tables, before, strict=True):
                table[0] = kept


class SetsOnce(CapturedLora):
    """The adapters of the first replay stay."""

    done = False

    def set(self, segments):
        if not self.done:
            super().set(segments)
        self.done = bool(segments)


class FirstSiteAlone(CapturedLora):
    def set(self, segments):
        super().set([replace(one, updates=Updates(dict([*one.updates.by_site.items()][:1]))) for one in segments])


def load_capturable(_settings, _device, lora=CapturedLora):
    kernel = CapturableKernel(rank=128)
    kernel.lora = lora
    return kernel, ""


def load_first_row_alone(settings, device):
    return load_capturable(settings, device, FirstRowAlone)


def load_ranks_at_once(settings, device):
    return load_capturable(settings, device, RanksAtOnce)


def load_first_row_kept(settings, device):
    return load_capturable(settings, device, KeepsTheFirstRow)


def load_set_once(settings, device):
    return load_capturable(settings, device, SetsOnce)


def load_first_site_alone(settings, device):
    return load_capturable(settings, device, FirstSiteAlone)
