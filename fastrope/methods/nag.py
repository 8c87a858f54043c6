"""NAG, normalised attention guidance (arXiv 2505.21179): a negative prompt for models without guidance."""

from __future__ import annotations

from dataclasses import dataclass, field

from ..activity import Indices
from ..checks import require
from ..guidance import Guidance
from ..modulations import Modulation
from ..tokens import Site
from .schedules import Activity, Schedule, Steps, check_schedule, require_number, value_at


@dataclass(frozen=True)
class NAG:
    """A negative prompt for distilled models, which have no classifier-free guidance.

    The text of the call is both prompts, one after the other: ``prompt_embeds = torch.cat([prompt, negative], dim=1)``.
    Each prompt attends to itself and the image. The image attends to itself once. A log-sum-exp merge joins this with
    its attention to either prompt, and the result with the prompt is moved away from the result with the negative
    prompt (:func:`fastrope.guidance.normalised_guidance`). This equals two passes of the model over one image, and
    costs the additional text tokens.

    Args:
        scale: ``s``, a number or schedule; at 1 only the prompt counts. NAG's code has 5 for FLUX.
        tau: largest growth of a token's L1 norm, dimensionless.
        alpha: share of the guided attention, in 0..1.
        negative: number of tokens of the negative prompt, at the end of the text; None means half of the text.
        layers, steps: where the image is guided, as in :class:`fastrope.GRAG`; elsewhere it attends to the prompt
            alone.

    Raises:
        ValueError: naming the argument, what was expected and what came; in a call also a text too short for both
            prompts.
    """

    scale: Schedule = 5.0
    tau: float = 2.5
    alpha: float = 0.25
    negative: int | None = None
    layers: Indices | None = None
    steps: Steps = None
    _active: Activity = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        check_schedule("NAG.scale", self.scale)
        for name in ("tau", "alpha"):
            require_number(f"NAG.{name}", getattr(self, name))
        require(self.tau > 0, "NAG.tau", "a positive number", self.tau)
        require(0 <= self.alpha <= 1, "NAG.alpha", "a number in 0..1", self.alpha)
        count = self.negative
        ok = count is None or (isinstance(count, int) and not isinstance(count, bool) and count > 0)
        require(ok, "NAG.negative", "a number of text tokens, or None", repr(count))
        object.__setattr__(self, "_active", Activity(self.layers, self.steps))

    def modulations(self, site: Site) -> list[Modulation]:
        """No modulations; see :meth:`guidance`."""
        return []

    def guidance(self, site: Site) -> Guidance:
        """The guidance at a site. Where the method is inactive, the scale is 1.

        Raises:
            ValueError: a text too short for both prompts.
        """
        text, total = site.tokens.text, site.tokens.text_tokens
        if self.negative is None:
            require(total > 0 and total % 2 == 0, "prompt_embeds", "as many tokens of the negative prompt as of the "
                    "prompt (NAG.negative says otherwise)", f"{total} tokens")  # fmt: skip
        count = total // 2 if self.negative is None else self.negative
        require(count < total, "NAG.negative", f"fewer than the {total} tokens of the text", count)
        scale = value_at("NAG.scale", self.scale, site) if site in self._active else 1.0
        return Guidance(slice(text.stop - count, text.stop), scale, self.tau, self.alpha)
