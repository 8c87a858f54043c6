"""The arguments of a call that runs a reference: by itself (``alone``), or as further rows of the target's call
(``together``).

There is one class per way of calling a transformer: tensors with a batch dimension, and Z-Image's lists. Neither
changes the target's arguments.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from fastrope.checks import require, require_tensor

from ..image.fingerprints import Memo
from .sequences import Call

# Arguments that a reference takes over from the target.
INERT = ("return_dict", "joint_attention_kwargs", "attention_kwargs", "controlnet_blocks_repeat")
OR_CACHE = "or a fastrope.ReferenceCache, which takes any grid"


class Joined(NamedTuple):
    """A call with the reference's rows after the target's.

    Args:
        call: its arguments.
        rows: number of the reference's rows.
        text_mask: ``(B, S_text)`` bool if a text was padded and the host itself masks nothing.
    """

    call: dict[str, Any]
    rows: int
    text_mask: Tensor | None = None


@dataclass(frozen=True)
class TensorRows:
    """Arguments ``(B, ...)``: FLUX.1 and related hosts, FLUX.2, Qwen-Image.

    Args:
        required: arguments of the text besides ``encoder_hidden_states`` that a reference must bring.
        text_mask: name of the host's mask over the text, ``(B, S_text)``.
        joint_mask: name of the host's mask over text and image, ``(B, S)``.
        movable: False if the positions of the image depend on the length of the text.
    """

    required: tuple[str, ...] = ()
    text_mask: str | None = None
    joint_mask: str | None = None
    movable: bool = True

    image, text = "hidden_states", "encoder_hidden_states"
    repeated = ("timestep", "guidance")
    placed = ("img_ids", "txt_ids", "img_shapes")

    @property
    def masks(self) -> tuple[str, ...]:
        """Names of the masks that this host takes."""
        return tuple(name for name in (self.text_mask, self.joint_mask) if name)

    def count(self, call: Call) -> int:
        """Number of rows of a call."""
        require_tensor(self.image, call.get(self.image), (3,), "(B, tokens, C)")
        return len(call[self.image])

    def alone(self, call: Call, latents: Tensor, given: Call, size: int, memo: Memo) -> dict[str, Any]:
        """The call that runs the reference by itself.

        Args:
            call: the target's.
            latents: ``(R, tokens, C)``.
            given: the reference's arguments.
            size: number of tokens of the target's grid.
            memo: returns earlier results for the same tensors.

        Raises:
            ValueError: naming the argument that is missing or of another shape.
        """
        target = call[self.image]
        require_tensor("reference.latents", latents, (3,), "(R, tokens, C)")
        width = target.shape[2]
        require(latents.shape[2] == width, "reference.latents", f"(R, tokens, {width})", tuple(latents.shape))
        rows, known = len(latents), (self.text, *self.required, *self.masks, *self.repeated, *self.placed)
        for name in given:
            require(name in known, "reference.arguments", f"some of {known}", repr(name))
        alone: dict[str, Any] = {self.image: latents.to(target)}
        for name in (self.text, *self.required):
            value: Any = given.get(name)
            require(isinstance(value, Tensor), f"reference.arguments[{name!r}]", "a tensor", type(value).__name__)
            alone[name] = memo(lambda x: x.to(target), _rows_of(name, value, rows, memo), target.dtype, target.device)
        for name in self.masks:
            if given.get(name) is not None:
                mask = _rows_of(name, given[name], rows, memo)
                alone[name] = memo(lambda x: x.to(target.device), mask, target.device)
        for name in self.repeated:
            value = given[name] if given.get(name) is not None else call.get(name)
            if isinstance(value, Tensor) and value.ndim:
                alone[name] = value[:1].expand(rows, *value.shape[1:]).to(target.device)
            elif value is not None:
                alone[name] = value
        self._place(alone, call, given, size, memo)
        alone.update({name: call[name] for name in INERT if call.get(name) is not None}, return_dict=False)
        return alone

    def _place(self, alone: dict, call: Call, given: Call, size: int, memo: Memo) -> None:
        """Ids or shapes: those of the reference, or the target's if they fit."""
        tokens, text = alone[self.image].shape[1], alone[self.text].shape[1]
        if call.get("img_shapes") is not None:
            shapes: Any = given.get("img_shapes")
            if shapes is None:
                first = call["img_shapes"][0]
                shapes = [[tuple(image) for image in (first if isinstance(first, list) else [first])][:1]]
            first = shapes[0] if isinstance(shapes[0], list) else [shapes[0]]
            size = sum(image[0] * image[1] * image[2] for image in first)
            require(
                size == tokens, 'reference.arguments["img_shapes"]', f"shapes of {tokens} tokens, as latents", first
            )
            alone["img_shapes"] = [first] * len(alone[self.image])
            return
        for name, length in (("img_ids", tokens), ("txt_ids", text)):
            # If every row has ids, the host takes those of the first row for all.
            ids, theirs = (memo(lambda x: x[0], x) if _batched(x) else x for x in (given.get(name), call.get(name)))
            require_tensor(name, theirs, (2,), "(tokens, axes)")
            if ids is None:
                told = name == "txt_ids" or self.movable or text == call[self.text].shape[1]
                expected = "ids, as the image's positions depend on the length of the text"
                require(told, f'reference.arguments["{name}"]', expected, None)
                ids = theirs
                if ids.shape[-2] > length and (name == "txt_ids" or length == size):  # drops the host's references
                    ids = memo(lambda x, n=length: x[..., :n, :], ids, length)
                elif ids.shape[-2] < length and name == "txt_ids":
                    ids = memo(lambda x, n=length: _lengthened(x, n), ids, length)
            fits = isinstance(ids, Tensor) and ids.ndim == 2 and len(ids) == length
            expected = f"({length}, axes), one id for each of the reference's tokens"
            require(fits, f'reference.arguments["{name}"]', expected, tuple(getattr(ids, "shape", ())))
            alone[name] = memo(lambda x, y=theirs: x.to(y), ids, theirs.dtype, theirs.device)

    def together(self, call: Call, alone: Call, memo: Memo) -> Joined:
        """Target and reference in one call.

        Raises:
            ValueError: grids or ids that differ from the target's.
            NotImplementedError: arguments that no reference has (ControlNet's), masks that are not bool.
        """
        _refuse_others(call, (self.image, self.text, *self.required, *self.masks, *self.repeated, *self.placed, *INERT))
        target, reference = call[self.image], alone[self.image]
        rows = len(reference)
        texts = [call[self.text], alone[self.text].to(call[self.text])]
        if not self.movable and texts[0].shape[1] != texts[1].shape[1]:
            raise NotImplementedError(
                f"{self.text}: expected texts of one length where positions depend on it, received "
                f"{[text.shape[1] for text in texts]} tokens; use a fastrope.ReferenceCache"
            )
        fits = reference.shape[1] == target.shape[1]
        require(fits, "reference.latents", f"(R, {target.shape[1]}, C), {OR_CACHE}", tuple(reference.shape))
        joined = {name: value for name, value in call.items() if name in INERT}
        for name in (self.image, *self.required):
            joined[name] = torch.cat([call[name], alone[name].to(call[name])])
        for name in (n for n in self.repeated if n in call):
            value = call[name]
            batched = isinstance(value, Tensor) and value.ndim and name in alone
            joined[name] = torch.cat([value.expand(len(target)), alone[name].to(value)]) if batched else value
        for name in (n for n in self.placed if n in call):
            joined[name] = self._placed(name, call, alone, memo)
        length = max(text.shape[1] for text in texts)
        joined[self.text] = torch.cat([pad(text, (0, 0, 0, length - text.shape[1])) for text in texts])
        mask = self._masks(call, alone, texts, memo)
        if mask is None or not self.masks:
            return Joined(joined, rows, mask)
        joined[self.masks[0]] = mask
        return Joined(joined, rows)

    def _placed(self, name: str, call: Call, alone: Call, memo: Memo) -> Any:
        """Ids or shapes of all rows."""
        target, reference = call.get(name), alone.get(name)
        if target is None:
            return None
        what = f'reference.arguments["{name}"]'
        if name == "img_shapes":
            first = target[0] if isinstance(target[0], list) else [target[0]]
            same = [tuple(s) for s in first] == [tuple(s) for s in reference[0]]
            require(same, what, f"those of the target, {first}, {OR_CACHE}", reference[0])
            return [*target, *reference] if isinstance(target[0], list) else target
        same = target is reference or memo(_agree, target, reference)
        require(bool(same), what, f"ids of the target, {OR_CACHE}", "others")
        return target if target.shape[-2] >= reference.shape[-2] else reference  # the host takes one row's for all

    def _masks(self, call: Call, alone: Call, texts: list[Tensor], memo: Memo) -> Tensor | None:
        """``(B + R, S_text)`` bool, or ``(B + R, S)`` if the host's mask is over text and image; None if nothing is
        masked. A mask that the host adds to the logits keeps its dtype."""
        given = [next((each[m] for m in self.masks if each.get(m) is not None), None) for each in (call, alone)]
        if all(m is None for m in given) and texts[0].shape[1] == texts[1].shape[1]:
            return None
        added = [self.joint_mask and mask is not None and mask.is_floating_point() for mask in given]
        if any(added):
            if not all(added) or texts[0].shape[1] != texts[1].shape[1]:
                raise NotImplementedError(
                    f"{self.joint_mask}: expected bool masks, or floating-point ones of texts of one length, beside a "
                    f"reference in the same batch, received {[getattr(m, 'dtype', None) for m in given]} of "
                    f"{[text.shape[1] for text in texts]} tokens; pass prompt_attention_mask.bool(), or use a "
                    "fastrope.ReferenceCache"
                )
            rows = len(texts[1])
            return memo(lambda x, y: torch.cat([x, y.to(x).expand(rows, -1)]), *given, rows)
        shapes = tuple(tuple(text.shape[:2]) for text in texts)
        image = call[self.image].shape[1] if self.joint_mask else 0
        device = texts[0].device if self.masks else torch.device("cpu")  # only we read a mask that the host has not
        absent = tuple(mask is None for mask in given)
        held = [mask for mask in given if mask is not None]
        return memo(lambda *_: _join_masks(given, shapes, image, device), *held, absent, shapes, image, device)

    @staticmethod
    def cut(sample: Tensor, rows: int) -> Tensor:
        """The target's rows of the output."""
        return sample[: len(sample) - rows]


@dataclass(frozen=True)
class ListRows:
    """Lists of pictures and captions: Z-Image."""

    image, text = "x", "cap_feats"
    inert = (*INERT, "patch_size", "f_patch_size")

    def count(self, call: Call) -> int:
        """Number of rows of a call."""
        return len(call[self.image])

    def alone(self, call: Call, latents: Tensor, given: Call, size: int, memo: Memo) -> dict[str, Any]:
        """The call that runs the reference by itself; ``latents (R, C, 1, rows, columns)``, or a list of R pictures.

        Raises:
            ValueError: naming the argument that is missing or of another shape.
        """
        first = call[self.image][0]
        pictures = list(latents)
        fits = all(isinstance(x, Tensor) and x.ndim == 4 and x.shape[:2] == first.shape[:2] for x in pictures)
        shapes = [tuple(getattr(x, "shape", ())) for x in pictures]
        expected = f"(R, {first.shape[0]}, {first.shape[1]}, rows, columns)"
        require(fits and bool(pictures), "reference.latents", expected, f"rows of {shapes}")
        for name in given:
            require(name == self.text, "reference.arguments", f"{self.text!r} alone", repr(name))
        captions: Any = given.get(self.text)
        captions = [captions] if isinstance(captions, Tensor) and captions.ndim == 2 else captions
        what = f"1 or {len(pictures)} captions (text, C)"
        ok = isinstance(captions, (list, tuple, Tensor)) and len(captions) in (1, len(pictures))
        require(ok, f'reference.arguments["{self.text}"]', what, type(captions).__name__)
        captions = list(captions) * (len(pictures) // len(captions))
        time = call["t"]
        alone = {
            self.image: [x.to(first) for x in pictures],
            "t": time[:1].expand(len(pictures)) if time.ndim else time,
            self.text: [memo(lambda x: x.to(first), c, first.dtype, first.device) for c in captions],
        }
        alone.update({name: call[name] for name in self.inert if call.get(name) is not None}, return_dict=False)
        return alone

    def together(self, call: Call, alone: Call, memo: Memo) -> Joined:
        """Target and reference in one call.

        Raises:
            ValueError: another grid than the target's.
            NotImplementedError: arguments that no reference has (ControlNet's).
        """
        _refuse_others(call, (self.image, self.text, "t", *self.inert))
        shapes = [tuple(each[self.image][0].shape) for each in (call, alone)]
        require(shapes[0] == shapes[1], "reference.latents", f"rows of {shapes[0]}, {OR_CACHE}", shapes[1])
        joined = {name: value for name, value in call.items() if name in self.inert}
        for name in (self.image, self.text):
            joined[name] = [*call[name], *alone[name]]
        time = call["t"]
        joined["t"] = torch.cat([time.expand(len(call[self.image])), alone["t"].to(time)]) if time.ndim else time
        return Joined(joined, len(alone[self.image]))

    @staticmethod
    def cut(sample: list[Tensor], rows: int) -> list[Tensor]:
        """The target's rows of the output."""
        return sample[: len(sample) - rows]


def _refuse_others(call: Call, known: Collection[str]) -> None:
    """Refuse arguments of the target that a reference cannot have."""
    for name, value in call.items():
        if value is not None and name not in known:
            raise NotImplementedError(
                f"{name}: expected None beside a reference in the same batch, received {type(value).__name__}; a "
                "fastrope.ReferenceCache leaves the target's call as it is"
            )


def _rows_of(name: str, value: Tensor, rows: int, memo: Memo) -> Tensor:
    """One row for each reference image."""
    require(len(value) in (1, rows), f"reference.arguments[{name!r}]", f"1 or {rows} rows", tuple(value.shape))
    return value if len(value) == rows else memo(lambda x: x.expand(rows, *x.shape[1:]), value, rows)


def _batched(ids: Any) -> bool:
    return isinstance(ids, Tensor) and ids.ndim == 3


def _agree(one: Tensor, other: Tensor) -> bool:
    """True if two lists of ids are the same up to the end of the shorter one."""
    one, other = (x if x.ndim == 2 else x[0] for x in (one, other))
    length = min(len(one), len(other))
    return torch.equal(one[:length], other[:length])


def _join_masks(given: list[Tensor | None], shapes: tuple, image: int, device: torch.device) -> Tensor:
    """Masks over texts of shapes ``(rows, length)``, padded to the longest, and over ``image`` further tokens."""
    length, found = max(shape[1] for shape in shapes), []
    for mask, shape in zip(given, shapes, strict=True):
        whole = torch.zeros(shape[0], length + image, dtype=torch.bool, device=device)
        whole[:, : shape[1]] = True if mask is None else mask[:, : shape[1]].bool()
        whole[:, length:] = True
        found.append(whole)
    return torch.cat(found)


def _lengthened(ids: Tensor, length: int) -> Tensor:
    """Text ids extended to a length: all zeros, or counting on."""
    what = f"{length} ids, as the target's single one does not tell how they go on"
    require(len(ids) > 1, 'reference.arguments["txt_ids"]', what, None)
    more = length - len(ids)
    stride = ids[-1:] - ids[-2:-1]
    count = torch.arange(1, more + 1, device=ids.device)[:, None].to(ids.dtype)
    return torch.cat([ids, ids[-1:] + stride * count])
