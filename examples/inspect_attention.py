"""Measure the attention of a pipeline: how much of it goes to text, target and reference, and at which distance.

python examples/inspect_attention.py --image photo.png --prompt "make it a winter evening"
python examples/inspect_attention.py --tiny
"""

import argparse
from pathlib import Path

import tiny_models
import torch

import fastrope as fr

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--image", help="the picture to edit")
parser.add_argument("--prompt", default="make it a winter evening")
parser.add_argument("--model", default="black-forest-labs/FLUX.1-Kontext-dev")
parser.add_argument("--tiny", action="store_true", help="a small model that comes with the package")
parser.add_argument("--out", type=Path, default=Path("."), help="folder for the plots")
options = parser.parse_args()

if options.tiny:
    pipe, call = tiny_models.editor()
else:
    from diffusers import FluxKontextPipeline
    from diffusers.utils import load_image

    pipe = FluxKontextPipeline.from_pretrained(options.model, torch_dtype=torch.bfloat16)
    pipe.enable_model_cpu_offload()
    call = dict(image=load_image(options.image), prompt=options.prompt, guidance_scale=2.5, num_inference_steps=28)

for name, methods in (("stock", []), ("grag", [fr.GRAG(bias=1.1)])):
    with fr.apply(pipe, *methods) as handle, handle.inspect(steps={0, 3}) as record:  # inspect few steps: it takes time
        pipe(**call, generator=torch.Generator().manual_seed(0))
    shares = {group: sum(by_step.values()) / len(by_step) for group, by_step in record.mean("mass", "step").items()}
    print(name, ", ".join(f"{group} {share:.1%}" for group, share in shares.items()))
    record.plot(options.out / f"attention-{name}.png")
