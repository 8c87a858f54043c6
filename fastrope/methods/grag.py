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


@dataclass(frozen=True)
class GRAG:
    """Moves the keys of each reference picture away from their mean, or towards it: ``k' = lambda mu + delta (k - mu)``
    (GRAG, arXiv 2510.24657).

    ``mu`` is the mean of the rotated keys of one picture, per batch row, head and channel, in each layer. Every
    reference is a separate group, at any resolution and batch size. Keys of the target, queries and values do not
    change.

    Args:
        bias: lambda, dimensionless. It raises or lowers the mean logit of the picture against text and target: above 1
            the source weighs more. Useful from 0.8 to 1.7; 1 is neutral.
        delta: dimensionless, a temperature inside the picture. Above 1 the source is preserved, below 1 more is edited.
            The default is the published demo's. Useful from 0.8 to 1.7; 1 is neutral. It is the smoothest single dial.
        text_bias, text_delta: the same for the text tokens, as one group; neutral as published.
        references: indices of the reference pictures that are groups; None means all.
        layers: indices of the attention layers where the method acts, as in :class:`fastrope.At`; None means all.
        steps: step indices likewise, or two floats ``(start, stop)``, fractions of the run; None means all.

    ``bias`` and ``delta`` are numbers, schedules (:mod:`fastrope.methods.schedules`), or a list with one of these per
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
    references: Sequence[int] | None = None
    layers: Indices | None = None
    steps: Steps = None
    _active: Activity = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        for name in ("bias", "delta"):
            object.__setattr__(self, name, checked_dial(f"GRAG.{name}", getattr(self, name)))
        for name in ("text_bias", "text_delta"):
            check_schedule(f"GRAG.{name}", getattr(self, name))
        object.__setattr__(self, "references", checked_references("GRAG.references", self.references))
        object.__setattr__(self, "_active", Activity(self.layers, self.steps))

    def modulations(self, site: Site) -> list[BiasDelta]:
        """One :class:`fastrope.BiasDelta` per group that is not neutral. Equal values give the same objects."""
        if site not in self._active:
            return []
        bias, delta = (values_of(f"GRAG.{name}", getattr(self, name), site) for name in ("bias", "delta"))
        references = () if {*bias, *delta} == {1.0} else self._references(site.tokens, bias, delta)
        text = value_at("GRAG.text_bias", self.text_bias, site), value_at("GRAG.text_delta", self.text_delta, site)
        return list(_groups(site.tokens, references, text))

    @property
    def _text_only(self) -> bool:
        """True if only the dials of the text are set."""
        default = (self.bias, self.delta, self.references) == (GRAG.bias, GRAG.delta, None)
        return default and (self.text_bias, self.text_delta) != (1.0, 1.0)

    def _references(
        self, tokens: TokenLayout, bias: tuple[float, ...], delta: tuple[float, ...]
    ) -> tuple[tuple[int, float, float], ...]:
        """Index, lambda and delta of the references that are groups."""
        if not self._text_only:
            require_reference("GRAG", tokens)
        chosen = present("GRAG", tokens, self.references)
        dials = (("bias", self.bias, bias), ("delta", self.delta, delta))
        found = [for_each(f"GRAG.{name}", dial, values, len(chosen)) for name, dial, values in dials]
        return tuple(zip(chosen, *found, strict=True))


@lru_cache(maxsize=512)
def _groups(
    tokens: TokenLayout, references: tuple[tuple[int, float, float], ...], text: tuple[float, float]
) -> tuple[BiasDelta, ...]:
    """Groups that are not neutral. Cached, because a binding reuses its plan for the same objects."""
    spans = [(tokens.reference(i), bias, delta) for i, bias, delta in references]
    if tokens.text_tokens:
        spans.append((tokens.text, *text))
    return tuple(BiasDelta(bias, delta, keys=span) for span, bias, delta in spans if (bias, delta) != (1.0, 1.0))
