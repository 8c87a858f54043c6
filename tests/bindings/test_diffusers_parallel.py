"""Bound transformers under diffusers' context parallelism: four processes on one CPU."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fastrope as fr

pytest.importorskip("diffusers")
from pages import DOCS, page, snippets
from source_tree import ROOT

from fastrope import lab
from fastrope.bindings.diffusers import parallel

HERE = Path(__file__).parent
WORLD = 4
DIED = "a process that died"
SPANS = ("shared reference, batched", "shared reference, kept", "statistics of a reference", "NAG")
HOSTS, CASES = ("kontext", "flux2", "qwen-edit-plus"), ("ulysses", "ring", "both", "ulysses, odd", "ring, odd")


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> list[dict]:
    """What each process found."""
    folder = tmp_path_factory.mktemp("parallel")
    path = os.pathsep.join(map(str, (ROOT / "tests", HERE)))
    environment = os.environ | {"PYTHONPATH": path, "GLOO_SOCKET_IFNAME": "lo"}
    worker = [sys.executable, HERE / "parallel_worker.py", folder / "store", folder / "found"]
    said = subprocess.run(
        worker, env=environment, timeout=600, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    files = [folder / f"found.{rank}.json" for rank in range(WORLD)]
    assert all(path.exists() for path in files), said.stdout[-4000:]
    return [json.loads(path.read_text()) for path in files]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("host", HOSTS)
def test_a_split_sequence_gives_what_one_process_gives(found, host, case):
    for each in found:
        results = each[f"{host}, {case}"]
        assert {result["what"] for result in results} == {"groups and scales", "buckets", "biases"}
        for result in results:
            assert result["gap"] < 1e-5, result["what"]
            assert result["again"], "a second call gives the same bits"


def test_the_methods_of_these_cases_do_something(found):
    assert all(each["least that methods do"] > 1e-2 for each in found)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("host", HOSTS)
def test_processes_send_what_the_formula_says(found, host, case):
    for each in found:
        assert all(result["sent"] == result["formula"] > 0 and result["told"] for result in each[f"{host}, {case}"])


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("what", SPANS)
def test_what_knows_spans_works_on_parts_of_them(found, what, case):
    for each in found:
        result = each[f"{what}, {case}"]
        assert result["gap"] < 1e-5
        assert result["sent"] == result["formula"] > 0
        assert result["told"], "handle.sent"


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("host", ["kontext", "qwen", "ovis"])
def test_positions_are_rescaled_in_all_layers(found, host, case):
    """Of Qwen-Image, diffusers splits the table; Ovis has a plan of one's own."""
    assert all(each[f"positions, {host}, {case}"]["gap"] < 1e-5 for each in found)


@pytest.mark.parametrize("case", CASES)
def test_a_process_caches_its_part_of_a_reference(found, case):
    for each in found:
        result = each[f"cache, {case}"]
        assert result["cache"] == result["share"]


def test_fewer_heads_of_keys_and_heads_that_do_not_divide(found):
    refused = "expected heads for 2 processes, and grouped ones that divide by it, received (3, 1); use ring_degree"
    for each in found:
        assert len(each["heads"]) == 2 * len(CASES)
        assert all(result["gap"] < 1e-5 and result["told"] for result in each["heads"])
        assert each["heads that do not divide"] == f"context parallelism: {refused}"


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("other methods", "the same methods, step and sequence in every process"),
        ("no method in one", "the same methods, step and sequence in every process"),
        ("other noise", "the same latents, prompt and timestep in every process"),
        ("other prompt", "the same latents, prompt and timestep in every process"),
        ("inspect", "no inspection"),
        ("an odd length", "a number that divides by 2 processes as image tokens, received 23; use another size"),
    ],
)
def test_mistakes_are_named_in_every_process(found, what, message):
    assert all(each[what].startswith("context parallelism: expected " + message) for each in found)


def test_an_error_in_some_processes_is_one_in_all(found):
    """Those that can go on do not wait for the others."""
    waiting = "context parallelism: expected a call that every process can make, received an error in process [1]"
    reasons = {
        "an error in some": "context parallelism: expected this one",
        "another processor in some": "attention processors: expected those that fastrope.apply installed",
    }
    for what, reason in reasons.items():
        said = [each[what] for each in found]
        assert [text.startswith(waiting) for text in said] == [True, False, True, False]
        assert [text.startswith(reason) for text in said] == [False, True, False, True]
    assert all(each["after"]["gap"] < 1e-5 for each in found), "the next call goes on"


def test_folded_work_goes_to_the_plain_attention_that_was_asked_for(found):
    assert all(each["a plain attention"]["gap"] < 1e-5 for each in found)
    assert all(each["a plain attention"]["heads"] == [1] for each in found), "one layer, one of two heads"


def test_a_compiled_layer_without_a_modulation_sees_all_tokens(found):
    assert all(each["compiled"]["gap"] < 1e-5 for each in found)


@pytest.mark.parametrize(("case", "ring", "ulysses"), [("ulysses", 1, 2), ("ring", 2, 1), ("both", 2, 2)])
def test_memory_falls_as_the_page_says(found, case, ring, ulysses):
    """Within 2 %: a share of what one process needs, what it received, and copies of keys and values of all tokens."""
    for each in found:
        alone, tokens = each["memory, alone"], each["memory, all tokens"]
        exchanged = 3 * tokens / (ring * ulysses) if ulysses > 1 else 0
        gathered = (5 - 3 / ring) * tokens / ulysses if ring > 1 else 0
        stated = alone / (ring * ulysses) + exchanged + gathered
        assert abs(each[f"memory, {case}"] / stated - 1) < 0.02


def test_it_has_loras_and_leaves_the_model_as_it_was(found):
    for each in found:
        assert each["a LoRA counts"] > 1e-2
        assert each["removed"] == {"configured": True, "same": True, "equal": True}


def test_an_error_within_a_layer_ends_the_others_when_time_is_up(found):
    said = [each["an error within a layer"] for each in found]
    assert said[1] == said[3] == "an error of this process"
    for text in (said[0], said[2]):
        assert text.startswith("context parallelism: expected every process to take part in the all-gather of k, v")


def test_a_process_that_dies_in_a_collective_is_an_error_in_the_others(found):
    *others, died = (each[DIED] for each in found)
    assert died == "this one"
    assert all(
        text.startswith("context parallelism: expected every process to take part in the all-") for text in others
    )


def test_every_token_is_held_once():
    tokens = fr.TokenLayout(5, (3, 5), [(2, 3)])
    for ring, ulysses in ((1, 2), (2, 1), (2, 2), (3, 2)):
        places = [parallel.Split(ring, ulysses, rank).part(tokens) for rank in range(ring * ulysses)]
        for place in places:
            assert sorted(place.keys.tolist()) == list(range(len(tokens)))
        queries = torch.cat([place.queries for place in places[::ulysses]])
        assert sorted(queries.tolist()) == list(range(len(tokens)))


# ---- the page -------------------------------------------------------------------------------------------------------

TABLE = re.compile(r"(<!-- scaling: [^\n]* -->\n)(.*?)(<!-- end of scaling -->)", re.DOTALL)
ATTENTION, LINEAR, BANDWIDTH = 638e12, 550e12, 350e9  # per second and GPU
RUNS = {
    "FLUX.1 Kontext, 1024 px": (fr.TokenLayout(512, (64, 64), [(64, 64)]), 24),
    "FLUX.2, 1440 px, three references": (fr.TokenLayout(512, (90, 90), [(90, 90)] * 3), 48),
    "120k tokens": (fr.TokenLayout(512, (300, 400)), 48),
}


def predicted() -> str:
    """The table of docs/parallel.md: time of a block on several GPUs over that on one."""
    rows = ["| sequence, time of a block on one GPU | GPUs "
            "| Ulysses: MB per layer | time, one GPU = 1 | ring: MB per layer | time, one GPU = 1 |",
            "|---|---|---|---|---|---|"]  # fmt: skip
    for name, (tokens, heads) in RUNS.items():
        length, width = len(tokens), heads * 128
        alone = 4 * length**2 * width / ATTENTION + 24 * length * width**2 / LINEAR
        for ranks in (2, 4, 8):
            cells = []
            for split in (parallel.Split(1, ranks, 0), parallel.Split(ranks, 1, 0)):
                sent = sum(parallel.communication(split, tokens, 1, heads, 128, 2).values())
                cells += [f"{sent / 1e6:.0f}", f"{1 / ranks + sent / BANDWIDTH / alone:.2f}"]
            rows.append(f"| {name} ({length} tokens), {1e3 * alone:.1f} ms | {ranks} | {' | '.join(cells)} |")
    return "\n".join(rows) + "\n"


def test_the_page_says_what_the_formula_gives():
    path, text = DOCS / "parallel.md", page("parallel.md")
    if os.environ.get("FASTROPE_WRITE_DOCS") == "1":
        path.write_text(TABLE.sub(lambda m: m[1] + predicted() + m[3], text), encoding="utf-8")
        text = page("parallel.md")
    assert TABLE.search(text)[2] == predicted()
    for code, _ in snippets(text):
        compile(code, "parallel.md", "exec")


def test_communication_of_a_large_edit():
    """FLUX.2 with three references at 33k tokens on 8 processes: with Ulysses less than with ring."""
    tokens = fr.TokenLayout(512, (90, 90), [(90, 90)] * 3)
    split = [parallel.Split(1, 8, 0), parallel.Split(8, 1, 0)]
    ulysses, ring = (sum(parallel.communication(s, tokens, 1, 48, 128, 2).values()) for s in split)
    share = len(parallel.shards_of(8, tokens)[0])
    assert ulysses == 4 * share * 48 * 128 * 2 * 7 // 8
    assert ring == 2 * share * 48 * 128 * 2 * 7


def test_the_example_runs_in_two_processes(tmp_path):
    """As its first lines say."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*torchrun, ROOT / "examples" / "parallel_edit.py", "--tiny", "--out", tmp_path]
    said = subprocess.run(command, timeout=600, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert said.returncode == 0, said.stdout[-4000:]
    alone, call = lab.pipeline(), lab.CALL | {"num_inference_steps": 8, "image": lab.pictures(1)[0]}
    with fr.apply(alone, fr.GRAG(delta=1.15)):
        picture = alone(**call, **lab.prompt("digit", digit=3), generator=torch.Generator().manual_seed(0)).images[0]
    image = pytest.importorskip("PIL.Image")
    with image.open(tmp_path / "parallel-edit.png") as found:
        gaps = [abs(a - b) for a, b in zip(found.tobytes(), picture.tobytes(), strict=True)]
    assert max(gaps) <= 1
