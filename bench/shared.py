#!/usr/bin/env python3
"""A denoising step with a shared reference against a plain one: time and peak memory, a row of JSON each.

``python bench/shared.py`` on a GPU calls a full-size FLUX.1 with random weights at 1024 px and writes
``bench/results/<gpu>/shared.jsonl``; on a CPU it is a smoke test of a tiny one that leaves its rows in a temporary
folder. Needs diffusers. A contestant whose output is not the batched one's is not timed.

* ``plain``: the transformer as it is; ``plain, batch 2`` has two targets.
* ``batched``: the reference is a second row of the batch.
* ``kept``: its keys and values come from a cache on the device; ``kept, host``: on the host.
* ``kept, new weights``: every call has band weights of its own, as every step of a schedule has.
* ``kept, filling``: the cache is empty before every call.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

import fastrope as fr
from fastrope.bench import RESULTS, report, runner, timing

TOLERANCE = 0.05  # of the largest output: half precision, other kernels and batch sizes


@dataclass(frozen=True)
class Workload:
    """A FLUX.1: blocks, heads, head dim with its axes, text tokens and grid."""

    name: str
    blocks: tuple[int, int] = (19, 38)
    heads: int = 24
    axes: tuple[int, ...] = (16, 56, 56)
    channels: int = 64
    joint: int = 4096
    pooled: int = 768
    text: int = 512
    grid: tuple[int, int] = (64, 64)

    def build(self, device: torch.device, dtype: torch.dtype) -> torch.nn.Module:
        """The transformer with random weights."""
        from diffusers import FluxTransformer2DModel

        with torch.device("meta"):
            model = FluxTransformer2DModel(
                patch_size=1, in_channels=self.channels, num_layers=self.blocks[0], num_single_layers=self.blocks[1],
                attention_head_dim=sum(self.axes), num_attention_heads=self.heads, joint_attention_dim=self.joint,
                pooled_projection_dim=self.pooled, guidance_embeds=True, axes_dims_rope=self.axes,
            )  # fmt: skip
        model = model.to(dtype).to_empty(device=device).eval()
        with torch.no_grad():
            for name, weight in model.named_parameters():
                if weight.ndim > 1:
                    weight.normal_(std=weight[0].numel() ** -0.5)
                else:
                    weight.fill_(1.0 if "norm" in name and name.endswith("weight") else 0.0)
        return model

    def call(self, batch: int, device: torch.device, dtype: torch.dtype, seed: int = 0) -> dict:
        """Arguments of the transformer."""
        g = torch.Generator(device).manual_seed(seed)

        def draw(*shape):
            return torch.randn(*shape, generator=g, device=device, dtype=dtype)

        layout = fr.TokenLayout(self.text, self.grid)
        ids = layout.positions("flux", device).to(dtype)
        return {
            "hidden_states": draw(batch, self.grid[0] * self.grid[1], self.channels),
            "encoder_hidden_states": draw(batch, self.text, self.joint),
            "pooled_projections": draw(batch, self.pooled),
            "timestep": torch.full((batch,), 0.5, device=device, dtype=dtype),
            "guidance": torch.full((batch,), 3.5, device=device, dtype=dtype),
            "txt_ids": ids[layout.text],
            "img_ids": ids[layout.target],
            "return_dict": False,
        }


FULL = Workload("FLUX.1, 1024 px")
SMALL = Workload("smoke", blocks=(1, 2), heads=2, axes=(4, 4, 8), channels=4, joint=32, pooled=16, text=5, grid=(3, 5))


@dataclass
class Contestant:
    """A step under a name; ``cache`` is what it keeps, ``batch`` its targets."""

    run: Callable[[], torch.Tensor]
    batch: int = 1
    cache: fr.ReferenceCache | None = None


@contextlib.contextmanager
def contestants(workload: Workload, model, device, dtype, name: str) -> Iterator[Contestant]:
    """One contestant, bound to the model while the context is open."""
    call = workload.call(2 if name == "plain, batch 2" else 1, device, dtype)
    own = workload.call(1, device, dtype, seed=1)
    given = {key: own[key] for key in ("encoder_hidden_states", "pooled_projections")}
    source = fr.Reference(lambda step, sigma: own["hidden_states"], given)
    method = fr.UntwistingRoPE()

    def step() -> torch.Tensor:
        with torch.no_grad():
            return model(**call)[0]

    if name.startswith("plain"):
        yield Contestant(step, len(call["hidden_states"]))
        return
    place = "cpu" if name == "kept, host" else None
    cache = None if name == "batched" else fr.ReferenceCache(source, device=place)
    with fr.apply(model, method, reference=source if cache is None else cache) as handle:
        handle.set_step(10, 28)
        count = 0

        def turned() -> torch.Tensor:
            nonlocal count
            count += 1
            handle.update(replace(method, s_lf=(1.0, 1.4 + 1e-6 * count)))
            return step()

        def filled() -> torch.Tensor:
            cache.clear()
            return step()

        yield Contestant({"kept, new weights": turned, "kept, filling": filled}.get(name, step), cache=cache)


NAMES = ("plain", "plain, batch 2", "batched", "kept", "kept, host", "kept, new weights", "kept, filling")


def measure(workload: Workload, device: torch.device, dtype: torch.dtype, repeats: int) -> tuple[list[dict], list[str]]:
    """Rows of all contestants, and what was wrong."""
    model = workload.build(device, dtype)
    rows, problems, outputs, plain = [], [], {}, None
    for name in NAMES:
        with contestants(workload, model, device, dtype, name) as contestant:
            outputs[name] = contestant.run().double().cpu()
            wrong = check(name, outputs)
            if wrong:
                problems.append(f"{workload.name} / {name}: {wrong}")
                continue
            t = timing.interleaved({name: contestant.run}, device, repeats)[name]
            plain = t.median if name == "plain" else plain
            kernel, launches = timing.kernels(contestant.run, device)
            cache = contestant.cache
            rows.append({
                "workload": workload.name, "case": "untwisting, paper", "impl": name, "ms_median": t.median,
                "ms_p20": t.p20, "ms_p80": t.p80, "rounds": t.rounds, "x_plain": t.median / plain,
                "peak_mem_mib": timing.peak_memory_mib(contestant.run, device),
                "cache_mib": None if cache is None else cache.nbytes / 2**20, "kernel": kernel, "launches": launches,
                "dtype": str(dtype).removeprefix("torch."), "batch": contestant.batch, "text": workload.text,
                "grid": workload.grid, "blocks": workload.blocks, "heads": workload.heads, "dim": sum(workload.axes),
            })  # fmt: skip
            print(
                f"{name:<20}{t.median:10.2f} ms [{t.p20:.2f}, {t.p80:.2f}]  {t.median / plain:.2f} x plain", flush=True
            )
    return rows, problems


def check(name: str, outputs: dict[str, torch.Tensor]) -> str | None:
    """What is wrong with a contestant's output; None if nothing is."""
    out, plain, batched = outputs[name], outputs["plain"], outputs.get("batched")
    if not bool(out.isfinite().all()):
        return "values that are not finite"
    if name.startswith("plain"):
        return None
    largest = float(batched.abs().max())
    if name == "batched":
        return None if not torch.equal(out, plain) else "the plain step's output"
    gap = float((out - batched).abs().max()) / largest
    return None if gap <= TOLERANCE else f"another output than the batched step's (by {gap:.2g} of the largest value)"


def main(argv: Sequence[str] | None = None) -> int:
    """Run; 0, or 1 when a contestant was wrong."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, metavar="FILE", help="JSON lines to append to")
    parser.add_argument("--repeats", type=int, default=20, metavar="N", help="timed rounds (default 20)")
    parser.add_argument("--rev", help="revision to record where there is no git history")
    options = parser.parse_args(argv)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    environment = runner.environment(device, options.rev)
    small = device.type == "cpu"
    folder = Path(tempfile.mkdtemp(prefix="fastrope-bench-")) if small else RESULTS / report.slug(environment["gpu"])
    out = options.out or folder / "shared.jsonl"
    out.parent.mkdir(parents=True, exist_ok=True)
    workload, dtype = (SMALL, torch.float32) if small else (FULL, torch.bfloat16)
    rows, problems = measure(workload, device, dtype, options.repeats)
    with out.open("a", encoding="utf-8") as file:
        file.writelines(json.dumps({**row, **environment}) + "\n" for row in rows)
    print(f"rows in {out}")
    for problem in problems:
        print(f"problem: {problem}", file=sys.stderr)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
