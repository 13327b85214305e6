"""Fine-tunes a classifier of texts, in any of the three frameworks: by default, verse or prose?

    python examples/train_classifier.py --backend torch
    python examples/train_classifier.py --backend tf --from facebook/opt-125m --train my.csv --validation held-out.csv

Files have the fields text and label (.csv or .jsonl). Texts are padded to one of a few widths, so that little is wasted
and a framework compiles for few shapes. Stopped, even killed, and started again with the same command, it goes on. The
result is in FOLDER/model.
"""

import argparse
from typing import Any

import numpy as np
from shakespeare_data import parts_of_text, verse_or_prose
from training_arguments import parse_arguments, training_parser

from opt_core import OPTTokenizer
from opt_core.batching import Batches
from opt_core.optimization import TrainingRecipe
from opt_core.text_sources import read_rows
from opt_zoo.backends import load_backend
from opt_zoo.sources import find_source
from opt_zoo.training_log import summary
from opt_zoo.training_loop import train


def main() -> None:
    args = options()
    source = find_source(args.source, None)
    tokenizer = OPTTokenizer.from_pretrained(source)
    sources = (args.train, args.validation) if args.train else [verse_or_prose(part) for part in parts_of_text()]
    rows, held_out = (read_rows(source, {"text": str, "label": str}) for source in sources)
    labels = sorted({row["label"] for row in rows})

    def encode(row: dict[str, str]) -> dict[str, Any]:
        ids = tokenizer(row["text"], max_length=max(args.widths))["input_ids"]
        return {"input_ids": ids, "labels": labels.index(row["label"])}

    batches = Batches([encode(row) for row in rows], args.batch_size, seed=args.seed, widths=args.widths)
    validation = Batches(
        [encode(row) for row in held_out], args.batch_size, shuffle=False, widths=args.widths, drop_last=False
    )

    backend = load_backend(args.backend)
    model_class = backend.model_class("sequence-classification")
    model = model_class.from_pretrained(source, id2label=dict(enumerate(labels)))
    recipe = TrainingRecipe(args.rate, warmup_steps=args.steps // 10, total_steps=args.steps)
    trainer = backend.part("training").Trainer(model, recipe, seed=args.seed)

    def accuracy() -> dict[str, float]:
        right = [backend.to_numpy(trainer.predict(batch).logits).argmax(-1) == batch["labels"] for batch in validation]
        return {"accuracy": np.concatenate(right).mean()}

    result = train(
        trainer, batches, args.steps, args.folder,
        validate=accuracy, validate_every=args.every, save_every=args.every, identity={"from": args.source},
    )  # fmt: skip
    model.save_pretrained(args.folder / "model")
    tokenizer.save_pretrained(args.folder / "model")
    print(summary(result, "accuracy"))


def options() -> argparse.Namespace:
    files = ".csv or .jsonl with the fields text and label"
    parser = training_parser(__doc__, folder="classifier", steps=300, batch_size=16, rate=5e-4, files=files)
    parser.add_argument("--widths", type=int, nargs="+", default=[64, 128], help="to which texts are padded or cut")
    return parse_arguments(parser)


if __name__ == "__main__":
    main()
