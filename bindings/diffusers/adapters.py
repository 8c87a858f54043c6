"""Which adapters (LoRAs) are at work in a model, for what is kept of it and holds for those alone."""

from __future__ import annotations

import operator
import weakref
from collections.abc import Hashable
from typing import Any

import torch


class Adapters:
    """Names and strengths of a model's adapters as something to compare: peft's layers say it.

    Weights that are changed in place, by hand or by fusing, go unnoticed.
    """

    def __init__(self) -> None:
        self._configs: list = []
        self._layers: list[weakref.ref] = []  # weak, so that what is unloaded is freed

    def of(self, model: Any) -> Hashable:
        """Layer by layer, what is active and how strongly."""
        known = getattr(model, "peft_config", None) or {}
        found = []
        for layer in self._layers_of(model, known) if known else ():
            part = getattr(layer, layer.adapter_layer_names[0])
            for adapter in () if layer.disable_adapters else layer.active_adapters:
                if adapter in part:
                    # By reference: an adapter that was loaded anew under the same name is another one.
                    found.append((weakref.ref(part[adapter]), getattr(layer, "scaling", {}).get(adapter)))
        return tuple(found)

    def _layers_of(self, model: torch.nn.Module, known: dict) -> list[Any]:
        """All that peft put into the model, looked for again when adapters came or went."""
        layers = [ref() for ref in self._layers]
        # Unloading all takes the dict itself away: the same configuration may come again, in other layers.
        configs = [known, *known.values()]
        same = len(configs) == len(self._configs) and all(map(operator.is_, configs, self._configs))
        if not same or None in layers:
            from peft.tuners.tuners_utils import BaseTunerLayer

            layers = [layer for layer in model.modules() if isinstance(layer, BaseTunerLayer)]
            self._configs, self._layers = configs, list(map(weakref.ref, layers))
        return layers
