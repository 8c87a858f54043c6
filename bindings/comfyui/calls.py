"""One call of a model that is steered: what its attention layers do, and how the host reaches it.

The host is reached by two doors of its own, both in the options of this one call: a patch of queries and keys before
their rotation, and an override of attention. Others who hold them keep them.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from torch import Tensor

from fastrope.backends.plain import Plain, using
from fastrope.checks import require

from ..image.rescaled import Rescaled
from ..image.sequence import JointSequence
from ..image.work import LayerWork
from .models import Family
from .rescaled import table_of

PATCH, OVERRIDE = "attn1_patch", "optimized_attention_override"
TABLE = 2e-2  # how far cosines may be off: some hosts keep them in half precision
_IGNORING: set[str] = set()  # overrides that were seen to leave the attention they are given out


class Positions:
    """The tokens and angles of a sequence, and whether they were seen to be the host's.

    Args:
        sequence, rope: as we read them.
        trusted: whether the host's embedder is its own.
    """

    def __init__(self, sequence: JointSequence, rope: Any, trusted: bool) -> None:
        self.sequence, self.rope, self.trusted = sequence, rope, trusted
        self._seen = False

    def compare(self, table: Any) -> None:
        """Hold our angles against the host's ``(B, 1, S, D/2, 2, 2)``, the first time. Where another node moved tokens,
        the host goes on to rotate."""
        if self._seen or not isinstance(table, Tensor):
            return
        self._seen = True
        cosines = table.detach()[:1, ..., 0, 0].reshape(-1, *table.shape[-4:-2])[0].double().cpu()
        ours = self.rope.angles.cos()
        if cosines.shape != ours.shape or not bool(((cosines - ours).abs() < TABLE).all()):
            self.trusted = False

    def require_own(self, what: str) -> None:
        """Require, for ``what``, positions that no other node has changed.

        Raises:
            NotImplementedError: another node has.
        """
        if not self.trusted:
            raise NotImplementedError(
                "positions: expected the host's own, received those of a node that changes its position embedding; "
                f"{what} does not go with it"
            )


class ModelCall:
    """What the layers of one call do.

    Args:
        family, transformer: of the model.
        positions: of the tokens.
        works: of each layer, None where it stays as it is.
        probes: of each layer, called with its queries and keys; None where nobody looks.
        rescaled: other angles for all layers, which ``works`` have already.
        backend: as in :func:`fastrope.attention`.
    """

    def __init__(
        self,
        family: Family,
        transformer: Any,
        positions: Positions,
        works: tuple[LayerWork | None, ...],
        probes: tuple[Callable | None, ...],
        rescaled: Rescaled | None = None,
        backend: str = "auto",
    ) -> None:
        self._family, self._transformer = family, transformer
        self._positions, self._works, self._probes = positions, works, probes
        self._rescaled, self._table = rescaled, None
        self._backend = backend
        self._tokens = len(positions.sequence.layout())
        self._unrotated: int | None = None  # the layer whose queries and keys the host has left unrotated
        self._others: Callable | None = None  # the override that was there before

    @property
    def idle(self) -> bool:
        """Whether the host does everything."""
        return self._rescaled is None and not any(self._works) and not any(self._probes)

    def options(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """The host's options for this call, with both doors open: behind all patches, around any override."""
        patches = dict(given.get("patches") or {})
        patches[PATCH] = [*patches.get(PATCH, ()), self.patch]
        self.surround(given)
        return {**given, "patches": patches, OVERRIDE: self.override}

    def surround(self, given: Mapping[str, Any]) -> None:
        """Take in the override that is there already."""
        self._others = given.get(OVERRIDE)

    def finish(self) -> None:
        """After the call.

        Raises:
            NotImplementedError: attention that went past the host's override, with queries and keys unrotated.
        """
        if self._unrotated is not None:
            self._refuse_detour()

    # ---- doors -------------------------------------------------------------------------------------------------------

    def patch(self, q: Tensor, k: Tensor, v: Tensor, pe: Any = None, extra_options: Any = None, **_: Any) -> dict:
        """Before the rotation, ``(B, H, S, D)``: takes it over in layers that are modulated."""
        if self._unrotated is not None:
            self._refuse_detour()
        layer = self._family.layer(self._transformer, extra_options or {})
        if layer is None or (self._rescaled is None and self._idle(layer)):
            return {}
        self._positions.compare(pe)
        answer = {} if self._rescaled is None else {"pe": self._own_table(self._rescaled, pe)}
        if self._idle(layer):
            return answer
        fits = q.shape[2] == k.shape[2] == self._tokens and self._works[layer] is not None
        if pe is None or not (self._family.rotates_last and self._positions.trusted and fits):
            return answer
        self._unrotated = layer
        return {"pe": None}

    def override(
        self, func: Callable, q: Tensor, k: Tensor, v: Tensor, heads: int, *args: Any, **kwargs: Any
    ) -> Tensor:
        """In the place of the host's attention ``func``. An override that was there before is asked first, with our
        attention for the host's."""
        layer = self._family.layer(self._transformer, kwargs.get("transformer_options") or {})
        unrotated, self._unrotated = self._unrotated, None
        others = self._others
        if layer is None or self._idle(layer):
            return (
                func(q, k, v, heads, *args, **kwargs)
                if others is None
                else others(func, q, k, v, heads, *args, **kwargs)
            )
        steered = partial(self._attend, layer, unrotated != layer)
        name = _name_of(others)
        if others is not None and name not in _IGNORING:
            calls = []

            def attend(*given: Any, **named: Any) -> Tensor:
                calls.append(layer)
                return steered(func, *given, **named)

            out = others(attend, q, k, v, heads, *args, **kwargs)
            if calls:
                return out
            _IGNORING.add(name)
            logging.warning(f"fastrope: {name} computes attention of its own; it is given the steered queries and keys")
        host = func if others is None else partial(others, func)
        return steered(host, q, k, v, heads, *args, **kwargs)

    def _own_table(self, rescaled: Rescaled, pe: Any) -> Tensor:
        """In the place of the host's table, the same for all layers.

        Raises:
            NotImplementedError: another node moved the tokens, or rotates them.
        """
        if not (isinstance(pe, Tensor) and self._positions.trusted):
            raise NotImplementedError(
                "positions: expected the host's own, received those of a node that changes its position embedding; "
                "High resolution does not go with it"
            )
        if self._table is None:
            self._table = table_of(rescaled, pe)
        return self._table

    def _idle(self, layer: int) -> bool:
        return self._works[layer] is None and self._probes[layer] is None

    def opaque(self, layer: int, host: Callable, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        """In compiled code, where the host has rotated: ``(B, H, S, D)``, through the host's attention ``host`` and any
        override but ours."""

        def func(q: Tensor, k: Tensor, v: Tensor, heads: int, *args: Any, **kwargs: Any) -> Tensor:
            return host(q, k, v, heads, *args, **{**kwargs, "transformer_options": {}, "_inside_attn_wrapper": True})

        options = self._family.options(self._transformer, layer)
        given = dict(mask=mask, skip_reshape=True, skip_output_reshape=True, transformer_options=options)
        return self.override(func, q, k, v, q.shape[1], **given)

    # ---- attention ---------------------------------------------------------------------------------------------------

    def _attend(
        self,
        layer: int,
        applied: bool,
        host: Callable,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        heads: int,
        mask: Tensor | None = None,
        attn_precision: Any = None,
        skip_reshape: bool = False,
        skip_output_reshape: bool = False,
        **kwargs: Any,
    ) -> Tensor:
        work, probe = self._works[layer], self._probes[layer]
        tokens_first = [_tokens_first(x, heads, q, skip_reshape) for x in (q, k, v)]
        self._check(tokens_first, mask, work, kwargs.get("scale"))
        if probe is not None:
            probe(tokens_first[0], tokens_first[1], work, applied)
        if work is None:  # a probe alone
            given = dict(mask=mask, attn_precision=attn_precision, skip_reshape=skip_reshape,
                         skip_output_reshape=skip_output_reshape, **kwargs)  # fmt: skip
            return host(q, k, v, heads, **given)
        with using(_plain(host, kwargs)):
            out = work.attend(tokens_first[0], tokens_first[1], tokens_first[2], applied, self._backend)
        return out.transpose(1, 2) if skip_output_reshape else out.flatten(2)

    def _check(self, qkv: list[Tensor], mask: Tensor | None, work: LayerWork | None, scale: Any) -> None:
        counts = [x.shape[1] for x in qkv]
        if counts != [self._tokens] * 3:
            raise NotImplementedError(
                f"tokens: expected {self._tokens} queries, keys and values in a steered layer (prompt, picture and "
                f"references), received {counts}; a node that adds or drops tokens (Flux KV Cache, IP-Adapter) does "
                "not go with this one"
            )
        if mask is not None and not (work is None or work.masked):
            raise NotImplementedError(
                "attention mask: expected none in a steered layer, received one from another node (a style model's "
                "strength, a regional prompt)"
            )
        plain = scale is None or abs(float(scale) - qkv[0].shape[3] ** -0.5) < 1e-6
        require(plain, "scale", f"the host's {qkv[0].shape[3]} ** -0.5", scale)

    def _refuse_detour(self) -> None:
        self._unrotated = None
        raise NotImplementedError(
            "attention: expected the host's own attention, received one that another node put in its place, past the "
            "host's override; remove that node"
        )


def _tokens_first(x: Tensor, heads: int, q: Tensor, skip_reshape: bool) -> Tensor:
    """``(B, S, H, D)`` of what the host hands to its attention: ``(B, H, S, D)``, or ``(B, S, H D)``."""
    return x.transpose(1, 2) if skip_reshape else x.unflatten(-1, (-1, q.shape[-1] // heads))


def _plain(host: Callable, given: Mapping[str, Any]) -> Plain:
    """The host's attention, for what folds into queries and keys and for queries that nothing modulates."""

    def attend(query: Tensor, key: Tensor, value: Tensor, **_: Any) -> Tensor:
        heads_first = (x.transpose(1, 2) for x in (query, key, value))
        out = host(*heads_first, query.shape[2], skip_reshape=True, skip_output_reshape=True, **given)
        return out.transpose(1, 2)

    return Plain("ComfyUI's attention", attend)


def _name_of(override: Callable | None) -> str:
    return f"{getattr(override, '__module__', '')}.{getattr(override, '__qualname__', type(override).__qualname__)}"
