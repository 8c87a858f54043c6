"""A laboratory: small models trained on handwritten digits, on which the effects of the methods can be measured.

    from fastrope import lab

    pipe = lab.pipeline()  # diffusers' FluxKontextPipeline, trained weights
    picture = lab.pictures(8)[0]  # 16 x 16 pixels, a digit held out from training
    edited = pipe(picture, **lab.prompt("digit", digit=3), **lab.CALL).images[0]

How the weights were made and how to go on training: ``README.md`` here.
"""

from .models import CALL, load, pasted, pictures, pipeline, prompt

__all__ = ["CALL", "load", "pasted", "pictures", "pipeline", "prompt"]
