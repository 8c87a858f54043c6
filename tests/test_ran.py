"""Notes of the calls that ran."""

from __future__ import annotations

import threading

import torch

import fastrope as fr

ROPE = fr.RoPE.axial(torch.arange(12)[:, None], (16,))
GROUP = fr.BiasDelta(delta=1.2, keys=slice(6, 12))


def attend(dtype=torch.float32, **options) -> None:
    x = torch.zeros(1, 12, 2, 16, dtype=dtype)
    fr.attention(x, x, x, rope=ROPE, modulations=[GROUP], **options)


def test_alike_calls_are_counted():
    with fr.explain_calls() as calls:
        attend()
        attend()
        attend(torch.float16, backend="eager")
    attend()
    assert [ran.backend for ran in calls] == ["sdpa", "sdpa", "eager"]
    first, second = str(calls).splitlines()
    assert first.startswith("2 x sdpa on (1, 12, 2, 16) queries, 12 keys, float32: ")
    assert first.endswith(calls[0].reason)
    assert second == "1 x eager on (1, 12, 2, 16) queries, 12 keys, float16: asked for"


def test_contexts_nest_and_see_all_threads():
    with fr.explain_calls() as outer:
        with fr.explain_calls() as inner:
            thread = threading.Thread(target=attend)
            thread.start()
            thread.join()
        attend()
    assert (len(outer), len(inner)) == (2, 1)
    with fr.explain_calls() as none:
        pass
    assert str(none) == "no call"


def test_joint_and_compiled_calls_are_noted():
    x = torch.zeros(1, 6, 2, 16)
    plan = fr.plan(rope=ROPE, modulations=[GROUP])
    compiled = torch.compile(lambda q: fr.attention(q, q, q, plan=plan), backend="eager", fullgraph=True)
    with fr.explain_calls() as calls:
        fr.joint_attention([fr.Stream(x, x, x), fr.Stream(x, x, x)], plan=plan)
        compiled(torch.zeros(1, 12, 2, 16))
    assert [(ran.queries, ran.keys) for ran in calls] == [((1, 12, 2, 16), 12)] * 2
