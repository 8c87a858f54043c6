"""The bars the kernels are held to, judged from rows alone.

A ratio is made of rows of one run: same device, revision and start. Those of one case, and of a case and its own plain
call, were timed in the same rounds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial

from .names import APPLIED, AUTO, CUDNN, MATERIALISED, STOCK, STOCK_COMPILED, TRITON
from .report import markdown

DEVICES, DTYPE = ("H200", "H100"), "bfloat16"  # judged where there are rows of them, the first in any case
PASSED, MISSED, UNMEASURED = "passed", "missed", "not measured"
Run = dict[tuple[str, str], dict]  # (case, impl) -> row


@dataclass(frozen=True)
class Figure:
    """A ratio, of which case and run."""

    value: float
    case: str
    row: dict
    fails: bool | None = None  # set where the bar is no number


@dataclass(frozen=True)
class Gate:
    """A bar: what is measured, from which it is missed, and what one aims at.

    ``find`` gives the figures; the worst of them counts. ``low``: the smaller, the better. ``wanted`` are cases without
    which the bar is not passed.
    """

    figure: str
    bar: str
    aim: str
    find: Callable[[Runs], list[Figure]]
    limit: float
    goal: float
    low: bool = True
    strict: bool = False
    wanted: tuple[str, ...] = ()

    def judge(self, runs: Runs) -> dict:
        """A row of the table."""
        found = self.find(runs)
        if not found:
            return self._row("", UNMEASURED)
        worst = (max if self.low else min)(found, key=lambda f: f.value)
        value = f"{worst.value:.2f} x" + (f" ({worst.case})" if len(found) > 1 or self.wanted else "")
        missed = [f for f in found if (not self._meets(f.value, self.limit) if f.fails is None else f.fails)]
        missing = [case for case in self.wanted if case not in {f.case for f in found}]
        if missed:
            names = ", ".join(f.case for f in missed)
            return self._row(value, f"{MISSED}{f' by {names}' if len(found) > 1 else ''}", worst.row)
        if missing:
            return self._row(f"{value}; without {', '.join(missing)}", UNMEASURED, worst.row)
        aim = all(self._meets(f.value, self.goal) for f in found)
        return self._row(value, f"{PASSED}, aim met" if aim else PASSED, worst.row)

    def _meets(self, value: float, limit: float) -> bool:
        if self.strict and value == limit:
            return False
        return value <= limit if self.low else value >= limit

    def _row(self, value: str, verdict: str, row: dict | None = None) -> dict:
        source = "" if row is None else f"{row['rev']}, {row['date'][:10]}"
        return {"figure": self.figure, "bar": self.bar, "aim": self.aim, "measured": value, "verdict": verdict,
                "source": source}  # fmt: skip


class Runs:
    """Rows of the device and dtype of the bars, by run, the latest first."""

    def __init__(self, rows: Iterable[dict], device: str):
        self.rows = [r for r in rows if device in r["gpu"] and r.get("dtype") == DTYPE]

    def of(self, suite: str, workload: str) -> list[Run]:
        """The runs of a workload: its rows by case and implementation."""
        runs: dict[tuple, Run] = {}
        for row in self.rows:
            if (row.get("suite"), row["workload"]) == (suite, workload):
                runs.setdefault((row["date"], row["rev"]), {})[row["case"], row["impl"]] = row
        return [runs[key] for key in sorted(runs, key=lambda key: key[0], reverse=True)]

    def ratios(self, suite: str, workload: str, over: tuple[str, str], under: tuple[str, str], key: str = "ms_median"):
        """``over`` by ``under``, of the latest run that has both; at most one figure."""
        for run in self.of(suite, workload):
            if over in run and under in run and run[over][key] and run[under][key]:
                return [Figure(run[over][key] / run[under][key], over[0], run[over])]
        return []


def over_plain(cases: Sequence[str], runs: Runs, workload: str = "kontext") -> list[Figure]:
    """Our fused call over our own plain one, in the same rounds."""
    found = []
    for case in cases:
        for run in runs.of("attention", workload):
            row = run.get((case, TRITON))
            if row is not None and row.get("plain_ms"):
                found.append(Figure(row["ms_median"] / row["plain_ms"], case, row))
                break
    return found


def against_the_fastest(runs: Runs) -> list[Figure]:
    """``auto`` over the fastest of the others that compute the same: same case, and rotation inside the call or before
    it as well. Slower beyond the spread: the spreads do not meet."""
    found: dict[tuple, Figure] = {}
    for run in runs.of("attention", "kontext"):
        for (case, impl), row in run.items():
            key = case, row.get("rotation")
            if impl not in (AUTO, AUTO + APPLIED) or key in found:
                continue
            others = [r for (c, _), r in run.items() if (c, r.get("rotation")) == key and not r.get("ours")]
            if others:
                best = min(others, key=lambda r: r["ms_median"])
                where = f"{case}, rotated {key[1]}, {best['impl']}"
                slower = row["ms_p20"] > best["ms_p80"]
                found[key] = Figure(row["ms_median"] / best["ms_median"], where, row, fails=slower)
    return list(found.values())


def against_materialised(runs: Runs, key: str) -> list[Figure]:
    """Materialised logits over ``auto``, of every case that has both."""
    cases = dict.fromkeys(case for run in runs.of("attention", "kontext") for case, _ in run)
    pairs = (runs.ratios("attention", "kontext", (c, MATERIALISED), (c, AUTO), key) for c in cases)
    return [figure for some in pairs for figure in some]


def outside_the_rule(runs: Runs) -> list[Figure]:
    """Errors of the rows over what the tolerance rule allows them."""
    pairs = ("max_err", "max_allowed"), ("mean_err", "mean_allowed")
    return [
        Figure(row[error] / row[allowed], f"{row['workload']} / {row['case']} / {row['impl']}", row)
        for row in runs.rows
        for error, allowed in pairs
        if row.get(error) is not None and row.get(allowed)
    ]


def _applied(runs: Runs) -> list[Figure]:
    return runs.ratios("attention", "kontext", ("plain", CUDNN), ("plain", TRITON + APPLIED))


def _block(runs: Runs, stock: str, ours_over: bool) -> list[Figure]:
    ours, theirs = ("all", AUTO), ("plain", stock)
    return runs.ratios("block", "kontext", *((ours, theirs) if ours_over else (theirs, ours)))


LOOP = (
    'Bars that say "fused loop" compare calls under `backend="triton"`, where our loop takes all queries: with a '
    "modulation, and plain. `auto` hands its plain call to torch, which is faster. So the ratios of `auto` are larger "
    "than these, although its times are shorter: see the table of calls."
)
FOLDED = "grag", "bands", "crop-gain"
GATES = (
    Gate("fused loop, plain, against pinned cuDNN (throughput)", ">= 0.80 x", "1.00 x", _applied, 0.80, 1.0, low=False),
    Gate(
        "GRAG, bands or crop gain over plain, fused loop", "<= 1.05 x", "1.02 x", partial(over_plain, FOLDED),
        1.05, 1.02, wanted=FOLDED,
    ),
    Gate(
        "LooseRoPE, five levels, over plain, fused loop", "<= 1.12 x", "1.05 x", partial(over_plain, ["loose-levels"]),
        1.12, 1.05,
    ),
    Gate(
        "LooseRoPE, all scales different, over plain, fused loop", "<= 1.40 x", "1.15 x",
        partial(over_plain, ["loose-per-query"]), 1.40, 1.15,
    ),
    Gate("everything at once over plain, fused loop", "<= 1.20 x", "1.10 x", partial(over_plain, ["all"]), 1.20, 1.10),
    Gate(
        "`auto` over the fastest other that computes the same", "not slower beyond the spread", "1.2 x faster",
        against_the_fastest, 1.0, 1 / 1.2,
    ),
    Gate(
        "diffusers' plain block, eager, over our modulated one", "> 1.00 x", "1.25 x",
        partial(_block, stock=STOCK, ours_over=False), 1.0, 1.25, low=False, strict=True,
    ),
    Gate(
        "our modulated block over diffusers' plain one, compiled", "<= 1.05 x", "<= 1.00 x",
        partial(_block, stock=STOCK_COMPILED, ours_over=True), 1.05, 1.0,
    ),
    Gate(
        "materialised logits over `auto`: time", ">= 5 x", "10 x", partial(against_materialised, key="ms_median"),
        5.0, 10.0, low=False,
    ),
    Gate(
        "materialised logits over `auto`: peak memory", ">= 15 x", "50 x",
        partial(against_materialised, key="peak_mem_mib"), 15.0, 50.0, low=False,
    ),
    Gate(
        "33k tokens: everything at once over plain, fused loop", "<= 1.15 x", "1.05 x",
        partial(over_plain, ["all"], workload="tokens-33k"), 1.15, 1.05,
    ),
    Gate("errors of timed rows over what the tolerance rule allows", "<= 1.00 x", "1.00 x", outside_the_rule, 1.0, 1.0),
)  # fmt: skip


def table(rows: Iterable[dict], device: str = DEVICES[0]) -> list[dict]:
    """Each gate with what was measured on a device and the verdict."""
    runs = Runs(rows, device)
    return [gate.judge(runs) for gate in GATES]


def render(rows: Iterable[dict]) -> str:
    """A table for each device, as Markdown."""
    rows = list(rows)
    others = [device for device in DEVICES[1:] if any(device in row["gpu"] for row in rows)]
    return "\n".join(_render(table(rows, device), device) for device in (DEVICES[0], *others))


def _render(judged: list[dict], device: str) -> str:
    columns = [(name, "---", lambda r, name=name: r[name]) for name in ("figure", "bar", "aim", "measured", "verdict",
                                                                        "source")]  # fmt: skip
    passed = sum(row["verdict"].startswith(PASSED) for row in judged)
    missed = sum(row["verdict"].startswith(MISSED) for row in judged)
    left = len(judged) - passed - missed
    count = f"{passed} passed, {missed} missed, {left} not measured."
    head = f"### Bars ({device}, {DTYPE}, FLUX.1 Kontext unless said)"
    return "\n".join([head, "", *markdown(columns, judged), "", f"{count} {LOOP}", ""])
