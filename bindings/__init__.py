"""Bindings: methods and modulations put into the attention of a host library's models."""

from __future__ import annotations

from .diffusers import bind


def apply(pipe, *methods, backend: str = "auto"):
    """Bind methods and modulations to a diffusers pipeline or transformer, in place and on this instance alone.

    Args:
        pipe: a pipeline whose ``transformer`` is supported (FluxPipeline, FluxKontextPipeline and their kin), or the
            transformer itself, compiled or not.
        methods: modulations (QueryScale, BandWeight, BiasDelta, LogitGain) over the joint sequence of the model, and
            objects with ``modulations(site) -> list`` that are asked for every layer and step; lists are flattened.
            Tensors may be on any device.
        backend: of :func:`fastrope.attention`, for the modulated layers.

    Returns:
        A :class:`fastrope.bindings.diffusers.Handle`: a context manager; ``remove()`` restores the very same
        processors. Layers that nothing modulates run the host's own processor, to the same bits.

    Raises:
        ValueError: an unknown host, a host bound already, something that is neither modulation nor method.
        NotImplementedError: IP-Adapter, PAG, nunchaku, context parallelism, processors that are not the host's own.
    """
    return bind(pipe, methods, backend)
