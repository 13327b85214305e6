"""Products of few rows, as decoding steps have them: written weight first in compiled functions, to the same result."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from harness import ROUNDOFF, config_of, token_ids

from opt_core.generation import BUCKET
from opt_tf import TFOPTForCausalLM
from opt_tf.layers import FEW_ROWS, Embedding, linear

IN, OUT = 53, 31


def factors(R: int, dtype: str) -> tuple[tf.Tensor, keras.Variable, keras.Variable]:
    random = np.random.default_rng(R)
    weight, bias = (keras.Variable(random.normal(size=shape), dtype=dtype) for shape in ((OUT, IN), (OUT,)))
    return tf.constant(random.normal(size=(R, 1, IN)), dtype), weight, bias


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("R", [1, 2, 31, FEW_ROWS, FEW_ROWS + 1])
def test_a_product_of_few_rows_compiled_equals_the_plain_one(R, dtype):
    x, weight, bias = factors(R, dtype)
    for some_bias in (None, bias):
        for jit_compile in (True, False):
            compiled = tf.function(lambda x, b=some_bias: linear(x, weight, b), jit_compile=jit_compile)
            plain = linear(x, weight, some_bias)
            want, got = (np.asarray(tf.cast(y, tf.float64)) for y in (plain, compiled(x)))
            size = np.abs(x.numpy().astype(float)) @ np.abs(np.asarray(tf.cast(weight, tf.float64))).T
            assert got.shape == (R, 1, OUT)
            assert (np.abs(got - want) <= 4 * ROUNDOFF[dtype] * (np.abs(want) + size)).all()


@pytest.mark.parametrize("R", [1, 3, FEW_ROWS + 1])
def test_the_gradients_of_a_product_of_few_rows_compiled_are_the_plain_ones(R):
    x, weight, bias = factors(R, "float32")

    def gradients(x):
        with tf.GradientTape() as tape:
            tape.watch(x)
            y = tf.reduce_sum(tf.sin(linear(x, weight, bias)))
        return tape.gradient(y, [x, weight.value, bias.value])

    for got, want in zip(tf.function(gradients, jit_compile=True)(x), gradients(x), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)


def test_the_product_of_few_rows_has_the_weight_first():
    """XLA moves a transposition of the result into the product, unless something stands between."""
    x, weight, bias = factors(7, "float32")
    compiled = tf.function(lambda x: linear(x, weight, bias), jit_compile=True)
    program = compiled.experimental_get_compiler_ir(x)(stage="optimized_hlo")
    assert f"f32[{OUT},7]{{1,0}} dot(" in program


@pytest.mark.parametrize("R", [1, 7])
def test_a_loop_widens_no_bfloat16_weight_of_its_products_and_no_table_of_its_lookups(R):
    _, weight, _ = factors(R, "bfloat16")
    table = Embedding(OUT, IN, init_std=1.0, dtype="bfloat16")

    def step(index):
        return tf.argmax(linear(table(index), weight), axis=-1)

    def steps(index):
        return tf.while_loop(lambda index: tf.reduce_any(index < OUT), step, (index,))

    compiled = tf.function(steps, jit_compile=True, autograph=False)
    program = compiled.experimental_get_compiler_ir(tf.zeros([R], tf.int64))(stage="optimized_hlo")
    assert f"bf16[{OUT},{IN}]" in program
    kept = [line for line in program.splitlines() if "get-tuple-element" in line]
    assert not [line for line in kept if f"= f32[{OUT},{IN}]" in line]


def test_prompts_of_5_to_60_tokens_compile_one_program():
    model = TFOPTForCausalLM(config_of(num_hidden_layers=1, max_position_embeddings=BUCKET))
    for T in range(5, 61, 5):
        model.generate(token_ids(model.config, 2, T), max_new_tokens=BUCKET - T)
    assert model.compiled_search.experimental_get_tracing_count() == 1
