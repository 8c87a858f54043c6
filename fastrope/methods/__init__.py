"""Methods: frozen descriptions that return the modulations for a :class:`fastrope.Site`. They compute no attention."""

from .grag import GRAG
from .looserope import Curve, LooseRoPE
from .nag import NAG
from .positions import HighResolution, LongVideo
from .regions import Region, Regions
from .schedules import Linear, PerLayer, PerStep
from .strength import PromptWeights, ReferenceStrength, Temperature
from .untwisting import UntwistingRoPE

__all__ = [
    "GRAG", "NAG", "Curve", "HighResolution", "Linear", "LongVideo", "LooseRoPE", "PerLayer", "PerStep",
    "PromptWeights", "ReferenceStrength", "Region", "Regions", "Temperature", "UntwistingRoPE",
]  # fmt: skip
