"""LlamaGen (arXiv 2406.06525), which no host library has: the model, its tokenizer, and editing with anchors.

It needs torch alone. Prompts as text need transformers, for the T5 encoder.
"""

from .checkpoint import read_checkpoint
from .config import SIZES, LlamaGenConfig
from .generate import generate
from .model import LlamaGen
from .text import encode_prompts
from .vq import VQConfig, VQTokenizer

__all__ = [
    "SIZES", "LlamaGen", "LlamaGenConfig", "VQConfig", "VQTokenizer", "encode_prompts", "generate", "read_checkpoint",
]  # fmt: skip
