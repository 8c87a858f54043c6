"""Tables from rows and from nothing else."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from . import rows as records

Cell = Callable[[dict], str]


def number(row: dict, key: str, form: str) -> str:
    """A field, formatted; empty where the row has none."""
    value = row.get(key)
    return "" if value is None else format(value, form)


def spread(row: dict) -> str:
    """The 20th and the 80th percentile."""
    return f"{row['ms_p20']:.3f} - {row['ms_p80']:.3f}"


def over_plain(row: dict, plain: dict | None) -> float | None:
    """Time over that of the same contestant's plain call: of the same rounds where it was timed among them, else of the
    plain row."""
    if row.get("plain_ms"):
        return row["ms_median"] / row["plain_ms"]
    if row.get("x_stock") or row.get("x_plain"):  # of a step, over the stock or the plain one
        return row.get("x_stock") or row.get("x_plain")
    return row["ms_median"] / plain["ms_median"] if plain else None


def render(rows: Sequence[dict]) -> str:
    """Markdown: a table per device, dtype, suite and workload: the latest row of each contestant, conditions below."""
    tables: dict[tuple, list[dict]] = {}
    for (gpu, dtype, suite, workload, _, _), row in records.latest(list(rows)).items():
        tables.setdefault((gpu, dtype, suite, workload), []).append(row)
    return "\n".join(_table(*place, table) for place, table in tables.items())


def _table(gpu: str, dtype: str | None, suite: str | None, workload: str, rows: list[dict]) -> str:
    plain = {row["impl"]: row for row in rows if row["case"] == "plain"}
    columns: list[tuple[str, str, Cell]] = [
        ("case", "---", lambda r: r["case"]),
        ("contestant", "---", lambda r: r["impl"]),
        ("rotates", "---", lambda r: r.get("rotation") or ""),
        ("ms", "---:", lambda r: number(r, "ms_median", ".3f")),
        ("spread", "---:", spread),
        ("over its plain", "---:", lambda r: _ratio(over_plain(r, plain.get(r["impl"])))),
        ("TFLOP/s", "---:", lambda r: number(r, "tflops", ".1f")),
        ("of matmul", "---:", lambda r: number(r, "peak_pct", ".0f") and number(r, "peak_pct", ".0f") + " %"),
        ("MiB", "---:", lambda r: number(r, "peak_mem_mib", ".0f")),
        ("max error", "---:", lambda r: number(r, "max_err", ".1e")),
        ("host ms", "---:", lambda r: number(r, "host_ms", ".2f")),
        ("cache MiB", "---:", lambda r: number(r, "cache_mib", ".0f")),
        ("share of a step", "---:", lambda r: number(r, "share", ".1%")),
        ("launches", "---:", lambda r: number(r, "launches", "d")),
        ("kernel", "---", lambda r: _short(r["kernel"])),
    ]
    cases = list(dict.fromkeys(row["case"] for row in rows))
    ordered = sorted(rows, key=lambda row: (cases.index(row["case"]), row["ms_median"]))
    title = f"### {workload}, {dtype}, {gpu}" if suite is None else f"### {suite}: {workload}, {dtype}, {gpu}"
    return "\n".join([title, "", *markdown(columns, ordered), "", conditions(rows), ""])


def markdown(columns: Sequence[tuple[str, str, Cell]], rows: Iterable[dict]) -> list[str]:
    """Lines of a table; columns that are empty in every row are left out."""
    rows = list(rows)
    used = [c for c in columns if any(c[2](row) for row in rows)]
    lines = [[name for name, _, _ in used], [rule for _, rule, _ in used]]
    lines += [[cell(row) for _, _, cell in used] for row in rows]
    head, rule, *body = lines
    return [f"| {' | '.join(head)} |", f"|{'|'.join(rule)}|", *(f"| {' | '.join(line)} |" for line in body)]


def _ratio(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def _short(kernel: str | None, length: int = 48) -> str:
    return "" if kernel is None else kernel[:length].replace("|", "/")


def conditions(rows: Iterable[dict]) -> str:
    """What the rows were measured with: every value that occurs."""

    def values(key: str) -> str:
        return ", ".join(dict.fromkeys(str(row[key]) for row in rows if row[key] is not None)) or "unknown"

    rows = list(rows)
    days = sorted({row["date"][:10] for row in rows})
    return (
        f"Median of the rounds with the 20th and 80th percentile; single calls and blocks are timed in turns, TFLOP/s "
        f"count the two products of plain attention in every case; memory is what a call takes beyond its inputs; "
        f"the host's time to queue a call overlaps the device's. "
        f"torch {values('torch')}, triton {values('triton')}, driver {values('driver')}, "
        f"{' to '.join(dict.fromkeys((days[0], days[-1])))}, revision {values('rev')}."
    )
