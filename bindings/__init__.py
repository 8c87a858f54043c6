"""Bindings: methods and modulations put into the attention of a host library's models."""

from __future__ import annotations


def apply(pipe, *methods, backend: str = "auto", rotation: str = "op", reference=None):
    """Bind methods and modulations to a diffusers pipeline or transformer, in place and on this instance alone.

    Args:
        pipe: a pipeline whose ``transformer`` is in the table of hosts (FLUX.1, Kontext, Chroma, FLUX.2, Qwen-Image and
            its editors, Z-Image and their kin), or the transformer itself, compiled or not.
        methods: modulations (QueryScale, BandWeight, BiasDelta, LogitGain) over the joint sequence of the model, and
            objects with ``modulations(site) -> list`` that are asked for every layer and step (:class:`fastrope.At`
            makes one of either, for some layers and steps); lists are flattened. Tensors may be on any device.
        backend: of :func:`fastrope.attention`, for the modulated layers.
        rotation: who rotates queries and keys in modulated layers: ``"op"`` hands them over as they come out of the QK
            norm, ``"host"`` after the host's own rotary embedding. Same result up to rounding (the host rotates in
            float32). Compiled layers always let the host rotate.
        reference: whom methods share attention with (:class:`fastrope.UntwistingRoPE`): a :class:`fastrope.Reference`,
            which joins every call as further rows of the batch, on the target's grid, or a
            :class:`fastrope.ReferenceCache` around one. It has its own text in all calls, also in those of a negative
            prompt.

    Returns:
        A :class:`fastrope.bindings.diffusers.Handle`: a context manager; ``remove()`` restores the very same
        processors, ``update(...)`` replaces the methods. Layers that nothing modulates run the host's own processor, to
        the same bits.

    Raises:
        ValueError: an unknown host, a host bound already, something that is neither modulation nor method.
        NotImplementedError: IP-Adapter, PAG, nunchaku, context parallelism, processors that are not the host's own.
    """
    from .diffusers import bind  # imports diffusers

    return bind(pipe, methods, backend, rotation, reference)


def remove(pipe) -> None:
    """Undo :func:`apply` where its handle was not kept: ``handle.remove()`` of whatever is bound to the transformer.

    Args:
        pipe: the pipeline or the transformer.

    Raises:
        ValueError: nothing is bound to it.
    """
    from .diffusers import unbind

    unbind(pipe)
