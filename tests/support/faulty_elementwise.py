"""Elementwise forms with one mistake each, for trials to find; by class path, as a process of their own loads them."""

from __future__ import annotations

from lorax_core.kernels.elementwise import READABLE, Elementwise


class OffsetForgotten(Elementwise):
    def rms_norm(self, x, weight, eps, offset=0.0):
        return super().rms_norm(x, weight, eps)


class GateAndUpExchanged(Elementwise):
    def gated_act(self, gate_up, act):
        gate, up = gate_up.chunk(2, dim=-1)
        return gate * act(up)


class LastRowNotStored(Elementwise):
    def rotate_and_store(self, q, k, v, angles, k_cache, v_cache, slots):
        q, k = self.rotate(q, k, angles) if angles is not None else (q, k)
        for cache, rows in ((k_cache, k), (v_cache, v)):
            cache.view(-1, *cache.shape[2:]).index_copy_(0, slots[:-1], rows[:-1])
        return q


class SumsOffsetForgotten(Elementwise):
    def add_rms_norm(self, x, residual, weight, eps, offset=0.0):
        return super().add_rms_norm(x, residual, weight, eps)


class BiasNeeded(Elementwise):
    def layer_norm(self, x, weight, bias, eps):
        return super().layer_norm(x, weight, bias if bias is not None else x[0], eps)


class GateCut(Elementwise):
    """Columns that no norm is wide enough to have."""

    def gated_act(self, gate_up, act):
        out = super().gated_act(gate_up, act)
        out[:, 104:] = 0
        return out


class RestForgotten(Elementwise):
    """Dimensions of a head that do not turn."""

    def rotate(self, q, k, angles):
        q, k = super().rotate(q, k, angles)
        for one in (q, k):
            one[..., 2 * angles.cos.shape[-1] :] = 0
        return q, k


class KeysNotTurned(Elementwise):
    """Where they are not stored at once."""

    def rotate(self, q, k, angles):
        return super().rotate(q, k, angles)[0], k

    def rotate_and_store(self, *args):
        return READABLE.rotate_and_store(*args)


class StoredOnlyTurned(Elementwise):
    def rotate_and_store(self, q, k, v, angles, *to):
        return q if angles is None else super().rotate_and_store(q, k, v, angles, *to)
