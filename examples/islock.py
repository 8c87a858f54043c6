"""Edit an autoregressive image by changing its prompt, while its structure stays (ISLock).

python examples/islock.py --prompt "a red boat on the sea" --edit "a green boat on the sea"
python examples/islock.py --tiny
"""

import common
import torch

import fastrope as fr
from fastrope import lab
from fastrope.bindings import llamagen
from fastrope.commands.words import understand
from fastrope.lab.codes import Codebook
from fastrope.pictures import to_picture

prompts, edits = ("a red boat on the sea", "a red 3 on white"), ("a green boat on the sea", "a red 3 on yellow")
options = common.options(__doc__, prompt=prompts, edit=edits)

if options.tiny:
    author = lab.load("author")
    model, tokenizer = author.transformer, Codebook(author.codebook)
    words = [understand("prompt", text, editing=False) for text in (options.prompt, options.edit)]
    features = torch.cat([lab.prompt(**slots)["prompt_embeds"] for slots in words])
    mask = torch.ones(features.shape[:2])
else:
    from huggingface_hub import hf_hub_download

    device, name = "cuda" if torch.cuda.is_available() else "cpu", options.model or "peizesun/llamagen_t2i"
    weights, vq = (hf_hub_download(name, file) for file in ("t2i_XL_stage2_512.pt", "vq_ds16_t2i.pt"))
    model = llamagen.LlamaGen.from_checkpoint(weights, grid=32, device=device, dtype=torch.bfloat16)
    tokenizer = llamagen.VQTokenizer.from_checkpoint(vq, device=device)
    features, mask = llamagen.encode_prompts([options.prompt, options.edit], device=device, dtype=torch.bfloat16)

generator = torch.Generator().manual_seed(0)
original = llamagen.generate(model, features[:1], mask=mask[:1], generator=generator)
lock = fr.ISLock(candidates=8 if options.tiny else 150)  # the tiny model knows 512 tokens in all
matcher = lock.matcher(tokenizer.codebook, num_tokens=model.config.num_tokens)
edit = llamagen.generate(
    model, features[1:], mask=mask[1:], matcher=matcher, anchors=original.tokens, generator=generator
)
print(edit.record.counts())  # tokens that were kept, moved to a near one, or chosen freely
for name, result in (("original", original), ("edit", edit)):
    pixels = tokenizer.decode(result.tokens)[0].float().cpu() / 2 + 0.5
    to_picture(name, pixels.clamp(0, 1)).save(options.out / f"islock-{name}.png")
