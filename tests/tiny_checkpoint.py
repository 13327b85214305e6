"""A random checkpoint with a small tokenizer, whole as a published repository is: what tests load in place of one.

Its texts are nonsense; its files, names, ids of special tokens and code paths are the published ones.
"""

import hashlib
import shutil
from collections.abc import Iterable
from pathlib import Path

from harness import config_of, save_random
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from opt_core import OPTConfig, OPTTokenizer

SPECIAL_TOKENS = ["<s>", "<pad>", "</s>", "<unk>"]  # ids 0 to 3, as in the published vocabulary


def save_tokenizer(folder: Path, texts: Iterable[str], vocab_size: int = 1009) -> OPTTokenizer:
    """Trains byte-level BPE on `texts`, which it then encodes in few tokens, and writes its files into `folder`."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=SPECIAL_TOKENS, initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator(list(texts) * 3, trainer)
    folder.mkdir(parents=True, exist_ok=True)
    bpe.model.save(str(folder))
    tokenizer = OPTTokenizer.from_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return tokenizer


def save_checkpoint(folder: Path, texts: Iterable[str], variant: str = "pre-norm", **changes) -> OPTConfig:
    """A random language model of `variant` with a tokenizer for `texts`, in `folder`; returns its config."""
    tokenizer = save_tokenizer(folder, texts)
    config = config_of(variant, vocab_size=len(tokenizer), **{"max_position_embeddings": 211, **changes})
    save_random(folder, config)
    return config


def publish_in_cache(cache: Path, repo_id: str, folder: Path) -> None:
    """Lays `folder` out in `cache` as `huggingface_hub` does with what it downloaded from `repo_id`."""
    commit = hashlib.sha1(repo_id.encode()).hexdigest()
    repository = cache / f"models--{repo_id.replace('/', '--')}"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(commit)
    shutil.copytree(folder, repository / "snapshots" / commit)
