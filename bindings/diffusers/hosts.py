"""The table of hosts: what must be known of a transformer class to modulate its attention."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from fastrope.checks import require, require_tensor

from .processors import BoundProcessor, FluxProcessor

Call = Mapping[str, object]  # the arguments of a transformer's forward, by name


@dataclass(frozen=True)
class Host:
    """A transformer class.

    Args:
        transformer: its name in diffusers.
        processors: its own processor classes, by name, and what stands in for each.
        blocks: the lists of blocks that hold an attention layer, in order of execution.
        ids: reads the position ids of text and image, ``(tokens, axes)`` each, off a call's arguments.
        axes_dim: reads the RoPE channels of each axis off the model.
        theta: reads the base of the RoPE's frequencies off the model.
        cosines: the model's own table of ``cos(phi)``, ``(tokens, D/2)``, for some ids; what ours is checked against.
        pairing: of the RoPE.
        order: of the joint sequence, as in :class:`fastrope.TokenLayout`.
        spatial_axes: the axes of rows and columns.
        steps_per_unit: model timestep 1 in units of the scheduler's timesteps.
    """

    transformer: str
    processors: Mapping[str, type[BoundProcessor]]
    blocks: tuple[str, ...]
    ids: Callable[[Call], tuple[torch.Tensor, torch.Tensor]]
    axes_dim: Callable[[torch.nn.Module], tuple[int, ...]]
    theta: Callable[[torch.nn.Module], float]
    cosines: Callable[[torch.nn.Module, torch.Tensor], torch.Tensor]
    pairing: str = "interleaved"
    order: str = "text-first"
    spatial_axes: tuple[int, ...] = (1, 2)
    steps_per_unit: float = 1000.0


def _ids_arguments(call: Call) -> tuple[torch.Tensor, torch.Tensor]:
    found = []
    for name in ("txt_ids", "img_ids"):
        ids = call.get(name)
        require_tensor(name, ids, (2, 3), "(tokens, axes)")
        found.append(ids[0] if ids.ndim == 3 else ids)  # the host, too, takes the first row for all
    text, image = found
    require(text.shape[1] == image.shape[1], "txt_ids", f"{image.shape[1]} axes, as img_ids", tuple(text.shape))
    return text, image


HOSTS = (
    Host(
        transformer="FluxTransformer2DModel",
        processors={"FluxAttnProcessor": FluxProcessor},
        blocks=("transformer_blocks", "single_transformer_blocks"),
        ids=_ids_arguments,
        axes_dim=lambda model: tuple(model.config.axes_dims_rope),
        theta=lambda model: float(model.pos_embed.theta),
        cosines=lambda model, ids: model.pos_embed(ids)[0][:, 0::2],
    ),
)


def find_host(model: torch.nn.Module) -> Host:
    """The row of a transformer.

    Raises:
        ValueError: there is none.
        NotImplementedError: nunchaku's transformers, whose kernels rotate inside.
    """
    lineage = type(model).__mro__
    if any(cls.__module__.split(".")[0] == "nunchaku" for cls in lineage):
        raise NotImplementedError(
            f"nunchaku: expected a transformer of diffusers, received {type(model).__name__}, whose fused kernels "
            "rotate queries and keys where no modulation can reach them"
        )
    names = {cls.__name__ for cls in lineage if cls.__module__.split(".")[0] == "diffusers"}
    host = next((h for h in HOSTS if h.transformer in names), None)
    known = ", ".join(h.transformer for h in HOSTS)
    require(host is not None, "pipe", f"a pipeline with, or one of, the transformers {known}", type(model).__name__)
    return host
