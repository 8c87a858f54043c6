"""What quantised plain attention does to accuracy, in docs/numerics.md: a simulation on a CPU.

``python tests/test_quantised.py`` measures and rewrites the table; the test measures again and refuses a table that
promises smaller errors than it finds.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
import torch

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))

from quantised import fp8, int8

import fastrope as fr
from fastrope.tolerance import measure

PAGE = Path(__file__).resolve().parents[1] / "docs" / "numerics.md"
TABLE = re.compile(r"(<!-- quantised[^\n]*-->\n\n)(.*?)(\n\n<!-- end of quantised -->)", re.DOTALL)
TOKENS, HEADS, AXES = fr.TokenLayout(text=32, target=(16, 16), references=[(16, 16)]), 2, (16, 56, 56)
SLACK = 1.25  # other processors sum in another order
CASES = {
    "plain": None, "GRAG, delta 1.1": fr.GRAG(delta=1.1), "GRAG, delta 1.1, value_delta 1.15": fr.GRAG(
        delta=1.1, value_delta=1.15), "UntwistingRoPE, first step": fr.UntwistingRoPE(reference=0),
    "ReferenceStrength 0.5": fr.ReferenceStrength(0.5),
}  # fmt: skip
KERNELS = {"torch's": None, "int8": int8, "fp8": fp8}
Row = tuple[str, str, list[tuple[float, float, float]]]


def inputs(kind: str) -> torch.Tensor:
    """``q, k, v (1, S, H, D)`` bfloat16. q and k have a norm of ``D ** 0.5``, as behind the norms of image models."""
    g = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(3, 1, len(TOKENS), HEADS, sum(AXES), generator=g)
    if kind == "keys with a common part":  # slow pairs, which no position turns far
        k[..., [14, 70, 126]] += 8
    q, k = (torch.nn.functional.normalize(x, dim=-1) * sum(AXES) ** 0.5 for x in (q, k))
    return torch.stack((q, k, v)).bfloat16()


def measured() -> list[Row]:
    """Of each case and kernel: the mean error over the mean size of the output, and the largest and the mean error over
    what the tolerance rule allows."""
    site, rope, rows = fr.Site(TOKENS), fr.RoPE.axial(TOKENS.positions("flux"), AXES), []
    for kind in ("normal", "keys with a common part"):
        q, k, v = inputs(kind)
        for name, method in CASES.items():
            plan = fr.plan(rope=rope, modulations=method.modulations(site) if method else ())
            exact = fr.attention(q.double(), k.double(), v.double(), plan=plan, backend="eager")
            low, found = fr.attention(q, k, v, plan=plan, backend="eager"), []
            for kernel in KERNELS.values():
                errors = measure(fr.attention(q, k, v, plan=plan, plain=kernel), exact, low)
                found.append((
                    errors.mean_out / float(exact.abs().mean()), errors.max_out / errors.max_allowed,
                    errors.mean_out / errors.mean_allowed,
                ))  # fmt: skip
            rows.append((kind, name, found))
    return rows


def render(rows: list[Row]) -> str:
    """A Markdown table."""
    titles = [f"{name}: error | largest | mean" for name in KERNELS]
    lines = [f"| q, k, v | call | {' | '.join(titles)} |", "|---|---" + "|---:" * 3 * len(KERNELS) + "|"]
    for kind, name, found in rows:
        cells = [f"{100 * mean:.2f} % | {largest:.1f} | {ratio:.1f}" for mean, largest, ratio in found]
        lines.append(f"| {kind} | {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


@pytest.fixture(scope="module")
def rows() -> list[Row]:
    return measured()


def test_the_page_has_what_is_measured(rows):
    held = TABLE.search(PAGE.read_text(encoding="utf-8"))
    assert held, "docs/numerics.md has no table of quantised attention"
    printed, fresh = held[2].splitlines(), render(rows).splitlines()
    assert [line.split("|")[1:3] for line in printed] == [line.split("|")[1:3] for line in fresh]
    for old, new in zip(printed[2:], fresh[2:], strict=True):
        figures = ([float(x) for x in re.findall(r"\d+\.\d+(?= [%|])", line.split("|", 3)[3])] for line in (old, new))
        for promised, now in zip(*figures, strict=True):
            assert now <= SLACK * promised + 0.1, f"{old}\nmeasured: {new}"


def test_what_the_page_says_of_it(rows):
    """Folds and merges add nothing to what the kernel does; int8 breaks the bound of the mean alone, fp8 both."""
    plain = {kind: found for kind, name, found in rows if name == "plain"}
    for kind, name, found in rows:
        for of_call, of_plain in zip(found, plain[kind], strict=True):
            assert of_call[2] <= 1.1 * of_plain[2], (kind, name)
        torchs, int8s, fp8s = found
        assert max(torchs[1:]) <= 1
        assert int8s[1] <= 1 < int8s[2]
        assert min(fp8s[1:]) > 1


def test_the_simulated_kernels_agree_with_attention():
    """Without rounding to 8 bits they would be it; the log-sum-exp knows of the mean that int8 takes from keys."""
    q, k, v = inputs("keys with a common part")
    exact = (torch.einsum("bihd,bjhd->bhij", q.double(), k.double()) / sum(AXES) ** 0.5).logsumexp(-1)
    for kernel, bound in ((int8, 0.05), (fp8, 0.3)):
        _, lse = kernel(q, k, v, sum(AXES) ** -0.5, return_lse=True)
        assert float((lse - exact).abs().max()) < bound, kernel


if __name__ == "__main__":
    table = render(measured())
    text, count = TABLE.subn(lambda match: f"{match[1]}{table}{match[3]}", PAGE.read_text(encoding="utf-8"))
    if not count:
        sys.exit(f"{PAGE}: no markers to write between")
    PAGE.write_text(text, encoding="utf-8")
