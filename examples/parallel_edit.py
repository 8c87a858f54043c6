"""Edit one picture on several GPUs, or on several processes of a CPU (diffusers' context parallelism, with GRAG).

torchrun --nproc-per-node 4 examples/parallel_edit.py --image photo.png --prompt "make it evening"
torchrun --nproc-per-node 2 examples/parallel_edit.py --tiny        (on CPUs)
"""

import argparse
from pathlib import Path

import tiny_models
import torch
import torch.distributed as dist
from diffusers import ContextParallelConfig

import fastrope as fr

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--image", help="the picture to edit")
parser.add_argument("--prompt", default="make it evening")
parser.add_argument("--delta", type=float, default=1.15, help="above 1 keeps more of the picture")
parser.add_argument("--ring", type=int, default=1, help="processes of a ring; the others exchange heads (Ulysses)")
parser.add_argument("--model", default="black-forest-labs/FLUX.1-Kontext-dev")
parser.add_argument("--tiny", action="store_true", help="a small trained model, no download; 2 processes")
parser.add_argument("--out", type=Path, default=Path("."), help="folder for the picture")
options = parser.parse_args()

on_gpus = torch.cuda.is_available()
dist.init_process_group("nccl" if on_gpus else "gloo")
rank, size = dist.get_rank(), dist.get_world_size()
if on_gpus:
    torch.cuda.set_device(rank)
else:
    torch.accelerator.device_count = lambda: 1  # diffusers divides by it

if options.tiny:
    pipe, call = tiny_models.editor()
else:
    from diffusers import FluxKontextPipeline
    from diffusers.utils import load_image

    pipe = FluxKontextPipeline.from_pretrained(options.model, torch_dtype=torch.bfloat16).to("cuda", rank)
    call = dict(image=load_image(options.image), prompt=options.prompt, guidance_scale=2.5, num_inference_steps=28)

if size > 1:
    degrees = dict(ring_degree=options.ring, ulysses_degree=size // options.ring)
    if options.tiny:  # its 3 heads and 5 words do not divide by 2
        degrees = dict(ring_degree=size, ring_anything=True)
    pipe.transformer.enable_parallelism(config=ContextParallelConfig(**degrees))
with fr.apply(pipe, fr.GRAG(delta=options.delta)):
    image = pipe(**call, generator=torch.Generator().manual_seed(0)).images[0]  # the same noise in every process
if rank == 0:
    image.save(options.out / "parallel-edit.png")
dist.destroy_process_group()
