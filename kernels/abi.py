"""What plans and kernels agree on: the columns of the segment table and the sizes of tiles.

Pure Python, so that both sides import it: plans are built where triton is not installed.
"""

QUERY_TILE = 128  # sorted queries that share a scale bucket; every kernel's BLOCK_M divides it
AXIS_BLOCK = 8  # keys of an axis block along either axis: with 16, what a block keeps in registers spills
PAIR_CHUNK = 16  # RoPE pairs the axis-block kernel multiplies at once: the least a dot product takes
GROUP_COLUMNS = ("bias", "delta", "count")  # of a group's row: lambda, delta, number of unmasked keys

# Columns of the segment table, int32, one row per segment.
SEGMENT_COLUMNS = (
    "start",  # keys [start, stop) in key order
    "stop",
    "bucket_base",  # packed row of the first key at scale bucket 0; bucket n lies n * scaled_keys further
    "scaled",  # 1 where a QueryScale covers the keys
    "weight",  # row of the band weights, or -1
    "group",  # BiasDelta group, or -1
    "gain",  # product of gains, numbered within the pass, or -1
    "bias",  # sum of logit biases, numbered within the pass, or -1
    "first_block",  # axis blocks [first_block, last_block)
    "last_block",
    "variant",  # query variant, numbered within the pass
    "first_of_variant",  # 1 for the first segment of its variant in the pass
    "pass_group",  # the group, numbered within the pass, or -1
)
