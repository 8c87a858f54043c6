"""A tiny LlamaGen, and matchers for it."""

from __future__ import annotations

import math

import torch
from anchored import seeded
from torch.nn import functional as F

import fastrope as fr
from fastrope.bindings import llamagen

TINY = llamagen.LlamaGenConfig(dim=32, layers=2, heads=2, grid=4, vocabulary=48, prefix=5, caption_dim=12, hidden=48)


N = TINY.num_tokens


def matcher(tau=math.inf, candidates=TINY.vocabulary, alpha=0.0, num_tokens=N, **options):
    codebook = F.normalize(torch.randn(TINY.vocabulary, 8, generator=seeded(3)[0]), dim=-1)
    return fr.ISLock(candidates=candidates, alpha=alpha, tau=tau).matcher(codebook, num_tokens=num_tokens, **options)
