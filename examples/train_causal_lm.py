"""Trains a causal language model on texts, from scratch or from a checkpoint, in any of the three frameworks.

    python examples/train_causal_lm.py --backend torch                                   # a small OPT, from scratch
    python examples/train_causal_lm.py --backend flax --from opt-tiny --rate 3e-4        # fine-tuning
    python examples/train_causal_lm.py --backend tf --train my.jsonl --validation held-out.jsonl
    torchrun --nproc-per-node 4 examples/train_causal_lm.py --backend torch --mesh fsdp=2,tensor=2

Texts are packed into rows without padding, and those that share a row do not see each other. The perplexity on held-out
texts is measured before, during and after. Stopped, even killed, and started again with the same command, it goes on,
also with another mesh and number of processes. The result is in FOLDER/model, for `from_pretrained` of all three.
"""

import argparse
import math

import numpy as np
from shakespeare_data import parts_of_text, texts
from training_arguments import parse_arguments, training_parser

from opt_core import OPTConfig, OPTTokenizer
from opt_core.batching import Batches, PackedDocuments, count_targets
from opt_core.optimization import TrainingRecipe
from opt_core.reference import IGNORED_LABEL
from opt_core.text_sources import read_texts
from opt_zoo.backends import load_backend
from opt_zoo.embedded import embedded_folder
from opt_zoo.sources import find_source
from opt_zoo.training_log import summary
from opt_zoo.training_loop import train

SCRATCH = dict(hidden_size=128, ffn_dim=512, num_hidden_layers=4, num_attention_heads=4, max_position_embeddings=256)


def main() -> None:
    args = options()
    source = args.source and find_source(args.source, None)
    tokenizer = OPTTokenizer.from_pretrained(source or embedded_folder("opt-tiny"))
    sources = (args.train, args.validation) if args.train else [texts(part) for part in parts_of_text()]
    documents = [read_texts(source, at_blank_lines=True) for source in sources]
    rows, held_out = (PackedDocuments(tokenizer(those)["input_ids"], args.length) for those in documents)
    batches = Batches(rows, args.batch_size, seed=args.seed)
    validation = Batches(held_out, args.batch_size, shuffle=False, drop_last=False)

    backend = load_backend(args.backend)
    model_class = backend.model_class("causal-lm")
    new = OPTConfig(vocab_size=len(tokenizer), **SCRATCH)
    if args.mesh:
        mesh = backend.part("sharding").init_mesh(args.mesh)
        cut = backend.part("sharding").shard_model
        model = model_class.from_pretrained(source, device_mesh=mesh) if source else cut(model_class(new), mesh)
    else:
        model = model_class.from_pretrained(source) if source else model_class(new)
    recipe = TrainingRecipe(args.rate, warmup_steps=args.steps // 10, total_steps=args.steps)
    trainer = backend.part("training").Trainer(model, recipe, seed=args.seed)

    result = train(
        trainer, batches, args.steps, args.folder,
        validate=lambda: perplexity(trainer, validation), validate_every=args.every, save_every=args.every,
        identity={"from": args.source},
    )  # fmt: skip
    model.save_pretrained(args.folder / "model")
    if trainer.process_index == 0:
        tokenizer.save_pretrained(args.folder / "model")
        print(summary(result, "perplexity"))


def perplexity(trainer, batches: Batches) -> dict[str, float]:
    """exp of the mean loss of all tokens that are predicted."""
    counts = [count_targets(batch) for batch in batches]
    whole = [filled(batch, batches.batch_size) for batch in batches]
    losses = [trainer.evaluate(batch) * count for batch, count in zip(whole, counts, strict=True)]
    return {"perplexity": math.exp(sum(losses) / sum(counts))}


def filled(batch: dict[str, np.ndarray], rows: int) -> dict[str, np.ndarray]:
    """The last batch with as many rows as the others, which devices share; those that are added predict nothing."""
    more = rows - len(batch["labels"])
    added = {name: np.repeat(x[-1:], more, axis=0) for name, x in batch.items()}
    added["labels"] = np.full_like(added["labels"], IGNORED_LABEL)
    return {name: np.concatenate([x, added[name]]) for name, x in batch.items()}


def options() -> argparse.Namespace:
    files = ".txt (a text between blank lines), .csv or .jsonl"
    common = dict(folder="causal-lm", steps=400, batch_size=8, rate=2e-3, files=files, source=None)
    parser = training_parser(__doc__, **common)
    parser.add_argument("--length", type=int, default=256, help="tokens of a row")
    parser.add_argument("--mesh", help="several devices, such as fsdp=2,tensor=2, under torchrun (torch, flax)")
    args = parse_arguments(parser)
    if args.mesh and args.backend == "tf":
        parser.error("--mesh: expected --backend torch or flax")
    return args


if __name__ == "__main__":
    main()
