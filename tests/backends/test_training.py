"""Training with each framework's own optimizer, as its users write it: the same losses, step by step, in all."""

import numpy as np
import pytest
from harness import config_of, mask_named, save_random, token_ids

STEPS, RATE = 4, 0.05


def train_torch(model, batch) -> list[float]:
    import torch

    optimizer, losses = torch.optim.SGD(model.train().parameters(), lr=RATE), []
    for _ in range(STEPS):
        loss = model(**batch).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def train_tf(model, batch) -> list[float]:
    import keras
    import tensorflow as tf

    losses = []
    keep = keras.callbacks.LambdaCallback(on_epoch_end=lambda _, logs: losses.append(logs["loss"]))
    model.compile(optimizer=keras.optimizers.SGD(RATE))
    model.fit(tf.data.Dataset.from_tensors(batch), epochs=STEPS, shuffle=False, verbose=0, callbacks=[keep])
    return losses


def train_flax(model, batch) -> list[float]:
    import optax
    from flax import nnx

    @nnx.jit
    def step(model, optimizer, batch):
        loss, gradients = nnx.value_and_grad(lambda model: model(**batch).loss)(model)
        optimizer.update(model, gradients)
        return loss

    model.train()
    optimizer = nnx.Optimizer(model, optax.sgd(RATE), wrt=nnx.Param)
    return [float(step(model, optimizer, batch)) for _ in range(STEPS)]


TRAIN = {"torch": train_torch, "tf": train_tf, "flax": train_flax}


@pytest.mark.parametrize("variant", ["pre-norm", "350m style"])
def test_gradient_descent_takes_the_same_steps_in_every_backend(backends, variant, tmp_path):
    config = config_of(variant)
    ids = token_ids(config)
    batch = dict(input_ids=ids, attention_mask=mask_named("holes"), labels=ids)
    save_random(tmp_path / "before", config)
    losses, logits = {}, {}
    for backend in backends:
        model = backend.model_class().from_pretrained(tmp_path / "before", dtype="auto")
        losses[backend.name] = TRAIN[backend.name](model, batch)
        model.save_pretrained(tmp_path / backend.name)
        again = backends[0].model_class().from_pretrained(tmp_path / backend.name)
        logits[backend.name] = backends[0].numpy(again(ids).logits)
    first = backends[0].name
    assert losses[first][-1] < losses[first][0] - 0.2
    for name in losses:
        np.testing.assert_allclose(losses[name], losses[first], atol=1e-5, err_msg=name)
        np.testing.assert_allclose(logits[name], logits[first], atol=1e-4, err_msg=name)
    untouched = backends[0].model_class().from_pretrained(tmp_path / "before")(**batch).loss
    assert abs(float(backends[0].numpy(untouched)) - losses[first][0]) < 1e-6  # nothing was written through the map
