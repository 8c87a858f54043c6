"""Prepared launches: what triton works out for every launch is worked out once for tensors of one layout.

Triton's own launch binds names, classifies every argument and looks for the binary among those compiled, which takes
the host longer than many a kernel takes the device. All of that follows from the layouts of tensors and from plain
numbers. So a launch is described by a function of these alone, which is called once for the same arguments. The first
launch goes through triton, which compiles and returns the binary; later ones call the launcher of this binary.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any, NamedTuple

import torch
import triton
from triton import knobs
from triton.runtime import JITFunction, driver
from triton.tools.tensor_descriptor import TensorDescriptor

# Releases whose binaries are launched as ``compiled.run(*grid, stream, function, packed_metadata, *hooks, *arguments)``
# and whose choice of a binary was read: see :class:`Layout`. Others take triton's own way.
KNOWN_RELEASES = ("3.6.", "3.7.", "3.8.", "3.9.")
MOST_PREPARED = 4096  # then all are forgotten: lengths that come and go must not pile up


class Layout(NamedTuple):
    """What the description of a launch may read of a tensor. On CUDA, triton chooses a binary by the dtype, by whether
    16 divides the address, and by the values of strides and other numbers."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    misaligned: int  # address modulo 16 bytes


def batch_stride(x: Layout | None) -> int:
    """Elements from one batch row to the next of a ``(1 or B, ...)`` table; 0 where the rows share it."""
    return x.strides[0] if x is not None and x.shape[0] > 1 else 0


def strides(name: str, x: Layout, axes: str) -> dict[str, int]:
    """Strides of ``x`` by the names of a kernel's parameters: ``stride_<name><axis>``."""
    return {f"stride_{name}{axis}": stride for axis, stride in zip(axes, x.strides, strict=True)}


class Launch(NamedTuple):
    """The description of a launch, without the tensors.

    Args:
        kernel: its first parameters are the tensors, in their order.
        grid: numbers of programs.
        arguments: the other parameters by name, and compiler options.
        stand_ins: for a tensor that may be missing, the one whose address is passed for it. Its loads are masked off; a
            flag for each such tensor would double the number of binaries. A missing one without a stand-in is None.
        tiles: shape, strides and tile of the tensors that are passed as descriptors.
    """

    kernel: Any
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    stand_ins: dict[str, str] = {}  # noqa: RUF012
    tiles: dict[str, tuple[list[int], list[int], list[int]]] = {}  # noqa: RUF012


class Prepared:
    """A launch for tensors of one layout, on any device."""

    def __init__(self, names: tuple[str, ...], described: Launch):
        self.kernel, grid, arguments, stand_ins, tiles = described
        parameters = tuple(self.kernel.arg_names)
        if names != parameters[: len(names)]:
            raise TypeError(f"launch: expected tensors {parameters[: len(names)]}, received {names}")
        self.names, self.grid, self.arguments = names, (*grid, 1, 1)[:3], arguments
        self.numbers = [arguments[name] for name in parameters[len(names) :]]
        self.stand_ins = [(names.index(name), names.index(other)) for name, other in stand_ins.items()]
        self.tiles = [(names.index(name), *tile) for name, tile in tiles.items()]
        self.described: list[dict[str, Any]] = []  # the same, checked
        self.binaries: dict[int, Any] = {}  # by device

    def __call__(self, tensors: list) -> None:
        for missing, other in self.stand_ins:
            if tensors[missing] is None:
                tensors[missing] = tensors[other]
        if not self.binaries or self.kernel.pre_run_hooks or not _unobserved():
            self.through_triton(tensors)
            return
        active: Any = driver.active
        device = active.get_current_device()
        if device in self.binaries:
            self.directly(self.binaries[device], active.get_current_stream(device), tensors)
        else:
            self.through_triton(tensors)

    def directly(self, binary: Any, stream: int, tensors: list) -> None:
        """Launch the binary that triton chose for tensors of this layout."""
        for (at, *_), fields in zip(self.tiles, self.described, strict=True):
            tensors[at], tensor = object.__new__(TensorDescriptor), tensors[at]
            tensors[at].__dict__.update(fields, base=tensor)
        binary.run(
            *self.grid, stream, binary.function, binary.packed_metadata, None, None, None, *tensors, *self.numbers
        )

    def through_triton(self, tensors: list) -> None:
        """Triton's own launch, which compiles where needed; remembers the binary."""
        descriptors = [TensorDescriptor(tensors[at], shape, strides, tile) for at, shape, strides, tile in self.tiles]
        for (at, *_), descriptor in zip(self.tiles, descriptors, strict=True):
            tensors[at] = descriptor
        binary = self.kernel[self.grid](**dict(zip(self.names, tensors, strict=True)), **self.arguments)
        active: Any = driver.active if isinstance(self.kernel, JITFunction) else None  # None: interpreted
        # On AMD the choice of a binary also depends on the size of a tensor's storage.
        known = triton.__version__.startswith(KNOWN_RELEASES)
        if active is not None and known and _unobserved() and active.get_current_target().backend == "cuda":
            self.described = [{k: v for k, v in vars(x).items() if k != "base"} for x in descriptors]
            self.binaries[active.get_current_device()] = binary


def _unobserved() -> bool:
    """True unless something observes launches, such as triton's profiler, or asks for another binary than usual."""
    runtime = knobs.runtime
    listened = runtime.launch_enter_hook.calls or runtime.launch_exit_hook.calls
    changed = runtime.debug or knobs.compilation.instrumentation_mode
    return not (listened or changed or getattr(runtime, "add_stages_inspection_hook", None))


_PREPARED: dict[tuple, Prepared] = {}


def launch(describe: Callable[..., Launch], tensors: dict[str, torch.Tensor | None], *facts: Hashable) -> None:
    """Launch what ``describe({name: Layout or None}, *facts)`` says on tensors of these layouts, on the current device.

    ``describe`` is defined at the top of a module and reads nothing but its arguments: for the same arguments it is
    called once.
    """
    key = describe, facts, *[
        None if x is None else (x.dtype, x.shape, x.stride(), x.data_ptr() % 16) for x in tensors.values()
    ]  # fmt: skip
    prepared = _PREPARED.get(key)
    if prepared is None:
        layouts = [layout and Layout(*layout) for layout in key[2:]]
        prepared = Prepared(tuple(tensors), describe(dict(zip(tensors, layouts, strict=True)), *facts))
        if len(_PREPARED) >= MOST_PREPARED:
            _PREPARED.clear()
        _PREPARED[key] = prepared
    prepared(list(tensors.values()))
