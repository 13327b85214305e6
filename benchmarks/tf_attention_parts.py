"""What causal attention costs in TensorFlow's own operators on a CPU, part by part: a floor for what is made of them.

    python benchmarks/tf_attention_parts.py

Blocks of queries against all keys up to them, as opt_tf/rowwise.py does, but each part alone, on inputs that are there:
both products, and the softmax between them; their sum is what such blocks, one after another, cannot go below. Beside
it the least that both products could take, by the rate of a large one. Then eager and "sdpa" attention in turn, in each
way to run TensorFlow, with the peak of its allocator. The last line is one JSON document, in milliseconds and MB.
"""

import argparse
import functools
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "-1")

import tensorflow as tf

sys.path.insert(0, str(Path(__file__).parent.parent))

from opt_tf.attention import causal_attention, eager_attention


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--heads", type=int, default=12)
    parser.add_argument("--head-size", type=int, default=64)
    parser.add_argument("--runs", type=int, default=15)
    options = parser.parse_args()
    shape = (1, options.heads, options.length, options.head_size)
    q, k, v = (tf.random.stateless_normal(shape, (seed, 0)) for seed in range(3))
    document = {"shape": shape, "tensorflow": tf.__version__, **ceiling(options)}
    document["blocks"] = {
        rows: parts(q, k, v, rows, options.runs) for rows in (128, 256, 512) if rows <= options.length
    }
    document["ways"] = {
        name: {what: in_pairs(way, call, q, k, v, options.runs) for what, call in CALLS.items()}
        for name, way in WAYS.items()
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
    found = {name: milliseconds(in_turn(part, pairs), runs) for name, part in each.items()}
    return {**found, "sum": round(sum(found.values()), 1)}


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


def ceiling(options: argparse.Namespace) -> dict[str, float]:
    """Of the products over the causal half of the scores, by the fastest of some large products."""
    matrix = tf.random.stateless_normal((2048, 2048), (0, 0))
    rate = 2 * 2048**3 / (1e-3 * min(times(tf.function(tf.matmul), options.runs, matrix, matrix)))
    flops = 2 * options.heads * options.length**2 * options.head_size
    return {"Gflop/s": round(1e-9 * rate), "products at that rate": round(1e3 * flops / rate, 1)}


def forward(attend: Callable, q: tf.Tensor, k: tf.Tensor, v: tf.Tensor) -> tf.Tensor:
    return attend(q, k, v)


def both(attend: Callable, q: tf.Tensor, k: tf.Tensor, v: tf.Tensor) -> tuple:
    with tf.GradientTape() as tape:
        tape.watch([q, k, v])
        out = attend(q, k, v)
    return out, tape.gradient(out, [q, k, v], tf.ones_like(out))


CALLS = {"forward": forward, "forward and backward": both}
WAYS = {
    "graph": lambda function: tf.function(function, autograph=False),
    "jit_compile": lambda function: tf.function(function, autograph=False, jit_compile=True),
    "outside a graph": lambda function: function,
}
ATTENTION = {"eager": lambda q, k, v: eager_attention(q, k, v, None)[0], "sdpa": causal_attention}


def in_pairs(way: Callable, call: Callable, q: tf.Tensor, k: tf.Tensor, v: tf.Tensor, runs: int) -> dict[str, float]:
    """Eager and "sdpa" in turn, each after one call of its own that is not timed."""
    functions = {name: way(functools.partial(call, attend)) for name, attend in ATTENTION.items()}
    seen: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(1 + runs):  # the first turn traces and compiles
        for name, function in functions.items():
            seen[name].append(times(function, 2, q, k, v)[-1])
    found = {name: round(statistics.median(seen[name][1:]), 1) for name in functions}
    peaks = {f"{name}, MB": peak_megabytes(function, q, k, v) for name, function in functions.items()}
    return {**found, "times as fast": round(found["eager"] / found["sdpa"], 2), **peaks}


def peak_megabytes(function: Callable, *arguments: tf.Tensor) -> float:
    """Beyond the arguments, by TensorFlow's allocator."""
    info = tf.config.experimental
    before = info.get_memory_info("CPU:0")["current"]
    info.reset_memory_stats("CPU:0")
    function(*arguments)
    return round((info.get_memory_info("CPU:0")["peak"] - before) / 1e6, 1)


def milliseconds(function: Callable, runs: int, *arguments: tf.Tensor) -> float:
    return round(statistics.median(times(function, 2 + runs, *arguments)[2:]), 1)  # the first two trace and warm up


def times(function: Callable, runs: int, *arguments: tf.Tensor) -> list[float]:
    """Milliseconds of each call."""
    found = []
    for _ in range(runs):
        start = time.perf_counter()
        function(*arguments)
        found.append(1e3 * (time.perf_counter() - start))
    return found


if __name__ == "__main__":
    main()
