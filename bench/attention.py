"""The suite of single attention calls: every peer on every case of every workload."""

from __future__ import annotations

from functools import partial

from . import runner
from .cases import CASES, PLAIN, Case, chosen
from .frame import Selection, Session, Task
from .peers import PEERS, Peer
from .problem import Problem
from .workloads import WORKLOADS, Workload

SUITE, ROUNDS = "attention", 50


def tasks(selection: Selection) -> list[Task]:
    """A task for each case of each workload."""
    peers = [PEERS[name] for name in selection.peers_of(PEERS)]
    return [
        Task(SUITE, w.name, case.name, partial(measure, workload=w, case=case, peers=peers))
        for w in selection.of(WORKLOADS)
        for case in chosen(w, selection.cases and selection.cases_of(CASES))
        if peers
    ]


def measure(session: Session, workload: Workload, case: Case, peers: list[Peer]) -> None:
    """Rows of one case; the plain calls of those who want theirs in the same rounds are timed among them."""
    problem = Problem.make(workload, case, session.device, session.dtype)
    entries = [
        runner.Entry(
            case.name, peer.name, partial(peer.build, problem), {"rotation": peer.rotation, "ours": peer.ours},
            approximate=peer.approximate,
        )
        for peer in peers
    ]  # fmt: skip
    entries += [
        runner.Entry(PLAIN, peer.name, partial(peer.build, problem.plain), yardstick=True)
        for peer in peers
        if peer.own_plain and problem.modulations
    ]
    task = Task(SUITE, workload.name, case.name, measure)
    runner.measure(session, task, entries, workload.flops, ROUNDS)
