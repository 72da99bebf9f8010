"""From logits to tokens.

Decides each row by its own settings, whatever its neighbours. Randomness is counter-based: one number in [0, 1) from
(seed, choice, position), so a row gets the same number alone, in any batch, after preemption and with or without draft
tokens, and no global state is touched. Everything is computed on the device; what the host must know goes into a `Transfer`.
What is written here is the readable form, and that of a GPU; on a CPU `NativeSampling` does the same in a fraction of the time.
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from lorax_core.engine.sequence import Sampling
from lorax_core.engine.step_input import SamplingRow
from lorax_core.engine.transfer import Transfer
from lorax_core.kernels.native.sampling import NativeSampling, RowSettings, load_sampling
from lorax_core.settings import Settings
from lorax_core.types import TokenLogprobs

# Python integers do not wrap: every product is cut to uint64.
_MASK = (1 << 64) - 1
# Filters keep few tokens as a rule: they look at this many of the most likely first, and at all only when that was too few.
_CANDIDATES = 1024


@dataclass(slots=True)  # not frozen: that takes five times as long, at each row
class SampledToken:
    """A sampled token with its scores; `token_id` None says that the row had no token to give, for the reason in `fault`."""

    token_id: int | None
    logprobs: TokenLogprobs | None = None
    fault: str = ""


class Scores:
    """Log-probabilities on their way to the host: of `tokens` `[rows]` in logits `[rows, vocab]`, with the most likely beside.

    `tops[row]` is how many of the most likely, None for a row without scores.
    """

    def __init__(
        self,
        logits: Tensor,
        tokens: Tensor,
        tops: SequenceOf[int | None],
        transfer: Transfer,
        native: NativeSampling | None = None,
    ) -> None:
        self._transfer = transfer
        self._tops = tops
        self._rows = [row for row, top in enumerate(tops) if top is not None]
        if not self._rows:
            return
        chosen = tokens
        if len(self._rows) < len(tops):
            at = _index(self._rows, logits)
            logits, chosen = logits[at], tokens[at]
        most = min(max(top for top in tops if top is not None), logits.shape[-1])
        if native is not None:
            own, values, ids = native.score(logits, chosen, most)
        else:
            logprobs = logits.log_softmax(-1)  # [wanted, vocab]
            ids = _likeliest(logits, most)
            values = logprobs.gather(-1, ids)
            own = logprobs.gather(-1, chosen[:, None])[:, 0]
        self._own, self._values, self._ids = (transfer.add(one) for one in (own, values, ids))

    def read(self, tokens: SequenceOf[int]) -> list[TokenLogprobs | None]:
        """The scores of each row, once the transfer was fetched; None where none were asked for."""
        found: list[TokenLogprobs | None] = [None] * len(self._tops)
        if not self._rows:
            return found
        own, values, ids = (self._transfer[number].tolist() for number in (self._own, self._values, self._ids))
        for place, row in enumerate(self._rows):
            count = self._tops[row] or 0
            top = dict(zip(ids[place][:count], values[place][:count], strict=True))
            found[row] = TokenLogprobs(tokens[row], own[place], top)
        return found


class Sampled:
    """Tokens for rows of logits `[rows, vocab]` float32, sampled on the device.

    `tokens` `[rows]` int64 can be used there at once; `read` gives them on the host once the transfer was fetched. `native` is
    the compiled form, where there is one.
    """

    def __init__(
        self,
        logits: Tensor,
        rows: SequenceOf[SamplingRow],
        transfer: Transfer,
        native: NativeSampling | None = None,
    ) -> None:
        self._logits, self._rows, self._transfer = logits, rows, transfer
        self._adjusted = _adjusted(logits, rows, native)  # [rows, vocab]
        self.revised = False  # whether `read` changed `tokens`
        self._short: int | None = None
        self._filtered: list[int] = []
        if native is not None:
            by = [_row_settings(row, logits.shape[-1]) for row in rows]
            self.tokens, *flags = native.sample(self._adjusted, logits, by)
            self._sound, self._open = (transfer.add(flag) for flag in flags)
        else:
            best = self._sample()
            self._sound, self._open = self._faults(best, transfer)
        self._scores = Scores(logits, self.tokens, [one.sampling.logprobs for one in rows], transfer, native)
        self._tokens = transfer.add(self.tokens)

    def _sample(self) -> Tensor:
        """Sets the tokens; gives the largest adjusted logits `[rows]`."""
        # Greedy for every row; rows with a temperature are overwritten below.
        best, self.tokens = self._adjusted.max(-1)  # [rows]
        drawn = [row for row, one in enumerate(self._rows) if one.sampling.temperature > 0]
        plain = [row for row in drawn if not self._rows[row].sampling.filters]
        self._filtered = [row for row in drawn if self._rows[row].sampling.filters]
        if plain:
            self.tokens[_index(plain, best)] = _draw(*self._of(plain))
        if self._filtered:
            # At least what a top_k leaves: top_p is a share of it.
            most = max(_CANDIDATES, *(self._rows[row].sampling.top_k or 0 for row in self._filtered))
            tokens, short = _draw_filtered(*self._of(self._filtered), most)
            self.tokens[_index(self._filtered, best)] = tokens
            self._short = self._transfer.add(short)
        return best

    def read(self) -> list[SampledToken]:
        """The token of each row."""
        if self._short is not None and self._transfer[self._short].any():
            return self._read_again()
        chosen: list[int] = self._transfer[self._tokens].tolist()
        sound, some = self._transfer[self._sound].tolist(), self._transfer[self._open].tolist()
        scores = self._scores.read(chosen)
        return [
            SampledToken(chosen[row], scores[row])
            if sound[row] and some[row]
            else SampledToken(None, fault=_fault(sound[row]))
            for row in range(len(chosen))
        ]

    @torch.inference_mode()
    def _read_again(self) -> list[SampledToken]:
        """Rows whose filters leave more tokens than were looked at, over the whole vocabulary; rare, and a second transfer."""
        short = self._transfer[self._short].tolist() if self._short is not None else []
        again = [row for row, flag in zip(self._filtered, short, strict=True) if flag]
        tokens, _ = _draw_filtered(*self._of(again), self._logits.shape[-1])
        self.tokens[_index(again, self._logits)] = tokens
        self.revised = True
        transfer = Transfer()
        self._scores = Scores(self._logits, self.tokens, [one.sampling.logprobs for one in self._rows], transfer)
        self._tokens = transfer.add(self.tokens)
        self._sound, self._open = self._faults(self._adjusted.amax(-1), transfer)
        transfer.fetch()
        self._transfer, self._short = transfer, None
        return self.read()

    def _faults(self, best: Tensor, transfer: Transfer) -> tuple[int, int]:
        """Whether each row is sound, and whether it has a token to give; `best` `[rows]` are the largest adjusted logits."""
        # A NaN anywhere in a row is its maximum.
        if self._adjusted is self._logits:
            sound = transfer.add(best.isfinite())
            return sound, sound
        return transfer.add(self._logits.amax(-1).isfinite()), transfer.add(best > float("-inf"))

    def _of(self, rows: list[int]) -> tuple[Tensor, list[SamplingRow]]:
        logits = self._adjusted if len(rows) == len(self._rows) else self._adjusted[_index(rows, self._adjusted)]
        return logits, [self._rows[row] for row in rows]


def uniform(seed: int, choice: int, position: int) -> float:
    """A number in [0, 1), the same for the same arguments (the finaliser of splitmix64, applied to each in turn)."""
    # 2**64 over the golden ratio, as in splitmix64. The multipliers below are odd, so they are bijective mod 2**64.
    state = _mix((seed & _MASK) + 0x9E3779B97F4A7C15)
    state = _mix(state ^ (choice * 0xBF58476D1CE4E5B9 & _MASK))
    state = _mix(state ^ (position * 0xD1342543DE82EF95 & _MASK))
    # 53 bits, the significand of a double: the quotient cannot round up to 1.0.
    return (state >> 11) / (1 << 53)


def select_native(device: torch.device) -> NativeSampling | None:
    """The compiled form for logits on a device; None where there is none, or it is switched off."""
    return load_sampling(Settings.from_env())[0] if device.type == "cpu" else None


def _row_settings(row: SamplingRow, vocab: int) -> RowSettings:
    by = row.sampling
    if by.temperature <= 0:
        return (0.0, 0.0, 1.0, 0.0, 1.0, 0)
    top_k = 0 if by.top_k is None else min(by.top_k, vocab)
    return by.temperature, uniform(by.seed, by.choice, row.position), by.top_p, by.min_p, by.typical_p, top_k


def _adjusted(logits: Tensor, rows: SequenceOf[SamplingRow], native: NativeSampling | None) -> Tensor:
    """Bias, penalties, bans and grammars applied, row by row; logits themselves where no row asks for any."""
    if not any(_changes(row) for row in rows):
        return logits
    adjusted = logits.clone(memory_format=torch.contiguous_format)
    added = [
        (at, token, value)
        for at, row in enumerate(rows)
        for token, value in (*row.sampling.logit_bias, *((token, float("-inf")) for token in row.banned))
    ]
    if added:
        at, tokens, values = zip(*added, strict=True)
        places = _index(at, logits), _index(tokens, logits)
        # Accumulated: a token may have a bias and a ban in one row.
        adjusted.index_put_(places, torch.tensor(values, device=logits.device, dtype=logits.dtype), accumulate=True)
    counted = [at for at, row in enumerate(rows) if row.counts is not None]
    if counted:
        _penalise(adjusted, logits, rows, counted)
    masked = [at for at, row in enumerate(rows) if row.allowed is not None]
    if masked:
        bits = np.stack([np.frombuffer(row.allowed, np.uint8) for row in rows if row.allowed is not None])
        if native is not None:
            native.mask(adjusted, masked, bits)
        else:
            allowed = _unpacked(torch.from_numpy(bits).to(logits.device), logits.shape[-1])  # [masked, vocab]
            where = _index(masked, logits)
            adjusted[where] = adjusted[where].masked_fill(~allowed, float("-inf"))
    return adjusted


def _changes(row: SamplingRow) -> bool:
    return bool(row.sampling.logit_bias or row.banned or row.counts is not None or row.allowed is not None)


def _penalise(adjusted: Tensor, logits: Tensor, rows: SequenceOf[SamplingRow], counted: list[int]) -> None:
    """Lower the logits of tokens that stand before: all of them by the repetition penalty, generated ones by the other two."""
    found = [counts for at in counted if (counts := rows[at].counts) is not None]
    sizes = [len(counts.ids) for counts in found]
    at = _index(np.repeat(counted, sizes), logits)  # [numbers]
    tokens = _index(np.concatenate([np.frombuffer(counts.ids, np.int64) for counts in found]), logits)
    count = _index(np.concatenate([np.frombuffer(counts.counts, np.int64) for counts in found]), logits)

    def setting(read: Callable[[Sampling], float]) -> Tensor:
        values = np.repeat([read(rows[row].sampling) for row in counted], sizes)
        return torch.from_numpy(values).to(logits.device)  # [numbers] float64

    value = logits[at, tokens].double()
    factor = setting(lambda one: one.repetition_penalty)
    # The factor pushes down whatever the sign; the other two count only what was generated, as OpenAI's do.
    repeated = torch.where(value > 0, value / factor, value * factor)
    lowered = setting(lambda one: one.frequency_penalty) * count
    lowered = lowered + torch.where(count > 0, setting(lambda one: one.presence_penalty), 0.0)
    # Added as a difference: penalties are of the raw logits, and `adjusted` has biases and bans already.
    # A token at -inf stays there: the difference of two infinities would be NaN.
    lower = torch.where(value.isfinite(), repeated - value - lowered, 0.0)
    adjusted.index_put_((at, tokens), lower.to(logits.dtype), accumulate=True)


def _unpacked(bits: Tensor, vocab: int) -> Tensor:
    """Packed bits `[rows, bytes]` uint8 as `[rows, vocab]` bool; tokens beyond them are not allowed."""
    shifts = torch.arange(8, device=bits.device, dtype=torch.uint8)
    flags = (bits[:, :, None] >> shifts & 1).flatten(1).bool()[:, :vocab]
    return torch.nn.functional.pad(flags, (0, vocab - flags.shape[1]))


def _fault(sound: bool) -> str:
    return "no token is allowed here" if sound else "the model gave NaN or infinite logits"


def _index(values: SequenceOf[int] | np.ndarray[tuple[int], np.dtype[np.int64]], like: Tensor) -> Tensor:
    # Without waiting: the step before may still be computed.
    return torch.from_numpy(np.asarray(values, np.int64).copy()).to(like.device, non_blocking=True)


def _column(values: list[float], like: Tensor) -> Tensor:
    return torch.tensor(values, dtype=torch.float64).to(like.device, non_blocking=True)[:, None]  # [rows, 1]


def _points(rows: list[SamplingRow], like: Tensor) -> Tensor:
    return _column([uniform(row.sampling.seed, row.sampling.choice, row.position) for row in rows], like)


def _scaled(logits: Tensor, rows: list[SamplingRow]) -> Tensor:
    """Logits over their temperatures, the largest at 0: no temperature above 0 is too small."""
    # float64: a float32 cumsum over a large vocabulary loses small probabilities.
    below = logits.double() - logits.amax(-1, keepdim=True)
    return below / _column([row.sampling.temperature for row in rows], logits)


def _draw(logits: Tensor, rows: list[SamplingRow]) -> Tensor:
    """Inverse transform over the whole vocabulary, in its order."""
    scaled = _scaled(logits, rows)
    mass = scaled.softmax(-1).cumsum(-1)  # [rows, vocab]
    # `<=`: a draw of 0 must skip leading tokens without mass. The sum is 1 only up to rounding.
    drawn = (mass <= _points(rows, logits) * mass[:, -1:]).sum(-1)
    # Rounding may push a draw past the last token that has mass.
    return torch.minimum(drawn, (mass < mass[:, -1:]).sum(-1))


def _draw_filtered(logits: Tensor, rows: list[SamplingRow], candidates: int) -> tuple[Tensor, Tensor]:
    """Inverse transform over the tokens that top_k, top_p, min_p and typical_p leave, most likely first.

    Looks at so many `candidates`; gives the tokens `[rows]`, and for which rows that was too few.
    """
    scaled = _scaled(logits, rows)
    total = scaled.logsumexp(-1, keepdim=True)
    count = min(candidates, logits.shape[-1])
    order = _likeliest(logits, count)
    probabilities = (scaled.gather(-1, order) - total).exp()  # [rows, count]
    keep = _kept(probabilities, [row.sampling for row in rows])
    # The last candidate is kept: tokens past it may be as well.
    short = keep[:, -1] & (count < logits.shape[-1])
    if any(row.sampling.typical_p < 1 for row in rows):
        keep &= _typical(probabilities.where(keep, 0.0), [row.sampling.typical_p for row in rows])
    mass = probabilities.where(keep, 0.0).cumsum(-1)
    drawn = (mass <= _points(rows, logits) * mass[:, -1:]).sum(-1)
    last = (mass < mass[:, -1:]).sum(-1)
    return order.gather(-1, torch.minimum(drawn, last)[:, None])[:, 0], short


def _likeliest(logits: Tensor, count: int) -> Tensor:
    """Ids `[rows, count]` of the largest logits in falling order, of equal ones the first: the same on every device."""
    vocab = logits.shape[-1]
    bits = (logits + 0.0).view(torch.int32)  # 0.0 added: -0.0 is no less than 0.0
    # Read as integers, floats below 0 fall where they should rise. In place: each copy takes as long as finding the largest.
    bits ^= (bits >> 31).bitwise_and_(0x7FFFFFFF)
    keys = bits.long().bitwise_left_shift_(32)
    keys += torch.arange(vocab - 1, -1, -1, device=logits.device)  # no two are equal
    return vocab - 1 - (keys.topk(count, dim=-1).values & 0xFFFFFFFF)


def _kept(probabilities: Tensor, settings: list[Sampling]) -> Tensor:
    """Which of the candidates, in falling order, top_k, top_p (of what top_k left) and min_p keep."""
    count = probabilities.shape[-1]
    rank = torch.arange(count, device=probabilities.device)
    keep = rank < _column([one.top_k or float("inf") for one in settings], probabilities)
    kept = probabilities.where(keep, 0.0)
    # Without a top_k the whole vocabulary is left, whose mass is one.
    left = torch.where(
        _column([one.top_k or 0 for one in settings], probabilities) > 0, kept.sum(-1, keepdim=True), 1.0
    )
    before = (kept.cumsum(-1) - kept) / left  # mass in front of each token: the one that crosses top_p stays
    keep &= before < _column([one.top_p for one in settings], probabilities)
    floor = _column([one.min_p for one in settings], probabilities)
    return keep & (probabilities >= probabilities[:, :1] * floor)


def _typical(kept: Tensor, shares: list[float]) -> Tensor:
    """The tokens whose surprise is nearest the entropy, up to a share of the mass; everything where the share is 1."""
    p = kept / kept.sum(-1, keepdim=True)
    surprise = -p.log()  # infinite where nothing is kept
    entropy = (p * surprise.where(p > 0, 0.0)).sum(-1, keepdim=True)
    # Stable: ties fall to the likelier token on every device.
    nearest = (surprise - entropy).abs().argsort(dim=-1, stable=True)
    ordered = p.gather(-1, nearest)
    share = _column(shares, kept)
    # Mass in front of each token, so that at least one stays.
    inside = (ordered.cumsum(-1) - ordered < share) | (share >= 1)
    return torch.zeros_like(inside).scatter(-1, nearest, inside)


def _mix(state: int) -> int:
    state = state & _MASK
    state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & _MASK
    return state ^ (state >> 31)
