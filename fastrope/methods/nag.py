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
    """A negative prompt for distilled models, which know no classifier-free guidance.

    The call's text holds both prompts, one after the other: ``prompt_embeds = torch.cat([prompt, negative], dim=1)``.
    Each prompt sees itself and the image. The image attends to itself once; that is merged by log-sum-exp with its
    attention to either prompt, and the result under the prompt is pushed away from that under the negative one
    (:func:`fastrope.guidance.normalised_guidance`). This equals two passes of the model over one image (NAG's code
    doubles the text), at the price of the further text tokens.

    Args:
        scale: ``s``, a number or schedule; 1 leaves the prompt alone. NAG's code has 5 for FLUX.
        tau: how many times larger a token's L1 norm may become.
        alpha: share of the guided attention, in 0..1.
        negative: text tokens of the negative prompt, at the end of the text; None means the second half of the text.
        layers, steps: where the image is guided, as in :class:`fastrope.GRAG`; elsewhere it sees the prompt alone.

    Raises:
        ValueError: naming the argument, what was expected and what came; when called, a text that does not hold both.
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
        """None: it guides attention, :meth:`guidance`."""
        return []

    def guidance(self, site: Site) -> Guidance:
        """What to do at a site: guide, or keep the two prompts apart.

        Raises:
            ValueError: a text that cannot hold both prompts.
        """
        text, total = site.tokens.text, site.tokens.text_tokens
        if self.negative is None:
            require(total > 0 and total % 2 == 0, "prompt_embeds", "as many tokens of the negative prompt as of the "
                    "prompt (NAG.negative says otherwise)", f"{total} tokens")  # fmt: skip
        count = total // 2 if self.negative is None else self.negative
        require(count < total, "NAG.negative", f"fewer than the {total} tokens of the text", count)
        scale = value_at("NAG.scale", self.scale, site) if site in self._active else 1.0
        return Guidance(slice(text.stop - count, text.stop), scale, self.tau, self.alpha)
