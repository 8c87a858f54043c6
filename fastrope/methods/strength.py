"""How strongly reference pictures and words count, and how sharp attention is."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from numbers import Real
from typing import Any, Literal

import torch

from ..activity import Indices
from ..checks import is_whole, require, require_tensor
from ..modulations import BandWeight, KeyBias, LogitBias, ValueGain
from ..tokens import Site, TokenLayout
from .per_reference import Dial, checked_dial, checked_references, for_each, present, require_reference, values_of
from .schedules import Activity, Steps, require_number


@dataclass(frozen=True)
class ReferenceStrength:
    """How strongly each reference picture counts: ``s_ij <- s_ij + log w`` for the keys ``j`` of a picture and all
    queries ``i`` (the strength of a guide in ComfyUI).

    With weight 2, every token of the picture counts as two copies of it. GRAG changes how attention is spread inside a
    picture; this method changes how much of it goes to the picture as a whole.

    Args:
        weight: ``w``, dimensionless, at least 0: a number, a schedule, or a list with one of these per reference. 1 is
            neutral and modulates nothing; 0 hides the picture.
        references: indices of the reference pictures; None means all.
        layers: indices of the attention layers where the method acts, as in :class:`fastrope.At`; None means all.
        steps: step indices likewise, or two floats ``(start, stop)``, fractions of the run; None means all.

    Raises:
        ValueError: naming the argument, what was expected and what came; in :meth:`modulations` also, unless neutral, a
            sequence without a reference, or without one of ``references``.
    """

    weight: Dial
    references: Sequence[int] | None = None
    layers: Indices | None = None
    steps: Steps = None
    _active: Activity = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        weight = checked_dial("ReferenceStrength.weight", self.weight)
        _require_weights("ReferenceStrength.weight", [w for w in _listed(weight) if isinstance(w, Real)])
        object.__setattr__(self, "weight", weight)
        object.__setattr__(self, "references", checked_references("ReferenceStrength.references", self.references))
        object.__setattr__(self, "_active", Activity(self.layers, self.steps))

    def modulations(self, site: Site) -> list[LogitBias]:
        """One :class:`fastrope.LogitBias` per reference that is not neutral. Equal values give the same objects."""
        if site not in self._active:
            return []
        name = "ReferenceStrength.weight"
        weights = values_of(name, self.weight, site)
        _require_weights(name, weights)
        if set(weights) == {1.0}:
            return []
        require_reference("ReferenceStrength", site.tokens)
        chosen = present("ReferenceStrength", site.tokens, self.references)
        each = for_each(name, self.weight, weights, len(chosen))
        return list(_weighted(site.tokens, tuple(zip(chosen, each, strict=True))))


@dataclass(frozen=True, eq=False)
class PromptWeights:
    """A weight per text token, for all queries: ``s_ij <- s_ij + log w_j`` on logits, or ``v_j <- w_j v_j`` on values.

    On logits, a token with weight 2 counts as two copies of itself. On values the weights of attention stay, and a
    token with a negative weight subtracts what it would add (NegPiP).

    Args:
        weights: ``w``, dimensionless; 1 is neutral. A tensor ``(text_tokens,)`` or a sequence of that length, or the
            weights of some tokens, ``{index: weight}``, counted from the first text token. On logits at least 0, and 0
            hides the token.
        on: ``"logits"`` or ``"values"``.
        text_tokens: act only in calls whose text has this many tokens, so that a negative prompt of another length
            keeps its own weights. None means every call.
        layers, steps: where the method acts, as in :class:`fastrope.ReferenceStrength`.

    Raises:
        ValueError: naming the argument, what was expected and what came; in :meth:`modulations` also a text of another
            length than the weights, or without one of the indices.
    """

    weights: torch.Tensor | Sequence[float] | Mapping[int, float]
    on: Literal["logits", "values"] = "logits"
    text_tokens: int | None = None
    layers: Indices | None = None
    steps: Steps = None
    _active: Activity = field(init=False, repr=False)
    _chosen: tuple[tuple[int, float], ...] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        name, weights = "PromptWeights.weights", self.weights
        require(self.on in ("logits", "values"), "PromptWeights.on", '"logits" or "values"', repr(self.on))
        check_text_tokens("PromptWeights", self.text_tokens)
        if isinstance(weights, torch.Tensor):
            require_tensor(name, weights, (1,), "(text_tokens,)")
            weights = weights.tolist()
        several = isinstance(weights, (Mapping, Sequence)) and not isinstance(weights, str) and len(weights) > 0
        require(several, name, "weights of text tokens, a tensor, sequence or {index: weight}", repr(weights))
        chosen = tuple(weights.items() if isinstance(weights, Mapping) else enumerate(weights))
        for i, weight in chosen:
            require(is_whole(i) and i >= 0, name, "indices of text tokens, from 0", repr(i))
            require_number(f"{name}[{i}]", weight)
            least = "a weight of at least 0 on logits (on='values' takes negative ones)"
            require(self.on == "values" or weight >= 0, f"{name}[{i}]", least, weight)
        kept = dict(chosen) if isinstance(weights, Mapping) else tuple(weight for _, weight in chosen)
        object.__setattr__(self, "weights", kept)
        object.__setattr__(self, "_chosen", tuple((int(i), float(weight)) for i, weight in chosen))
        object.__setattr__(self, "_active", Activity(self.layers, self.steps))

    @classmethod
    def of_words(
        cls,
        tokenizer: Any,
        prompt: str,
        words: Mapping[str, float],
        *,
        start: int = 0,
        on: Literal["logits", "values"] = "logits",
        text_tokens: int | None = None,
        layers: Indices | None = None,
        steps: Steps = None,
    ) -> PromptWeights:
        """Weights of words or phrases of a prompt, wherever they stand in it.

        Args:
            tokenizer: the host's tokenizer, a fast one of transformers (with ``offset_mapping``).
            prompt: the prompt as the pipeline gets it.
            words: ``{word: weight}``, as they are written in the prompt.
            start: index of the tokenizer's first token in the host's text. 0 where the text begins with the prompt, as
                in FLUX.1 and Qwen-Image; hosts with a template have some tokens before it.
            on, text_tokens, layers, steps: of the method.

        Raises:
            ValueError: a word that is not in the prompt, words that share a token, a tokenizer without offsets.
        """
        require(isinstance(words, Mapping) and len(words) > 0, "words", "{word: weight}", repr(words))
        require(is_whole(start) and start >= 0, "start", "an index from 0", repr(start))
        found: dict[int, float] = {}
        for word, weight in words.items():
            for i in _places(tokenizer, prompt, word):
                require(start + i not in found, "words", "words that share no token", repr(word))
                found[start + i] = weight
        return cls(found, on, text_tokens, layers, steps)

    def modulations(self, site: Site) -> list[KeyBias | ValueGain]:
        """One :class:`fastrope.KeyBias` or :class:`fastrope.ValueGain`, unless neutral. A text of the same layout gives
        the same objects."""
        count = site.tokens.text_tokens
        if site not in self._active or self.text_tokens not in (None, count):
            return []
        name, last = "PromptWeights.weights", max(i for i, _ in self._chosen)
        if isinstance(self.weights, Mapping):
            require(last < count, name, f"indices below {count}, the number of text tokens", last)
        else:
            expected = f"{count} weights, one per text token (text_tokens confines them to texts of one length)"
            require(last + 1 == count, name, expected, last + 1)
        return list(_per_token(site.tokens, self._chosen, self.on))


@dataclass(frozen=True)
class Temperature:
    """Sharper attention for pictures larger than in training: all logits are multiplied by ``sqrt(log n / log n_0)``,
    with ``n`` tokens of the target and ``n_0`` in training (arXiv 2306.08645).

    Attention over more keys has more entropy, and pictures become blurred or repeat themselves; the factor undoes it.
    It is a weight on the keys, so torch's plain attention does the work.

    Args:
        trained: rows and columns of the training in tokens, or their number ``n_0``, at least 2; (64, 64) for
            1024 x 1024 pixels of FLUX, Qwen-Image and Z-Image.
        layers, steps: where the method acts, as in :class:`fastrope.ReferenceStrength`.

    A target with at most ``n_0`` tokens is not modulated. The kinds ``"yarn"`` and ``"dype"`` of
    :class:`fastrope.HighResolution` have a gain of their own on logits, and both gains multiply.

    Raises:
        ValueError: naming the argument, what was expected and what came.
    """

    trained: tuple[int, int] | int = (64, 64)
    layers: Indices | None = None
    steps: Steps = None
    _active: Activity = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        sides = self.trained if isinstance(self.trained, (tuple, list)) else (self.trained, 1)
        ok = len(sides) == 2 and all(is_whole(n) and n >= 1 for n in sides) and sides[0] * sides[1] >= 2
        require(ok, "Temperature.trained", "(rows, columns) or a number of tokens, at least 2", repr(self.trained))
        if isinstance(self.trained, list):
            object.__setattr__(self, "trained", tuple(sides))
        object.__setattr__(self, "_active", Activity(self.layers, self.steps))

    def modulations(self, site: Site) -> list[BandWeight]:
        """One :class:`fastrope.BandWeight` on all keys, or none within the training. Equal values give the same
        object."""
        trained = math.prod(self.trained) if isinstance(self.trained, tuple) else self.trained
        tokens = math.prod(site.tokens.target_grid)
        if site not in self._active or tokens <= trained:
            return []
        return [_sharpened(math.sqrt(math.log(tokens) / math.log(trained)), sum(site.axes_dim) // 2)]


def check_text_tokens(owner: str, count: object) -> None:
    """Require a number of text tokens, or None."""
    ok = count is None or (isinstance(count, int) and not isinstance(count, bool) and count >= 1)
    require(ok, f"{owner}.text_tokens", "a number of text tokens, or None", repr(count))


def _places(tokenizer: Any, prompt: str, word: object) -> list[int]:
    """The tokens of a prompt that hold a character of the word, at each of its places."""
    require(isinstance(word, str) and bool(word.strip()), "words", "words of the prompt", repr(word))
    fast = "a fast tokenizer of transformers, which has offsets"
    require(bool(getattr(tokenizer, "is_fast", False)), "tokenizer", fast, type(tokenizer).__name__)
    spans = [m.span() for m in re.finditer(rf"(?<!\w){re.escape(str(word))}(?!\w)", prompt)]
    require(len(spans) > 0, "words", f"words of the prompt {prompt!r}", repr(word))
    offsets = tokenizer(prompt, return_offsets_mapping=True)["offset_mapping"]
    found = [i for i, (a, b) in enumerate(offsets) if any(max(a, start) < min(b, stop) for start, stop in spans)]
    require(len(found) > 0, "words", "words that the tokenizer keeps", repr(word))
    return found


def _listed(value: Dial) -> Sequence:
    return value if isinstance(value, Sequence) else (value,)


def _require_weights(name: str, weights: Sequence) -> None:
    for weight in weights:
        require(weight >= 0, name, "a weight of at least 0", weight)


def _log(weight: float) -> float:
    return math.log(weight) if weight > 0 else -math.inf


@lru_cache(maxsize=512)
def _weighted(tokens: TokenLayout, weights: tuple[tuple[int, float], ...]) -> tuple[LogitBias, ...]:
    """Cached, because a binding reuses its plan for the same objects."""
    return tuple(LogitBias(_log(w), keys=tokens.reference(i)) for i, w in weights if w != 1.0)


@lru_cache(maxsize=64)
def _per_token(tokens: TokenLayout, weights: tuple[tuple[int, float], ...], on: str) -> tuple[KeyBias | ValueGain, ...]:
    if all(w == 1.0 for _, w in weights):
        return ()
    each = torch.ones(tokens.text_tokens, dtype=torch.float64, device="cpu")
    for i, w in weights:
        each[i] = w
    if on == "values":
        return (ValueGain(each, keys=tokens.text),)
    bias = torch.zeros(tokens.num_keys, dtype=torch.float64, device="cpu")
    bias[tokens.text] = each.log()
    return (KeyBias(bias),)


@lru_cache(maxsize=64)
def _sharpened(factor: float, pairs: int) -> BandWeight:
    return BandWeight(torch.full((pairs,), factor, dtype=torch.float64, device="cpu"))
