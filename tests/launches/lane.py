"""Every launch that a GPU would be asked for, without one: triton's own launch path over a driver that checks.

``python tests/launches/lane.py --arch sm_90 --out launches.json`` runs calls of every kind: just-in-time compilation,
C launchers and tensor maps are triton's own, the driver below them is ``stub_cuda.c``. Numbers mean nothing, since no
kernel runs. Rows: case, kernels launched, kernels compiled for it, and the error if a launch was refused; then of the
same call again: kernels launched, how many went to their binary directly, those whose binary triton would not have
taken, and of some calls the most bytes that they hold beyond inputs. After these come the calls of ``tests/gpu``, see
``gpu_suite.py``: some of every test, or all of them with ``--all`` (minutes).

A CUDA graph cannot be captured over a stub; instead, rows of ``tests/gpu`` say what the same call reads on the host
when made again, and the stub has no function that allocates, copies or waits, so that a launch that wants one fails.
"""

from __future__ import annotations

import argparse
import ctypes
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

HERE = Path(__file__).resolve().parent
TARGETS = {  # architecture: compute capability, bytes of shared memory a block may have
    "sm_80": (80, 166912), "sm_89": (89, 101376), "sm_90": (90, 232448), "sm_100": (100, 232448),
    "sm_120": (120, 101376),
}  # fmt: skip
WEIGHED = ("plain auto", "bias auto", "regions auto", "key bias auto")  # calls whose memory is a row's "peak"


def start_over(arch: str) -> None:
    """Build the driver and run this script again with it, unless that has happened."""
    if os.environ.get("STUB_ARCH") == arch:
        return
    folder = Path(os.environ.get("STUB_FOLDER") or tempfile.mkdtemp(prefix="fastrope-stub-"))
    include = Path(importlib.util.find_spec("triton").origin).parent / "backends" / "nvidia" / "include"
    library = folder / "libcuda.so.1"
    command = ["cc", "-O1", "-w", "-shared", "-fPIC", "-Wl,-soname,libcuda.so.1", f"-I{include}"]
    subprocess.run([*command, str(HERE / "stub_cuda.c"), "-o", str(library)], check=True)
    (folder / "libcuda.so").unlink(missing_ok=True)
    (folder / "libcuda.so").symlink_to(library)
    os.environ.update(
        STUB_ARCH=arch, STUB_SHARED=str(TARGETS[arch][1]), TRITON_LIBCUDA_PATH=str(folder), TRITON_INTERPRET="0",
        XDG_CACHE_HOME=str(folder),
        LD_LIBRARY_PATH=f"{folder}:{os.environ.get('LD_LIBRARY_PATH', '')}",
    )  # fmt: skip
    os.environ.setdefault("TRITON_CACHE_DIR", str(folder / "cache"))
    os.execv(sys.executable, [sys.executable, *sys.argv])


def pretend(arch: str) -> None:
    """Make tensors of the CPU look like those of a GPU, to triton and to the package."""
    from triton.backends.compiler import GPUTarget
    from triton.backends.nvidia import driver as nvidia
    from triton.runtime import driver

    capability = TARGETS[arch][0]

    class Driver(nvidia.CudaDriver):
        def __init__(self):
            self.utils, self.launcher_cls = nvidia.CudaUtils(), nvidia.CudaLauncher
            self.get_device_capability = lambda device: divmod(capability, 10)
            self.get_current_stream = self.get_current_device = lambda *_: 0
            self.set_current_device = lambda device: None

        def get_current_target(self):
            return GPUTarget("cuda", capability, 32)

    driver.set_active(Driver())
    import torch

    from fastrope import device, verification
    from fastrope.backends import folded
    from fastrope.kernels import config

    device.architecture = lambda _: config.arch_of(*divmod(capability, 10))
    device.kernel_obstacle = lambda _: None
    device.on_gpu = lambda _: True
    device.capability = lambda _: "sm_90"
    verification.needed = lambda _: False  # numbers mean nothing here

    class NoAttention:  # torch's kernels are not ours to launch
        def __getattr__(self, name):
            return getattr(torch.nn.functional, name)

        @staticmethod
        def scaled_dot_product_attention(q, k, v, **_):
            return torch.empty_like(q)

    folded.F = NoAttention()


def calls():
    """``(name, function)`` of every kind of call."""
    import torch

    import fastrope as fr
    from fastrope import dispatch, sample
    from fastrope.bench import block, match
    from fastrope.bench.cases import CASES, CHECKED
    from fastrope.bench.problem import Problem
    from fastrope.bench.workloads import WORKLOADS
    from fastrope.planning import polynomial

    cpu, layout = torch.device("cpu"), fr.TokenLayout(77, (24, 24), references=[(24, 24)])
    small = replace(WORKLOADS["kontext"], tokens=layout, heads=4)
    cases = {name: case for name, case in (CASES | CHECKED).items() if case.suits(small)}
    edges = ("all", "all-per-query")

    def attend(workload, case, backend="triton", form=None, **options):
        def made():
            problem = Problem.make(workload, cases[case], cpu, torch.bfloat16)
            problem = problem if form is None else getattr(problem, form)
            return lambda: fr.attention(*problem.inputs(), plan=problem.plan, backend=backend, debug=False, **options)

        def run():
            return made()()

        run.made = made
        return run

    def verified(case):
        """The small call by which the kernels of a case are verified on a card without rows."""
        problem = Problem.make(small, cases[case], cpu, torch.bfloat16)
        call = problem.plan.lowered, *problem.inputs()
        kind = dispatch._kind(dispatch.decide(*call, "auto"), *call[:3])
        drawn = sample.draw(kind, cpu)
        lowered = drawn.plan.lowered
        decision = dispatch.by_route(kind.route, lowered, *drawn[:3])
        dispatch._attend(decision, lowered, *drawn[:3], 0.1, True, None)

    for case in cases:
        for backend in ("triton", "auto"):
            yield f"{case} {backend}", attend(small, case, backend)
        yield f"{case} verified", lambda case=case: verified(case)
    for case in ("plain", *edges):
        yield f"{case} applied", attend(small, case, form="applied")
        yield f"{case} lse", attend(small, case, "auto", return_lse=True)
        for form in ("grouped", "strided", "padded"):
            yield f"{case} {form}", attend(small, case, form=form)
    masked = replace(small, batch=2, prompts=(77, 5))
    for case in ("plain", *edges):
        yield f"{case} masked triton", attend(masked, case)
        yield f"{case} masked auto", attend(masked, case, "auto")
    odd = replace(small, tokens=fr.TokenLayout(1, (7, 5), references=[(7, 5)]))
    for case in ("plain", *edges):
        yield f"{case} odd", attend(odd, case, "auto")

    def in_tiles(workload, **options):
        """Of a polynomial, however few queries fill its tiles."""
        call = attend(workload, "all-per-query", **options)

        def run():
            least, polynomial.LEAST_FILLED = polynomial.LEAST_FILLED, 0.0
            try:
                return call()
            finally:
                polynomial.LEAST_FILLED = least

        return run

    for name, workload in (("dim 128", small), ("dim 64", replace(small, dim=64, axes_dim=(8, 28, 28)))):
        yield f"polynomial {name}", in_tiles(workload)
        yield f"polynomial {name} padded", in_tiles(workload, form="padded")
        yield f"polynomial {name} masked", in_tiles(replace(workload, batch=2, prompts=(77, 5)))
    for case in ("plain", "values", "all"):
        yield (
            f"{case} joint",
            lambda case=case: block.ours(block.BlockProblem.of(small, cases[case], cpu, torch.bfloat16)).run(),
        )
    yield "match", match.problem(match.WORKLOADS["llamagen"], cpu)["triton"]


class Watch:
    """Direct launches of what runs inside, each held to what triton would launch."""

    def __init__(self):
        self.direct, self.other = 0, []

    def __enter__(self):
        from fastrope.kernels import launch

        prepared, watch = launch.Prepared, self
        self.directly = directly = prepared.directly

        def compared(self, binary, stream, tensors):
            directly(self, binary, stream, list(tensors))
            watch.direct += 1
            for at, *tile in self.tiles:
                tensors[at] = launch.TensorDescriptor(tensors[at], *tile)
            named = dict(zip(self.names, tensors, strict=True))
            if self.kernel.run(**named, **self.arguments, grid=self.grid, warmup=True) is not binary:
                watch.other.append(self.kernel.__name__)

        prepared.directly = compared
        return self

    def __exit__(self, *_):
        from fastrope.kernels import launch

        launch.Prepared.directly = self.directly


def peak_bytes(call) -> int:
    """The most bytes that a call holds beyond what was there before; a dispatch mode would see one op."""
    from torch.profiler import ProfilerActivity, profile

    call()  # what is made once
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        call()
    held = most = 0
    for event in sorted(found.profiler.kineto_results.events(), key=lambda event: event.start_ns()):
        if event.name() == "[memory]":
            held += event.nbytes()
            most = max(most, held)
    return most


def observed(call) -> list[str]:
    """Kernels that a launch hook of triton's sees in a call."""
    from triton import knobs

    seen = []

    def note(metadata):
        seen.append(metadata.get()["name"])

    knobs.runtime.launch_enter_hook.add(note)
    try:
        call()
    finally:
        knobs.runtime.launch_enter_hook.remove(note)
    return seen


class Lane:
    """Makes calls, and rows of what they launch and compile."""

    def __init__(self, driver):
        from triton import knobs

        self.driver, self.compiled = driver, []
        driver.stub_launched.restype = ctypes.c_char_p
        # Before a compilation, where no test of tests/gpu listens; a true answer would skip it.
        knobs.runtime.jit_cache_hook = lambda *, fn, **_: self.compiled.append(fn.name)

    def made(self, call) -> tuple[dict, object]:
        """The row of a call, which is made twice, and what it returned."""
        self.compiled.clear()
        self.driver.stub_reset()
        try:
            result, error = call(), None
        except Exception as problem:  # one refused launch must not hide the others
            result, error = None, f"{type(problem).__name__}: {problem}"
        row = {"launched": self.launched(), "compiled": len(self.compiled), "error": error}
        if error is None:
            self.driver.stub_reset()
            with Watch() as watch:
                call()
            row |= {"again": self.launched(), "direct": watch.direct, "other": watch.other}
        return row, result

    def launched(self) -> list[str]:
        """Kernels since the last reset."""
        return self.driver.stub_launched().decode().split()


def rows_of_calls(lane: Lane) -> list[dict]:
    """Of the calls above."""
    rows = []
    for name, call in calls():
        if name not in os.environ.get("LANE_CASES", name).split(","):
            continue
        row, _ = lane.made(call)
        row["case"] = name
        if row["error"] is None:
            row["observed"] = observed(call) if name.startswith("plain") else None
            row["peak"] = peak_bytes(call.made()) if name in WEIGHED else None
        rows.append(row)
    return rows


def main() -> None:
    """Run what the arguments select and write the rows."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--arch", choices=TARGETS, default="sm_90")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--all", action="store_true", help="every case of the tests of tests/gpu, not some of each")
    parser.add_argument("--host", action="store_true", help="print host times instead, see bench/host.py")
    options = parser.parse_args()
    start_over(options.arch)
    pretend(options.arch)
    import torch

    driver = ctypes.CDLL("libcuda.so.1")
    if options.host:
        from fastrope.bench import host

        raise SystemExit(not host.report(torch.device("cpu"), driver.stub_reset))
    sys.path.insert(0, str(HERE.parent))  # what tests share
    import gpu_suite

    lane = Lane(driver)
    with torch.no_grad():
        rows = rows_of_calls(lane)
        if "LANE_CASES" not in os.environ:
            rows += gpu_suite.rows(lane, options.all)
    options.out.write_text(json.dumps(rows, indent=0))


if __name__ == "__main__":
    main()
