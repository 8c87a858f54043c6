"""LlamaGen's VQ tokenizer: from pixels to codes of a unit-norm codebook and back, with the published names."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

from fastrope.checks import require

from ..inputs import check_codes, check_pixels
from .checkpoint import load_weights, read_checkpoint

GROUPS = 32  # of every group norm


@dataclass(frozen=True)
class VQConfig:
    """Shapes of a tokenizer. The defaults are VQ-16: one code per 16 x 16 pixels.

    Args:
        codes, code_dim: of the codebook.
        multipliers: channels of each resolution over ``channels``; every one but the last halves the sides.
        channels: at full resolution; a multiple of 32.
        latent: channels between encoder and codebook.
        blocks: residual blocks per resolution of the encoder; the decoder has one more.
    """

    codes: int = 16384
    code_dim: int = 8
    multipliers: tuple[int, ...] = (1, 1, 2, 2, 4)
    channels: int = 128
    latent: int = 256
    blocks: int = 2

    def __post_init__(self) -> None:
        require(self.channels % GROUPS == 0, "channels", f"a multiple of {GROUPS}", self.channels)
        require(len(self.multipliers) > 0, "multipliers", "at least one", self.multipliers)

    @property
    def factor(self) -> int:
        """Pixels per code and side."""
        return 2 ** (len(self.multipliers) - 1)


def _norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(GROUPS, channels, eps=1e-6)


class ResidualBlock(nn.Module):
    """Two convolutions of ``x (B, C, H, W)``, added to it; the shortcut is a convolution where the width changes."""

    def __init__(self, channels: int, out: int) -> None:
        super().__init__()
        self.norm1 = _norm(channels)
        self.conv1 = nn.Conv2d(channels, out, 3, padding=1)
        self.norm2 = _norm(out)
        self.conv2 = nn.Conv2d(out, out, 3, padding=1)
        self.nin_shortcut = nn.Conv2d(channels, out, 1) if channels != out else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        return h + (x if self.nin_shortcut is None else self.nin_shortcut(x))


class AttentionBlock(nn.Module):
    """Single-head attention over all positions."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = _norm(channels)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(channels, channels, 1) for _ in range(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.norm(x)
        q, k, v = (layer(h).flatten(2).transpose(1, 2)[:, None] for layer in (self.q, self.k, self.v))
        out = F.scaled_dot_product_attention(q, k, v)
        return x + self.proj_out(out[:, 0].transpose(1, 2).reshape(x.shape))


class Downsample(nn.Module):
    """Halve the sides. Padding is only on the right and below."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Double the sides: nearest neighbour, then a convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class Resolution(nn.Module):
    """The blocks of one resolution, optionally with attention after each, then an optional change of resolution."""

    def __init__(self, channels: int, out: int, blocks: int, attention: bool, resample: dict[str, nn.Module]) -> None:
        super().__init__()
        self.res = nn.ModuleList(ResidualBlock(channels if i == 0 else out, out) for i in range(blocks))
        self.attn = nn.ModuleList(AttentionBlock(out) for _ in range(blocks if attention else 0))
        for name, module in resample.items():  # its name in checkpoints says what it does
            self.add_module(name, module)
        self._resample = tuple(resample)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for index, block in enumerate(self.res):
            x = block(x)
            if self.attn:
                x = self.attn[index](x)
        for name in self._resample:
            x = getattr(self, name)(x)
        return x


def _resolutions(widths: list[int], blocks: int, attentive: int, name: str, resample: type[nn.Module]) -> nn.ModuleList:
    """One resolution from each width to the next. Number ``attentive`` has attention; the last does not resample."""
    last = len(widths) - 2
    return nn.ModuleList(
        Resolution(channels, out, blocks, n == attentive, {} if n == last else {name: resample(out)})
        for n, (channels, out) in enumerate(itertools.pairwise(widths))
    )


def _middle(channels: int) -> nn.ModuleList:
    return nn.ModuleList(
        [ResidualBlock(channels, channels), AttentionBlock(channels), ResidualBlock(channels, channels)]
    )


class Encoder(nn.Module):
    """From pixels ``(B, 3, H, W)`` to latents ``(B, latent, H / factor, W / factor)``."""

    def __init__(self, config: VQConfig) -> None:
        super().__init__()
        widths = [config.channels, *(config.channels * m for m in config.multipliers)]
        self.conv_in = nn.Conv2d(3, config.channels, 3, padding=1)
        self.conv_blocks = _resolutions(widths, config.blocks, len(widths) - 2, "downsample", Downsample)
        self.mid = _middle(widths[-1])
        self.norm_out = _norm(widths[-1])
        self.conv_out = nn.Conv2d(widths[-1], config.latent, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.conv_in(x)
        for block in (*self.conv_blocks, *self.mid):
            x = block(x)
        return self.conv_out(F.silu(self.norm_out(x)))


class Decoder(nn.Module):
    """From latents to pixels, the shapes as in :class:`Encoder`."""

    def __init__(self, config: VQConfig) -> None:
        super().__init__()
        widths = [config.channels * m for m in reversed(config.multipliers)]
        self.conv_in = nn.Conv2d(config.latent, widths[0], 3, padding=1)
        self.mid = _middle(widths[0])
        self.conv_blocks = _resolutions([widths[0], *widths], config.blocks + 1, 0, "upsample", Upsample)
        self.norm_out = _norm(widths[-1])
        self.conv_out = nn.Conv2d(widths[-1], 3, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.conv_in(x)
        for block in (*self.mid, *self.conv_blocks):
            x = block(x)
        return self.conv_out(F.silu(self.norm_out(x)))


class Quantizer(nn.Module):
    """The codebook under its published name."""

    def __init__(self, config: VQConfig) -> None:
        super().__init__()
        self.embedding = nn.Embedding(config.codes, config.code_dim)


class VQTokenizer(nn.Module):
    """From pixels ``(B, 3, H, W)`` in -1..1 to codes ``(B, N)`` in raster order, and back. Weights are random until
    they are loaded."""

    def __init__(self, config: VQConfig | None = None) -> None:
        super().__init__()
        self.config = config = VQConfig() if config is None else config
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        self.quantize = Quantizer(config)
        self.quant_conv = nn.Conv2d(config.latent, config.code_dim, 1)
        self.post_quant_conv = nn.Conv2d(config.code_dim, config.latent, 1)

    @classmethod
    def from_checkpoint(
        cls,
        source: str | Path | Mapping,
        *,
        config: VQConfig | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> VQTokenizer:
        """A published checkpoint (``vq_ds16_t2i.pt``, ``vq_ds16_c2i.pt``), ready to run.

        Raises:
            ValueError: names or shapes that differ from those of ``config``; the message lists them.
        """
        weights = read_checkpoint(source)
        with torch.device("meta"):
            model = cls(config)
        return load_weights(model, weights).to(device=device, dtype=dtype)

    @property
    def codebook(self) -> torch.Tensor:
        """Entries ``(codes, code_dim)`` float32 of norm 1. Distances of codes are measured between them."""
        return F.normalize(self.quantize.embedding.weight.detach().float(), dim=-1)

    @torch.no_grad()
    def encode(self, pixels: torch.Tensor) -> torch.Tensor:
        """Codes ``(B, N)`` long of ``pixels (B, 3, H, W)``: the entries nearest to the normalised latents.

        Raises:
            ValueError: sides that the factor of the tokenizer does not divide.
        """
        factor = self.config.factor
        check_pixels(pixels)
        height, width = pixels.shape[2:]
        ok = pixels.shape[1] == 3 and height % factor == 0 and width % factor == 0 and height > 0 and width > 0
        require(ok, "pixels", f"3 channels and sides that are multiples of {factor}", tuple(pixels.shape))
        latents = self.quant_conv(self.encoder(pixels.to(self.quant_conv.weight.dtype)))
        # For unit entries, the nearest one has the largest product with the latent, whatever the latent's length.
        return (latents.float().flatten(2).transpose(1, 2) @ self.codebook.T).argmax(-1)

    @torch.no_grad()
    def decode(self, codes: torch.Tensor, grid: tuple[int, int] | None = None) -> torch.Tensor:
        """Pixels ``(B, 3, 16 * height, 16 * width)``, about -1..1, of ``codes (B, N)`` in raster order.

        Args:
            grid: (height, width) in codes; None for a square.
        """
        check_codes("codes", codes, torch.arange(self.config.codes, device=self.codebook.device))
        side = round(codes.shape[1] ** 0.5)
        height, width = (side, side) if grid is None else grid
        require(height * width == codes.shape[1], "codes", f"{height} x {width} = {height * width}", codes.shape[1])
        entries = self.codebook[codes].transpose(1, 2).unflatten(2, (height, width))
        return self.decoder(self.post_quant_conv(entries.to(self.post_quant_conv.weight.dtype)))
