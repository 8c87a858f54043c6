"""Pictures of the shipped models through the public interface, many per call, with the same noise at every setting."""

from __future__ import annotations

from collections.abc import Sequence

import torch

import fastrope as fr

from .. import scenes, words
from ..codes import Codebook
from ..models import CALL, load, pipeline

STEPS = 12
BATCH = 48
TOKENS = 64


class Studio:
    """The models behind their pipelines. Pictures are ``(B, 3, 16, 16)`` in -1..1, prompts ``(B, 5)`` long."""

    def __init__(self):
        self.see = load("classifier")
        self.author = load("author")
        self.editing, self.drawing = pipeline(), pipeline(edit=False)
        self.codebook = Codebook(self.author.codebook)

    def edit(
        self, prompt, reference, methods: Sequence = (), guidance: float = 1.0, seed: int = 0, backend: str = "auto"
    ) -> torch.Tensor:
        """``reference`` edited by the Kontext pipeline, :data:`BATCH` rows a call.

        Args:
            methods: for ``fr.apply``, or a function that returns them for a slice of rows.
            guidance: ``true_cfg_scale`` of the pipeline; the negative prompt names the task alone.
            backend: of the op; with a mask per row and few tokens, "eager" is the fastest on a CPU.
        """
        made = []
        for rows in (slice(n, min(n + BATCH, len(prompt))) for n in range(0, len(prompt), BATCH)):
            chosen = methods(rows) if callable(methods) else methods
            with fr.apply(self.editing, *chosen, backend=backend):
                made.append(self.call(prompt[rows], reference[rows], guidance, seed + rows.start))
        return torch.cat(made)

    def call(self, prompt, reference, guidance: float = 1.0, seed: int = 0) -> torch.Tensor:
        """One call of the Kontext pipeline as it stands."""
        image = {"image": reference}  # with as many channels as latents have, it is taken as latents
        return _run(self.editing, prompt, seed, guidance, **CALL | {"output_type": "pt"} | image)

    def draw(self, prompt, methods: Sequence = (), reference=None, guidance: float = 1.0, seed: int = 0):
        """Pictures of ``prompt`` by the text-to-image pipeline, in one call; ``reference`` as ``fr.apply`` has it."""
        call = {name: value for name, value in CALL.items() if name not in ("max_area", "_auto_resize")}
        shared = {} if reference is None else {"reference": reference}
        with fr.apply(self.drawing, *methods, **shared):
            return _run(self.drawing, prompt, seed, guidance, **call | {"output_type": "pt"})

    def write(self, prompt, seed: int = 0, guidance: float = 1.0, matcher=None, anchors=None, top_k: int = 0):
        """The author's tokens ``(B, 64)`` for ``prompt``, and the record of matches; one seed per row."""
        from ...bindings.llamagen import generate

        generators = [torch.Generator().manual_seed(seed + n) for n in range(len(prompt))]
        return generate(
            self.author.transformer, words.embed(prompt)[0], guidance=guidance, top_k=top_k, generator=generators,
            matcher=matcher, anchors=anchors,
        )  # fmt: skip


def only(prompt: torch.Tensor, *slots: str) -> torch.Tensor:
    """``prompt`` with every word but the task's and those of ``slots`` left open."""
    named = ["task", *slots]
    short = torch.full_like(prompt, scenes.ANY)
    for index, slot in enumerate(scenes.SLOTS):
        if slot in named:
            short[:, index] = prompt[:, index]
    return short


def as_task(prompt: torch.Tensor, task: str) -> torch.Tensor:
    """``prompt`` for another task."""
    changed = prompt.clone()
    changed[:, 0] = scenes.TASKS.index(task)
    return changed


def noise(batch: int, seed: int) -> torch.Tensor:
    """What a run starts from, ``(B, 64, 12)``."""
    return torch.randn(batch, TOKENS, 12, generator=torch.Generator().manual_seed(10_000 + seed))


def _run(pipe, prompt, seed: int, guidance: float, **call) -> torch.Tensor:
    tokens, pooled = words.embed(prompt)
    call |= {"prompt_embeds": tokens, "pooled_prompt_embeds": pooled, "num_inference_steps": STEPS}
    if guidance != 1:
        plain, plain_pooled = words.embed(only(prompt))
        call |= {"negative_prompt_embeds": plain, "negative_pooled_prompt_embeds": plain_pooled}
    return pipe(latents=noise(len(prompt), seed), true_cfg_scale=guidance, **call).images * 2 - 1
