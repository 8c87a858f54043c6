from __future__ import annotations

import builtins
import math
import types

import pytest
import torch

import fastrope as fr
from fastrope.methods.saliency import IMAGENET, feature_energy, spectral_residual

EVERYWHERE = torch.ones(48, 48, dtype=torch.bool)


def picture() -> torch.Tensor:
    """Even stripes with one odd patch."""
    x = (torch.arange(48) // 3 % 2).double() * 0.2 + 0.4
    image = x.expand(3, 48, 48).clone()
    image[:, 30:38, 8:16] = torch.tensor([0.9, 0.1, 0.9, 0.1, 0.9, 0.1, 0.9, 0.1])[:, None]
    return image


def test_spectral_residual_finds_what_breaks_the_pattern():
    energy = spectral_residual(picture(), EVERYWHERE)
    y, x = divmod(int(energy.argmax()), 48)
    assert energy.shape == (48, 48)
    assert 28 <= y < 40
    assert 6 <= x < 18
    assert float(energy.min()) >= 0


def test_spectral_residual_is_the_formula():
    """At 64 x 64 nothing is resized: the formula in loops over the spectrum, before the Gaussian at single points."""
    image = torch.rand(3, 64, 64, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    grey = image.mean(0)
    spectrum = torch.fft.fft2(grey)
    log = (spectrum.abs() + 1e-8).log()
    average = sum(log.roll((a, b), (0, 1)) for a in (-1, 0, 1) for b in (-1, 0, 1)) / 9
    residual = torch.fft.ifft2((log - average).exp() * torch.exp(1j * spectrum.angle())).abs() ** 2
    found = spectral_residual(image, torch.ones(64, 64, dtype=torch.bool))
    weights = {n: math.exp(-n * n / (2 * 2.5**2)) for n in range(-8, 9)}
    total = sum(weights.values()) ** 2
    for y, x in ((0, 0), (31, 40), (63, 5)):
        around = sum(
            weights[a] * weights[b] * float(residual[min(max(y + a, 0), 63), min(max(x + b, 0), 63)])
            for a in weights for b in weights
        )  # fmt: skip
        assert float(found[y, x]) == pytest.approx(around / total, rel=1e-9)


def test_spectral_residual_sees_the_paste_alone():
    mask = torch.zeros(48, 48, dtype=torch.bool)
    mask[10:40, 5:30] = True
    mask[10:15, 5:10] = False  # not a rectangle
    image = picture()
    other = torch.where(mask, image, torch.rand(3, 48, 48).double())
    energy = spectral_residual(image, mask)
    assert torch.equal(energy, spectral_residual(other, mask))
    assert not energy[:10].any()
    assert not energy[:, 30:].any()


def test_a_plain_paste_has_finite_energy():
    assert spectral_residual(torch.full((3, 20, 30), 0.5), torch.ones(20, 30, dtype=torch.bool)).isfinite().all()


class Pyramid(torch.nn.Module):
    """Two levels under names, as a detector's backbone gives them."""

    def __init__(self):
        super().__init__()
        self.stem = torch.nn.Conv2d(3, 4, 3, padding=1, stride=2)
        self.down = torch.nn.Conv2d(4, 4, 3, padding=1, stride=2)

    def forward(self, x):
        fine = self.stem(x)
        return {"pool": self.down(fine), "0": fine}


def seen_by(image, mask):
    mean, deviation = (torch.tensor(v).double()[:, None, None] for v in IMAGENET)
    return torch.where(mask, (image - mean) / deviation, 0.0)


def test_feature_energy_is_the_mean_activation_of_the_finest_level():
    torch.manual_seed(0)
    backbone = Pyramid().double().train()
    image, mask = torch.rand(3, 16, 12).double(), torch.rand(16, 12) > 0.3
    expected = backbone.stem(seen_by(image, mask)[None])[0].abs().mean(0)
    torch.testing.assert_close(feature_energy(image, mask, backbone), expected.detach())
    assert backbone.training
    assert not backbone._forward_hooks


def test_feature_energy_of_a_named_layer():
    torch.manual_seed(0)
    backbone = Pyramid().double()
    image, mask = torch.rand(3, 16, 12).double(), torch.ones(16, 12, dtype=torch.bool)
    expected = backbone.down(backbone.stem(seen_by(image, mask)[None]))[0].abs().mean(0)
    torch.testing.assert_close(feature_energy(image, mask, backbone, layer="down"), expected.detach())


def test_a_detector_stands_for_its_backbone():
    detector = types.SimpleNamespace
    torch.manual_seed(0)

    class Detector(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.backbone = Pyramid()
            self.roi_heads = torch.nn.Identity()

        def forward(self, images):
            raise AssertionError("a detector wants lists of pictures")

    detector = Detector()
    image, mask = torch.rand(3, 16, 12), torch.ones(16, 12, dtype=torch.bool)
    found = feature_energy(image, mask, detector)
    torch.testing.assert_close(found, feature_energy(image, mask, detector.backbone))


def test_a_module_as_the_source():
    torch.manual_seed(0)
    backbone, image = Pyramid().double(), torch.rand(3, 16, 12).double()
    mask = torch.zeros(16, 12, dtype=torch.bool)
    mask[4:12, 2:10] = True
    method = fr.LooseRoPE.from_images(image, mask=mask, saliency=backbone, smooth=False)
    energy = feature_energy(image, mask, backbone)
    low, high = energy.min(), energy.max()
    inside = ((energy - low) / (high - low))[2:6, 1:5]  # 2 x 2 pixels a cell
    torch.testing.assert_close(method.on_grid((8, 6))[0][0, 2:6, 1:5], inside)


def test_mask_rcnn_of_torchvision():
    """Random weights: which map is taken does not depend on them."""
    detection = pytest.importorskip("torchvision.models.detection", exc_type=ImportError)
    detector = detection.maskrcnn_resnet50_fpn(weights=None, weights_backbone=None).eval()
    image, mask = torch.rand(3, 64, 96), torch.rand(64, 96) > 0.3
    with torch.no_grad():
        levels = detector.backbone(seen_by(image, mask)[None].float())
    expected = levels["0"][0].double().abs().mean(0)  # float32, in whatever order convolutions sum
    torch.testing.assert_close(feature_energy(image, mask, detector), expected, rtol=1e-4, atol=1e-4)


def test_errors():
    image, mask = torch.rand(3, 8, 8), torch.ones(8, 8, dtype=torch.bool)
    with pytest.raises(ValueError, match=r"backbone: expected a torch.nn.Module, received str"):
        feature_energy(image, mask, "resnet")
    with pytest.raises(ValueError, match=r"layer: expected the name of a submodule, received 'p2'"):
        feature_energy(image, mask, Pyramid(), layer="p2")
    with pytest.raises(ValueError, match=r"backbone: expected an output that holds a feature map"):
        feature_energy(image, mask, torch.nn.Sequential(torch.nn.Flatten()))


def test_mask_rcnn_without_torchvision_says_what_to_install(monkeypatch):
    real = builtins.__import__

    def no_torchvision(name, *args, **kwargs):
        if name.partition(".")[0] == "torchvision":
            raise ImportError("No module named 'torchvision'", name="torchvision")
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", no_torchvision)
    with pytest.raises(ImportError, match=r"pip install torchvision"):
        fr.LooseRoPE.from_images(torch.rand(3, 8, 8), mask=torch.ones(8, 8), saliency="mask_rcnn")
