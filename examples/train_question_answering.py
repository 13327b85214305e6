"""Fine-tunes extractive question answering, in any of the three frameworks: by default, who speaks in a dialogue?

    python examples/train_question_answering.py --backend torch
    python examples/train_question_answering.py --backend tf --from facebook/opt-350m --train train-v1.1.json \\
        --validation dev-v1.1.json --length 384 --stride 128

Files are of SQuAD's format, version 1.1 or 2.0. Long contexts are cut into windows that overlap. Exact match and F1 on
held-out questions, by the published measures, are taken before, during and after. Stopped, even killed, and started
again with the same command, it goes on. The result is in FOLDER/model.
"""

import argparse

from shakespeare_data import parts_of_text, who_speaks
from training_arguments import parse_arguments, training_parser

from opt_core import OPTTokenizer
from opt_core.batching import Batches
from opt_core.optimization import TrainingRecipe
from opt_core.question_answering import best_answer, make_windows, squad_metrics
from opt_core.text_sources import read_questions
from opt_zoo.backends import load_backend
from opt_zoo.sources import find_source
from opt_zoo.training_log import summary
from opt_zoo.training_loop import train


def main() -> None:
    args = options()
    source = find_source(args.source, None)
    tokenizer = OPTTokenizer.from_pretrained(source)
    sources = (args.train, args.validation) if args.train else [who_speaks(part) for part in parts_of_text()]
    questions, held_out = (read_questions(source) for source in sources)
    windows, held_out_windows = (make_windows(q, tokenizer, args.length, args.stride) for q in (questions, held_out))
    widths = dict(widths=[args.length // 2, args.length])
    batches = Batches([window.example() for window in windows], args.batch_size, seed=args.seed, **widths)
    examples = [window.example() for window in held_out_windows]
    validation = Batches(examples, args.batch_size, shuffle=False, drop_last=False, **widths)

    backend = load_backend(args.backend)
    model = backend.model_class("question-answering").from_pretrained(source)
    recipe = TrainingRecipe(args.rate, warmup_steps=args.steps // 10, total_steps=args.steps)
    trainer = backend.part("training").Trainer(model, recipe, seed=args.seed)

    def metrics() -> dict[str, float]:
        found = {number: [] for number in range(len(held_out))}
        for step, batch in enumerate(validation):
            out = trainer.predict(batch)
            starts_BT, ends_BT = backend.to_numpy(out.start_logits), backend.to_numpy(out.end_logits)
            for number, start_T, end_T in zip(validation.examples_at(step), starts_BT, ends_BT, strict=True):
                window = held_out_windows[number]
                found[window.question].append((window, start_T, end_T))
        unanswerable = dict(may_be_unanswerable=any(not question.answers for question in held_out))
        answers = {q.id: best_answer(q.context, found[i], **unanswerable).text for i, q in enumerate(held_out)}
        return squad_metrics(held_out, answers)

    result = train(
        trainer, batches, args.steps, args.folder,
        validate=metrics, validate_every=args.every, save_every=args.every, identity={"from": args.source},
    )  # fmt: skip
    model.save_pretrained(args.folder / "model")
    tokenizer.save_pretrained(args.folder / "model")
    print(summary(result, "exact_match"), summary(result, "f1"))


def options() -> argparse.Namespace:
    parser = training_parser(__doc__, folder="answers", steps=300, batch_size=16, rate=1e-3, files="a SQuAD file")
    parser.add_argument("--length", type=int, default=192, help="tokens of a window")
    parser.add_argument("--stride", type=int, default=64, help="tokens that two windows share")
    return parse_arguments(parser)


if __name__ == "__main__":
    main()
