"""The shipped models behind the interfaces that people use, and their weights on disk."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import torch
from torch import nn

from ..checks import require
from . import author, classifier, editor, scenes, words
from .digits import SIZE, WEIGHTS
from .training import Job, Run

# What a call of the Kontext pipeline needs besides picture and prompt; FluxPipeline takes all but the last two.
CALL = {
    "height": SIZE, "width": SIZE, "guidance_scale": 1.0, "num_inference_steps": 16, "output_type": "pil",
    "max_area": SIZE**2, "_auto_resize": False,
}  # fmt: skip
JOBS: dict[str, Job] = {job.name: job for job in (classifier.JOB, editor.JOB, author.JOB)}


def export(run: Run, folder: Path = WEIGHTS) -> Path:
    """Write the averaged weights of a run as ``NAME.safetensors``, float16, with a record of the training."""
    from safetensors.torch import save_file

    tensors = {name: tensor.detach().half().contiguous() for name, tensor in run.averaged().items()}
    making = {
        "seed": run.seed, "steps": run.step, "samples": run.samples, "seconds": round(run.seconds),
    }  # fmt: skip
    path = folder / f"{run.job.name}.safetensors"
    save_file(tensors, path, metadata={name: json.dumps(value) for name, value in making.items()})
    (folder / "SHA256SUMS").write_text(checksums(folder))
    return path


def checksums(folder: Path = WEIGHTS) -> str:
    """SHA-256 of the weights in ``folder``, in the format of ``sha256sum``."""
    files = sorted(folder.glob("*.safetensors"))
    return "".join(f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.name}\n" for path in files)


def load(name: str, folder: Path = WEIGHTS) -> nn.Module:
    """A trained model ("editor", "author", "classifier"), float32, in evaluation mode.

    Raises:
        ValueError: an unknown name.
        ImportError: diffusers or safetensors is not installed.
    """
    from safetensors.torch import load_file

    require(name in JOBS, "name", f"one of {', '.join(JOBS)}", repr(name))
    model = author.Author() if name == "author" else JOBS[name].build()
    weights = load_file(folder / f"{name}.safetensors")
    model.load_state_dict({name: tensor.float() for name, tensor in weights.items()})
    return model.eval().requires_grad_(False)


def pipeline(device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32, edit: bool = True):
    """diffusers' ``FluxKontextPipeline`` around the editor, or its ``FluxPipeline`` for text to image.

    There is no text encoder: pass ``**prompt("recolour", ink="red")``, and ``**CALL`` for the size.

    Raises:
        ImportError: diffusers or transformers is not installed.
    """
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxKontextPipeline, FluxPipeline

    pipe = (FluxKontextPipeline if edit else FluxPipeline)(
        scheduler=FlowMatchEulerDiscreteScheduler(), vae=_identity_vae(), text_encoder=None, tokenizer=None,
        text_encoder_2=None, tokenizer_2=None, transformer=load("editor"),
    )  # fmt: skip
    pipe.set_progress_bar_config(disable=True)
    return pipe.to(device) if dtype == torch.float32 else pipe.to(device, dtype)  # a cast warns, even one to itself


def prompt(task: str = "draw", **slots) -> dict[str, torch.Tensor]:
    """The arguments that replace a text: ``prompt("recolour", ink="red")``. Slots that are not named are left open.

    Raises:
        ValueError: a slot or a word that does not exist, with those that do.
    """
    tokens, pooled = words.embed(words.prompt(task, **slots))
    return {"prompt_embeds": tokens, "pooled_prompt_embeds": pooled}


def pictures(count: int, seed: int = 0) -> list:
    """PIL pictures of random scenes with digits held out from training."""
    return _as_pictures(scenes.draw(count, torch.Generator().manual_seed(seed), held_out=True).render())


def pasted(seed: int = 0) -> tuple:
    """Two PIL pictures: a digit pasted with a box of its own ground onto another ground, and that ground alone."""
    task = torch.tensor([scenes.TASKS.index("blend")])
    drawn = scenes.to_edit(task, torch.Generator().manual_seed(seed), held_out=True)
    return tuple(_as_pictures(torch.cat([drawn.reference, drawn.source.background()])))


def _as_pictures(pixels: torch.Tensor) -> list:
    from PIL import Image

    return [Image.fromarray(((p + 1) * 127.5).round().byte().permute(1, 2, 0).numpy()) for p in pixels.clamp(-1, 1)]


def _identity_vae():
    from diffusers.configuration_utils import ConfigMixin, register_to_config
    from diffusers.models.modeling_utils import ModelMixin

    class IdentityVAE(ModelMixin, ConfigMixin):
        """Latents are pixels."""

        config_name = "config.json"

        @register_to_config
        def __init__(self, block_out_channels=(3,), latent_channels=3, scaling_factor=1.0, shift_factor=0.0):
            super().__init__()
            self.register_buffer("dtype_holder", torch.zeros(1))  # a model without tensors has no dtype to ask for

        def encode(self, pixels):
            return (pixels,)

        def decode(self, latents, return_dict=False):
            return (latents,)

    return IdentityVAE()
