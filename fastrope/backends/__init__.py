"""How a call runs.

``reference`` (backend ``eager``) defines the result and reads what the user asked for. The others read the lowered
plan: ``sdpa`` runs anywhere and differentiates, ``fused`` (backend ``triton``) is the fused loop. ``folded`` is how
``sdpa`` runs forward on a GPU where all of a plan folds into the keys; ``split_rows`` gives unmodulated queries to it
and the others to ``fused``. :mod:`fastrope.dispatch` decides which.
"""
