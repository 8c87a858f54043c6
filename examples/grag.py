"""Edit a picture, with a dial for how much of it is kept (GRAG).

python examples/grag.py --image photo.png --prompt "make it a winter evening"
python examples/grag.py --tiny
"""

import argparse
from pathlib import Path

import tiny_models
import torch

import fastrope as fr

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--image", help="the picture to edit")
parser.add_argument("--prompt", default="make it a winter evening")
parser.add_argument("--deltas", type=float, nargs="+", default=[0.95, 1.0, 1.15], help="below 1 edits more")
parser.add_argument("--model", default="black-forest-labs/FLUX.1-Kontext-dev")
parser.add_argument("--tiny", action="store_true", help="a small model that comes with the package")
parser.add_argument("--out", type=Path, default=Path("."), help="folder for the pictures")
options = parser.parse_args()

if options.tiny:
    pipe, call = tiny_models.editor()
else:
    from diffusers import FluxKontextPipeline
    from diffusers.utils import load_image

    pipe = FluxKontextPipeline.from_pretrained(options.model, torch_dtype=torch.bfloat16)
    pipe.enable_model_cpu_offload()
    call = dict(image=load_image(options.image), prompt=options.prompt, guidance_scale=2.5, num_inference_steps=28)

with fr.apply(pipe, fr.GRAG()) as handle:
    for delta in options.deltas:
        handle.update(fr.GRAG(delta=delta))  # nothing is loaded or compiled again
        image = pipe(**call, generator=torch.Generator().manual_seed(0)).images[0]
        image.save(options.out / f"grag-{delta:g}.png")
