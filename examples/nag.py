"""Give a model without guidance a negative prompt (NAG).

python examples/nag.py --prompt "a portrait of an old sailor" --negative "glasses, hat"
python examples/nag.py --tiny
"""

import common
import torch

import fastrope as fr

prompts, negatives = ("a portrait of an old sailor", "a 3"), ("glasses, hat", "red")
options = common.options(__doc__, prompt=prompts, negative=negatives)
pipe, call = common.text_to_image(options)

with torch.no_grad():
    prompt, pooled, _ = pipe.encode_prompt(options.prompt, prompt_2=None)
    negative, _, _ = pipe.encode_prompt(options.negative, prompt_2=None)
call |= dict(prompt=None, prompt_embeds=torch.cat([prompt, negative], dim=1), pooled_prompt_embeds=pooled)

for scale in (1.0, 5.0):  # at 1 the negative prompt has no effect
    with fr.apply(pipe, fr.NAG(scale=scale)):
        image = pipe(**call, generator=torch.Generator().manual_seed(0)).images[0]
    image.save(options.out / f"nag-{scale:g}.png")
