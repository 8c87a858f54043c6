"""ISLock (arXiv 2504.10434): structure-preserving edits of autoregressive images by anchor token matching.

It samples tokens and does not change attention. ``matcher`` has the settings and binds them to a codebook, ``op`` is
the torch.library op, ``reference`` is the specification, and ``kernels/match.py`` is the fused kernel. Other packages
import from here alone.
"""

from .matcher import METRICS, ISLock, Match, Matcher
from .reference import rows_of

__all__ = ["METRICS", "ISLock", "Match", "Matcher", "rows_of"]
