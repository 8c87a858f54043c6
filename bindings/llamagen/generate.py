"""Generation with LlamaGen: guidance, warping, anchor token matching, a key-value cache."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal, cast

import torch
from torch.nn import functional as F

from fastrope.checks import require

from ..anchors import Generated, Record, guide, plain_matcher, spread_anchors
from ..inputs import check_sampling
from .model import Cache, LlamaGen

PUBLISHED = "published"
SAMPLING = {"text": (7.5, 1000), "class": (4.0, 2000)}  # scale of guidance and top-k that the authors sample with


@torch.no_grad()
def generate(
    model: LlamaGen,
    condition: torch.Tensor,
    *,
    mask: torch.Tensor | None = None,
    matcher: Any = None,
    anchors: torch.Tensor | None = None,
    guidance: float | Literal["published"] | None = PUBLISHED,
    temperature: float = 1.0,
    top_k: int | Literal["published"] = PUBLISHED,
    top_p: float = 1.0,
    generator: torch.Generator | Sequence[torch.Generator] | None = None,
    progress: Callable[[Iterable[int]], Iterable[int]] = iter,
) -> Generated:
    """Generate images token by token; with anchors, edit the images they come from (ISLock, arXiv 2504.10434).

    Args:
        condition: text features ``(B, prefix, caption_dim)`` or class labels ``(B,)``.
        mask: 1 for features that count, ``(B, prefix)``, zeros before ones. The others are set to zero and masked.
            :func:`encode_prompts` returns it.
        matcher: ``fr.ISLock(...).matcher(tokenizer.codebook, num_tokens=model.config.num_tokens)``; None samples.
        anchors: codes of the original, ``(B, N)``, or ``(1, N)`` for all rows; -1 leaves a position free. Required with
            a matcher, and not allowed without one.
        guidance: scale of ``u + (c - u) * scale``; None or 1 runs the condition alone. ``"published"`` is the authors'
            value: 7.5 for text, 4 for classes.
        temperature, top_k, top_p: applied in this order, after guidance; ``top_k=0`` and ``top_p=1`` keep everything,
            ``top_k=1`` is greedy. ``top_k="published"`` is the authors' value: 1000 for text, 2000 for classes.
        generator: source of the seeds, one for the batch or one per row; None means torch's own. A row's tokens depend
            on its seed alone, not on the rest of the batch.
        progress: wraps the range of positions (``tqdm``).

    Returns:
        Tokens ``(B, N)`` long on the device of the model, and the record of matches (None without a matcher).

    Raises:
        ValueError: wrong shapes, dtypes or values: features that are not finite, or padded on the right, or padded
            without a mask; labels without a class; anchors that are not in the matcher's codebook.
    """
    model.check_condition(condition, mask)
    require((matcher is None) == (anchors is None), "anchors", "a matcher and anchors, or neither", "one of them")
    device = model.tok_embeddings.weight.device
    batch, num_tokens = condition.shape[0], model.config.num_tokens
    require(batch > 0, "condition", "at least one row", batch)
    usual = SAMPLING[model.config.condition]
    scale: Any = usual[0] if guidance == PUBLISHED else guidance
    most: Any = usual[1] if top_k == PUBLISHED else top_k
    check_sampling(scale, temperature, most, top_p)
    fits = matcher is None or matcher.num_tokens == num_tokens
    require(fits, "matcher", f"one for the model's {num_tokens} tokens", getattr(matcher, "num_tokens", None))
    codes = None if matcher is None else len(matcher.codebook)
    require(codes in (None, model.config.vocabulary), "matcher", f"one of {model.config.vocabulary} codes", codes)
    sampled = matcher is None
    if sampled:
        matcher = plain_matcher(num_tokens, device)
        anchors = torch.full((1, num_tokens), -1, device=device)
    anchors = spread_anchors(cast(torch.Tensor, anchors), batch, num_tokens, matcher)
    guided = scale not in (None, 1)
    x, visible = _prefix(model, condition.to(device), mask, guided)
    cache = Cache(model.config, x.shape[0], model.config.prefix + num_tokens - 1, x)
    seeds = matcher.seeds(batch, generator)
    start, matches = 0, []
    for position in progress(range(num_tokens)):
        logits = model.run(x, start, visible, cache)[:, -1]
        start += x.shape[1]
        logits = warp(guide(logits, scale) if guided else logits, temperature, most, top_p)
        match = matcher(logits, anchors[:, position], position, seeds=seeds)
        matches.append(match)
        tokens = match.tokens.repeat(2) if guided else match.tokens
        x = model.tok_embeddings(tokens)[:, None]
    record = Record.stack(matches, anchors)
    return Generated(record.tokens, None if sampled else record)


def _prefix(model: LlamaGen, condition: torch.Tensor, mask: torch.Tensor | None, guided: bool):
    """Embedded condition ``(B or 2B, prefix, dim)``, the unconditional half second, and the mask of visible tokens."""
    if condition.is_floating_point():
        condition = condition.to(model.dtype)
    visible = None
    if mask is not None:
        visible = mask.to(device=condition.device, dtype=torch.bool)
        condition = condition * visible[..., None]
        visible = torch.cat([visible, visible]) if guided else visible
    if guided:
        condition = torch.cat([condition, model.no_condition(condition.shape[0])])
    if visible is not None:
        visible = F.pad(visible, (0, model.config.num_tokens), value=True)
    return model.cls_embedding(condition), visible


def warp(logits: torch.Tensor, temperature: float, top_k: int, top_p: float) -> torch.Tensor:
    """Temperature, then top-k, then top-p of logits ``(B, V)``; removed logits become -inf.

    All logits equal to the k-th stay. Top-p keeps the smallest set of most probable tokens that reaches ``top_p``.
    """
    logits = logits / temperature
    if 0 < top_k < logits.shape[-1]:
        least = logits.topk(top_k).values[:, -1:]
        logits = logits.masked_fill(logits < least, -torch.inf)
    if top_p < 1:
        ordered, order = logits.sort(descending=True)
        before = ordered.softmax(-1).cumsum(-1) - ordered.softmax(-1)
        cut = (before >= top_p).scatter(1, order, before >= top_p)
        logits = logits.masked_fill(cut, -torch.inf)
    return logits
