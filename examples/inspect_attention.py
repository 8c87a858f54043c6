"""Measure the attention of a pipeline: how much of it goes to text, target and reference, and at which distance.

python examples/inspect_attention.py --image photo.png --prompt "make it a winter evening"
python examples/inspect_attention.py --tiny
"""

import common
import torch

import fastrope as fr

options = common.options(__doc__, image="photo.png", prompt=("make it a winter evening", "make it a 3"))
pipe, call = common.editor(options)

for name, methods in (("stock", []), ("grag", [fr.GRAG(bias=1.1)])):
    with fr.apply(pipe, *methods) as handle, handle.inspect(steps={0, 3}) as record:  # inspect few steps: it takes time
        pipe(**call, generator=torch.Generator().manual_seed(0))
    shares = {group: sum(by_step.values()) / len(by_step) for group, by_step in record.mean("mass", "step").items()}
    print(name, ", ".join(f"{group} {share:.1%}" for group, share in shares.items()))
    record.plot(options.out / f"attention-{name}.png")
