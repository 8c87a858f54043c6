"""The op by itself: attention with rotary embedding and modulations on tensors of your own.

python examples/attention_op.py          on a GPU, at the size of FLUX Kontext
python examples/attention_op.py --tiny   anywhere
"""

import argparse

import torch

import fastrope as fr

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--tiny", action="store_true", help="a small sequence in float32 on the CPU")
options = parser.parse_args()

device = "cpu" if options.tiny else "cuda"
text, side, heads, axes = (8, 8, 2, (4, 6, 6)) if options.tiny else (512, 64, 24, (16, 56, 56))
dtype = torch.float32 if options.tiny else torch.bfloat16

# Positions (S, 3) of text, target and reference: frame, row, column.
grid = torch.cartesian_prod(torch.arange(side), torch.arange(side))
frames = [torch.cat([torch.full((side * side, 1), frame), grid], dim=1) for frame in (0, 1)]
positions = torch.cat([torch.zeros(text, 3, dtype=torch.long), *frames]).to(device)
rope = fr.RoPE.axial(positions.double(), axes)

tokens = len(positions)
reference = slice(tokens - side * side, tokens)
q, k, v = (torch.randn(1, tokens, heads, sum(axes), device=device, dtype=dtype) for _ in range(3))  # (B, S, H, D)
scale = torch.ones(tokens)
scale[text : text + side] = 0.8  # for the target's first row, the reference seems nearer

plan = fr.plan(  # host work, once
    rope=rope,
    modulations=[
        fr.QueryScale(scale.to(device), keys=reference, axes=(1, 2)),
        fr.BiasDelta(bias=1.0, delta=1.1, keys=reference),
    ],
)
print(fr.explain(q, k, v, plan=plan))
out = fr.attention(q, k, v, plan=plan)  # as often as you like
print(
    "out",
    tuple(out.shape),
    "differs from plain attention by",
    float((out - fr.attention(q, k, v, rope=rope)).abs().max()),
)
