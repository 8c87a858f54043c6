"""Which adapters (LoRAs) are active in a model. What a cache holds is valid for these alone."""

from __future__ import annotations

import operator
import weakref
from collections.abc import Hashable
from typing import Any

import torch


class Adapters:
    """The adapters of a model, as a value to compare. peft's layers hold them.

    Weights that change in place, by hand or by fusing, are not noticed.
    """

    def __init__(self) -> None:
        self._configs: list = []
        self._layers: list[weakref.ref] = []  # weak, so that an unloaded adapter is freed

    def of(self, model: Any) -> Hashable:
        """The active adapters of every layer, and their strengths."""
        known = getattr(model, "peft_config", None) or {}
        found = []
        for layer in self._layers_of(model, known) if known else ():
            part = getattr(layer, layer.adapter_layer_names[0])
            for adapter in () if layer.disable_adapters else layer.active_adapters:
                if adapter in part:
                    # A reference, not the name: an adapter loaded again under the same name is another one.
                    found.append((weakref.ref(part[adapter]), getattr(layer, "scaling", {}).get(adapter)))
        return tuple(found)

    def _layers_of(self, model: torch.nn.Module, known: dict) -> list[Any]:
        """All layers of peft in the model. They are searched again when adapters came or went."""
        layers = [ref() for ref in self._layers]
        # Unloading all adapters removes the dict itself; the same configuration may then come back in other layers.
        configs = [known, *known.values()]
        same = len(configs) == len(self._configs) and all(map(operator.is_, configs, self._configs))
        if not same or None in layers:
            from peft.tuners.tuners_utils import BaseTunerLayer

            layers = [layer for layer in model.modules() if isinstance(layer, BaseTunerLayer)]
            self._configs, self._layers = configs, list(map(weakref.ref, layers))
        return layers
