"""Checks of what goes into a host's ``generate()``. Inputs that were made for another use are refused by name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from fastrope.checks import require, require_tensor

from ..inputs import check_mask

# Options of generate() that change neither the choice of tokens nor the form of the result.
PASSED = frozenset(
    ["num_return_sequences", "cache_implementation", "cache_config", "streamer", "synced_gpus", "compile_config",
     "disable_compile", "pad_token_id"]
)  # fmt: skip
# What to do instead of the options that are given most often.
INSTEAD = {
    "do_sample": "top_k=1 for the most probable token; otherwise this function samples",
    "guidance_scale": "guidance=...",
    "logits_processor": "processors=..., which run after matching",
    "generation_config": "the arguments of this function; for the rest set model.generation_config",
    "max_new_tokens": "no such option: the grid gives the number of tokens",
    "max_length": "no such option: the grid gives the number of tokens",
    "num_beams": "num_return_sequences=..., which draws several images",
    "past_key_values": "no such option: every call makes its cache",
    "cache": "no such option: every call makes its cache",
}
# Fields of a model's own generation config that choose or cut tokens, and the value at which they do not.
NEUTRAL = dict(
    num_beams=1, num_beam_groups=1, diversity_penalty=0, constraints=None, force_words_ids=None, penalty_alpha=None,
    repetition_penalty=1, encoder_repetition_penalty=1, no_repeat_ngram_size=0, encoder_no_repeat_ngram_size=0,
    bad_words_ids=None, sequence_bias=None, suppress_tokens=None, begin_suppress_tokens=None, forced_bos_token_id=None,
    forced_eos_token_id=None, exponential_decay_length_penalty=None, min_length=0, min_new_tokens=None, min_p=None,
    top_h=None, typical_p=1, epsilon_cutoff=0, eta_cutoff=0, watermarking_config=None, prompt_lookup_num_tokens=None,
    assistant_early_exit=None, dola_layers=None, stop_strings=None, max_time=None, token_healing=False,
)  # fmt: skip


def check_options(model: Any, options: Mapping) -> None:
    """Require options, and a generation config of the model, that do not choose tokens.

    Raises:
        ValueError: naming the option and what to do instead.
    """
    for name, value in options.items():
        instead = INSTEAD.get(name, f"no other options than {', '.join(sorted(PASSED))}")
        require(name in PASSED, name, instead, f"{type(value).__name__} among the options")
    copies = options.get("num_return_sequences", 1)
    whole = isinstance(copies, int) and not isinstance(copies, bool) and copies >= 1
    require(whole, "num_return_sequences", "an integer >= 1", repr(copies))
    for name, neutral in NEUTRAL.items():
        value = getattr(model.generation_config, name, None)
        free = value is None or value is False or value == neutral
        require(free, f"model.generation_config.{name}", f"{neutral}, as it would change the choice", repr(value))


def read_prompts(
    model: Any, inputs: Mapping, made_by: str, label: str = "", known: Sequence[str] = ()
) -> tuple[torch.Tensor, torch.Tensor]:
    """``input_ids`` and ``attention_mask``, ``(B, S)`` each, from the result of the host's processor.

    Args:
        model: of transformers; its config has the vocabulary and the padding token.
        made_by: the call that makes such prompts, for messages.
        label: name of the argument, for messages; empty for ``inputs``.
        known: further entries that the caller reads itself.

    Raises:
        ValueError: missing entries, entries for another use (pictures), other shapes, ids outside the vocabulary,
            padding that is not on the left, padding that the mask does not hide, rows of padding alone.
    """
    where = f"{label}." if label else ""
    require(isinstance(inputs, Mapping), label or "inputs", f"what {made_by} returns", type(inputs).__name__)
    for name in ("input_ids", "attention_mask"):
        require(name in inputs, where + name, f"one, from {made_by}", f"{sorted(map(str, inputs))} alone")
    for name, value in inputs.items():
        types = name.endswith("token_type_ids") and not torch.as_tensor(value, device="cpu").any()  # zeros mean text
        expected = f"a prompt of text alone, from {made_by}"
        require(name in ("input_ids", "attention_mask", *known) or types, where + name, expected, type(value).__name__)
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    require_tensor(where + "input_ids", ids, (2,), "(B, S)")
    integers = ids.dtype in (torch.int32, torch.int64)
    require(
        integers and ids.numel() > 0,
        where + "input_ids",
        "integers, one row and column at least",
        (ids.dtype, tuple(ids.shape)),
    )
    text = model.config.get_text_config()
    low, high = int(ids.min()), int(ids.max())
    inside = low >= 0 and high < text.vocab_size
    require(inside, where + "input_ids", f"ids below the vocabulary's {text.vocab_size}", f"{low} to {high}")
    check_mask(where + "attention_mask", mask, tuple(ids.shape), made_by)
    pad, bos, eos = (_special(model, name) for name in ("pad", "bos", "eos"))
    if not set(pad) & {*bos, *eos}:
        seen = torch.isin(ids, torch.tensor(pad, dtype=ids.dtype, device=ids.device)) & mask.to(ids.device).bool()
        rows = seen.any(1).nonzero().flatten().tolist()
        require(
            not rows, where + "attention_mask", f"zeros where input_ids has padding ({pad})", f"ones in row(s) {rows}"
        )
    return ids, mask


def check_result(tokens: torch.Tensor, chosen: torch.Tensor) -> None:
    """Require that the host returned the ``chosen`` tokens ``(B, N)``.

    Raises:
        ValueError: some are changed or missing.
    """
    whole = tokens.shape == chosen.shape and torch.equal(tokens, chosen)
    expected = "processors that do not change or drop the chosen tokens"
    require(whole, "processors", expected, f"other tokens ({tuple(tokens.shape)} of {tuple(chosen.shape)})")


def _special(model: Any, kind: str) -> tuple[int, ...]:
    """Ids of the padding, first or last token."""
    name = f"{kind}_token_id"
    value = getattr(model.generation_config, name, None)
    value = getattr(model.config.get_text_config(), name, None) if value is None else value
    return () if value is None else tuple(value) if isinstance(value, (list, tuple)) else (value,)
