"""Edit one picture on several GPUs, or on several processes of a CPU (diffusers' context parallelism, with GRAG).

torchrun --nproc-per-node 4 examples/parallel_edit.py --image photo.png --prompt "make it evening"
torchrun --nproc-per-node 2 examples/parallel_edit.py --tiny        (on CPUs)
"""

import common
import torch
import torch.distributed as dist
from diffusers import ContextParallelConfig

import fastrope as fr

prompts = "make it evening", "make it a 3"
options = common.options(__doc__, image="photo.png", prompt=prompts, delta=1.15, ring=1)

on_gpus = torch.cuda.is_available()
dist.init_process_group("nccl" if on_gpus else "gloo")
rank, size = dist.get_rank(), dist.get_world_size()
if on_gpus:
    torch.cuda.set_device(rank)
else:
    torch.accelerator.device_count = lambda: 1  # diffusers divides by it

pipe, call = common.editor(options, device=f"cuda:{rank}" if on_gpus else "cpu")

if size > 1:
    degrees = dict(ring_degree=options.ring, ulysses_degree=size // options.ring)
    if options.tiny:  # its 3 heads and 5 words do not divide by 2
        degrees |= dict(ring_anything=True) if options.ring > 1 else dict(ulysses_anything=True)
    pipe.transformer.enable_parallelism(config=ContextParallelConfig(**degrees))
with fr.apply(pipe, fr.GRAG(delta=options.delta)):
    image = pipe(**call, generator=torch.Generator().manual_seed(0)).images[0]  # the same noise in every process
if rank == 0:
    image.save(options.out / "parallel-edit.png")
dist.destroy_process_group()
