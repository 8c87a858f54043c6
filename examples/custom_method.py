"""A custom method: it returns modulations for every layer and step of a run.

This one weakens the edited picture from layer to layer. In the first half of the run it also brings tokens nearer.

python examples/custom_method.py --image photo.png --prompt "make it a winter evening"
python examples/custom_method.py --tiny
"""

import argparse
from dataclasses import dataclass
from pathlib import Path

import tiny_models
import torch

import fastrope as fr


@dataclass(frozen=True)
class Fade:
    """Multiplies the reference's logits by a gain, from 1 in the first layer to ``gain`` in the last."""

    gain: float = 0.7
    nearer: float = 0.8

    def modulations(self, site: fr.Site) -> list:
        """The modulations at a site. A :class:`fastrope.Site` has the layer, the step and the spans of tokens."""
        reference = site.tokens.reference(0)
        depth = site.layer / max(site.num_layers - 1, 1)
        ones = torch.ones(len(site.tokens))
        found: list = [fr.LogitGain(ones * (1 + depth * (self.gain - 1)), keys=reference)]
        if site.step < site.num_steps / 2:
            found.append(fr.QueryScale(ones * self.nearer, keys=reference, axes=site.spatial_axes))
        return found


parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--image", help="the picture to edit")
parser.add_argument("--prompt", default="make it a winter evening")
parser.add_argument("--model", default="black-forest-labs/FLUX.1-Kontext-dev")
parser.add_argument("--tiny", action="store_true", help="a small model that comes with the package")
parser.add_argument("--out", type=Path, default=Path("."), help="folder for the picture")
options = parser.parse_args()

if options.tiny:
    pipe, call = tiny_models.editor()
else:
    from diffusers import FluxKontextPipeline
    from diffusers.utils import load_image

    pipe = FluxKontextPipeline.from_pretrained(options.model, torch_dtype=torch.bfloat16)
    pipe.enable_model_cpu_offload()
    call = dict(image=load_image(options.image), prompt=options.prompt, guidance_scale=2.5, num_inference_steps=28)

late = fr.At(fr.GRAG(delta=1.1), layers=slice(-1, None))  # At confines a method to some layers and steps
with fr.apply(pipe, Fade(), late):
    image = pipe(**call, generator=torch.Generator().manual_seed(0)).images[0]
image.save(options.out / "custom-method.png")
