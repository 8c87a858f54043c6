"""LlamaGen (arXiv 2406.06525), which no host library carries: the model, its tokenizer, and editing with anchors.

Needs torch alone; prompts as text need transformers for the T5 encoder.
"""

from .checkpoint import read_checkpoint
from .generate import generate
from .model import SIZES, LlamaGen, LlamaGenConfig
from .text import encode_prompts
from .vq import VQConfig, VQTokenizer

__all__ = [
    "SIZES", "LlamaGen", "LlamaGenConfig", "VQConfig", "VQTokenizer", "encode_prompts", "generate", "read_checkpoint",
]  # fmt: skip
