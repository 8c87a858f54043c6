"""A layer of a bound transformer, and the op that a compiler sees in place of its attention.

A compiler specialises on every Python number and object in the code. So compiled code of a layer holds no plan and no
modulation: it calls one opaque op with the layer's number in a tensor, and the op finds the layer when it runs.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable
from functools import partial
from typing import Any, NoReturn

import torch
from diffusers.models.attention_dispatch import (
    AttentionBackendName,
    _AttentionBackendRegistry,
    dispatch_attention_fn,
)  # fmt: skip
from torch import Tensor

import fastrope as fr
from fastrope.backends.plain import Plain, using

from ..image.work import Work
from .forwards import Forwards, LayerState
from .parallel import attend as attend_in_parallel

_LAYERS: weakref.WeakValueDictionary[int, Layer] = weakref.WeakValueDictionary()
_NUMBERS = itertools.count()
OWN = "fastrope"  # in the place of a plain attention: not the one chosen for the model


class Layer:
    """One attention layer of a bound transformer. It stores nothing of a call, see :mod:`.forwards`.

    The host rotates queries and keys if ``applied``, and always in a ``compiled`` layer.

    Args:
        forwards: of the handle.
        index: of the layer, in order of execution.
        backend, plain: as in :func:`fastrope.apply`.
    """

    def __init__(
        self, forwards: Forwards, index: int, backend: str, plain: str | Callable | None, applied: bool
    ) -> None:
        self.backend = backend
        self.plain = plain
        self.applied = applied
        self.compiled = False
        self.original: Any = None
        self.handle: Any = None  # the handle of this layer
        self.number = next(_NUMBERS)
        self.address = torch.tensor([self.number], device="cpu")
        self._forwards = forwards
        self._index = index
        _LAYERS[self.number] = self

    def close(self) -> None:
        """From now on, the op refuses this layer."""
        self.handle = None
        _LAYERS.pop(self.number, None)

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        """Refuse a copy: no handle would manage it."""
        raise NotImplementedError(
            "copy: expected a transformer without a bound fastrope handle, received one with it; call handle.remove() "
            "before copying or pickling it"
        )

    @property
    def state(self) -> LayerState:
        """What the layer does in the forward that the caller is part of.

        Raises:
            ValueError: the layer was called before the transformer was.
        """
        return self._forwards.current().layers[self._index]

    def attend_streams(self, streams: list[fr.Stream | None], mask: Tensor | None) -> Tensor | None:
        """Modulated attention ``(B, S, H, D)`` straight from the projections, through the fused prologue.

        None if the host is to make q and k first: on a CPU (unless the backend ``"triton"`` was asked for), for
        streams of several dtypes, under a probe, which needs q and k, and for other work
        than :class:`fastrope.bindings.image.work.Work`.
        """
        forward = self._forwards.current()
        (work, probe), split = forward.layers[self._index], forward.split
        known = [stream for stream in streams if stream is not None]
        if len(known) < len(streams) or probe is not None or split is not None or type(work) is not Work:
            return None
        wanted = self.backend == "triton" or (self.backend == "auto" and known[0].q.is_cuda)
        alike = len({x.dtype for s in known for x in (s.q, s.k, s.v)}) == 1
        if not wanted or not alike or (mask is not None and not work.masked):
            return None
        with using(self._plain()):
            return work.attend_streams(known, self.backend)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, applied: bool) -> Tensor | None:
        """Modulated attention ``(B, S, H, D)``, or None if the host's own attention is to run."""
        forward = self._forwards.current()
        work, probe = forward.layers[self._index]
        if mask is not None and work is not None and not work.masked:
            raise NotImplementedError(
                "attention_mask: expected None in a modulated layer of this host, received a mask that is not among "
                "the arguments of the transformer"
            )
        if probe is not None:
            probe(q, k, work, applied)
        if work is None:
            return None
        with using(self._plain()):
            if forward.split is not None:
                sent = forward.sent[self._index]
                return attend_in_parallel(work, *forward.split, sent, q, k, v, applied, self.backend)
            return work.attend(q, k, v, applied, self.backend)

    def _plain(self) -> Plain | None:
        """The plain attention of the layer: what ``fr.apply`` was told, else what the user chose for the model."""
        if self.plain is not None:
            return None if self.plain == OWN else Plain.of(self.plain)
        name = getattr(self.original, "_attention_backend", None)
        if name is None:
            name, _ = _AttentionBackendRegistry.get_active_backend()
            if name == AttentionBackendName.NATIVE:  # nobody chose it
                return None
        name = AttentionBackendName(name)
        return Plain(f"{name.value}, the model's attention", partial(dispatch_attention_fn, backend=name))


# What the op does changes from call to call, so no CUDA graph may replay it. If torch lacks this tag, the argument on
# the CPU keeps inductor from capturing the op.
_TAGS = (torch.Tag.cudagraph_unsafe,) if hasattr(torch.Tag, "cudagraph_unsafe") else ()


@torch.library.custom_op("fastrope::host_attention", mutates_args=(), tags=_TAGS)
def host_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    layer: Tensor,
) -> Tensor:
    """Attention of a bound layer: modulated, or the host's own, as the running forward says.

    Args:
        q, k, v: ``(B, S, H, D)``, rotated by the host.
        mask: the host's mask, for its own attention.
        layer: ``(1,)`` int64 on the CPU, the number of the layer.

    Returns:
        ``(B, S, H, D)`` contiguous.
    """
    found = _LAYERS.get(int(layer))
    if found is None:
        raise ValueError("handle: expected a bound handle, received compiled code of a removed one")
    found.compiled = True
    out = found.attend(q, k, v, mask, applied=True)
    if out is None:
        parallel = getattr(found.original, "_parallel_config", None)
        backend = found.original._attention_backend
        out = dispatch_attention_fn(q, k, v, attn_mask=mask, backend=backend, parallel_config=parallel)
    return out.contiguous()


@host_attention.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, layer: Tensor):
    return q.new_empty(q.shape)
