"""Decide how much the picture counts, and a word of the prompt (ReferenceStrength, PromptWeights).

python examples/strength.py --image photo.png --prompt "make it a snowy evening" --word snowy
python examples/strength.py --tiny
"""

import common
import torch

import fastrope as fr

prompts, words = ("make it a snowy evening", "make it a red 3"), ("snowy", "red")
options = common.options(__doc__, image="photo.png", prompt=prompts, word=words)
pipe, call = common.editor(options)

methods = {
    "freer": fr.ReferenceStrength(0.3),  # 1 is neutral, 0 hides the picture
    "louder": fr.PromptWeights.of_words(pipe.tokenizer_2, options.prompt, {options.word: 3.0}),
    "without": fr.PromptWeights.of_words(pipe.tokenizer_2, options.prompt, {options.word: -1.0}, on="values"),
}
for name, method in methods.items():
    with fr.apply(pipe, method):
        image = pipe(**call, generator=torch.Generator().manual_seed(0)).images[0]
    image.save(options.out / f"strength-{name}.png")
