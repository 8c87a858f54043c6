"""A reference latent that is in no conditioning: the model runs it by itself, and the picture attends to its tokens."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fastrope.checks import require
from fastrope.sharing import Reference, ReferenceCache, Snapshot


class LatentReference:
    """Reference latents, and what is known of them at each noise level.

    At noise level sigma they are ``(1 - sigma) latent + sigma noise`` with one noise for all steps. The model runs them
    once per step, in a call of their own, whatever the target's size, prompt, batch or guidance.

    Args:
        latent: ``(R, C, H, W)`` or ``(R, C, 1, H, W)``, as an encoder gives it; each of R is seen by every target.
        conditioning: what the reference shows, a conditioning of the host: its own text in all calls.
        seed: of the noise.
        keep: keep keys and values of all steps in main memory for the runs to come; else those of one step are held,
            where they were computed.

    Raises:
        ValueError: no latent, or a conditioning of several parts.
    """

    def __init__(self, latent: Any, conditioning: Any, seed: int = 0, keep: bool = False) -> None:
        fits = isinstance(latent, Tensor) and latent.ndim in (4, 5)
        require(fits, "reference_latent", "a LATENT of pictures", getattr(latent, "shape", type(latent).__name__))
        told = isinstance(conditioning, list) and len(conditioning) == 1
        expected = "a CONDITIONING of one part: what the reference shows, an empty prompt will do"
        require(told, "reference_conditioning", expected, conditioning and f"{len(conditioning)} parts")
        self._latent, self._conditioning, self.keep = latent, conditioning, keep
        self._noise = torch.randn(latent.shape, generator=torch.Generator().manual_seed(seed), device="cpu")
        self._cache = ReferenceCache(Reference(lambda step, sigma: latent, {}), "cpu" if keep else None)

    @property
    def rows(self) -> int:
        """R."""
        return len(self._latent)

    def forget(self) -> None:
        """After a run, unless it is kept."""
        if not self.keep:
            self._cache.clear()

    def store(self, x: Tensor) -> Tensor:
        """The copy that is kept."""
        return self._cache.store(x)

    def snapshot(self, key: tuple, layers: set[int]) -> Snapshot | None:
        """What is known under a key; None unless it is known of all these layers."""
        found = self._cache.find(key)
        return found if found is not None and layers <= found.layers.keys() else None

    def put(self, key: tuple, snapshot: Snapshot) -> Snapshot:
        """Keep a snapshot, alone or with those before."""
        if not self.keep:
            self._cache.clear()
        return self._cache.put(key, snapshot)

    def call(self, model: Any, given: Mapping[str, Any], sigma: float) -> dict[str, Any]:
        """The arguments of ``BaseModel.apply_model`` that run the reference by itself.

        Args:
            model: the host's model.
            given: the arguments of the target's call.
        """
        x, rows = given["x"], self.rows
        clean, noise = (self._as(each, x) for each in (model.process_latent_in(self._latent), self._noise))
        level = torch.full((rows,), sigma, device=x.device, dtype=torch.float32)
        noisy = model.model_sampling.noise_scaling(level.reshape(-1, *[1] * (x.ndim - 1)), noise, clean)
        options = {**(given.get("transformer_options") or {}), "cond_or_uncond": [0]}
        return {**self._conditions(model, noisy), "x": noisy, "t": level, "transformer_options": options}

    def _as(self, latent: Tensor, x: Tensor) -> Tensor:
        """With as many axes as the target, where it is."""
        latent = latent.to(x.device, torch.float32)
        if latent.ndim < x.ndim:
            latent = latent.unsqueeze(2)
        return latent.squeeze(2) if latent.ndim > x.ndim else latent

    def _conditions(self, model: Any, noisy: Tensor) -> dict[str, Any]:
        """Of its own conditioning, as the host's sampler makes them of one."""
        text, options = self._conditioning[0]
        size = dict(width=noisy.shape[-1] * 8, height=noisy.shape[-2] * 8)
        told = {
            **size,
            **options,
            "cross_attn": text,
            "noise": noisy,
            "device": noisy.device,
            "prompt_type": "positive",
        }
        told.pop("reference_latents", None)
        conditions = model.extra_conds(**told)
        made = {name: each.process_cond(batch_size=self.rows, area=None).cond for name, each in conditions.items()}
        return {name: x.to(noisy.device) if isinstance(x, Tensor) else x for name, x in made.items()}
