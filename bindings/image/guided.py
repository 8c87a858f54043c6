"""A layer with a prompt and a negative prompt in one sequence: attention over three sets of keys, then merges."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

import fastrope as fr
from fastrope.device import on_device
from fastrope.guidance import Guidance, normalised_guidance
from fastrope.modulations import Modulation

from .part import Part, joined, replaced
from .rotation import Rotation
from .sequence import JointSequence
from .subset import subset_of
from .work import with_tensors


class GuidedKeys:
    """Attention of all queries over the keys of the image, of the prompt, and of the negative prompt, each separately.

    Args:
        sequence, rope: both prompts and the image, and their angles.
        gain: ``(D/2,)`` of rescaled positions, see :class:`.work.Work`.
        modulations: over the keys of the sequence.
        negative: the tokens of the negative prompt. They get the positions that they would have without the prompt;
            ``moves`` says whether these are others.

    Raises:
        NotImplementedError: a sequence that does not begin with the text, a floating-point mask, or a BiasDelta over
            keys of several parts.
    """

    def __init__(
        self, sequence: JointSequence, rope: fr.RoPE, gain: Tensor | None, modulations: tuple[Modulation, ...],
        negative: slice,
    ) -> None:  # fmt: skip
        tokens = sequence.layout()
        if tokens.order != "text-first" or sequence.bonus is not None:
            raise NotImplementedError(
                "NAG: expected a host whose sequence begins with the text, with a bool mask if any, received another"
            )
        start, stop = negative.start, negative.stop
        self.parts = slice(stop, len(tokens)), slice(0, start), negative
        angles = rope.angles.clone()
        angles[..., negative, :] = rope.angles[..., : stop - start, :]
        self.moves = not torch.equal(angles, rope.angles)
        self._move = Rotation(angles - rope.angles, rope.pairing)
        self._rope = replace(rope, angles=angles)
        self._mask = sequence.key_mask
        self._gain = [] if gain is None else [fr.BandWeight(gain.square())]
        self._modulations = tuple(with_tensors(m, torch.clone) for m in modulations)
        for keys in self.parts:
            subset_of(modulations, slice(None), keys, len(tokens))  # refused now, not in a layer
        self._plans: dict[tuple, fr.Plan] = {}

    @property
    def plans(self) -> list[fr.Plan]:
        """The plans built so far."""
        return list(self._plans.values())

    def moved(self, x: Tensor, part: Part | None) -> Tensor:
        """Queries or keys ``(B, S, H, D)`` that the host has rotated, with the negative prompt at its own positions."""
        if not self.moves:
            return x
        places, tokens = (self.parts[2],) * 2 if part is None else part.within(self.parts[2], x.device)
        return joined(replaced(x, places, self._move.do(x[:, places], tokens)))

    def attend(
        self, n: int, q: Tensor, k: Tensor, v: Tensor, applied: bool, backend: str, part: Part | None
    ) -> tuple[Tensor, Tensor]:
        """``out (B, S, H, D)`` and ``lse (B, S, H, 1)`` over the keys of part ``n``."""
        key = n, applied, q.device, part and part.name
        if key not in self._plans:
            self._plans[key] = self._plan(n, applied, q.device, part)
        places = self.parts[n] if part is None else part.within(self.parts[n], k.device, gathered=True)[0]
        out, lse = fr.attention(q, k[:, places], v[:, places], plan=self._plans[key], backend=backend, return_lse=True)
        return out, lse.transpose(1, 2)[..., None]

    def _plan(self, n: int, applied: bool, device: torch.device, part: Part | None) -> fr.Plan:
        queries, keys = slice(None), self.parts[n]
        if part is not None:
            queries, keys = part.queries, part.within(keys, torch.device("cpu"), gathered=True)[1]
        modulations = subset_of(self._modulations, queries, keys, self._rope.tokens) + ([] if applied else self._gain)
        angles, axis = self._rope.angles, self._rope.axis.to(device)
        rope, key_rope = (fr.RoPE(on_device(angles[..., tokens, :], device), axis, self._rope.pairing, applied)
                          for tokens in (queries, keys))  # fmt: skip
        return fr.plan(
            rope=rope, key_rope=key_rope,
            modulations=[with_tensors(m, lambda x: on_device(x, device)) for m in modulations],
            key_mask=None if self._mask is None else self._mask[:, keys].to(device),
        )  # fmt: skip


@dataclass(eq=False)
class GuidedWork:
    """A layer with NAG."""

    keys: GuidedKeys
    guidance: Guidance
    masked: bool

    @property
    def plans(self) -> list[fr.Plan]:
        """The plans built so far."""
        return self.keys.plans

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        applied: bool,
        backend: str = "auto",
        part: Part | None = None,
    ) -> Tensor:
        """See :meth:`.work.LayerWork.attend`."""
        if applied:
            q, k = self.keys.moved(q, part), self.keys.moved(k, part)
        guidance, places, total = self.guidance, [self.guidance.negative, self.keys.parts[0]], lambda x: x
        if part is not None:
            k, v = part.gather(k, v)
            places, total = [part.within(span, q.device)[0] for span in places], part.total
        image, prompt, negative = (self.keys.attend(n, q, k, v, applied, backend, part) for n in range(3))
        under, against = _merged(image, prompt), _merged(image, negative)
        opposed, seen = places
        out = under.clone()
        out[:, opposed] = against[:, opposed]
        if guidance.scale != 1:
            numbers = guidance.scale, guidance.tau, guidance.alpha
            out[:, seen] = normalised_guidance(under[:, seen], against[:, seen], *numbers, total)
        return out.to(q.dtype)


def _merged(one: tuple[Tensor, Tensor], other: tuple[Tensor, Tensor]) -> Tensor:
    """Attention over both sets of keys, in float32 or wider."""
    (a, lse_a), (b, lse_b) = one, other
    share = torch.sigmoid(torch.nan_to_num(lse_b - lse_a))  # a query may see no key of either set
    return torch.lerp(a.to(share.dtype), b.to(share.dtype), share)
