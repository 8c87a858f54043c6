"""GRAG, group relative attention guidance (arXiv 2510.24657): a dial for the strength of an edit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache

from ..activity import Indices
from ..modulations import BiasDelta
from ..tokens import Site, TokenLayout
from .per_reference import Dial, checked_dial, checked_references, for_each, present, require_reference, values_of
from .schedules import Activity, Schedule, Steps, check_schedule, value_at

DIALS = ("bias", "delta", "value_bias", "value_delta")  # of the reference pictures


@dataclass(frozen=True)
class GRAG:
    """Moves the keys of each reference picture away from their mean, or towards it: ``k' = lambda mu + delta (k - mu)``
    (GRAG, arXiv 2510.24657).

    ``mu`` is the mean of the rotated keys of one picture, per batch row, head and channel, in each layer. Every
    reference is a separate group, at any resolution and batch size. Keys of the target and queries do not change, nor
    do values by default.

    Args:
        bias: lambda, dimensionless. It raises or lowers the mean logit of the picture against text and target: above 1
            the source weighs more. Useful from 0.8 to 1.7; 1 is neutral.
        delta: dimensionless, a temperature inside the picture. Above 1 the source is preserved, below 1 more is edited.
            The default is the published demo's. Useful from 0.8 to 1.7; 1 is neutral. It is the smoothest single dial.
        value_bias, value_delta: the same for the values of each picture, ``v' = lambda nu + delta (v - nu)``, and
            ``nu`` is their mean (DCAG, arXiv 2602.18022). The weights of attention stay. Neutral by default; the paper
            has 1.15 for ``value_delta`` beside 1.1 for ``delta``.
        text_bias, text_delta: the same for the text tokens, as one group; neutral as published.
        references: indices of the reference pictures that are groups; None means all.
        layers: indices of the attention layers where the method acts, as in :class:`fastrope.At`; None means all.
        steps: step indices likewise, or two floats ``(start, stop)``, fractions of the run; None means all.

    Dials of references are numbers, schedules (:mod:`fastrope.methods.schedules`), or a list with one of these per
    reference. ``GRAG(1, 1)`` modulates nothing on any sequence, to the same bits. A sequence without a reference is
    fine if only ``text_bias`` or ``text_delta`` is set, and the other dials have their defaults or are neutral.

    Raises:
        ValueError: naming the argument, what was expected and what came; in :meth:`modulations` also, unless neutral, a
            sequence without a reference, or without one of ``references``.
    """

    bias: Dial = 1.0
    delta: Dial = 1.1
    text_bias: Schedule = 1.0
    text_delta: Schedule = 1.0
    value_bias: Dial = 1.0
    value_delta: Dial = 1.0
    references: Sequence[int] | None = None
    layers: Indices | None = None
    steps: Steps = None
    _active: Activity = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        for name in DIALS:
            object.__setattr__(self, name, checked_dial(f"GRAG.{name}", getattr(self, name)))
        for name in ("text_bias", "text_delta"):
            check_schedule(f"GRAG.{name}", getattr(self, name))
        object.__setattr__(self, "references", checked_references("GRAG.references", self.references))
        object.__setattr__(self, "_active", Activity(self.layers, self.steps))

    def modulations(self, site: Site) -> list[BiasDelta]:
        """One :class:`fastrope.BiasDelta` per group that is not neutral. Equal values give the same objects."""
        if site not in self._active:
            return []
        values = [values_of(f"GRAG.{name}", getattr(self, name), site) for name in DIALS]
        references = () if all(set(each) == {1.0} for each in values) else self._references(site.tokens, values)
        text = value_at("GRAG.text_bias", self.text_bias, site), value_at("GRAG.text_delta", self.text_delta, site)
        return list(_groups(site.tokens, references, text))

    @property
    def _text_only(self) -> bool:
        """True if only the dials of the text are set."""
        default = all(getattr(self, name) == getattr(GRAG, name) for name in (*DIALS, "references"))
        return default and (self.text_bias, self.text_delta) != (1.0, 1.0)

    def _references(self, tokens: TokenLayout, values: list[tuple[float, ...]]) -> tuple[tuple[float, ...], ...]:
        """Index and the value of each dial, of the references that are groups."""
        if not self._text_only:
            require_reference("GRAG", tokens)
        chosen = present("GRAG", tokens, self.references)
        found = [
            for_each(f"GRAG.{name}", getattr(self, name), each, len(chosen))
            for name, each in zip(DIALS, values, strict=True)
        ]
        return tuple(zip(chosen, *found, strict=True))


@lru_cache(maxsize=512)
def _groups(
    tokens: TokenLayout, references: tuple[tuple[float, ...], ...], text: tuple[float, float]
) -> tuple[BiasDelta, ...]:
    """Groups that are not neutral. Cached, because a binding reuses its plan for the same objects."""
    groups = [BiasDelta(bias, delta, keys=tokens.reference(int(i))) for i, bias, delta, *_ in references]
    if tokens.text_tokens:
        groups.append(BiasDelta(*text, keys=tokens.text))
    groups += [BiasDelta(*values, keys=tokens.reference(int(i)), on="values") for i, _, _, *values in references]
    return tuple(m for m in groups if (m.bias, m.delta) != (1.0, 1.0))
