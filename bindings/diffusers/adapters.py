"""Which adapters (LoRAs) are at work in a model, for what is kept of it and holds for those alone."""

from __future__ import annotations

import weakref
from collections.abc import Hashable

import torch


class Adapters:
    """Names and strengths of a model's adapters as something to compare: peft's layers say it.

    Weights that are changed in place, by hand or by fusing, go unnoticed.
    """

    def __init__(self):
        self._configs: list = []
        self._layers: list = []

    def of(self, model: torch.nn.Module) -> Hashable:
        """Layer by layer, what is active and how strongly."""
        configs = list((getattr(model, "peft_config", None) or {}).values())
        if not configs:
            return ()
        if len(configs) != len(self._configs) or any(a is not b for a, b in zip(configs, self._configs, strict=True)):
            from peft.tuners.tuners_utils import BaseTunerLayer

            self._configs = configs
            self._layers = [layer for layer in model.modules() if isinstance(layer, BaseTunerLayer)]
        found = []
        for layer in self._layers:
            part = getattr(layer, layer.adapter_layer_names[0])
            for adapter in () if layer.disable_adapters else layer.active_adapters:
                if adapter in part:
                    # By reference: an adapter that was loaded anew under the same name is another one.
                    found.append((weakref.ref(part[adapter]), getattr(layer, "scaling", {}).get(adapter)))
        return tuple(found)
