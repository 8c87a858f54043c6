"""The numerics card: measured errors of every backend and dtype, in docs/numerics.md.

``python tests/test_numerics_card.py`` measures and rewrites the table; the test measures again and refuses a table that
promises smaller errors than it finds.
"""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path

import pytest
import torch

if __name__ == "__main__":  # under pytest, conftest.py has done the same
    os.environ["TRITON_INTERPRET"] = "1"
    torch.set_num_threads(1)

import fastrope as fr
from fastrope import device as devices

ROOT = Path(__file__).resolve().parents[1]
AXES, HEADS = (16, 56, 56), 1
LAYOUT = fr.TokenLayout(text=16, target=(8, 8), references=[(8, 8)])
SCALES = (0.65, 0.66, 0.82, 0.99)
DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
BACKENDS = ("eager", "sdpa", "triton")
SLACK = 2.0  # other processors sum in another order; a wrong term would show as a factor of hundreds
FLOOR = 1e-14  # float64 errors are a few of its last bits
Row = tuple[str, str, float, dict[str, tuple[float, float] | None]]  # case, dtype, largest |out|, (max, mean) errors


def cases() -> dict[str, list]:
    """Modulations by name. Queries are the target's, keys those of the reference."""
    g = torch.Generator().manual_seed(1)
    keys, target, count = LAYOUT.reference(0), LAYOUT.target, len(LAYOUT)
    shared, per_query, gain = (torch.ones(count, dtype=torch.float64) for _ in range(3))
    size = target.stop - target.start
    shared[target] = torch.tensor(SCALES, dtype=torch.float64)[torch.randint(len(SCALES), (size,), generator=g)]
    per_query[target] = torch.linspace(0.75, 0.99, size, dtype=torch.float64)
    gain[target] = torch.linspace(0.65, 1.345, size, dtype=torch.float64)
    bias = torch.zeros(count, dtype=torch.float64)
    bias[target] = torch.linspace(-1, 1, size, dtype=torch.float64)
    value = torch.linspace(-1, 1.5, keys.stop - keys.start, dtype=torch.float64)
    weight = torch.cat([1.4 + (0.25 - 1.4) * torch.linspace(1, 0, d // 2).double() ** 2 for d in AXES])
    buckets, distinct = (fr.QueryScale(r, keys=keys, axes=(1, 2)) for r in (shared, per_query))
    others = [fr.BandWeight(weight, keys=keys), fr.BiasDelta(1.2, 1.1, keys=keys), fr.LogitGain(gain, keys=keys)]
    biases = [fr.LogitBias(bias, keys=keys), fr.KeyBias(torch.linspace(-2, 1, count, dtype=torch.float64))]
    values = [fr.ValueGain(value, keys=keys), fr.BiasDelta(1.2, 1.1, keys=keys, on="values")]
    return {
        "none": [], "QueryScale, scale buckets": [buckets], "QueryScale, per-query scales": [distinct],
        "BandWeight": others[:1], "BiasDelta": others[1:2], "LogitGain": others[2:], "LogitBias": biases[:1],
        "KeyBias": biases[1:], "ValueGain": values[:1], "BiasDelta on values": values[1:],
        "all four, scale buckets": [buckets, *others], "all four, per-query scales": [distinct, *others],
        "everything, scale buckets": [buckets, *others, *biases, *values],
    }  # fmt: skip


def measure() -> list[Row]:
    """Errors of the output against the reference in float64 on the same inputs, drawn in the low dtype."""
    g = torch.Generator().manual_seed(0)
    drawn = torch.randn(3, 1, len(LAYOUT), HEADS, sum(AXES), generator=g, dtype=torch.float64)
    rope = fr.RoPE.axial(LAYOUT.positions("flux"), AXES)
    rows = []
    for name, modulations in cases().items():
        plan = fr.plan(rope=rope, modulations=modulations)
        for dtype in DTYPES:
            q, k, v = drawn.to(dtype)
            exact = fr.attention(q.double(), k.double(), v.double(), plan=plan, backend="eager")
            errors = {}
            for backend in BACKENDS:
                oracle = backend == "eager" and dtype == torch.float64
                if oracle or (backend == "triton" and devices.kernel_obstacle(q)):
                    errors[backend] = None
                    continue
                error = (fr.attention(q, k, v, plan=plan, backend=backend).double() - exact).abs()
                errors[backend] = float(error.max()), float(error.mean())
            rows.append((name, str(dtype).removeprefix("torch."), float(exact.abs().max()), errors))
    return rows


def render(rows: list[Row]) -> str:
    """A Markdown table: largest error, and in brackets the mean."""
    lines = ["| modulations | dtype | largest output | eager | sdpa | triton |", "|---|---|---|---|---|---|"]
    for name, dtype, size, errors in rows:
        cells = [f"{e[0]:.1e} ({e[1]:.1e})" if e else "-" for e in errors.values()]
        lines.append(f"| {name} | {dtype} | {size:.2f} | {' | '.join(cells)} |")
    return "\n".join(lines)


PAGE = ROOT / "docs" / "numerics.md"
TABLE = re.compile(r"(<!-- numerics card[^\n]*-->\n\n)(.*?)(\n\n<!-- end of numerics card -->)", re.DOTALL)
FIGURES = re.compile(r"(\S+e[+-]\d+) \((\S+e[+-]\d+)\)")


@pytest.fixture(scope="module")
def measured() -> list[Row]:
    if not devices.interpreted():
        pytest.skip("the card holds figures of the CPU, with triton interpreted")
    return measure()


@pytest.mark.slow
def test_the_card_promises_no_more_than_is_measured(measured):
    found = TABLE.search(PAGE.read_text(encoding="utf-8"))
    assert found, "docs/numerics.md has no numerics card"
    printed, fresh = found[2].splitlines(), render(measured).splitlines()
    assert len(printed) == len(fresh)
    for old, new in zip(printed, fresh, strict=True):
        assert FIGURES.sub("#", old) == FIGURES.sub("#", new)
        for before, now in zip(FIGURES.findall(old), FIGURES.findall(new), strict=True):
            for promised, error in zip(map(float, before), map(float, now), strict=True):
                assert error <= SLACK * promised + FLOOR, f"{old}\nmeasured: {new}"


def main() -> None:
    """Rewrite the table."""
    table = render(measure())
    text, count = TABLE.subn(lambda match: f"{match[1]}{table}{match[3]}", PAGE.read_text(encoding="utf-8"))
    if not count:
        sys.exit(f"{PAGE}: no markers to write between")
    PAGE.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
