"""What tests of methods share: the lab's trained editor, a tokenizer of a few words."""

from __future__ import annotations

import pytest

import fastrope as fr


@pytest.fixture(scope="module")
def pipe():
    """The lab's trained editor."""
    pytest.importorskip("diffusers")
    pytest.importorskip("transformers")
    from methods import tiny_run

    return tiny_run.pipeline()


@pytest.fixture(scope="module")
def method():
    """LooseRoPE from a pasted digit."""
    from methods import tiny_run

    return fr.LooseRoPE.from_images(*tiny_run.pasted())


@pytest.fixture(scope="session")
def tokenizer():
    """Words and endings are tokens, after a token of the start."""
    transformers = pytest.importorskip("transformers")
    tokenizers = pytest.importorskip("tokenizers")
    words = ["[UNK]", "<s>", "a", "red", "##dish", "boat", ",", "sun"]
    model = tokenizers.models.WordPiece({word: n for n, word in enumerate(words)}, unk_token="[UNK]")
    found = tokenizers.Tokenizer(model)
    found.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
    found.post_processor = tokenizers.processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return transformers.PreTrainedTokenizerFast(tokenizer_object=found)
