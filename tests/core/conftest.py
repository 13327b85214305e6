"""A small vocabulary with OPT's special ids, trained here, and OPT's real one where OPT_TOKENIZER_DIR names it."""

import os
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from opt_core import OPTTokenizer

TEXT = """
The man turned on the faucet so the toilet filled with water. Isn't it what we've said? They're here, I'm there,
she'll go, he'd stay. 12 months and 365 days make 1 year; 2023, 1999. A naïve café in Zürich, œuvre, straße, ångström.
Привет, как дела? Хорошо, спасибо. 你好，世界。今天天气很好。 こんにちは。 مرحبا بالعالم 😀😃👨‍👩‍👧
♥ — “quotes” … x² + y³ = ½.
def f(x):
\treturn {"a": [1, 2.5e-3], 'b': None}  # comment

The water in the toilet is what the man said, and the months of the year are there:   spaces,\t\ttabs.
"""


@pytest.fixture(scope="session")
def vocab_folder(tmp_path_factory) -> Path:
    """`vocab.json` and `merges.txt` of 503 tokens: <s> 0, <pad> 1, </s> 2, <unk> 3, all bytes, and merges."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=503,
        special_tokens=["<s>", "<pad>", "</s>", "<unk>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([TEXT] * 3, trainer)
    folder = tmp_path_factory.mktemp("vocab")
    tokenizer.model.save(str(folder))
    return folder


@pytest.fixture
def tokenizer(vocab_folder) -> OPTTokenizer:
    return OPTTokenizer.from_pretrained(vocab_folder)


@pytest.fixture(scope="session")
def real_folder() -> Path:
    folder = os.environ.get("OPT_TOKENIZER_DIR")
    if not folder:
        pytest.skip("OPT_TOKENIZER_DIR, the folder of OPT's vocab.json and merges.txt, is not set")
    return Path(folder)


@pytest.fixture(scope="session")
def real_tokenizer(real_folder) -> OPTTokenizer:
    return OPTTokenizer.from_pretrained(real_folder)
