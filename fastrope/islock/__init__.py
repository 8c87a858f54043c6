"""ISLock (arXiv 2504.10434): structure-preserving edits of autoregressive images by anchor token matching.

``config`` says what is asked for, ``matcher`` binds it to a codebook and checks calls, ``op`` is the torch.library op
they end in, ``reference`` is the specification; the fused kernel is ``kernels/match.py``.
"""

from .config import METRICS, ISLock

__all__ = ["METRICS", "ISLock"]
