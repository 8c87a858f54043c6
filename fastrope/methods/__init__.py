"""Methods: frozen descriptions that turn a :class:`fastrope.Site` into modulations. They compute no attention."""

from .grag import GRAG
from .looserope import Curve, LooseRoPE
from .schedules import Linear, PerLayer, PerStep
from .untwisting import UntwistingRoPE

__all__ = ["GRAG", "Curve", "Linear", "LooseRoPE", "PerLayer", "PerStep", "UntwistingRoPE"]
