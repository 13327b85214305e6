"""Fine-tunes a causal language model through low-rank adapters (LoRA), in any of the three frameworks.

    python examples/train_lora.py --backend flax
    python examples/train_lora.py --backend torch --from facebook/opt-1.3b --train my.txt --validation held-out.txt

The weights stay as they are; what is trained, saved and kept in checkpoints are two thin matrices beside some of them.
FOLDER/adapter is an adapter of PEFT's format, which the other backends and PEFT load; FOLDER/model has it added to the
weights. Stopped, even killed, and started again with the same command, it goes on.
"""

import argparse

from shakespeare_data import parts_of_text, texts
from train_causal_lm import perplexity
from training_arguments import parse_arguments, training_parser

from opt_core import OPTTokenizer
from opt_core.batching import Batches, PackedDocuments
from opt_core.lora import LoraConfig
from opt_core.optimization import TrainingRecipe
from opt_core.text_sources import read_texts
from opt_zoo.backends import load_backend
from opt_zoo.sources import find_source
from opt_zoo.training_log import summary
from opt_zoo.training_loop import train


def main() -> None:
    args = options()
    source = find_source(args.source, None)
    tokenizer = OPTTokenizer.from_pretrained(source)
    sources = (args.train, args.validation) if args.train else [texts(part) for part in parts_of_text()]
    documents = [read_texts(source, at_blank_lines=True) for source in sources]
    rows, held_out = (PackedDocuments(tokenizer(those)["input_ids"], args.length) for those in documents)
    batches = Batches(rows, args.batch_size, seed=args.seed)
    validation = Batches(held_out, args.batch_size, shuffle=False, drop_last=False)

    backend = load_backend(args.backend)
    lora, training = backend.part("lora"), backend.part("training")
    model = backend.model_class("causal-lm").from_pretrained(source)
    config = LoraConfig(r=args.rank, lora_alpha=2 * args.rank, lora_dropout=0.05, target_modules=tuple(args.modules))
    lora.add_lora(model, config, seed=args.seed)
    recipe = TrainingRecipe(args.rate, warmup_steps=args.steps // 10, total_steps=args.steps)
    trainer = training.Trainer(model, recipe, seed=args.seed)

    result = train(
        trainer, batches, args.steps, args.folder,
        validate=lambda: perplexity(trainer, validation), validate_every=args.every, save_every=args.every,
        identity={"from": args.source, "rank": args.rank, "modules": args.modules},
    )  # fmt: skip
    lora.save_adapter(model, args.folder / "adapter")
    lora.merge_lora(model)
    model.save_pretrained(args.folder / "model")
    tokenizer.save_pretrained(args.folder / "model")
    print(summary(result, "perplexity"))


def options() -> argparse.Namespace:
    files = ".txt (a text between blank lines), .csv or .jsonl"
    parser = training_parser(__doc__, folder="lora", steps=200, every=50, batch_size=8, rate=2e-3, files=files)
    parser.add_argument("--length", type=int, default=256, help="tokens of a row")
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--modules", nargs="+", default=["q_proj", "v_proj"], help="default: q_proj v_proj")
    return parse_arguments(parser)


if __name__ == "__main__":
    main()
