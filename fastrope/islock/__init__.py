"""ISLock (arXiv 2504.10434): structure-preserving edits of autoregressive images by anchor token matching.

It samples tokens and touches no attention. ``matcher`` holds the settings and binds them to a codebook, ``op`` is the
torch.library op that calls end in, ``reference`` is the specification; the fused kernel is ``kernels/match.py``.
Everybody else imports from here alone.
"""

from .matcher import METRICS, ISLock, Match, Matcher
from .reference import rows_of

__all__ = ["METRICS", "ISLock", "Match", "Matcher", "rows_of"]
