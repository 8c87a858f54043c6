"""Shared attention in a bound transformer: the target's rows, the reference's rows or kept keys, one softmax.

The reference is either further rows of the call, which :class:`SharedAttention` appends before the transformer runs and
drops from its output, or it is run alone once per step and its keys and values are kept.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

import fastrope as fr
from fastrope.activity import sharings_of
from fastrope.checks import require
from fastrope.rope import rotate
from fastrope.sharing import SHARED, SharedKeys, Sharing, Snapshot, Statistics, adain, check_reference

from .adapters import Adapters
from .dispatch import Work
from .fingerprints import Readings
from .prefetch import Prefetch
from .rows import Joined, Memo
from .sequences import Call, JointSequence, device_of
from .steps import find_sigma

if TYPE_CHECKING:
    from .calls import CallState


class SharedWork:
    """What a layer does that shares, or whose target takes on a reference's statistics.

    Args:
        targets: the target's attention; its keys are the sequence and the shared tokens.
        sharings: what the methods ask for in this layer, see :func:`combine`.
        tokens: the layout of the sequence.
        rope: of the sequence, before anything is appended.
        reference: the plain attention of the last ``rows`` rows of the batch, if there are any.
    """

    def __init__(
        self,
        targets: Work,
        sharings: tuple[Sharing, ...],
        tokens: fr.TokenLayout,
        rope: fr.RoPE,
        reference: Work | None = None,
        rows: int = 0,
    ):
        self.masked = targets.masked
        self._targets = targets
        self._shares = shares(sharings)
        self._normalising = next((s for s in sharings if s.adain > 0), None)
        self._tokens = tokens
        self._rope = rope
        self._reference = reference
        self._rows = rows

    @property
    def plans(self) -> list[fr.Plan]:
        """Those built so far."""
        return self._targets.plans + (self._reference.plans if self._reference is not None else [])

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        applied: bool,
        backend: str = "auto",
        kept: SharedKeys | None = None,
        kept_angles: Tensor | None = None,
    ) -> Tensor:
        """Attention of ``q, k, v (B, S, H, D)``, the reference's rows last, rotated already (``applied``) or not.

        Args:
            kept: the reference's keys, where it is no row of the batch, and the angles ``(tokens, D/2)`` they have.
        """
        own = None
        if self._rows:
            count = len(q) - self._rows
            (q, q_own), (k, k_own), (v, v_own) = ((x[:count], x[count:]) for x in (q, k, v))
            own = self._reference.attend(q_own, k_own, v_own, applied, backend)
            if self._shares:
                angles = self._angles(q.device)
                angles = angles if angles.ndim == 2 else angles[count:]
                statistics = self._normalising is not None and self._normalising.reference == SHARED
                angles = angles if applied else None
                kept = share(q_own, k_own, v_own, self._tokens.target, angles, statistics, self._rope.pairing)
        keys, values = [k], [v]
        if self._normalising is not None:
            q, keys = self._normalised(q, k, applied, kept)
        if self._shares:
            kept_keys, kept_values = (x.to(k.device, non_blocking=True) for x in (kept.k, kept.v))
            if kept.applied != applied:
                kept_angles = kept_angles.to(k.device)
                kept_keys = rotate(kept_keys, kept_angles if applied else -kept_angles, self._rope.pairing)
            keys.append(kept_keys.expand(len(k), -1, -1, -1))
            values.append(kept_values.expand(len(k), -1, -1, -1))
        k, v = (x[0] if len(x) == 1 else torch.cat(x, dim=1) for x in (keys, values))
        out = self._targets.attend(q, k, v, applied, backend)
        return out if own is None else torch.cat([out, own])

    def _normalised(self, q: Tensor, k: Tensor, applied: bool, kept: SharedKeys | None) -> tuple[Tensor, list[Tensor]]:
        """Queries, and the parts of the keys, after AdaIN of the target's image tokens."""
        at, strength = self._normalising.reference, self._normalising.adain
        span, angles = self._tokens.target, None
        if applied:
            angles = self._angles(q.device)
            angles = angles if angles.ndim == 2 else angles[: len(q)]
        found = []
        for x, statistics in ((q, kept and kept.queries), (k, kept and kept.keys)):
            inner = x[:, span] if angles is None else rotate(x[:, span], -angles[..., span, :], self._rope.pairing)
            if at != SHARED:
                own = self._tokens.reference(at)
                theirs = x[:, own] if angles is None else rotate(x[:, own], -angles[..., own, :], self._rope.pairing)
                statistics = Statistics.of(theirs)
            statistics = Statistics(*(s.to(x.device, non_blocking=True) for s in statistics))
            inner = adain(inner, statistics, strength)
            inner = inner if angles is None else rotate(inner, angles[..., span, :], self._rope.pairing)
            found.append([x[:, : span.start], inner, x[:, span.stop :]])
        return torch.cat(found[0], dim=1), found[1]

    def _angles(self, device: torch.device) -> Tensor:
        if self._rope.angles.device != device:
            self._rope = replace(self._rope, angles=self._rope.angles.to(device), axis=None)
        return self._rope.angles


class _Layer:
    """A :class:`SharedWork` and the keys one layer keeps: entry ``n`` of those of the step."""

    def __init__(self, work: SharedWork, kept: Prefetch, n: int, angles: Tensor):
        self.masked = work.masked
        self._work = work
        self._kept = kept
        self._n = n
        self._angles = angles

    def attend(self, q: Tensor, k: Tensor, v: Tensor, applied: bool, backend: str = "auto") -> Tensor:
        """As :meth:`SharedWork.attend`."""
        return self._work.attend(q, k, v, applied, backend, self._kept.take(self._n), self._angles)


class _Recorder:
    """Plain attention of a reference alone, whose keys and values are put into a snapshot."""

    def __init__(self, plain: Work, cache: fr.ReferenceCache, snapshot: Snapshot, layer: int, tokens, rope: fr.RoPE):
        self.masked = plain.masked
        self._plain = plain
        self._cache = cache
        self._snapshot = snapshot
        self._layer = layer
        self._tokens = tokens
        self._rope = rope

    def attend(self, q: Tensor, k: Tensor, v: Tensor, applied: bool, backend: str = "auto") -> Tensor:
        """As :meth:`Work.attend`."""
        angles = self._rope.angles.to(q.device) if applied else None
        found = share(q, k, v, self._tokens.target, angles, statistics=True, pairing=self._rope.pairing)
        self._snapshot.layers[self._layer] = found.map(self._cache.keep)
        return self._plain.attend(q, k, v, applied, backend)


def share(
    q: Tensor, k: Tensor, v: Tensor, span: slice, angles: Tensor | None, statistics: bool, pairing: str
) -> SharedKeys:
    """The image tokens of all reference rows as one run of keys.

    Args:
        q, k, v: ``(R, S, heads, D)`` of the reference.
        span: its image tokens.
        angles: ``(S, D/2)`` or ``(R, S, D/2)`` that q and k are rotated by; None where they are not.
        statistics: whether to take those of queries and keys, over the tokens of all rows, unrotated.
        pairing: of the rotation.
    """
    found = [None, None]
    if statistics:
        for n, x in enumerate((q, k)):
            x = x[:, span] if angles is None else rotate(x[:, span], -angles[..., span, :], pairing)
            found[n] = Statistics.of(x.flatten(0, 1)[None])
    k, v = (x[:, span].flatten(0, 1)[None] for x in (k, v))
    return SharedKeys(k, v, angles is not None, *found)


def combine(sharings: Sequence[Sharing]) -> tuple[Sharing, ...]:
    """What all methods together ask of a layer.

    Raises:
        ValueError: two methods that both normalise the target.
    """
    normalising = sum(s.adain > 0 for s in sharings)
    require(normalising <= 1, "adain", "one method with adain above 0 per layer and step", normalising)
    return tuple(dict.fromkeys(sharings))


def shares(sharings: Sequence[Sharing]) -> bool:
    """Whether a layer's target sees the shared reference."""
    return any(s.reference == SHARED for s in sharings)


def over_sequence(m, length: int):
    """A modulation whose keys count over the host's sequence of ``length`` tokens, where further keys follow it: open
    and negative bounds mean the sequence's own end."""
    keys = m.keys
    if isinstance(keys, slice):
        start, stop = (n if n is None or n >= 0 else n + length for n in (keys.start, keys.stop))
        stop = length if stop is None and (start or 0) < length else stop
        return m if (start, stop) == (keys.start, keys.stop) else replace(m, keys=slice(start, stop, keys.step))
    if keys.dtype == torch.bool and len(keys) == length:
        return replace(m, keys=keys.nonzero().flatten())
    return m


class SharedAttention:
    """The reference of one handle.

    Args:
        state: of the handle.
        reference: a :class:`fastrope.Reference` or the like, or a :class:`fastrope.ReferenceCache`.

    Raises:
        ValueError: something else.
        NotImplementedError: a host without rows for a reference.
    """

    def __init__(self, state: CallState, reference):
        self._state = state
        self._cache = reference if isinstance(reference, fr.ReferenceCache) else None
        self._source = reference if self._cache is None else self._cache.source
        check_reference(self._source)
        self._arguments = state.host.rows
        if self._arguments is None:
            raise NotImplementedError(f"reference: expected a host with shared attention, received "
                                      f"{state.host.transformer}, whose row says nothing of it")  # fmt: skip
        self._recording: tuple[Snapshot, set[int]] | None = None
        self._dropped = 0
        self._sigmas, self._guidance, self._memo, self._adapters = Readings(), Readings(), Memo(), Adapters()

    # ---- hooks ------------------------------------------------------------------------------------------------------

    def reset(self) -> None:
        """Before every forward, also of one that shares nothing: the last one may have broken off."""
        self._dropped = 0

    def fill(self, module, call: Call) -> dict[str, object] | None:
        """Fill the slots for one forward; arguments to call it with instead, if others."""
        if self._recording is not None:
            return self._record(module, call)
        step, num_steps = self._state.step(call)
        host = self._state.host
        sigma = find_sigma(self._levels(), call.get(host.timestep), step, host.model_time)
        latents = self._source.latents(step, sigma)
        key, sequence, rope = self._state.sequence_of(module, call)
        target = math.prod(sequence.layout().target_grid)
        alone = self._arguments.alone(call, latents, self._source.arguments, target, self._memo)
        own = None if self._cache is None else self._state.sequence_of(module, alone)
        rows = self._arguments.count(alone)
        grid = (sequence if own is None else own[1]).layout().target_grid
        tokens = with_shared(sequence.layout(), (grid,) * rows)
        sites = self._state.sites(step, num_steps, tokens)
        asked = self._asked(sites)
        wanted = {n for n, (_, sharings) in enumerate(asked) if shares(sharings)}
        if wanted and own is None:
            return self._fill_rows(module, self._arguments.together(call, alone, self._memo), sites, asked)
        kept = self._snapshot(module, call, alone, own, (step, sigma), wanted) if wanted else None
        device = device_of(call.get(host.hidden))
        self._fill_target(key, sequence, rope, tokens, asked, kept and (own[0], rows), kept, device)
        return None

    def after_forward(self, module, args, output):
        """Forward hook: the reference's rows are dropped from the output."""
        rows, self._dropped = self._dropped, 0
        if not rows:
            return None
        if isinstance(output, tuple):
            return self._arguments.cut(output[0], rows), *output[1:]
        return replace(output, sample=self._arguments.cut(output.sample, rows))

    def _levels(self) -> list[float] | None:
        """The scheduler's sigmas; None where the step is no index into them."""
        scheduler = getattr(self._state.pipe, "scheduler", None)
        sigmas = getattr(scheduler, "sigmas", None)
        known = self._state.told is None and isinstance(sigmas, Tensor)
        return self._sigmas.of(sigmas) if known else None

    def _strength(self, guidance) -> float | None:
        """The number that the transformer is given as guidance."""
        return self._guidance.of(guidance)[0] if isinstance(guidance, Tensor) else guidance

    # ---- rows of one batch ------------------------------------------------------------------------------------------

    def _fill_rows(self, module, joined: Joined, sites: list[fr.Site], asked: list) -> dict[str, object]:
        state, (call, rows, text_mask) = self._state, joined
        key, sequence, rope = state.sequence_of(module, call)
        masked = sequence.masked  # by the host, whatever we mask besides
        if text_mask is not None:
            layout = sequence.layout()
            image = text_mask.new_ones(len(text_mask), len(layout) - layout.text_tokens)
            sequence = replace(sequence, key_mask=torch.cat([text_mask, image], dim=1).cpu())
            key = key, state.digest((text_mask,))
        count = self._arguments.count(call) - rows
        whole = sequence.layout()
        tokens = with_shared(whole, (whole.target_grid,) * rows)
        if tokens != sites[0].tokens:  # filled up
            asked = self._asked([replace(site, tokens=tokens) for site in sites])
        mine, theirs = _rows(sequence, slice(count)), _rows(sequence, slice(count, None))
        angles = rope.angles
        angles = (angles, angles) if angles.ndim == 2 else (angles[:count], angles[count:])
        shared = angles[1][..., whole.target, :]
        shared = shared.repeat(rows, 1) if shared.ndim == 2 else shared.flatten(0, 1)
        own = replace(rope, angles=angles[0])
        plain = state.remember((key, rows, "reference"), lambda: Work(theirs, replace(rope, angles=angles[1]), ()))
        every = None if text_mask is None else state.remember((key, rows, "all"), lambda: Work(sequence, rope, ()))
        for slot, (modulations, sharings) in zip(state.slots, asked, strict=True):
            if not modulations and not sharings:
                slot.work = every
                continue
            content = key, rows, state.digest(modulations), sharings
            slot.work = state.remember(
                content,
                lambda m=tuple(modulations), s=sharings: SharedWork(
                    state.alike((key, rows, s), m, lambda like: self._targets(mine, own, m, s, shared, like)),
                    s,
                    tokens,
                    rope,
                    plain,
                    rows,
                ),
            )
        for slot in state.slots:
            if slot.work is not None:
                slot.work.masked = masked
        state.forget()
        self._dropped = rows
        return call

    # ---- kept keys --------------------------------------------------------------------------------------------------

    def _snapshot(
        self, module, call: Call, alone: dict, own: tuple, moment: tuple[int, float], wanted: set[int]
    ) -> Snapshot:
        """What is kept of the reference at this step; it is run for layers that are not there."""
        own_key, sequence, rope = own
        hidden = alone[self._arguments.image]
        dtype, device = (hidden if isinstance(hidden, Tensor) else hidden[0]).dtype, device_of(hidden).type
        guidance = self._source.arguments.get("guidance")
        strength = self._strength(call.get("guidance") if guidance is None else guidance)
        settings = call.get("joint_attention_kwargs") or call.get("attention_kwargs") or {}  # a LoRA's scale
        numbers = tuple(sorted((n, x) for n, x in settings.items() if isinstance(x, (int, float))))
        autocast = torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device)
        name = *moment, dtype, autocast, own_key, strength, numbers, self._adapters.of(self._state.model)
        self._cache.claim(self._state.model)
        known = self._cache.find(name)
        if known is not None and wanted <= set(known.layers):
            return known
        layout, rows = sequence.layout(), self._arguments.count(alone)
        angles = rope.angles[..., layout.target, :]
        angles = angles.repeat(rows, 1) if angles.ndim == 2 else angles.flatten(0, 1)
        return self._run_alone(module, alone, name, Snapshot(angles, (layout.target_grid,) * rows), wanted)

    def _fill_target(
        self,
        key: Hashable,
        sequence: JointSequence,
        rope: fr.RoPE,
        tokens: fr.TokenLayout,
        asked: list,
        kept_key: Hashable,
        kept: Snapshot | None,
        device: torch.device,
    ) -> None:
        """Slots for the target's own rows, with the kept keys where a layer shares."""
        state, angles = self._state, kept and kept.angles
        order = [n for n, (_, sharings) in enumerate(asked) if shares(sharings)]
        ahead = Prefetch([kept.layers[n] for n in order], device) if order else None
        for n, (slot, (modulations, sharings)) in enumerate(zip(state.slots, asked, strict=True)):
            if not modulations and not sharings:
                continue
            where = key, kept_key if n in order else None
            work = state.remember(
                (*where, state.digest(modulations), sharings),
                lambda w=where, m=tuple(modulations), s=sharings: SharedWork(
                    state.alike(w, m, lambda like: self._targets(sequence, rope, m, s, angles, like)), s, tokens, rope
                ),
            )
            slot.work = _Layer(work, ahead, order.index(n), kept.angles) if n in order else work
        state.forget()

    def _run_alone(self, module, alone: dict, name: Hashable, fresh: Snapshot, wanted: set[int]) -> Snapshot:
        if getattr(self._state.model, "is_cache_enabled", False):
            raise NotImplementedError(
                "enable_cache: expected a transformer without diffusers' own caches when a reference is run alone, "
                "received one that would take the reference's blocks for the target's; call disable_cache() first"
            )
        known = self._cache.find(name)
        missing = wanted - set(known.layers if known else ())
        self._recording = fresh, missing
        try:
            with torch.no_grad():
                module(**alone)
        finally:
            self._recording = None
        self._state.reset()
        return self._cache.put(name, fresh)

    def _record(self, module, call: Call) -> None:
        snapshot, wanted = self._recording
        state = self._state
        key, sequence, rope = state.sequence_of(module, call)
        plain = state.remember((key, "alone"), lambda: Work(sequence, rope, ()))
        tokens = sequence.layout()
        for n in wanted:
            state.slots[n].work = _Recorder(plain, self._cache, snapshot, n, tokens, rope)

    # ---- both -------------------------------------------------------------------------------------------------------

    def _asked(self, sites: list[fr.Site]) -> list[tuple[list, tuple[Sharing, ...]]]:
        """Per layer, the modulations and what is shared."""
        methods = self._state.methods
        return [(self._state.ask(site), combine(sharings_of(methods, site))) for site in sites]

    @staticmethod
    def _targets(
        sequence: JointSequence,
        rope: fr.RoPE,
        modulations: tuple,
        sharings: tuple[Sharing, ...],
        shared: Tensor,
        like: Work | None,
    ) -> Work:
        """The target's attention, over the sequence and, where it is shared, the reference."""
        if not shares(sharings):
            return Work(sequence, rope, modulations, like=like)
        length = rope.tokens
        keys = None if like is None else like.key_rope
        if keys is None:
            keys = shared.to(rope.angles)
            keys = keys if rope.angles.ndim == 2 else keys.expand(len(rope.angles), -1, -1)
            keys = fr.RoPE(torch.cat([rope.angles, keys], dim=-2), rope.axis, rope.pairing)
        mask, bonus = sequence.key_mask, sequence.bonus
        if mask is not None:
            mask = torch.cat([mask, mask.new_ones(len(mask), shared.shape[-2])], dim=1)
        if bonus is not None:  # what the host adds to logits within its own sequence
            bonus = torch.cat([bonus, bonus.new_zeros(len(bonus), shared.shape[-2])], dim=1)
        modulations = tuple(over_sequence(m, length) for m in modulations)
        return Work(replace(sequence, key_mask=mask, bonus=bonus), rope, modulations, keys, like)


def with_shared(tokens: fr.TokenLayout, grids: Sequence[tuple[int, int]]) -> fr.TokenLayout:
    """The same layout with shared references."""
    return fr.TokenLayout(
        tokens.text_tokens, tokens.target_grid, tokens.reference_grids, tokens.order, tokens.padding, grids
    )


def _rows(sequence: JointSequence, rows: slice) -> JointSequence:
    """Some rows of a batch."""
    positions = sequence.positions if sequence.positions.ndim == 2 else sequence.positions[rows]
    mask, bonus = (None if m is None else m[rows] for m in (sequence.key_mask, sequence.bonus))
    return replace(sequence, positions=positions, key_mask=mask, bonus=bonus)
