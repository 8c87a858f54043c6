"""Draw a prompt in the style of a reference picture (Untwisting RoPE).

python examples/untwisting.py --reference woodcut.png --about "a woodcut of a harbour" --prompt "a heron at dawn"
python examples/untwisting.py --tiny
"""

import argparse
from pathlib import Path

import tiny_models
import torch

import fastrope as fr

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--reference", help="the picture whose style to draw in")
parser.add_argument("--about", default="", help="what the reference shows")
parser.add_argument("--prompt", default="a heron at dawn", help="what to draw")
parser.add_argument("--model", default="black-forest-labs/FLUX.1-dev")
parser.add_argument("--tiny", action="store_true", help="a small model that comes with the package")
parser.add_argument("--out", type=Path, default=Path("."), help="folder for the picture")
options = parser.parse_args()

if options.tiny:
    pipe, call, picture, about = tiny_models.text_to_image()
else:
    from diffusers import FluxPipeline
    from diffusers.utils import load_image

    pipe = FluxPipeline.from_pretrained(options.model, torch_dtype=torch.bfloat16)
    pipe.enable_model_cpu_offload()
    picture = load_image(options.reference)
    size = dict(height=1024, width=1024, num_inference_steps=28, guidance_scale=3.5)
    call, about = dict(prompt=options.prompt, **size), dict(prompt=options.about, **size)

# The model inverts the reference once, to every noise level of the run. Its seed differs from the target's.
reference = fr.prepare_reference(pipe, picture, "rf_inversion", generator=torch.Generator().manual_seed(1), **about)
with fr.apply(pipe, fr.UntwistingRoPE(blocks="single"), reference=fr.ReferenceCache(reference)):
    image = pipe(**call, generator=torch.Generator().manual_seed(0)).images[0]
image.save(options.out / "untwisting.png")
