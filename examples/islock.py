"""Edit an autoregressive image by changing its prompt, while its structure stays (ISLock).

python examples/islock.py --prompt "a red boat on the sea" --edit "a green boat on the sea"
python examples/islock.py --tiny
"""

import argparse
from pathlib import Path

import tiny_models
import torch

import fastrope as fr
from fastrope.bindings import llamagen
from fastrope.pictures import to_picture

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--prompt", default="a photo of a red boat on the sea")
parser.add_argument("--edit", default="a photo of a green boat on the sea")
parser.add_argument("--model", default="peizesun/llamagen_t2i", help="with t2i_XL_stage2_512.pt and vq_ds16_t2i.pt")
parser.add_argument("--tiny", action="store_true", help="a small model that comes with the package")
parser.add_argument("--out", type=Path, default=Path("."), help="folder for the pictures")
options = parser.parse_args()

prompts = [options.prompt, options.edit]
if options.tiny:
    model, tokenizer, features, mask = tiny_models.autoregressive()
else:
    from huggingface_hub import hf_hub_download

    device = "cuda" if torch.cuda.is_available() else "cpu"
    weights, vq = (hf_hub_download(options.model, name) for name in ("t2i_XL_stage2_512.pt", "vq_ds16_t2i.pt"))
    model = llamagen.LlamaGen.from_checkpoint(weights, grid=32, device=device, dtype=torch.bfloat16)
    tokenizer = llamagen.VQTokenizer.from_checkpoint(vq, device=device)
    features, mask = llamagen.encode_prompts(prompts, device=device, dtype=torch.bfloat16)

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
