"""What modulated layers do: attention with plans over a sequence. Plans are built on first use."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import fields, replace
from functools import cached_property
from typing import Any, Protocol

import torch
from torch import Tensor

import fastrope as fr
from fastrope.device import on_device
from fastrope.joint import fused_joint_attention
from fastrope.rescaling import Rescaling

from .part import Part
from .rescaled import Rescaled
from .rotation import Rotation
from .sequence import JointSequence
from .subset import subset_of

_WEIGHING: ContextVar[bool] = ContextVar("weighing", default=False)


@contextlib.contextmanager
def weighing() -> Iterator[None]:
    """Inside, :class:`Work` takes values as they are, so that those of a probe show the weights of attention."""
    token = _WEIGHING.set(True)
    try:
        yield
    finally:
        _WEIGHING.reset(token)


class LayerWork(Protocol):
    """What a layer does in one forward: :class:`Work`, or one of :mod:`.layers` for a shared reference."""

    masked: bool  # True if the host's mask is part of the work

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, applied: bool, backend: str = "auto", part: Part | None = None
    ) -> Tensor:
        """Attention of ``q, k, v (B, S, H, D)``, rotated already (``applied``) or not: of the whole sequence, or of the
        tokens that a part has."""
        ...


class Work:
    """Attention with some modulations over some sequence.

    Args:
        sequence, rope: the tokens and their angles, as the model has them.
        modulations: over the keys.
        key_rope: angles of the keys, if there are more keys than the sequence has tokens. The masks of the sequence
            then cover all keys.
        like: work over the same tokens with modulations of the same :func:`structure_of`, and gains of the same
            rescaling. Its plans are used again.
        rescaled: other frequencies of all tokens. A host that rotates has multiplied queries and keys by their gain.
    """

    def __init__(
        self,
        sequence: JointSequence,
        rope: fr.RoPE,
        modulations: tuple,
        key_rope: fr.RoPE | None = None,
        like: Work | None = None,
        rescaled: Rescaled | None = None,
    ) -> None:
        # Copies, because the work outlives its call, and some plans are built later.
        modulations = tuple(with_tensors(m, torch.clone) for m in modulations)
        self.masked = sequence.masked
        self._masks = {"seen": sequence.key_mask}
        self._bonus: dict[torch.device, Tensor] = {}
        if sequence.bonus is not None:
            self._masks |= {"raised": sequence.bonus, "rest": ~sequence.bonus}
            _check_groups(modulations, sequence.bonus)
        self._rope = rope
        self.key_rope = key_rope
        self._rescaled, self._sequence = rescaled, sequence
        self._turned = like is not None and like._rescaling != self._rescaling
        if like is not None and not self._turned:
            self.rotation = like.rotation
        self._placed: dict[tuple, Tensor] = {} if like is None else like._placed
        self._modulations = modulations
        self._subsets: dict[Any, Work] = {}
        self._known_subsets = {} if like is None else like._subsets
        gain = rescaled and rescaled.gain
        self._gain = () if gain is None else (fr.BandWeight(gain.square()),)
        self._groups = [(m.bias, m.delta) for m in modulations if isinstance(m, fr.BiasDelta)]
        self._biases = [m.bias for m in modulations if isinstance(m, fr.LogitBias)]
        self._weights = [m.weight for m in modulations if isinstance(m, fr.BandWeight)]
        self._plans: dict[tuple, fr.Plan] = {}
        self._known = {} if like is None else like._plans

    @cached_property
    def rotation(self) -> Rotation:
        """The angles of the sequence, at its frequencies."""
        rope = self._rope if self._rescaled is None else self._rescaled.rope
        return Rotation(rope.angles, rope.pairing)

    @property
    def _rescaling(self) -> Rescaling | None:
        return self._rescaled and self._rescaled.rescaling

    @property
    def plans(self) -> list[fr.Plan]:
        """The plans built so far."""
        return [*self._plans.values(), *(plan for work in self._subsets.values() for plan in work.plans)]

    def modulates(self, applied: bool, device: torch.device) -> bool:
        """True unless everything is neutral. Rescaled positions alone need no modulated layer."""
        return self._plan("seen", applied or bool(self._gain), device).resolved.modulations > 0

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, applied: bool, backend: str = "auto", part: Part | None = None
    ) -> Tensor:
        """Modulated attention of ``q, k, v (B, S, H, D)``, rotated already (``applied``) or not."""
        if part is not None:
            return self.of(part).attend(q, *part.gather(k, v), applied, backend)
        if "raised" not in self._masks:
            return fr.attention(q, k, v, plan=self._plan("seen", applied, q.device), backend=backend)
        # Keys with the bonus and keys without it run apart, and their log-sum-exps merge them: the bonus comes after
        # any gain of a modulation.
        if q.device not in self._bonus:
            self._bonus[q.device] = self._masks["raised"].to(q.device)[:, : q.shape[1], None, None]
        outs, lses = [], []
        for keys in ("raised", "rest"):
            plan = self._plan(keys, applied, q.device)
            out, lse = fr.attention(q, k, v, plan=plan, backend=backend, return_lse=True)
            outs.append(out)
            lses.append(lse.transpose(1, 2)[..., None])  # (B, S, H, 1)
        # A query may see no key of either set.
        share = torch.sigmoid(torch.nan_to_num(lses[0] + self._bonus[q.device] - lses[1]))
        return torch.lerp(outs[1].to(share.dtype), outs[0].to(share.dtype), share).to(q.dtype)

    def attend_streams(self, streams: list[fr.Stream], backend: str) -> Tensor | None:
        """Modulated attention straight from the projections. None if the host is to make q and k first: for a mask that
        is added to the logits, for further keys, and if none of our kernels would run."""
        if "raised" in self._masks or self.key_rope is not None:
            return None
        plan = self._plan("seen", False, streams[0].q.device)
        return fused_joint_attention(streams, plan, backend)

    def of(self, part: Part | None) -> Work:
        """The same for the queries of a part and all keys, in the order of gathered ones; further keys stay the last.

        Raises:
            NotImplementedError: a mask that the host adds to the logits, where queries and keys differ.
        """
        if part is None:
            return self
        if part.name not in self._subsets:
            sequence, rope, key_rope = self._sequence, self._rope, self.key_rope or self._rope
            queries, own = part.queries, torch.equal(part.queries, part.keys)
            keys = torch.cat([part.keys, torch.arange(rope.tokens, key_rope.tokens, device="cpu")])
            if sequence.bonus is not None and not own:
                raise NotImplementedError("attention_mask: expected bool where queries and keys are split apart, "
                                          "received floating point; pass prompt_attention_mask.bool()")  # fmt: skip
            masks = {n: m if m is None else m[:, keys] for n, m in
                     (("key_mask", sequence.key_mask), ("bonus", sequence.bonus))}  # fmt: skip
            mine, theirs = (replace(of, angles=of.angles[..., places, :])
                            for of, places in ((rope, queries), (key_rope, keys)))  # fmt: skip
            modulations = tuple(subset_of(self._modulations, queries, keys, key_rope.tokens))
            self._subsets[part.name] = Work(
                replace(sequence, **masks), mine, modulations, None if own and len(keys) == len(queries) else theirs,
                self._known_subsets.get(part.name), self._rescaled and Rescaled(mine, self._rescaled.rescaling),
            )  # fmt: skip
        return self._subsets[part.name]

    def _plan(self, keys: str, applied: bool, device: torch.device) -> fr.Plan:
        key = keys, applied, device
        if key not in self._plans and key in self._known and self._fits(self._known[key]):
            plan = self._known[key].with_groups(self._groups).with_biases(self._biases)
            plan = plan.with_rope(*self._ropes(applied, device)) if self._turned else plan
            self._plans[key] = plan.with_weight(self._weights[0]) if len(self._weights) == 1 else plan
        if key not in self._plans:
            key_mask = self._masks[keys]
            modulations = self._modulations + (() if applied else self._gain)
            rope, key_rope = self._ropes(applied, device)
            self._plans[key] = fr.plan(
                rope=rope,
                key_rope=key_rope,
                modulations=[with_tensors(m, lambda x: on_device(x, device)) for m in modulations],
                key_mask=None if key_mask is None else key_mask.to(device),
            )
        return self._plans[key].without_values if _WEIGHING.get() else self._plans[key]

    def _ropes(self, applied: bool, device: torch.device) -> tuple[fr.RoPE, fr.RoPE | None]:
        """Angles of queries, and of keys if they are other tokens, on a device. Other frequencies are multiplied there,
        into angles that stay there for later steps."""

        def placed(n: int, rope: fr.RoPE) -> fr.RoPE:
            if self._rescaled is None:
                angles = on_device(rope.angles, device)
            else:
                if (n, device) not in self._placed:
                    self._placed[n, device] = on_device(rope.angles, device)
                angles = self._placed[n, device] * on_device(self._rescaled.factor, device)
            return fr.RoPE(angles, rope.axis.to(device), rope.pairing, applied)

        return placed(0, self._rope), self.key_rope and placed(1, self.key_rope)

    def _fits(self, plan: fr.Plan) -> bool:
        """True if a plan of ``like`` becomes ours with other numbers. Neutral numbers need a plan without them, so that
        the result has the bits of stock attention."""
        held = plan.resolved
        if len(held.groups) != len(self._groups) or (len(self._weights) == 1 and len(held.weights) != 1):
            return False
        if len(held.biases) != len(self._biases) or any(_neutral((b,), 0) for b in self._biases):
            return False
        return not any(map(_neutral, self._groups)) and not any(_neutral((weight,)) for weight in self._weights)


def structure_of(modulations: tuple) -> list:
    """Modulations without the numbers that ``Plan.with_groups``, ``Plan.with_biases`` and ``Plan.with_weight`` can
    replace: those of all BiasDelta, of every LogitBias that has one for all queries, and those of a single BandWeight.
    """
    found = list(modulations)
    bands = sum(isinstance(m, fr.BandWeight) for m in modulations)
    for n, m in enumerate(modulations):
        if isinstance(m, fr.BiasDelta):
            shapes = (x.shape if isinstance(x, Tensor) else () for x in (m.bias, m.delta))
            found[n] = "BiasDelta", m.on, m.keys, *shapes
        elif isinstance(m, fr.LogitBias) and not (isinstance(m.bias, Tensor) and m.bias.ndim):
            found[n] = "LogitBias", m.keys
        elif isinstance(m, fr.BandWeight) and bands == 1:
            found[n] = "BandWeight", m.keys
    return found


def _neutral(numbers: tuple, value: float = 1) -> bool:
    return all(bool(torch.all(x == value)) if isinstance(x, Tensor) else x == value for x in numbers)


def _check_groups(modulations: tuple, bonus: Tensor) -> None:
    for m in modulations:
        if isinstance(m, fr.BiasDelta) and not _neutral((m.bias, m.delta)):
            group = bonus[:, m.keys if isinstance(m.keys, slice) else m.keys.cpu()]
            if bool(group.any() & ~group.all()):
                raise NotImplementedError(
                    "BiasDelta.keys: expected tokens with one value in the host's floating-point attention_mask, "
                    "received tokens with both; pass prompt_attention_mask.bool(), which hides tokens instead"
                )


def with_tensors(m: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """A modulation with ``change`` applied to its tensors."""
    tensors = {f.name: getattr(m, f.name) for f in fields(m) if isinstance(getattr(m, f.name), torch.Tensor)}
    return replace(m, **{name: change(t) for name, t in tensors.items()})
