"""Trains a byte-level BPE with OPT's special ids on one text file: the tokenizer of the embedded checkpoints.

    python examples/train_tokenizer.py --text tinyshakespeare.txt --output my-tokenizer

Ids 0 to 3 are "<s>", "<pad>", "</s>" and "<unk>" as in the published vocabulary; the 256 bytes follow, then the merges
(Sennrich et al., arXiv:1508.07909, on the bytes of GPT-2). Every text can be encoded: "<unk>" is there for its id only.
"""

import argparse
import json
from pathlib import Path

from tokenizers import Tokenizer
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.trainers import BpeTrainer

from opt_core import OPTTokenizer

SPECIAL_TOKENS = ("<s>", "<pad>", "</s>", "<unk>")  # in the order of their ids


def train_tokenizer(text: str, vocab_size: int) -> OPTTokenizer:
    """A tokenizer of at most `vocab_size` tokens: fewer where `text` has no more pairs that occur twice."""
    backend = Tokenizer(BPE())
    backend.pre_tokenizer = ByteLevel(add_prefix_space=False, use_regex=True)
    trainer = BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=sorted(ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator([text], trainer)
    learnt = json.loads(backend.to_str())["model"]
    return OPTTokenizer(learnt["vocab"], learnt["merges"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--text", type=Path, required=True, help="a UTF-8 text file")
    parser.add_argument("--output", type=Path, required=True, help="the folder to write")
    parser.add_argument("--vocab-size", type=int, default=2048, help="special tokens and bytes included")
    arguments = parser.parse_args()
    tokenizer = train_tokenizer(arguments.text.read_text(encoding="utf-8"), arguments.vocab_size)
    print(*tokenizer.save_pretrained(arguments.output), sep="\n")


if __name__ == "__main__":
    main()
