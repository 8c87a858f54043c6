"""Draw a prompt in the style of a reference picture (Untwisting RoPE).

python examples/untwisting.py --reference woodcut.png --about "a woodcut of a harbour" --prompt "a heron at dawn"
python examples/untwisting.py --tiny
"""

import common
import torch
from diffusers.utils import load_image

import fastrope as fr
from fastrope import lab

options = common.options(__doc__, prompt=("a heron at dawn", "a 3"), reference="woodcut.png", about="")
pipe, call = common.text_to_image(options)
picture = lab.pictures(1)[0] if options.tiny else load_image(options.reference)

# The model inverts the reference once, to every noise level of the run. Its seed differs from the target's.
about = call | dict(prompt=options.about)
reference = fr.prepare_reference(pipe, picture, "rf_inversion", generator=torch.Generator().manual_seed(1), **about)
with fr.apply(pipe, fr.UntwistingRoPE(blocks="single"), reference=fr.ReferenceCache(reference)):
    image = pipe(**call, generator=torch.Generator().manual_seed(0)).images[0]
image.save(options.out / "untwisting.png")
