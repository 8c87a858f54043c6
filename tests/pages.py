"""The pages of the project: their snippets and command lines found, run, and held to what the pages print."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import torch

from fastrope.cli import main

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
BASH = re.compile(r"^```bash\n(.*?)^```", re.MULTILINE | re.DOTALL)
SNIPPET = re.compile(
    r"^```python[^\n]*\n(?P<code>.*?)^```(?:\n+```text\n(?P<printed>.*?)^```)?", re.MULTILINE | re.DOTALL
)


def page(name: str) -> str:
    """The text of a page in docs/."""
    return (DOCS / name).read_text(encoding="utf-8")


def snippets(text: str) -> list[tuple[str, str | None]]:
    """Python snippets, each padded with empty lines so that tracebacks carry the line numbers of the page, and the
    ``text`` block right after each, which is what it prints."""
    found = SNIPPET.finditer(text)
    return [("\n" * text.count("\n", 0, m.start("code")) + m["code"], m["printed"]) for m in found]


def run_snippets(path: Path, capsys, namespace: dict | None = None) -> dict:
    """Run the snippets of a page in order, in one namespace, and compare what they print; the namespace."""
    namespace = {"__name__": path.stem} if namespace is None else namespace
    found = snippets(path.read_text(encoding="utf-8"))
    assert found, f"{path.name} shows no python"
    for code, printed in found:
        capsys.readouterr()
        exec(compile(code, str(path), "exec", dont_inherit=True), namespace)
        said = capsys.readouterr().out
        assert printed in (None, said)
    return namespace


def offline_kontext(monkeypatch, folder: Path):
    """Let ``FluxKontextPipeline.from_pretrained`` give the lab's trained editor, and write ``photo.png`` into
    ``folder``; the pipeline."""
    import diffusers

    from fastrope import lab

    pipe = lab.pipeline()

    class Offline(type(pipe)):
        def __call__(self, image, **arguments):
            width, height = image.size
            size = dict(width=width, height=height, max_area=width * height, _auto_resize=False)
            return super().__call__(image, num_inference_steps=4, **size, **arguments)

        def encode_prompt(self, **arguments):
            generator = torch.Generator().manual_seed(0)
            embeds, pooled = (torch.randn(*shape, 32, generator=generator) for shape in ((1, 512), (1,)))
            return embeds, pooled, torch.zeros(512, 3)

        def to(self, *args, **kwargs):
            return self

    def load(cls, name, torch_dtype):
        assert (name, torch_dtype) == ("black-forest-labs/FLUX.1-Kontext-dev", torch.bfloat16)
        return pipe

    pipe.__class__ = Offline
    monkeypatch.setattr(diffusers.FluxKontextPipeline, "from_pretrained", classmethod(load))
    lab.pictures(1)[0].save(folder / "photo.png")
    monkeypatch.chdir(folder)
    return pipe


def commands_of(*names: str) -> list[str]:
    """The commands that pages show, in order."""
    shown = [text for name in names for text in BASH.findall(page(name))]
    return [line for text in shown for line in text.splitlines() if line.strip()]


def carry_out(command: str, modules: dict, steps: int, folder: Path, monkeypatch, capsys) -> None:
    """Parse a command with the parser of its module, which also checks that its options agree; run it in a folder where
    it is of the tiny model, and see that it writes what it says."""
    program, name, *arguments = shlex.split(command)
    assert program == "fastrope"
    module = modules[name]
    parser = module._parser()
    options = parser.parse_args(arguments)
    (getattr(module, "_check", None) or module.check_options)(parser, options)
    if options.model != "tiny":
        return
    monkeypatch.chdir(folder)
    assert main([name, *arguments, "--steps", str(steps)]) == 0
    written = capsys.readouterr().out.split()
    assert written
    assert all(Path(path).stat().st_size > 0 for path in written)
