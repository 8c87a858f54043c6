"""What a transformer's own arguments tell of a call: the sequence, the step, and from both the plan of every layer."""

from __future__ import annotations

import inspect
import itertools
import weakref
from collections import OrderedDict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, fields, replace

import torch

import fastrope as fr
from fastrope.checks import require
from fastrope.modulations import MODULATIONS, Modulation

from .hosts import Call, Host
from .processors import Slot

PLAN_BYTES = 1 << 30  # plans kept for reuse; a plan of FLUX Kontext at 1024 px takes some 50 MB
KNOWN_TENSORS = 64


@dataclass(frozen=True, eq=False)
class JointSequence:
    """The tokens of a call: ``key`` identifies them by content, ``image_ids (tokens, axes)`` are on the CPU."""

    key: Hashable
    rope: fr.RoPE
    text: int
    image_ids: torch.Tensor


class Fingerprints:
    """The content of tensors as something to compare; the last ones seen are not read again."""

    def __init__(self):
        self._known: OrderedDict[tuple[int, int], tuple[torch.Tensor, Hashable]] = OrderedDict()

    def __call__(self, x: torch.Tensor) -> Hashable:
        try:
            key = id(x), x._version
        except RuntimeError:  # inference tensors have no version
            return self._read(x)
        if key not in self._known:
            self._known[key] = x, self._read(x)  # x is held, so that its id stays its own
            if len(self._known) > KNOWN_TENSORS:
                self._known.popitem(last=False)
        self._known.move_to_end(key)
        return self._known[key][1]

    @staticmethod
    def _read(x: torch.Tensor) -> Hashable:
        content = x.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
        return x.dtype, tuple(x.shape), content


class CallState:
    """Shared by the processors of one handle. Before every forward it fills their slots.

    Args:
        host, model: the transformer and its row of the table.
        methods: modulations and methods, flat.
        slots: one per attention layer, in order of execution.
        pipe: the pipeline the handle was made for, if any; it knows the step.
    """

    def __init__(self, host: Host, model: torch.nn.Module, methods: Sequence, slots: Sequence[Slot], pipe=None):
        self.host = host
        self.methods = tuple(methods)
        self.slots = tuple(slots)
        self.axes_dim = host.axes_dim(model)
        self.told: tuple[int, int] | None = None
        self._pipe = weakref.ref(pipe) if pipe is not None else lambda: None
        self._signature = inspect.signature(type(model).forward)
        self._fingerprint = Fingerprints()
        self._sequences: OrderedDict[Hashable, JointSequence] = OrderedDict()
        self._plans: OrderedDict[Hashable, fr.Plan | None] = OrderedDict()

    def before_forward(self, module, args, kwargs) -> None:
        """Forward pre-hook of the transformer."""
        for slot in self.slots:
            slot.filled = False
        call = self._signature.bind_partial(module, *args, **kwargs).arguments
        plans = self._layer_plans(module, call) if self.methods else [None] * len(self.slots)
        for slot, plan in zip(self.slots, plans, strict=True):
            slot.plan, slot.filled = plan, True

    def _layer_plans(self, module, call: Call) -> list[fr.Plan | None]:
        sequence = self._sequence(module, call)
        if all(isinstance(m, MODULATIONS) for m in self.methods):
            return [self._plan(sequence, self.methods)] * len(self.slots)
        step, num_steps = self.told or self._step(call) or (0, fr.Site.num_steps)
        tokens = read_layout(sequence, self.host)
        plans, before = [], None
        for layer in range(len(self.slots)):
            site = fr.Site(tokens, layer, step, num_steps, self.axes_dim, self.host.spatial_axes)
            modulations = ask(self.methods, site)
            same = before is not None and len(before) == len(modulations)
            if same and all(a is b for a, b in zip(before, modulations, strict=True)):
                plans.append(plans[-1])
            else:
                plans.append(self._plan(sequence, modulations))
            before = modulations
        return plans

    def _sequence(self, module, call: Call) -> JointSequence:
        text, image = self.host.ids(call)
        hidden = call.get("hidden_states")
        device = hidden.device if isinstance(hidden, torch.Tensor) else image.device
        key = self._fingerprint(text), self._fingerprint(image), device, self.host.theta(module)
        if key not in self._sequences:
            # Through float64 before anything is computed: hosts hand ids over in the dtype of the model.
            wide = torch.float32 if device.type == "mps" else torch.float64
            parts = (text, image) if self.host.order == "text-first" else (image, text)
            positions = torch.cat([part.detach().to(device, wide) for part in parts])
            rope = fr.RoPE.axial(positions, self.axes_dim, self.host.theta(module), self.host.pairing)
            self._check_embedding(module, positions, rope)
            self._sequences[key] = JointSequence(key, rope, len(text), image.detach().cpu().double())
            if len(self._sequences) > 8:
                self._sequences.popitem(last=False)
        self._sequences.move_to_end(key)
        return self._sequences[key]

    def _check_embedding(self, module, positions: torch.Tensor, rope: fr.RoPE) -> None:
        """Modulated layers rotate by our angles: they must be the host's, whatever was done to its embedding."""
        with torch.no_grad():
            gap = (self.host.cosines(module, positions.float()).double() - rope.angles.cos().double()).abs().max()
        if not gap < 1e-3:
            raise NotImplementedError(
                f"{type(module).__name__}: expected the rotary embedding of diffusers with theta "
                f"{self.host.theta(module):g}, received another one (its cosines differ by {float(gap):.2g})"
            )

    def _plan(self, sequence: JointSequence, modulations: Sequence[Modulation]) -> fr.Plan | None:
        key = sequence.key, tuple(self._content(m) for m in modulations)
        if key not in self._plans:
            rope = sequence.rope
            plan = fr.plan(rope=rope, modulations=[_to(m, rope.angles.device) for m in modulations])
            self._plans[key] = plan if plan.spec.modulated else None
            while len(self._plans) > 1 and sum(p.nbytes for p in self._plans.values() if p) > PLAN_BYTES:
                self._plans.popitem(last=False)
        self._plans.move_to_end(key)
        return self._plans[key]

    def _content(self, m: Modulation) -> Hashable:
        parts = []
        for value in (getattr(m, f.name) for f in fields(m)):
            if isinstance(value, torch.Tensor):
                value = self._fingerprint(value)
            elif isinstance(value, slice):
                value = value.start, value.stop, value.step
            parts.append(value)
        return (type(m), *parts)

    def _step(self, call: Call) -> tuple[int, int] | None:
        pipe = self._pipe()
        return pipe and find_step(pipe, call.get("timestep"), self.host.steps_per_unit)


def find_step(pipe, timestep: torch.Tensor | None, steps_per_unit: float) -> tuple[int, int] | None:
    """Index of the current step in the scheduler's timesteps, and their number.

    Inside the pipeline's loop the scheduler knows the index, without a device synchronisation. Elsewhere (another
    pipeline that shares the transformer, a direct call) the timestep's value is looked up. None where both fail.
    """
    scheduler = getattr(pipe, "scheduler", None)
    timesteps = getattr(scheduler, "timesteps", None)
    if timesteps is None or len(timesteps) == 0:
        return None
    index = getattr(scheduler, "step_index", None)
    if index is None:
        index = getattr(scheduler, "begin_index", None)
    count = len(timesteps)
    if index is not None and index < count and getattr(pipe, "_current_timestep", None) is not None:
        return int(index), count
    if not isinstance(timestep, torch.Tensor):
        return None
    dtype = timestep.dtype if timestep.is_floating_point() else torch.float32
    # The pipeline rounds to the model's dtype, then divides; the same here makes equal values equal.
    known = (torch.as_tensor(timesteps).cpu().to(dtype) / steps_per_unit).double()
    distance = (known - timestep.flatten()[0].cpu().double()).abs()
    nearest = int(distance.argmin())
    if distance[nearest] > 1e-3:
        return None
    if index is not None and index < count and distance[index] == distance[nearest]:
        return int(index), count  # neighbours that half precision rounds to one value
    return nearest, count


def ask(methods: Sequence, site: fr.Site) -> list[Modulation]:
    """All modulations at a site.

    Raises:
        ValueError: a method that returns something else than a list of modulations.
    """
    found = []
    for method in methods:
        if isinstance(method, MODULATIONS):
            found.append(method)
            continue
        answer = method.modulations(site)
        ok = isinstance(answer, (list, tuple)) and all(isinstance(m, MODULATIONS) for m in answer)
        require(ok, f"{type(method).__name__}.modulations", "a list of modulations", repr(answer))
        found.extend(answer)
    return found


def read_layout(sequence: JointSequence, host: Host) -> fr.TokenLayout:
    """The layout of a sequence, its grids read off the image ids: the first is the target.

    Raises:
        ValueError: ids that are not one raster grid after another.
    """
    grids = read_grids(sequence.image_ids, host.spatial_axes)
    return fr.TokenLayout(sequence.text, grids[0], grids[1:], host.order)


def read_grids(ids: torch.Tensor, spatial_axes: tuple[int, ...]) -> list[tuple[int, int]]:
    """``(rows, columns)`` of the raster grids that ``ids (tokens, axes)`` list one after another.

    A grid ends where the rows stop counting up, get another width, or an axis that is not spatial changes.
    """
    row_axis, column_axis = spatial_axes
    frames = [axis for axis in range(ids.shape[1]) if axis not in spatial_axes]
    along, down = torch.zeros(2, ids.shape[1], dtype=ids.dtype)
    along[column_axis] = down[row_axis] = 1
    ends = (ids.diff(dim=0) != along).any(dim=1).nonzero().flatten() + 1
    bounds = [0, *ends.tolist(), len(ids)]
    grids: list[tuple[int, int]] = []
    first = previous = 0  # tokens that open the grid and the row before
    for start, stop in itertools.pairwise(bounds):
        width = stop - start
        if grids and grids[-1][1] == width and torch.equal(ids[start] - ids[previous], down):
            grids[-1] = grids[-1][0] + 1, width
        else:
            # Half precision tears grids of more than 256 tokens a side; pieces of one do not open where it does.
            whole = not torch.equal(ids[start, frames], ids[first, frames]) or torch.equal(ids[start], ids[first])
            require(whole, "img_ids", "raster grids one after another, row by row", f"a break at token {start}")
            grids.append((1, width))
            first = start
        previous = start
    return grids


def _to(m: Modulation, device: torch.device) -> Modulation:
    """A modulation with its tensors on the model's device."""
    tensors = {f.name: getattr(m, f.name) for f in fields(m) if isinstance(getattr(m, f.name), torch.Tensor)}
    return replace(m, **{name: t.to(device) for name, t in tensors.items()})
