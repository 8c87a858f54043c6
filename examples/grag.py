"""Edit a picture, with a dial for how much of it is kept (GRAG).

python examples/grag.py --image photo.png --prompt "make it a winter evening"
python examples/grag.py --tiny
"""

import common
import torch

import fastrope as fr

options = common.options(__doc__, image="photo.png", prompt=("make it a winter evening", "make it a 3"))
pipe, call = common.editor(options)

with fr.apply(pipe, fr.GRAG()) as handle:
    for delta in (0.95, 1.0, 1.15):  # below 1 edits more
        handle.update(fr.GRAG(delta=delta))  # nothing is loaded or compiled again
        image = pipe(**call, generator=torch.Generator().manual_seed(0)).images[0]
        image.save(options.out / f"grag-{delta:g}.png")
