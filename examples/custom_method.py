"""A custom method: it returns modulations for every layer and step of a run.

This one weakens the edited picture from layer to layer. In the first half of the run it also brings tokens nearer.

python examples/custom_method.py --image photo.png --prompt "make it a winter evening"
python examples/custom_method.py --tiny
"""

from dataclasses import dataclass

import common
import torch

import fastrope as fr


@dataclass(frozen=True)
class Fade:
    """Multiplies the reference's logits by a gain, from 1 in the first layer to ``gain`` in the last."""

    gain: float = 0.7
    nearer: float = 0.8

    def modulations(self, site: fr.Site) -> list:
        """The modulations at a site. A :class:`fastrope.Site` has the layer, the step and the spans of tokens."""
        reference = site.tokens.reference(0)
        depth = site.layer / max(site.num_layers - 1, 1)
        ones = torch.ones(len(site.tokens))
        found: list = [fr.LogitGain(ones * (1 + depth * (self.gain - 1)), keys=reference)]
        if site.step < site.num_steps / 2:
            found.append(fr.QueryScale(ones * self.nearer, keys=reference, axes=site.spatial_axes))
        return found


options = common.options(__doc__, image="photo.png", prompt=("make it a winter evening", "make it a 3"))
pipe, call = common.editor(options)

late = fr.At(fr.GRAG(delta=1.1), layers=slice(-1, None))  # At confines a method to some layers and steps
with fr.apply(pipe, Fade(), late):
    image = pipe(**call, generator=torch.Generator().manual_seed(0)).images[0]
image.save(options.out / "custom-method.png")
