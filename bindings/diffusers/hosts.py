"""The table of hosts: what the binding must know about a transformer class to modulate its attention."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, cast

import torch

from fastrope.checks import require
from fastrope.tokens import KINDS

from ..image.sequence import JointSequence
from .embedders import FLUX_LIKE, QWEN_LIKE, Z_IMAGE_LIKE, Embedder
from .processors import BoundProcessor, Flux2SingleProcessor, FluxProcessor, QwenProcessor, ZImageProcessor
from .rows import ListRows, TensorRows
from .sequences import (
    describe_ids,
    describe_lists,
    describe_shapes,
    identify_ids,
    identify_lists,
    identify_masked_ids,
    identify_shapes,
)


@dataclass(frozen=True)
class Host:
    """A transformer class.

    Args:
        transformer: name of the class.
        processors: the names of its processor classes, and the class that replaces each.
        blocks: the lists of blocks with a joint attention layer, in order of execution, and the kind of each:
            ``"double"``, ``"single"`` or ``"joint"``.
        identify: ``identify(model, call) -> tuple``: the arguments of the call that determine the sequence, tensors and
            hashable values. It must not read values of tensors.
        describe: ``describe(*identified) -> JointSequence``.
        axes_dim: reads the RoPE channels of each axis from the model.
        theta: reads the base of the RoPE's frequencies from the model.
        cosines: ``cosines(model, sequence, device)``, the model's own ``cos(phi)``, ``(S, D/2)`` or ``(B, S, D/2)``.
            Ours are compared with it.
        pairing: of the RoPE.
        spatial_axes: the axes of rows and columns.
        hidden: name of the argument with the image. The call runs on its device.
        timestep: name of the argument with the time.
        model_time: turns the scheduler's timesteps into those that the model is given.
        skipped: lists of blocks whose attention is not over the joint sequence. They are not bound.
        package: the top-level package that defines the transformer and its processors.
        rows: how a shared reference enters a call, see :mod:`.rows`; None if it cannot.
        embedder: what makes the rotary table; None if positions cannot be rescaled.
    """

    transformer: str
    processors: Mapping[str, type[BoundProcessor]]
    blocks: Mapping[str, str]
    identify: Callable[[Any, Mapping[str, Any]], tuple]
    describe: Callable[..., JointSequence]
    axes_dim: Callable[[Any], tuple[int, ...]]
    theta: Callable[[Any], float]
    cosines: Callable[[Any, JointSequence, torch.device], torch.Tensor]
    pairing: str = "interleaved"
    spatial_axes: tuple[int, ...] = (1, 2)
    hidden: str = "hidden_states"
    timestep: str = "timestep"
    model_time: Callable[[torch.Tensor], torch.Tensor] = lambda timesteps: timesteps / 1000
    skipped: tuple[str, ...] = ()
    package: str = "diffusers"
    rows: TensorRows | ListRows | None = None
    embedder: Embedder | None = None

    def __post_init__(self) -> None:
        known = all(isinstance(c, type) and issubclass(c, BoundProcessor) for c in self.processors.values())
        expected = "BoundProcessor classes, by the name of the processor that each replaces"
        require(known and len(self.processors) > 0, "Host.processors", expected, self.processors)
        kinds = all(kind in KINDS for kind in self.blocks.values())
        expected = f"names of block lists and kinds of {KINDS}"
        require(kinds and len(self.blocks) > 0, "Host.blocks", expected, self.blocks)


def _flux_cosines(model: Any, sequence: JointSequence, device: torch.device) -> torch.Tensor:
    return model.pos_embed(sequence.positions.to(device, torch.float32))[0][:, 0::2]


def _qwen_cosines(model: Any, sequence: JointSequence, device: torch.device) -> torch.Tensor:
    layout = sequence.layout()
    shapes = [[(1, *grid) for grid in (layout.target_grid, *layout.reference_grids)]]
    image, text = model.pos_embed(shapes, max_txt_seq_len=layout.text_tokens, device=device)
    return torch.cat([text, image]).real


def _z_image_cosines(model: Any, sequence: JointSequence, device: torch.device) -> torch.Tensor:
    positions = sequence.positions.to(device)
    return model.rope_embedder(positions.flatten(0, -2)).real.unflatten(0, positions.shape[:-1])


FLUX = Host(
    transformer="FluxTransformer2DModel",
    processors={"FluxAttnProcessor": FluxProcessor},
    blocks={"transformer_blocks": "double", "single_transformer_blocks": "single"},
    identify=identify_ids,
    describe=describe_ids,
    axes_dim=lambda model: tuple(model.config.axes_dims_rope),
    theta=lambda model: float(model.pos_embed.theta),
    cosines=_flux_cosines,
    rows=TensorRows(required=("pooled_projections",)),
    embedder=FLUX_LIKE,
)

HOSTS: list[Host] = [
    FLUX,
    replace(
        FLUX,
        transformer="ChromaTransformer2DModel",
        identify=identify_masked_ids,
        rows=TensorRows(joint_mask="attention_mask"),
    ),
    replace(
        FLUX,
        transformer="LongCatImageTransformer2DModel",
        processors={"LongCatImageAttnProcessor": FluxProcessor},
        rows=TensorRows(movable=False),
    ),
    replace(
        FLUX,
        transformer="OvisImageTransformer2DModel",
        processors={"OvisImageAttnProcessor": FluxProcessor},
        rows=TensorRows(),
    ),
    replace(
        FLUX,
        transformer="Flux2Transformer2DModel",
        processors={"Flux2AttnProcessor": FluxProcessor, "Flux2ParallelSelfAttnProcessor": Flux2SingleProcessor},
        rows=TensorRows(),
    ),
    Host(
        transformer="QwenImageTransformer2DModel",
        processors={"QwenDoubleStreamAttnProcessor2_0": QwenProcessor},
        blocks={"transformer_blocks": "double"},
        identify=identify_shapes,
        describe=describe_shapes,
        axes_dim=lambda model: tuple(model.config.axes_dims_rope),
        theta=lambda model: float(model.pos_embed.theta),
        cosines=_qwen_cosines,
        rows=TensorRows(text_mask="encoder_hidden_states_mask"),
        embedder=QWEN_LIKE,
    ),
    Host(
        transformer="ZImageTransformer2DModel",
        processors={"ZSingleStreamAttnProcessor": ZImageProcessor},
        blocks={"layers": "joint"},
        skipped=("noise_refiner", "context_refiner", "siglip_refiner"),
        identify=identify_lists,
        describe=describe_lists,
        axes_dim=lambda model: tuple(model.axes_dims),
        theta=lambda model: float(model.rope_theta),
        cosines=_z_image_cosines,
        hidden="x",
        timestep="t",
        model_time=lambda timesteps: (1000 - timesteps) / 1000,
        rows=ListRows(),
        embedder=Z_IMAGE_LIKE,
    ),
]


def register_host(host: Host) -> Host:
    """Add a row to the table, for a transformer of your own or of another library. The last row added is found first.

    Args:
        host: the row. docs/hosts.md has a complete one.

    Returns:
        The same row.

    Raises:
        ValueError: not a :class:`Host`, or a transformer of that package that is in the table already.
    """
    require(isinstance(host, Host), "host", "a fastrope.bindings.diffusers.Host", type(host).__name__)
    known = [(h.transformer, h.package) for h in HOSTS]
    require((host.transformer, host.package) not in known, "host", "a transformer that is not in the table",
            f"{host.transformer} of {host.package}")  # fmt: skip
    HOSTS.insert(0, host)
    return cast(Host, host)


def find_host(model: torch.nn.Module) -> Host:
    """The row of a transformer.

    Raises:
        ValueError: the table has none.
        NotImplementedError: nunchaku's transformers, whose kernels do the rotation.
    """
    lineage = type(model).__mro__
    if any(cls.__module__.split(".")[0] == "nunchaku" for cls in lineage):
        raise NotImplementedError(
            f"nunchaku: expected a transformer of diffusers, received {type(model).__name__}, whose fused kernels "
            "rotate queries and keys inside, so that no modulation can reach them"
        )
    names = {(cls.__name__, cls.__module__.split(".")[0]) for cls in lineage}
    host = next((h for h in HOSTS if (h.transformer, h.package) in names), None)
    known = ", ".join(h.transformer for h in HOSTS)
    expected = f"a pipeline with, or one of, the transformers {known} (register_host adds others, see docs/hosts.md)"
    require(host is not None, "pipe", expected, type(model).__name__)
    return cast(Host, host)
