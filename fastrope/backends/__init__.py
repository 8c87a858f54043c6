"""How a plan runs. Each backend is one function ``run(q, k, v, plan, scale, return_lse) -> (out, lse or None)``.

``eager`` defines the result, ``sdpa`` runs anywhere and differentiates, ``triton`` is the fused kernel. ``folded`` is
the form that ``sdpa`` takes forward on a GPU, for what leaves nothing but plain attention to a loop over keys;
``divided`` gives the queries of a call of which that is true to it, and the others to ``triton``.
"""
