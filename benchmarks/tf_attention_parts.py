"""What causal attention costs in TensorFlow's own operators on a CPU, part by part: a floor for what is made of them.

    python benchmarks/tf_attention_parts.py

Blocks of queries against all keys up to them, as opt_tf/rowwise.py does, but each part alone, on inputs that are there:
both products, and the softmax between them; their sum is what such blocks, one after another, cannot go below. Then the
whole of it for groups of heads side by side, each with smaller blocks and a chain of its own. The last line is one JSON
document, in milliseconds.
"""

import argparse
import json
import os
import statistics
import sys
import time
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "-1")

import tensorflow as tf

sys.path.insert(0, str(Path(__file__).parent.parent))

from opt_tf.attention import eager_attention
from opt_tf.rowwise import rowwise_attention


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--heads", type=int, default=12)
    parser.add_argument("--head-size", type=int, default=64)
    parser.add_argument("--runs", type=int, default=15)
    options = parser.parse_args()
    shape = (1, options.heads, options.length, options.head_size)
    q, k, v = (tf.random.stateless_normal(shape, (seed, 0)) for seed in range(3))
    plain = tf.function(lambda q, k, v: eager_attention(q, k, v, None)[0])
    document = {"shape": shape, "tensorflow": tf.__version__, "eager": milliseconds(plain, options.runs, q, k, v)}
    document["blocks"] = {
        rows: parts(q, k, v, rows, options.runs) for rows in (128, 256, 512) if rows <= options.length
    }
    document["groups of heads"] = {
        groups: milliseconds(by_groups(groups), options.runs, q, k, v)
        for groups in (1, 2, 4, 12)
        if options.heads % groups == 0
    }
    print(json.dumps(document))


def parts(q: tf.Tensor, k: tf.Tensor, v: tf.Tensor, rows: int, runs: int) -> dict[str, float]:
    """Milliseconds of each part over all blocks of `rows` queries."""
    stops = range(rows, q.shape[2] + 1, rows)
    scores = [tf.matmul(q[:, :, stop - rows : stop], k[:, :, :stop], transpose_b=True) for stop in stops]
    pairs = list(zip(stops, scores, strict=True))
    each = {
        "queries by keys": lambda stop, _: tf.matmul(q[:, :, stop - rows : stop], k[:, :, :stop], transpose_b=True),
        "softmax": lambda _, block: tf.nn.softmax(block),
        "weights by values": lambda stop, block: tf.matmul(block, v[:, :, :stop]),
    }
    times = {name: milliseconds(in_turn(part, pairs), runs) for name, part in each.items()}
    return {**times, "sum": round(sum(times.values()), 1)}


def in_turn(part, pairs):
    """A graph of one part for block after block; one number of each goes into the result, so that none is left out."""
    blocks = [block for _, block in pairs]

    @tf.function
    def run(*blocks):
        kept, last = [], []
        for (stop, _), block in zip(pairs, blocks, strict=True):
            with tf.control_dependencies(last):  # else blocks are computed side by side, and all are held
                last = [part(stop, tf.identity(block))]
            kept.append(last[0][0, 0, 0, 0])
        return tf.add_n(kept)

    return lambda: run(*blocks)


def by_groups(groups: int):
    """opt_tf's attention for each group of heads apart; their graphs depend on nothing of one another."""

    @tf.function
    def run(q, k, v):
        split = zip(*(tf.split(x, groups, axis=1) for x in (q, k, v)), strict=True)
        return tf.concat([rowwise_attention(*parts) for parts in split], axis=1)

    return run


def milliseconds(function, runs: int, *arguments) -> float:
    times = []
    for _ in range(2 + runs):  # the first two trace and warm up
        start = time.perf_counter()
        function(*arguments)
        times.append(1e3 * (time.perf_counter() - start))
    return round(statistics.median(times[2:]), 1)


if __name__ == "__main__":
    main()
