"""Saliency of pictures: sources of the energy maps from which :class:`fastrope.LooseRoPE` takes its factors."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F

from ..checks import require
from ..device import wide_on_cpu
from .maps import as_map

Source = str | torch.nn.Module | Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | torch.Tensor | np.ndarray

IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # mean and deviation of pixels in the training of backbones
LONGEST_EDGE = 1333  # pixels, in the authors' detector
WIDTH = 64  # pixels a side for the spectral residual: the scale of objects, not of texture
SMOOTHING = 2.5  # standard deviation of its last Gaussian, in those pixels


def spectral_residual(image: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """The spectral residual: what differs from the smoothed log spectrum. Needs no model (Hou & Zhang, CVPR 2007).

    ``|ifft(exp(L - mean3x3(L) + i P))|^2``, blurred by a Gaussian, with ``L`` the log amplitude and ``P`` the phase of
    the grey picture at 64 pixels a side. Pixels outside the mask get the mean grey of those inside, so that the outline
    of the mask itself is not salient.

    Args:
        image: ``(3, H, W)`` in 0..1.
        mask: ``(H, W)`` bool; the picture is cut to its bounding box.

    Returns:
        ``(H, W)`` energy, at least 0; 0 outside the bounding box.
    """
    grey = image.double().mean(dim=0)
    box = tuple(slice(int(line[0]), int(line[-1]) + 1) for line in (mask.any(d).nonzero()[:, 0] for d in (1, 0)))
    inside = mask[box]
    crop = torch.where(inside, grey[box], grey[mask].mean())
    small = F.interpolate(crop[None, None], size=(WIDTH, WIDTH), mode="area")
    spectrum = torch.fft.fft2(small)
    log = (spectrum.abs() + 1e-8).log()
    average = F.avg_pool2d(F.pad(log, (1, 1, 1, 1), mode="circular"), 3, stride=1)
    energy = torch.fft.ifft2(torch.polar((log - average).exp(), spectrum.angle())).abs().square()
    radius = math.ceil(3 * SMOOTHING)
    places = torch.arange(-radius, radius + 1, dtype=energy.dtype, device=energy.device)
    line = torch.exp(-0.5 * (places / SMOOTHING) ** 2)
    line = line / line.sum()
    energy = F.conv2d(F.pad(energy, (radius,) * 4, mode="replicate"), (line[:, None] * line)[None, None])
    found = torch.zeros_like(grey)
    found[box] = F.interpolate(energy, size=tuple(inside.shape), mode="bilinear", align_corners=False)[0, 0]
    return found


@torch.no_grad()
def feature_energy(
    image: torch.Tensor,
    mask: torch.Tensor,
    backbone: torch.nn.Module,
    layer: str | None = None,
    normalise: tuple[Sequence[float], Sequence[float]] = IMAGENET,
    shortest_edge: int | None = None,
) -> torch.Tensor:
    """Mean absolute activation over the channels of a backbone's finest feature map (LooseRoPE's authors' saliency).

    Args:
        image: ``(3, H, W)`` in 0..1; masked to the crop before the backbone sees it.
        mask: ``(H, W)`` bool.
        backbone: called with ``(1, 3, H, W)`` on its own device and in its own dtype. For a detector of torchvision,
            its ``backbone`` is called.
        layer: name of the submodule whose output counts; None means the output of the backbone. If there are several
            maps (a feature pyramid), the one with the most cells counts.
        normalise: mean and standard deviation per channel, for the pixels.
        shortest_edge: None: the picture keeps its size, and pixels outside the mask have the mean colour. A number, as
            in the authors' detector: pixels outside the mask are black, and the picture is resized so that its shorter
            side has that many pixels and its longer side at most :data:`LONGEST_EDGE`.

    Returns:
        ``(h, w)`` float64, the size of the feature map.

    Raises:
        ValueError: no such submodule, or no feature map ``(1, C, h, w)`` in the output.
    """
    require(isinstance(backbone, torch.nn.Module), "backbone", "a torch.nn.Module", type(backbone).__name__)
    detector = getattr(backbone, "roi_heads", None) is not None and layer is None
    network: Any = backbone.backbone if detector else backbone
    modules = dict(network.named_modules())
    require(layer is None or layer in modules, "layer", "the name of a submodule", repr(layer))
    parameter = next(network.parameters(), torch.zeros((), device="cpu"))
    mean, deviation = (torch.tensor(v, dtype=torch.float64, device="cpu")[:, None, None] for v in normalise)
    pixels = image.double()
    if shortest_edge is not None:
        height, width = image.shape[1:]
        size = _scaled((height, width), shortest_edge)
        pixels = F.interpolate(pixels.masked_fill(~mask, 0)[None], size=size, mode="bilinear", antialias=True)[0]
    pixels = (pixels - mean) / deviation
    if shortest_edge is None:
        pixels = pixels.masked_fill(~mask, 0)
    seen: list[object] = []
    hook = modules[layer or ""].register_forward_hook(lambda module, args, output: seen.append(output))
    training = network.training
    try:
        network.eval()
        network(pixels[None].to(parameter.device, parameter.dtype))
    finally:
        hook.remove()
        network.train(training)
    maps = [x for output in seen for x in _tensors(output) if x.ndim == 4 and len(x) == 1]
    require(bool(maps), "backbone", "an output that holds a feature map (1, C, h, w)",
            f"{[tuple(x.shape) for output in seen for x in _tensors(output)]}")  # fmt: skip
    finest = max(maps, key=lambda x: x.shape[2] * x.shape[3])
    return wide_on_cpu(finest[0]).abs().mean(dim=0)


def mask_rcnn() -> torch.nn.Module:
    """Torchvision's Mask R-CNN R50-FPN, trained on COCO. The authors' saliency comes from its feature map "0".

    Raises:
        ImportError: torchvision is not installed.
    """
    try:
        from torchvision.models.detection import MaskRCNN_ResNet50_FPN_Weights, maskrcnn_resnet50_fpn
    except ImportError as error:
        raise ImportError('saliency="mask_rcnn" needs torchvision: pip install torchvision; '
                          '"spectral_residual" needs no model') from error  # fmt: skip
    return maskrcnn_resnet50_fpn(weights=MaskRCNN_ResNet50_FPN_Weights.DEFAULT).eval()


def energy_of(
    source: Source,
    images: torch.Tensor,
    masks: torch.Tensor,
    shortest_edge: int | None = None,
    mode: str = "nearest",
    size: tuple[int, int] | None = None,
) -> torch.Tensor:
    """The energy of every picture, at one size.

    Args:
        source: as in :meth:`fastrope.LooseRoPE.from_images`.
        images: ``(B, 3, H, W)`` in 0..1.
        masks: ``(B, H, W)`` or ``(1, H, W)`` bool.
        shortest_edge: of a module's input, see :func:`feature_energy`.
        mode: ``"nearest"`` repeats cells, so that an average onto a token grid is that of the coarse map;
            ``"bilinear"`` blends them.
        size: of the result; None means that of the pictures.

    Returns:
        ``(B, *size)`` float64.

    Raises:
        ValueError: an unknown source, or one that returned something else than a finite map.
    """
    if size is None:
        height, width = images.shape[2:]
        size = height, width
    if isinstance(source, (torch.Tensor, np.ndarray)):
        energy = as_map("saliency", source)
        require(len(energy) in (1, len(images)), "saliency", f"1 or {len(images)} maps", len(energy))
        return _at_size(energy, size, mode).expand(len(images), -1, -1)
    if isinstance(source, str):
        known = {"spectral_residual": lambda: spectral_residual, "mask_rcnn": mask_rcnn}
        require(source in known, "saliency", f"one of {tuple(known)}, a module, a function or an array", repr(source))
        source = cast(Any, known[source]())
    if isinstance(source, torch.nn.Module):
        backbone = source
        source = lambda image, mask: feature_energy(image, mask, backbone, shortest_edge=shortest_edge)  # noqa: E731
    require(callable(source), "saliency", "a name, a module, a function or an array", type(source).__name__)
    found = []
    for image, mask in zip(images, masks.expand(len(images), -1, -1), strict=True):
        if not bool(mask.any()):
            found.append(torch.zeros(1, *size, dtype=torch.float64, device="cpu"))
            continue
        energy = as_map("saliency", cast(Any, source)(image, mask))
        require(len(energy) == 1, "saliency", "one map (h, w) per picture", tuple(energy.shape))
        found.append(_at_size(energy, size, mode))
    return torch.cat(found)


def input_size(source: Source, picture: tuple[int, int], shortest_edge: int) -> tuple[int, int]:
    """``(h, w)`` of the picture that a source sees: modules see it resized."""
    resized = isinstance(source, torch.nn.Module) or (isinstance(source, str) and source == "mask_rcnn")
    return _scaled(picture, shortest_edge) if resized else picture


def _scaled(picture: tuple[int, int], shortest_edge: int) -> tuple[int, int]:
    scale = min(shortest_edge / min(picture), LONGEST_EDGE / max(picture))
    height, width = (max(1, int(side * scale + 0.5)) for side in picture)
    return height, width


def _at_size(energy: torch.Tensor, size: tuple[int, int], mode: str) -> torch.Tensor:
    smooth = {} if mode == "nearest" else {"align_corners": False}
    return F.interpolate(energy[:, None], size=size, mode=mode, **smooth)[:, 0]


def _tensors(output: object) -> Iterator[torch.Tensor]:
    if isinstance(output, torch.Tensor):
        yield output
    elif isinstance(output, Mapping):
        for value in output.values():
            yield from _tensors(value)
    elif isinstance(output, (list, tuple)):
        for value in output:
            yield from _tensors(value)
