"""A model as a SavedModel, TensorFlow: its weights and the program that uses them, to be served without this package.

Written only. The weights of one are read from its variables (`conversion.tf_checkpoint`); its program is never run.
"""

from collections.abc import Mapping
from pathlib import Path

import tensorflow as tf
from tensorflow import Tensor

from conversion.manifest import Manifest, Record, look_at, write_manifest
from conversion.plan import Source
from conversion.staging import staging
from conversion.stored import DTYPES
from conversion.stream import records_of
from conversion.verification import verify_written
from conversion.write import CLASSES, is_of_a_checkpoint, refuse_existing
from opt_core.config import CONFIG_NAME, OPTConfig
from opt_core.schema import published_name, shapes
from opt_tf.pretrained import TFOPTPreTrainedModel
from opt_tf.sharding import check_on_no_mesh

_MODEL_NAME = "saved_model.pb"


def save_saved_model(
    model: TFOPTPreTrainedModel, folder, *, overwrite: bool = False, verify: bool = True, allow_nonfinite: bool = False
) -> list[Path]:
    """Writes `model` for `tf.saved_model.load(folder).signatures["serving_default"](input_ids=, attention_mask=)`.

    Both arguments are int32 [B, T] with any B and T. The outputs are those of the class by name: `logits`,
    `last_hidden_state`, or `start_logits` and `end_logits`. An id out of range, a mask of another shape, or a row with
    more real tokens than the model has positions is an InvalidArgumentError. Variables are attributes with their
    published names: `model.decoder.layers[0].fc1.weight`. config.json and the manifest lie beside them.

    Args:
        overwrite: replaces an older checkpoint of any format; other files stay.
        verify: before the files get their names, reads every variable again and compares it with the model's.
        allow_nonfinite: keeps NaN and infinities, which are refused otherwise.

    Returns:
        The entries written.

    Raises:
        CheckpointError: weights are NaN or infinite, or read back as others; all such are listed.
        FileExistsError: the folder holds a checkpoint and `overwrite` is false.
        OSError: TensorFlow could not write.
    """
    check_on_no_mesh(model, "save_saved_model")
    folder = Path(folder)
    refuse_existing(folder, overwrite)
    source = Source({name: model.weight(name).value.numpy for name in shapes(model.config, model.task)})
    records = _records(source, allow_nonfinite)
    with staging(folder) as staged:
        _save(model, staged.folder)
        config = model.config.replace(architectures=[CLASSES[model.task]], torch_dtype=model.dtype)
        config.to_json(staged.folder / CONFIG_NAME)
        write_manifest(staged.folder, Manifest("saved-model", model.task, records))
        if verify:
            verify_written(staged.folder, records, source, {}, lambda nbytes: None)
        return staged.publish(replaced=is_of_a_checkpoint, last=_MODEL_NAME)


def _save(model: TFOPTPreTrainedModel, folder: Path) -> None:
    try:
        tf.saved_model.save(_variables_by_name(model), str(folder), signatures=_serving_function(model))
    except tf.errors.OpError as error:  # of a full disk OutOfRangeError or ResourceExhaustedError
        raise OSError(f"TensorFlow could not write: {error.message[:500]}") from error


def _records(source: Source, allow_nonfinite: bool) -> dict[str, Record]:
    seen, found = {}, {}
    for name in source.names:
        array = source.read(name)
        found[name] = array.shape
        seen[name] = str(array.dtype), look_at(array, DTYPES[str(array.dtype)], 0)
    return records_of(seen, found, allow_nonfinite=allow_nonfinite)


# -- variables --------------------------------------------------------------------------------------------------------


def _variables_by_name(model: TFOPTPreTrainedModel) -> tf.Module:
    """The variables as attributes with their published names, and nothing of Keras around them."""
    tree: dict = {}
    for name in shapes(model.config, model.task):
        *path, last = published_name(name, model.task).split(".")
        branch = tree
        for step in path:
            branch = branch.setdefault(step, {})
        branch[last] = model.weight(name).value
    return _module_of(tree)


def _module_of(tree: Mapping) -> tf.Module | list:
    """Numbered entries are a list, which they are by their order."""
    values = {name: _module_of(value) if isinstance(value, dict) else value for name, value in tree.items()}
    if all(name.isdigit() for name in values):
        return list(values.values())
    module = tf.Module()
    for name, value in values.items():
        setattr(module, name, value)
    return module


# -- the program ------------------------------------------------------------------------------------------------------


def _serving_function(model: TFOPTPreTrainedModel):
    tokens = tf.TensorSpec([None, None], tf.int32, "input_ids")
    mask = tf.TensorSpec([None, None], tf.int32, "attention_mask")

    @tf.function(input_signature=[tokens, mask], autograph=False)
    def serve(input_ids: Tensor, attention_mask: Tensor) -> dict[str, Tensor]:
        with tf.control_dependencies(_checks(model.config, input_ids, attention_mask)):
            input_ids = tf.identity(input_ids)
        out = model(input_ids, attention_mask, use_cache=False, training=False)
        return {name: value for name, value in out._asdict().items() if tf.is_tensor(value)}

    return serve


def _checks(config: OPTConfig, input_ids: Tensor, attention_mask: Tensor) -> list[tf.Operation]:
    """What `check_inputs` knows only of values, as operations that raise."""
    V, positions = config.vocab_size, config.max_position_embeddings
    real_B = tf.math.count_nonzero(attention_mask, axis=1, dtype=tf.int32)
    checks = (
        (tf.shape(input_ids), tf.shape(attention_mask), tf.equal, "attention_mask: expected the shape of input_ids"),
        (input_ids, 0, tf.greater_equal, f"input_ids: expected 0 to {V - 1} (vocab_size = {V})"),
        (input_ids, V, tf.less, f"input_ids: expected 0 to {V - 1} (vocab_size = {V})"),
        (real_B, positions, tf.less_equal, f"sequence: expected at most {positions} real tokens a row"),
    )
    return [tf.debugging.Assert(tf.reduce_all(holds(got, want)), [text, got]) for got, want, holds, text in checks]
