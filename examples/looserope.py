"""Blend a pasted crop into a photo (LooseRoPE).

python examples/looserope.py --composite pasted.png --original photo.png
python examples/looserope.py --tiny
"""

import argparse
from pathlib import Path

import tiny_models
import torch

import fastrope as fr

PROMPT = "Blend the pasted object into the scene, keep its identity and the style of the picture"

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--composite", help="the photo with the crop pasted in")
parser.add_argument("--original", help="the photo without it")
parser.add_argument("--boost", type=float, default=0.83, help="lower blends more, higher keeps more of the crop")
parser.add_argument("--model", default="black-forest-labs/FLUX.1-Kontext-dev")
parser.add_argument("--tiny", action="store_true", help="a small model that comes with the package")
parser.add_argument("--out", type=Path, default=Path("."), help="folder for the picture")
options = parser.parse_args()

if options.tiny:
    pipe, call, composite, original = tiny_models.pasted()
else:
    from diffusers import FluxKontextPipeline
    from diffusers.utils import load_image

    pipe = FluxKontextPipeline.from_pretrained(options.model, torch_dtype=torch.bfloat16)
    pipe.enable_model_cpu_offload()
    composite, original = load_image(options.composite), load_image(options.original)
    call = dict(image=composite, prompt=PROMPT, width=composite.width, height=composite.height, guidance_scale=2.5)

# The paste is where the two pictures differ. Its salient tokens keep their place strictly, the others loosely.
method = fr.LooseRoPE.from_images(composite, original, boost=options.boost)
with fr.apply(pipe, method):
    image = pipe(**call, generator=torch.Generator().manual_seed(0)).images[0]
image.save(options.out / "looserope.png")
