"""Blend a pasted crop into a photo (LooseRoPE).

python examples/looserope.py --image pasted.png --original photo.png
python examples/looserope.py --tiny
"""

import common
import torch
from diffusers.utils import load_image

import fastrope as fr
from fastrope import lab

PROMPT = "Blend the pasted object into the scene, keep its identity and the style of the picture"
options = common.options(__doc__, image="pasted.png", original="photo.png", prompt=(PROMPT, "blend"), boost=0.83)
pipe, call = common.editor(options)
if options.tiny:
    call["image"], original = lab.pasted()
else:
    original = load_image(options.original)

# The paste is where the two pictures differ. Its salient tokens keep their place strictly, the others loosely.
method = fr.LooseRoPE.from_images(call["image"], original, boost=options.boost)  # lower blends more
with fr.apply(pipe, method):
    image = pipe(**call, generator=torch.Generator().manual_seed(0)).images[0]
image.save(options.out / "looserope.png")
