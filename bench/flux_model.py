"""FLUX.1 transformers with random weights, of full size and tiny, and what to call them with."""

from __future__ import annotations

from dataclasses import dataclass

import torch

import fastrope as fr

from .problem import Unsupported


@dataclass(frozen=True)
class Workload:
    """A FLUX.1: blocks, heads, head dim with its axes, text tokens and grid. ``small`` ones need no GPU."""

    name: str
    blocks: tuple[int, int] = (19, 38)
    heads: int = 24
    axes: tuple[int, ...] = (16, 56, 56)
    channels: int = 64
    joint: int = 4096
    pooled: int = 768
    text: int = 512
    grid: tuple[int, int] = (64, 64)
    small: bool = False

    @property
    def facts(self) -> dict:
        """What the rows of a workload say of it."""
        return {
            "text": self.text, "grid": self.grid, "blocks": self.blocks, "heads": self.heads, "dim": sum(self.axes),
        }  # fmt: skip

    def build(self, device: torch.device, dtype: torch.dtype) -> torch.nn.Module:
        """The transformer with random weights.

        Raises:
            Unsupported: without diffusers.
        """
        try:
            from diffusers import FluxTransformer2DModel
        except ImportError as error:
            raise Unsupported(f"diffusers is not installed ({error})") from error
        with torch.device("meta"):
            model = FluxTransformer2DModel(
                patch_size=1, in_channels=self.channels, num_layers=self.blocks[0], num_single_layers=self.blocks[1],
                attention_head_dim=sum(self.axes), num_attention_heads=self.heads, joint_attention_dim=self.joint,
                pooled_projection_dim=self.pooled, guidance_embeds=True, axes_dims_rope=self.axes,
            )  # fmt: skip
        model = model.to(dtype).to_empty(device=device).eval()
        with torch.no_grad():
            for name, weight in model.named_parameters():
                if weight.ndim > 1:
                    weight.normal_(std=weight[0].numel() ** -0.5)
                else:
                    weight.fill_(1.0 if "norm" in name and name.endswith("weight") else 0.0)
        return model

    def call(self, batch: int, device: torch.device, dtype: torch.dtype, seed: int = 0) -> dict:
        """Arguments of the transformer."""
        g = torch.Generator(device).manual_seed(seed)

        def draw(*shape):
            return torch.randn(*shape, generator=g, device=device, dtype=dtype)

        layout = fr.TokenLayout(self.text, self.grid)
        ids = layout.positions("flux", device).to(dtype)
        return {
            "hidden_states": draw(batch, self.grid[0] * self.grid[1], self.channels),
            "encoder_hidden_states": draw(batch, self.text, self.joint),
            "pooled_projections": draw(batch, self.pooled),
            "timestep": torch.full((batch,), 0.5, device=device, dtype=dtype),
            "guidance": torch.full((batch,), 3.5, device=device, dtype=dtype),
            "txt_ids": ids[layout.text],
            "img_ids": ids[layout.target],
            "return_dict": False,
        }


FULL = Workload("flux-1024px")
SMALL = Workload(
    "smoke", blocks=(1, 2), heads=2, axes=(4, 4, 8), channels=4, joint=32, pooled=16, text=5, grid=(3, 5),
    small=True,
)  # fmt: skip
WORKLOADS = {w.name: w for w in (FULL, SMALL)}
