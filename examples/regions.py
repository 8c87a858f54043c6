"""Draw a picture whose halves have prompts of their own, with a soft edge between them (Regions).

python examples/regions.py --prompt "a harbour" --left "a red boat" --right "a lighthouse"
python examples/regions.py --tiny
"""

import common
import torch

import fastrope as fr

options = common.options(
    __doc__,
    prompt=("a harbour", "a 3 on white"),
    left=("a red boat", "a red 3 on white"),
    right=("a lighthouse", "a green 3 on white"),
)
pipe, call = common.text_to_image(options)

left = torch.zeros(64, 64)  # of any size: it is averaged onto the grid of tokens
left[:, :28], left[:, 28:36] = 1.0, 0.5

# The prompts are encoded apart and joined: first the one that all of the picture sees, then those of the regions.
with torch.no_grad():
    encoded = [pipe.encode_prompt(text, prompt_2=None) for text in (options.prompt, options.left, options.right)]
n, pooled = encoded[0][0].shape[1], encoded[0][1]
call |= dict(prompt=None, prompt_embeds=torch.cat([text for text, *_ in encoded], dim=1), pooled_prompt_embeds=pooled)

regions = [fr.Region(left, text=slice(n, 2 * n)), fr.Region(1 - left, text=slice(2 * n, 3 * n))]
with fr.apply(pipe, fr.Regions(regions)):
    image = pipe(**call, generator=torch.Generator().manual_seed(0)).images[0]
image.save(options.out / "regions.png")
