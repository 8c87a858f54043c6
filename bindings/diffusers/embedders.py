"""Rotary tables of transformers with other frequencies.

Positions are rescaled where the model makes its table, once per call. So layers without a modulation still run the
host's own attention.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

import fastrope as fr
from fastrope.rescaling import Rescaling

Table = Any  # cos(phi) + i sin(phi) as a complex (S, D/2) tensor, or real (cos, sin), each value twice


@dataclass(frozen=True)
class Embedder:
    """The part of a transformer that makes its rotary table.

    Args:
        attribute: its name in the transformer; a module or any callable.
        positions: ``positions(*args, **kwargs)``, with the arguments of its call: a tuple with the position ids
            ``(S, axes)`` of each table that it returns.
        several: True if it returns a tuple of tables, even of a single one.
    """

    attribute: str
    positions: Callable[..., tuple[Tensor, ...]]
    several: bool = False


class RescaledTables:
    """Replaces the output of an embedder if the running call rescales positions.

    Args:
        embedder, model: the embedder and its model.
        axes_dim, theta: of the RoPE.
        wanted: returns the rescaling of the call that runs in this thread, if any.
        share: the part of a table's positions that the model gets, where processes split its tables.
    """

    def __init__(
        self,
        embedder: Embedder,
        model: torch.nn.Module,
        axes_dim: tuple[int, ...],
        theta: float,
        wanted: Callable[[], Rescaling | None],
        share: Callable[[Tensor], Tensor] = lambda positions: positions,
    ) -> None:
        self._embedder, self._axes_dim, self._theta, self._wanted = embedder, axes_dim, theta, wanted
        self._share = share
        self._checked = False
        self._model = model
        self._found: Any = getattr(model, embedder.attribute)
        if isinstance(self._found, torch.nn.Module):
            self._hook: Any = self._found.register_forward_hook(self._after, with_kwargs=True)
        else:
            self._hook = _Wrapped(self._found, self._after)
            setattr(model, embedder.attribute, self._hook)

    def remove(self) -> None:
        """Put the embedder back as it was."""
        if isinstance(self._found, torch.nn.Module):
            self._hook.remove()
        elif getattr(self._model, self._embedder.attribute) is self._hook:
            setattr(self._model, self._embedder.attribute, self._found)

    @torch.compiler.disable(reason="the tables of a step must not be frozen into a graph")
    def _after(self, module: Any, args: tuple, kwargs: dict[str, Any], output: Any) -> Any:
        rescaling = self._wanted()
        if rescaling is None:
            return None
        tables = output if self._embedder.several else (output,)
        positions = map(self._share, self._embedder.positions(*args, **kwargs))
        ropes = [fr.RoPE.axial(p, self._axes_dim, self._theta) for p in positions]
        if not self._checked:
            self._check(tables, ropes)
            self._checked = True
        factor, gain = (torch.tensor(x, dtype=torch.float64, device="cpu") for x in (rescaling.factor, rescaling.gain))
        made = tuple(
            _like(table, rope.rescaled(factor).angles, gain) for table, rope in zip(tables, ropes, strict=True)
        )
        return made if self._embedder.several else made[0]

    def _check(self, tables: tuple, ropes: list[fr.RoPE]) -> None:
        """Require that the host's own table is the one that we compute."""
        for table, rope in zip(tables, ropes, strict=True):
            ours = _like(table, rope.angles, torch.ones(rope.pairs, dtype=torch.float64, device="cpu"))
            pairs = [(table, ours)] if isinstance(table, Tensor) else list(zip(table, ours, strict=True))
            gap = max(float((a - b).abs().max()) for a, b in pairs)
            if not gap < 1e-3:
                raise NotImplementedError(
                    f"{type(self._model).__name__}.{self._embedder.attribute}: expected the rotary table of axes "
                    f"{self._axes_dim} with theta {self._theta:g}, received another one (it differs by {gap:.2g})"
                )


def _like(table: Table, angles: Tensor, gain: Tensor) -> Table:
    """``gain * exp(i angles)`` in the form, dtype and shape of a table."""
    gain = gain.to(angles)
    if isinstance(table, Tensor):
        made = torch.polar(gain.expand_as(angles).contiguous(), angles)
        return made.reshape(table.shape).to(table.device, table.dtype)
    cos, sin = table
    return tuple(
        (gain * wave).repeat_interleave(2, dim=-1).reshape(x.shape).to(x.device, x.dtype)
        for x, wave in ((cos, angles.cos()), (sin, angles.sin()))
    )


class _Wrapped:
    """A callable that is no module, followed by a hook."""

    def __init__(self, found: Any, after: Callable) -> None:
        self._found, self._after = found, after

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        output = self._found(*args, **kwargs)
        other = self._after(self._found, args, kwargs, output)
        return output if other is None else other

    def __getattr__(self, name: str) -> Any:
        return getattr(self._found, name)


# ---- arguments of diffusers' embedders ------------------------------------------------------------------------------


def ids(ids: Tensor) -> tuple[Tensor]:
    """The arguments are position ids, in the dtype of the model. Whole numbers are exact in float64."""
    return (ids.double() if ids.device.type != "mps" else ids.float(),)


def image_shapes(
    video_fhw: Any, device: Any = None, max_txt_seq_len: int | Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Qwen-Image: the arguments are shapes ``(1, rows, columns)`` of the pictures and the length of the text. The table
    of the images comes first, then that of the text."""
    shapes = video_fhw[0] if isinstance(video_fhw, list) else video_fhw
    grids = [(int(rows), int(columns)) for _, rows, columns in (shapes if isinstance(shapes, list) else [shapes])]
    layout = fr.TokenLayout(int(cast(int, max_txt_seq_len)), grids[0], grids[1:])
    positions = layout.positions("qwen", device)
    return positions[layout.text_tokens :], positions[: layout.text_tokens]


FLUX_LIKE = Embedder("pos_embed", ids)
QWEN_LIKE = Embedder("pos_embed", image_shapes, several=True)
Z_IMAGE_LIKE = Embedder("rope_embedder", ids)
