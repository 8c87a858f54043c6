"""One report, written twice: Markdown beside the pictures, and a single HTML file that holds them."""

from __future__ import annotations

import base64
import html
import re
from dataclasses import dataclass
from pathlib import Path

from ..outputs import write_text


@dataclass(frozen=True)
class Picture:
    """A PNG with what it shows (``caption``), for those who cannot see it (``alt``), and its conditions."""

    path: Path
    caption: str
    alt: str
    conditions: str


@dataclass(frozen=True)
class Table:
    """Column heads, rows of text, conditions."""

    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    caption: str
    conditions: str


@dataclass(frozen=True)
class Section:
    """A heading and, in order, its paragraphs (``str``), pictures and tables.

    All but the rows of tables is Markdown as far as ``code`` in backticks and a backslash before punctuation go; what a
    user wrote comes in through :func:`literal`.
    """

    title: str
    parts: tuple[str | Picture | Table, ...]


def write(title: str, lead: str, sections: list[Section], folder: Path) -> tuple[Path, Path]:
    """Write ``report.md`` and ``report.html`` into ``folder``; the pictures lie there already."""
    markdown, page = folder / "report.md", folder / "report.html"
    return write_text(markdown, _markdown(title, lead, sections)), write_text(page, _html(title, lead, sections))


def literal(text: str) -> str:
    """Any text, such as a prompt, so that no reader of Markdown or HTML takes part of it for mark-up; in one line."""
    return re.sub(r"([\\`*_{}\[\]<>&|$~#!^])", r"\\\1", " ".join(text.split()))


def _markdown(title: str, lead: str, sections: list[Section]) -> str:
    lines = [f"# {title}", "", lead, ""]
    for section in sections:
        lines += [f"## {section.title}", ""]
        for part in section.parts:
            if isinstance(part, Picture):
                lines += [f"![{part.alt}]({part.path.name})"]
            elif isinstance(part, Table):
                lines += ["| " + " | ".join(part.head) + " |", "|" + "---|" * len(part.head)]
                lines += ["| " + " | ".join(map(literal, row)) + " |" for row in part.rows]
            else:
                lines += [part, ""]
                continue
            lines += ["", part.caption, "", f"*Conditions: {part.conditions}.*", ""]
    return "\n".join(lines)


def _html(title: str, lead: str, sections: list[Section]) -> str:
    body = [f"<h1>{html.escape(title)}</h1>", f'<p class="lead">{_inline(lead)}</p>', "<nav><ol>"]
    body += [f'<li><a href="#s{n}">{_inline(_unnumbered(s.title))}</a></li>' for n, s in enumerate(sections, 1)]
    body.append("</ol></nav>")
    for n, section in enumerate(sections, 1):
        body.append(f'<section id="s{n}"><h2>{_inline(section.title)}</h2>')
        for part in section.parts:
            if isinstance(part, Picture):
                data = base64.b64encode(part.path.read_bytes()).decode()
                body.append(
                    f'<figure><img alt="{html.escape(part.alt)}" src="data:image/png;base64,{data}">'
                    f"<figcaption>{_caption(part)}</figcaption></figure>"
                )
            elif isinstance(part, Table):
                head = "".join(f"<th>{_inline(cell)}</th>" for cell in part.head)
                cells = ("".join(f"<td>{html.escape(cell)}</td>" for cell in row) for row in part.rows)
                rows = "".join(f"<tr>{row}</tr>" for row in cells)
                body.append(
                    f'<figure><div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>'
                    f"</div><figcaption>{_caption(part)}</figcaption></figure>"
                )
            else:
                body.append(f"<p>{_inline(part)}</p>")
        body.append("</section>")
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{html.escape(title)}</title><style>{STYLE}</style></head><body><main>{''.join(body)}</main></body></html>"
    )


def _caption(part: Picture | Table) -> str:
    return f'{_inline(part.caption)} <span class="conditions">Conditions: {_inline(part.conditions)}.</span>'


def _inline(text: str) -> str:
    mark = r"\\(&#?\w+;|[^a-zA-Z0-9\s])|`([^`]+)`"
    return re.sub(mark, lambda m: m[1] or f"<code>{m[2]}</code>", html.escape(text))


def _unnumbered(title: str) -> str:
    return re.sub(r"^\d+\.\s*", "", title)


STYLE = """
:root { color-scheme: light dark; --ink: #1f2328; --muted: #59636e; --sheet: #fff; --line: #d9dee4; --soft: #f3f5f8;
  --link: #0072b2; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6edf3; --muted: #9da7b3; --sheet: #0d1117; --line: #30363d;
  --soft: #161b22; --link: #56b4e9; } }
body { margin: 0; background: var(--sheet); color: var(--ink); font: 16px/1.6 system-ui, sans-serif; }
main { max-width: 76rem; margin: 0 auto; padding: 2rem 1.25rem 5rem; }
h1 { font-size: 2rem; line-height: 1.2; margin: 1rem 0; }
h2 { font-size: 1.35rem; margin: 3rem 0 .75rem; padding-top: 1.5rem; border-top: 1px solid var(--line); }
p, nav { max-width: 46rem; }
.lead { font-size: 1.1rem; }
a { color: var(--link); }
figure { margin: 1.5rem 0; }
img { display: block; width: 100%; height: auto; border: 1px solid var(--line); border-radius: 8px; background: #fff; }
figcaption { max-width: 54rem; margin-top: .6rem; font-size: .95rem; }
.conditions { display: block; color: var(--muted); font-size: .85rem; }
code { font: .9em ui-monospace, monospace; background: var(--soft); padding: .1em .3em; border-radius: 4px; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .95rem; }
th, td { text-align: left; padding: .4rem .9rem .4rem 0; border-bottom: 1px solid var(--line); }
th { font-weight: 600; color: var(--muted); }
"""
