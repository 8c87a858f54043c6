"""The plain attention that folded and split-off work is handed to: torch's, one of its kernels, or a caller's own."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..checks import require

KERNELS = {
    "native": None, "cudnn": "CUDNN_ATTENTION", "flash": "FLASH_ATTENTION", "efficient": "EFFICIENT_ATTENTION",
    "math": "MATH",
}  # fmt: skip


Attend = Callable[[Tensor, Tensor, Tensor, float], Tensor]  # of q, k, v (B, S, H, D) and a scale, (B, Sq, H, D)


@dataclass(frozen=True)
class Plain:
    """A plain attention.

    Args:
        name: what ``explain`` calls it.
        function: ``function(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None,
            enable_gqa=False)`` on ``(B, S, H, D)``, as diffusers' ``dispatch_attention_fn``. It returns
            ``(B, Sq, H, D)`` in the dtype of ``query``.
        returns_lse: with ``return_lse=True`` it returns ``(out, lse)``, ``lse (B, H, Sq)`` of natural logarithms. A
            function says so by an attribute of this name; many have the parameter and refuse it.
    """

    name: str
    function: Callable[..., Any]
    returns_lse: bool = False

    @staticmethod
    def of(plain: str | Callable | Plain | None) -> Plain | None:
        """What a caller names or hands over.

        Raises:
            ValueError: neither a function nor the name of one of torch's kernels.
        """
        if plain is None or isinstance(plain, Plain):
            return plain
        expected = f"None, a function or one of {tuple(KERNELS)}"
        if isinstance(plain, str):
            require(plain in KERNELS, "plain", expected, repr(plain))
            return Plain(f"torch's {plain} attention", partial(_torch, plain))
        require(callable(plain), "plain", expected, repr(plain))
        name = getattr(plain, "__name__", type(plain).__name__)
        return Plain(name, plain, bool(getattr(plain, "returns_lse", False)))

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        """``(B, Sq, H, D)`` of ``q (B, Sq, H, D)`` and ``k, v (B, Sk, Hkv, D)``. Grouped heads become more rows of the
        same key head, so that any function will do."""
        share = q.shape[2] // k.shape[2]
        q = _as_rows(q, share)
        return _as_heads(self._checked(self._call(q, k, v, scale), q), share)

    def with_lse(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        """The same, and ``lse (B, H, Sq)``, if it :attr:`returns_lse`."""
        share = q.shape[2] // k.shape[2]
        q = _as_rows(q, share)
        found = self._call(q, k, v, scale, return_lse=True)
        pair = isinstance(found, tuple) and len(found) == 2 and isinstance(found[1], Tensor)
        require(pair, "plain", "a function that returns (out, lse) with return_lse=True", type(found).__name__)
        (out, lse), expected = found, (q.shape[0], q.shape[2], q.shape[1])
        require(lse.shape == expected, "plain", f"a function whose lse is (B, H, Sq), {expected}", tuple(lse.shape))
        lse = _as_heads(lse.transpose(1, 2)[..., None], share)  # (B, Sq, H, 1)
        return _as_heads(self._checked(out, q), share), lse[..., 0].transpose(1, 2)

    def _call(self, q: Tensor, k: Tensor, v: Tensor, scale: float, **options: Any) -> Any:
        return self.function(q, k, v, attn_mask=None, dropout_p=0.0, is_causal=False, scale=scale, **options)

    def _checked(self, out: Any, q: Tensor) -> Tensor:
        expected = tuple(q.shape), q.dtype
        found = (tuple(out.shape), out.dtype) if isinstance(out, Tensor) else (type(out).__name__, None)
        require(found == expected, "plain", "a function that returns {} {}".format(*expected), "{} {}".format(*found))
        return out


def _as_rows(q: Tensor, share: int) -> Tensor:
    """``(B, S, Hkv * share, D)`` to ``(B, S * share, Hkv, D)``."""
    return q if share == 1 else q.unflatten(2, (-1, share)).transpose(2, 3).flatten(1, 2)


def _as_heads(x: Tensor, share: int) -> Tensor:
    """Inverse of :func:`_as_rows`."""
    return x if share == 1 else x.unflatten(1, (-1, share)).transpose(2, 3).flatten(2, 3)


def _torch(
    kernel: str, query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0,
    is_causal: bool = False, scale: float | None = None, enable_gqa: bool = False,
) -> Tensor:  # fmt: skip
    from torch.nn.attention import SDPBackend, sdpa_kernel

    name = KERNELS[kernel]
    pinned = contextlib.nullcontext() if name is None else sdpa_kernel(getattr(SDPBackend, name))
    with pinned:
        out = F.scaled_dot_product_attention(
            *(x.transpose(1, 2) for x in (query, key, value)), attn_mask=attn_mask, dropout_p=dropout_p,
            is_causal=is_causal, scale=scale, enable_gqa=enable_gqa,
        )  # fmt: skip
    return out.transpose(1, 2)


def each_row(
    q: Tensor, k: Tensor, v: Tensor, scale: float, unmasked: tuple[Tensor, ...],
    attend: Attend, gathered: Callable[[Tensor, Tensor], Tensor],
) -> Tensor:  # fmt: skip
    """``attend`` over the keys that are there: all, or of every batch row its own in a call of its own.

    Args:
        q: ``(B, Sq, H, D)``; k, v: batches first.
        unmasked: of each row of the mask, ``(n,)`` the places of its keys; empty where there is no mask.
        attend: of ``q, k, v, scale``, ``(B, Sq, H, D)``.
        gathered: some places of k or of v.
    """
    if not unmasked:
        return attend(q, k, v, scale)
    outs = []
    for n, places in enumerate(unmasked):
        row = slice(n, n + 1) if len(unmasked) > 1 else slice(None)
        if len(places):
            outs.append(attend(q[row], gathered(k[row], places), gathered(v[row], places), scale))
        else:
            outs.append(torch.zeros_like(q[row]))
    return torch.cat(outs) if len(outs) > 1 else outs[0]


_CURRENT: ContextVar[Plain | None] = ContextVar("plain", default=None)


@contextlib.contextmanager
def using(plain: Plain | None) -> Iterator[None]:
    """What calls that name no plain attention take, in this thread, inside the context."""
    token = _CURRENT.set(plain)
    try:
        yield
    finally:
        _CURRENT.reset(token)


def chosen(plain: str | Callable | None, backend: str) -> Plain | None:
    """What a call takes: what it names, else that of :func:`using`.

    Raises:
        ValueError: no plain attention; one beside a backend that folds nothing; one in compiled code.
    """
    if torch.compiler.is_compiling():
        require(plain is None, "plain", "None in compiled code", repr(plain))
        return None
    if plain is None:
        return _CURRENT.get()
    found = Plain.of(plain)
    expected = '"auto" or "sdpa" with a plain attention (the others hand no work to it)'
    require(backend in ("auto", "sdpa"), "backend", expected, repr(backend))
    return found
