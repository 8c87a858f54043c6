"""A laboratory: small models trained on handwritten digits, on which the effects of the methods can be measured.

    pipe = fastrope.lab.pipeline()                          # diffusers' FluxKontextPipeline, trained weights
    picture = fastrope.lab.pictures(8)[0]                   # 16 x 16 pixels, never seen in training
    edited = pipe(picture, **fastrope.lab.prompt("digit", digit=3), **fastrope.lab.CALL).images[0]

Nothing else in fastrope imports this package. How the weights were made, and how to go on training: ``README.md`` here.
"""

from .models import CALL, load, pictures, pipeline, prompt

__all__ = ["CALL", "load", "pictures", "pipeline", "prompt"]
