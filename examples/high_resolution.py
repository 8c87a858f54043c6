"""Draw a picture larger than those of the training (HighResolution, Temperature).

python examples/high_resolution.py --prompt "a harbour at dawn"
python examples/high_resolution.py --tiny
"""

import common
import torch

import fastrope as fr

options = common.options(__doc__, prompt=("a harbour at dawn", "a red 3 on blue"))
pipe, call = common.text_to_image(options)
trained = (8, 8) if options.tiny else (64, 64)  # tokens
call |= dict(height=call["height"] * 3 // 2, width=call["width"] * 3 // 2)

methods = {
    "stock": [],  # repeats what it draws
    "sharper": [fr.Temperature(trained)],  # attention as sharp as over fewer tokens
    "rescaled": [fr.HighResolution("yarn", trained=trained)],  # positions as in training; DyPE is the default
}
for name, chosen in methods.items():
    with fr.apply(pipe, *chosen):
        image = pipe(**call, generator=torch.Generator().manual_seed(0)).images[0]
    image.save(options.out / f"high-resolution-{name}.png")
