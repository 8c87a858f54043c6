"""Draw a video longer than those of the training (LongVideo).

python examples/long_video.py --prompt "a cat runs through a garden"
python examples/long_video.py --tiny   with random weights: there is no small trained model of videos
"""

import common
import torch

import fastrope as fr

options = common.options(__doc__, prompt="a cat runs through a garden")
pipe, call = common.video(options)
latent = (call["num_frames"] - 1) // 4 + 1

for name, methods in (("stock", []), ("rescaled", [fr.LongVideo(latent)])):
    with fr.apply(pipe, *methods):
        frames = pipe(**call, generator=torch.Generator().manual_seed(0), output_type="pil").frames[0]
    frames[0].save(options.out / f"long-video-{name}.png", save_all=True, append_images=frames[1:], duration=62)
