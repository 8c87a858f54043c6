"""The demo from computation to report."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

import fastrope as fr

from ..outputs import write_text
from . import bands, groups, kontext, maps, sheets
from .kontext import NAMES, Settings
from .probe import chosen_backend
from .report import Picture, Section, Table, write
from .worker import Worker

FILES = (*(f"{name}.png" for name in ("bands", "maps", "groups", "scene", "runs", "backends")), "numbers.json",
         "report.md", "report.html")  # fmt: skip
TOLERANCE = 1e-4  # largest difference of a float32 run's final latents from eager in float64; pixels span -1..1


@dataclass(frozen=True)
class Agreement:
    """How far a backend's final latents are from the reference, or why it did not run."""

    backend: str
    errors: dict[str, tuple[float, float]]  # name -> (max, mean) absolute difference
    absent: str | None = None  # the backend cannot run here
    failure: str | None = None  # it should have

    @property
    def worst(self) -> float:
        """Largest difference of any run."""
        return max((largest for largest, _ in self.errors.values()), default=0.0)

    @property
    def good(self) -> bool:
        """Ran within tolerance, or cannot run here for a reason."""
        return self.failure is None and self.worst <= TOLERANCE


def build(out: Path, device: torch.device, quick: bool) -> int:
    """Compute, draw and write everything into ``out``; the exit code of :func:`fastrope.demo.main`."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # tensors this small lose more to waiting threads than they gain; the worker has its own
    try:
        return _build(out, device, quick)
    finally:
        torch.set_num_threads(threads)


def _build(out: Path, device: torch.device, quick: bool) -> int:
    from tqdm import tqdm

    small = Settings(pixels=16, steps=1) if quick else Settings(pixels=32, steps=2)
    large = Settings(pixels=32, steps=2) if quick else Settings(pixels=64)
    where = f"cuda ({torch.cuda.get_device_name(device)})" if device.type == "cuda" else device.type
    conditions = f"device {where}, torch {torch.__version__}, fastrope {fr.__version__}"
    with tempfile.TemporaryDirectory() as folder, tqdm(total=4, desc="fastrope demo", unit="section") as bar:
        worker = None
        if device.type == "cpu":  # the interpreter is slow: let it work while the rest is drawn
            worker = Worker("triton", small, Path(folder), {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""})
        try:
            sections, numbers = [], {"quick": quick, "conditions": conditions}
            for part in (_bands, _maps, _groups):
                section, found = part(out, device, quick, conditions)
                sections.append(section)
                numbers.update(found)
                bar.update()
            section, found, good = _kontext(out, device, small, large, conditions, worker)
            sections.append(section)
            numbers.update(found)
            bar.update()
        finally:
            if worker is not None:
                worker.stop()
    write_text(out / "numbers.json", json.dumps(numbers, indent=1))
    lead = (
        "What the four modulations of FastRoPE do to attention, and whether its backends agree. Everything below was "
        "computed by `fastrope demo` with FastRoPE itself; nothing was downloaded and nothing is timed."
    )
    for path in write("FastRoPE demo", lead, sections, out):
        print(path)
    return 0 if good else 1


def _bands(out, device, quick, conditions):
    data = bands.compute(device)
    picture = Picture(
        bands.draw(data, out / "bands.png"),
        "Left: mean similarity of a vector at position p with itself at p + shift, per quarter of the pairs of one "
        "axis. "
        "Right: the mean over the whole axis, with positions scaled by r, and with the bands weighted.",
        "Line charts of similarity against positional shift",
        f"{conditions}, float32, axes {bands.AXES}, theta {bands.THETA:g}, 64 random vectors, seed {bands.SEED}",
    )
    expected = torch.cos(data.shifts[:, None] * data.frequencies)
    error = float((data.similarity - expected).abs().max())
    text = (
        "Two equal vectors stop looking alike when RoPE puts them apart, and how soon depends on the band. Fast pairs "
        "decide within a few tokens: they lock a query onto its own position. Slow pairs hardly notice position and "
        "carry content. `QueryScale` stretches the curve by 1 / r, so the query sees further; `BandWeight` fades "
        "the fast "
        "pairs, so place counts for less at every distance.",
        f"Checked against the closed form, the mean of cos(shift * frequency): largest difference {error:.1e}.",
    )
    return Section("1. Bands: what distance does to similarity", (*text, picture)), {"bands": {"error": error}}


def _maps(out, device, quick, conditions):
    data = maps.compute(device, grid=32 if quick else 64)
    distances = [float(d) for d in data.distance]
    picture = Picture(
        maps.draw(data, out / "maps.png"),
        "Attention of one query (cross) over a reference grid at four values of r. The dashed circle has the mean "
        "distance of its attention as its radius.",
        "Four heat maps of attention; the bright spot grows as r falls",
        f"{conditions}, float32, backend {chosen_backend(device)}, grid {data.grid} x {data.grid}, axes {maps.AXES}, "
        f"seed {maps.SEED}",
    )  # fmt: skip
    rows = ", ".join(f"{d:.1f} at r = {r:g}" for r, d in zip(maps.SCALES, distances, strict=True))
    text = (
        "Keys are smooth noise around one common vector, which is what makes a query prefer near keys. `QueryScale` "
        "multiplies the positions of query and keys by r before they are rotated: the same query looks at a wider "
        f"neighbourhood. Mean distance of its attention, in tokens: {rows}. The weights are read through the op "
        "itself, "
        "with unit vectors as values.",
    )
    return Section("2. QueryScale: how far a query looks", (*text, picture)), {
        "maps": {"r": list(maps.SCALES), "mean_distance": distances}
    }


def _groups(out, device, quick, conditions):
    data = groups.compute(device, grid=12 if quick else 16, steps=7 if quick else 19)
    picture = Picture(
        groups.draw(data, out / "groups.png"),
        f"Entropy of attention inside the group (equal weights on its {data.keys} keys have {data.uniform:.2f} nats) "
        "against delta; attention on the group against lambda; and both together.",
        "Two line charts and a heat map over lambda and delta",
        f"{conditions}, float32, backend {chosen_backend(device)}, {data.keys} target and {data.keys} reference "
        "keys, mean "
        f"of {groups.QUERIES} target queries, seed {groups.SEED}",
    )
    spread = float((data.entropy - data.entropy[:1]).abs().max())
    text = (
        "`BiasDelta` splits the keys of a group into their mean and their deviations, k' = lambda mu + delta (k - "
        "mu). Here "
        "the group is the reference, the other keys are the target's own. Delta is a temperature inside the group: "
        "entropy "
        f"falls as it rises, whatever lambda is (the curves differ by {spread:.0e} nats at most). Lambda scales the "
        "group's "
        f"mean logit, which is {data.mean_logit:.1f} here: as it is positive, raising lambda moves attention to the "
        "group.",
    )
    return Section("3. BiasDelta: GRAG's two dials", (*text, picture)), {
        "groups": {
            "lambda": data.lambdas.tolist(), "delta": data.deltas.tolist(), "entropy": data.entropy.tolist(),
            "mass": data.mass.tolist(), "mean_logit": data.mean_logit,
        }
    }  # fmt: skip


def _kontext(out, device, small: Settings, large: Settings, conditions, worker: Worker | None):
    title = "4. A tiny FLUX Kontext: every modulation on every backend"
    try:
        reference = kontext.run(small, "eager", device, torch.float64, wrap=_progress("eager float64"))
    except ImportError as error:
        return Section(title, (f"Not available: {error}.",)), {"kontext": {"absent": str(error)}}, True
    found: dict[str, Agreement] = {}
    runs: dict[str, dict] = {}
    jobs: list[tuple[str, Callable]] = [
        (name, lambda name=name: kontext.run(small, name, device, torch.float32, wrap=_progress(name)))
        for name in ("eager", "sdpa", *(("triton",) if worker is None else ()))
    ]
    if worker is not None:
        jobs.append(("triton", lambda: _wait(worker)))
    for name, job in jobs:
        found[name] = _judge(name, job, reference, runs)
    host = kontext.run(small, "host", device, torch.float32, names=("none",))["none"]
    host_error = (host - reference["none"]).abs()
    pictures = kontext.run(large, "sdpa", device, torch.float32, wrap=_progress("pictures"))
    setting = (
        f"{conditions}, random queries and keys, seed {small.seed}, {{0}} px, {{1}} target and {{1}} reference tokens, "
        f"{small.text} text tokens, {{2}} steps"
    )
    small_setting, large_setting = (setting.format(s.pixels, s.grid**2, s.steps) for s in (small, large))
    triton_note = "; triton interpreted in a process of its own" if worker is not None else ""
    parts: list = [
        "A `FluxKontextPipeline` of three attention layers edits a composite drawn for the purpose. No weight is "
        "trained. "
        "What decides where attention looks is random, with a preference for near tokens of the reference; the "
        "path of the "
        "values is set by hand, so that attention carries colours and the pictures can be read: an unmodulated run "
        "paints "
        "the reference again, blurred by the reach of its attention.",
        "So the pictures show that the dials act, where they act, and that the backends agree. They do not show what a "
        "trained model would draw.",
        Picture(
            sheets.draw_scene(large, out / "scene.png"),
            "The composite, the same at the model's size, the crop (dilated paste) and its five saliency levels "
            "with the "
            "range factor r and crop factor g of each. Local contrast stands in for the features of a detector.",
            "A landscape with a balloon, its mask and its saliency levels",
            f"{conditions}, drawn in code",
        ),
        "`QueryScale`: target tokens in the crop, all reference keys, r per level, axes 1 and 2. `LogitGain`: the same "
        f"tokens, reference keys in the crop, g per level. `BandWeight`: reference keys, from {kontext.S_HF:g} at the "
        f"fastest to {kontext.S_LF:g} at the slowest pair with exponent {kontext.BETA:g}. `BiasDelta`: the "
        "reference, lambda "
        f"{kontext.BIAS:g}, delta {kontext.DELTA:g}.",
        Picture(
            sheets.draw_runs(pictures, out / "runs.png"),
            "Top: what each run draws. Bottom: its difference from the unmodulated run, mean over channels.",
            "Six pictures of the balloon and six maps of change",
            f"{large_setting}, float32, backend sdpa",
        ),
        Picture(
            sheets.draw_backends(reference, runs, out / "backends.png"),
            "The same runs, smaller, on every backend that runs here. Below each: largest difference of its final "
            "latents "
            "from the reference in the first row.",
            "Contact sheet, one row per backend, one column per modulation",
            f"{small_setting}{triton_note}",
        ),
        Table(
            ("backend", *("no modulation" if n == "none" else n for n in NAMES)),
            tuple(_row(agreement) for agreement in found.values()),
            "Largest and mean absolute difference of the final latents (pixels, -1..1) from eager in float64. "
            "Tolerance: "
            f"{TOLERANCE:g}. Without modulation the binding leaves diffusers' own attention in place, which is "
            f"{float(host_error.max()):.1e} from that reference when FastRoPE is not there at all.",
            f"{small_setting}, float32{triton_note}",
        ),
    ]
    backends = {
        name: {"errors": a.errors, "absent": a.absent, "failure": a.failure, "worst": a.worst}
        for name, a in found.items()
    }
    changes = {name: float(sheets.difference(pictures[name], pictures["none"]).mean()) for name in NAMES}
    good = all(a.good for a in found.values())
    numbers = {"kontext": {"tolerance": TOLERANCE, "backends": backends, "change": changes}}
    return Section(title, tuple(parts)), numbers, good


def _judge(name: str, job: Callable, reference: dict, runs: dict) -> Agreement:
    """Run one backend and compare. A failure becomes part of the report, and of the exit code, not its end."""
    try:
        result = job()
    except (NotImplementedError, ImportError) as error:
        return Agreement(name, {}, absent=str(error) or "not implemented in this version")
    except Exception as error:  # a table with the reason says more than no report at all
        return Agreement(name, {}, failure=f"{type(error).__name__}: {error}".splitlines()[0])
    runs[name] = result
    deltas = {key: (result[key] - reference[key]).abs() for key in NAMES}
    return Agreement(name, {key: (float(d.max()), float(d.mean())) for key, d in deltas.items()})


def _row(agreement: Agreement) -> tuple[str, ...]:
    if agreement.failure or agreement.absent:
        note = f"failed: {agreement.failure}" if agreement.failure else f"not available: {agreement.absent}"
        return (agreement.backend, note, *[""] * (len(NAMES) - 1))
    cells = (f"{largest:.1e} / {mean:.1e}" for largest, mean in agreement.errors.values())
    return (agreement.backend, *cells)


def _progress(label: str) -> Callable:
    from tqdm import tqdm

    return lambda names: tqdm(names, desc=f"  {label}", leave=False)


def _wait(worker: Worker) -> dict:
    from tqdm import tqdm

    with tqdm(total=len(NAMES), desc="  triton", leave=False) as bar:
        return worker.result(lambda done: bar.update(done - bar.n))
