"""Modulations in code written against torch's attention, and on any attention kernel.

python examples/any_attention.py          on a GPU
python examples/any_attention.py --tiny   anywhere
"""

import common
import torch
from torch import nn

import fastrope as fr
from fastrope import scaled_dot_product_attention  # in the place of torch.nn.functional's


class CrossAttention(nn.Module):
    """As it would be with torch's function, but for the keywords at its end."""

    def __init__(self, heads: int, dim: int):
        super().__init__()
        self.heads, self.query, self.both = heads, nn.Linear(dim, dim), nn.Linear(dim, 2 * dim)

    def forward(self, x, context, **modulated):
        q, k, v = self.query(x), *self.both(context).chunk(2, dim=-1)
        q, k, v = (y.unflatten(-1, (self.heads, -1)).transpose(1, 2) for y in (q, k, v))  # (B, H, S, D)
        return scaled_dot_product_attention(q, k, v, **modulated).transpose(1, 2).flatten(2)


def mine(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None):
    """Any plain attention on (B, S, H, D): FlashAttention, SageAttention, or torch's."""
    print("plain attention of", tuple(query.shape), "and", tuple(key.shape))
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    return nn.functional.scaled_dot_product_attention(q, k, v, scale=scale).transpose(1, 2)


options = common.options(__doc__)
device, tokens, heads, dim = ("cpu", 64, 2, 64) if options.tiny else ("cuda", 4096, 24, 3072)
layer = CrossAttention(heads, dim).to(device)
x, context = torch.randn(1, tokens, dim, device=device), torch.randn(1, 2 * tokens, dim, device=device)
second = slice(tokens, 2 * tokens)  # half of the context

kept = [fr.BiasDelta(delta=1.2, keys=second), fr.ValueGain(0.5, keys=second)]  # folds into keys and values
with torch.no_grad():
    moved = layer(x, context, modulations=kept, plain=mine) - layer(x, context)
print("moved by", float(moved.abs().max()))
