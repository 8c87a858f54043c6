"""Pipelines and calls in float64."""

from __future__ import annotations

import torch


def widen(value):
    if isinstance(value, list) and isinstance(value[0], torch.Tensor):
        return [x.double() for x in value]
    return value.double() if isinstance(value, torch.Tensor) else value
