"""How a plan runs. Each backend is one function ``run(q, k, v, plan, scale, return_lse) -> (out, lse or None)``.

``eager`` defines the result, ``sdpa`` runs anywhere and differentiates, ``triton`` is the fused kernel.
"""
