"""The formats, each a declaration: what its files are called, how each weight is named and laid out in them.

Data alone. What follows from it, in both directions, is `conversion.formats`' business; which format a file is in,
`conversion.recognition`'s; how bytes lie in a file, that of the module of its container. Sources of the names: what
transformers 4.57.6 writes (torch, TensorFlow, Flax), metaseq at f7ffa5f, KerasHub 0.32, CTranslate2 4.8.
"""

import re
from typing import Any, NamedTuple

from conversion.stored import DTYPES
from opt_core.schema import TASKS


class Rule(NamedTuple):
    """How a format stores the weights of some names; the first rule of a format that matches a weight counts.

    `weights` is a pattern over the schema's names: `*` matches any words, `{layer}` the number of a layer. In `stored`,
    `{0}`, `{1}`, ... are what the stars matched, `{layer}` is the number as the format spells it (`Numbering`), and
    `{model}` is "model." where the class that saves puts it before its decoder.
    """

    weights: str
    stored: str
    dims: str | None = None  # letters in stored order, or "reversed"; None: as in the schema
    skip_rows: int = 0  # see `Layout`
    slot: tuple[int, int] | None = None  # see `Layout`
    split: str = ""  # the letter along which model-parallel parts cut it; "": each part holds it whole
    older: str | None = None  # the stored name in older files, which is read but not written

    def match(self, name: str) -> re.Match | None:
        pattern = re.escape(self.weights).replace(r"\*", "(.+)").replace(r"\{layer\}", r"(?P<layer>\d+)")
        return re.fullmatch(pattern, name)


class Numbering(NamedTuple):
    """How stored names spell the number of a layer."""

    pattern: str  # finds it; group 1 is the number
    first: str = "0"  # of the first layer
    others: str = "{}"

    def spell(self, layer: str) -> str:
        return self.first if layer == "0" else self.others.format(layer)


_NUMBER = "(0|[1-9][0-9]{0,5})"
NUMBERED = Numbering(rf"(?<=layers[./]){_NUMBER}(?=[./])")
_KERAS_COUNTED = Numbering(r"(?<=transformer_decoder)(?:_([1-9][0-9]{0,5}))?(?=/)", first="", others="_{}")
_CT2_NUMBERED = Numbering(rf"(?<=decoder/layer_){_NUMBER}(?=/)")


class Format(NamedTuple):
    """A container, the names of its files, its rules, and what it cannot hold."""

    name: str
    stem: str  # of a single file; shards are `<stem>-00001-of-00002<suffix>`, their index `<stem><suffix>.index.json`
    suffix: str
    rules: tuple[Rule, ...]
    container: str = "safetensors"  # a key of `conversion.containers.CONTAINERS`
    framework: str = "pt"  # the word for it in the metadata of safetensors
    separator: str = "."  # in stored names, instead of the dots of the rules; "": the rules have the names as stored
    tasks: tuple[str, ...] = TASKS  # those that the programs of this format have a class for
    requires: tuple[tuple[str, Any], ...] = ()  # fields of the config that those classes do not have, as they act
    dtypes: tuple[str, ...] = tuple(DTYPES)
    scope: str = ""  # before the names in single h5 files and in every index of TensorFlow
    any_scope: str = ""  # pattern of what may precede the names on reading: it varies with class and process
    numbering: Numbering = NUMBERED
    has_shards: bool = True  # cut by size, with an index
    is_written_in_parts: bool = False  # of model parallelism; they may be read in any case
    is_written: bool = True
    entries: str = ""  # pattern of further names of files and folders that a checkpoint of this format consists of

    @property
    def names_tell_the_class(self) -> bool:
        """False where the base class stores the same names as the others."""
        return any("{model}" in rule.stored for rule in self.rules) and not self.any_scope

    @property
    def is_parallel(self) -> bool:
        """True where a checkpoint may consist of model-parallel parts, each with a piece of every large weight."""
        return any(rule.split for rule in self.rules)

    @property
    def single_name(self) -> str:
        return f"{self.stem}{self.suffix}"

    def part_name(self, part: int) -> str:
        """The file of a model-parallel part."""
        return self.single_name.replace("part-0", f"part-{part}")

    @property
    def index_name(self) -> str:
        return f"{self.stem}{self.suffix}.index.json"

    def owns(self, file_name: str) -> bool:
        """True for the names that this format writes beside config.json."""
        shard = rf"{re.escape(self.stem)}-\d+-of-\d+{re.escape(self.suffix)}"
        patterns = [shard] if self.has_shards else []
        patterns += [self.entries] if self.entries else []
        names = (self.single_name, self.index_name) if self.has_shards else (self.single_name,)
        return file_name in names or any(re.fullmatch(pattern, file_name) for pattern in patterns)


PUBLISHED = (Rule("*", "{model}{0}"),)
_FLAX = (
    Rule("*.embed_*.weight", "{model}{0}.embed_{1}.embedding"),
    Rule("*norm.weight", "{model}{0}norm.scale"),
    Rule("*.bias", "{model}{0}.bias"),
    Rule("*.weight", "{model}{0}.kernel", dims="reversed"),
)
_TF = (
    Rule("decoder.embed_tokens.weight", "model/decoder/embed_tokens/weight:0",
         older="model/decoder/embed_tokens/embeddings:0"),
    Rule("decoder.embed_positions.weight", "model/decoder/embed_positions/embeddings:0"),
    Rule("decoder.layers.{layer}.self_attn.*.weight", "model/decoder/layers.{layer}/self_attn/{0}/kernel:0",
         dims="reversed"),
    Rule("decoder.layers.{layer}.self_attn.*.bias", "model/decoder/layers.{layer}/self_attn/{0}/bias:0"),
    Rule("decoder.layers.{layer}.fc*.weight", "model/decoder/layers.{layer}/fc{0}/kernel:0", dims="reversed"),
    Rule("decoder.layers.{layer}.fc*.bias", "model/decoder/layers.{layer}/fc{0}/bias:0"),
    Rule("decoder.layers.{layer}.*norm.weight", "model/decoder/layers.{layer}/{0}norm/gamma:0"),
    Rule("decoder.layers.{layer}.*norm.bias", "model/decoder/layers.{layer}/{0}norm/beta:0"),
    Rule("decoder.final_layer_norm.weight", "model/decoder/final_layer_norm/gamma:0"),
    Rule("decoder.final_layer_norm.bias", "model/decoder/final_layer_norm/beta:0"),
    Rule("decoder.*.weight", "model/decoder/{0}/kernel:0", dims="reversed"),
    Rule("*.weight", "{0}/kernel:0", dims="reversed"),
    Rule("*.bias", "{0}/bias:0"),
)  # fmt: skip
_BLOCK = "decoder.layers.{layer}"
_ATTENTION = f"{_BLOCK}.self_attn"
_METASEQ_FUSED = tuple(  # each part holds its heads' rows of the keys, then of the values, then of the queries
    Rule(f"{_ATTENTION}.{letter}_proj.*", f"{_ATTENTION}.qkv_proj.{{0}}", slot=(number, 3), split="A")
    for number, letter in enumerate("kvq")
)
_METASEQ = (
    Rule("decoder.embed_tokens.weight", "decoder.embed_tokens.weight", split="V"),
    Rule("decoder.project_*.weight", "decoder.project_{0}_dim.weight"),
    Rule(f"{_ATTENTION}.out_proj.weight", f"{_ATTENTION}.out_proj.weight", split="A"),
    Rule(f"{_ATTENTION}.out_proj.bias", f"{_ATTENTION}.out_proj.bias"),
    Rule(f"{_ATTENTION}.*_proj.*", f"{_ATTENTION}.{{0}}_proj.{{1}}", split="A"),
    Rule("decoder.layers.{layer}.fc1.*", "decoder.layers.{layer}.fc1.{0}", split="F"),
    Rule("decoder.layers.{layer}.fc2.weight", "decoder.layers.{layer}.fc2.weight", split="F"),
    Rule("decoder.layers.{layer}.*", "decoder.layers.{layer}.{0}"),
    Rule("decoder.final_layer_norm.*", "decoder.layer_norm.{0}"),
    Rule("decoder.*", "decoder.{0}"),
    Rule("lm_head.weight", "decoder.output_projection.weight", split="V"),
)
_KERAS_EMBEDDING = "layers/token_and_position_embedding"
_KERAS_LAYER = "layers/transformer_decoder{layer}"
_KERAS_HUB = (
    Rule("decoder.embed_tokens.weight", f"{_KERAS_EMBEDDING}/token_embedding/vars/0"),
    Rule("decoder.embed_positions.weight", f"{_KERAS_EMBEDDING}/position_embedding/vars/0", skip_rows=2),
    *(
        rule
        for letter, word in {"q": "query", "k": "key", "v": "value"}.items()
        for rule in (
            Rule(f"{_ATTENTION}.{letter}_proj.weight", f"{_KERAS_LAYER}/_self_attention_layer/{word}_dense/vars/0",
                 dims="DNH"),
            Rule(f"{_ATTENTION}.{letter}_proj.bias", f"{_KERAS_LAYER}/_self_attention_layer/{word}_dense/vars/1",
                 dims="NH"),
        )
    ),
    Rule(f"{_ATTENTION}.out_proj.weight", f"{_KERAS_LAYER}/_self_attention_layer/output_dense/vars/0", dims="NHD"),
    Rule(f"{_ATTENTION}.out_proj.bias", f"{_KERAS_LAYER}/_self_attention_layer/output_dense/vars/1"),
    Rule(f"{_ATTENTION}_layer_norm.weight", f"{_KERAS_LAYER}/_self_attention_layer_norm/vars/0"),
    Rule(f"{_ATTENTION}_layer_norm.bias", f"{_KERAS_LAYER}/_self_attention_layer_norm/vars/1"),
    *(
        rule
        for name, word in {"fc1": "intermediate", "fc2": "output"}.items()
        for rule in (
            Rule(f"{_BLOCK}.{name}.weight", f"{_KERAS_LAYER}/_feedforward_{word}_dense/vars/0", dims="reversed"),
            Rule(f"{_BLOCK}.{name}.bias", f"{_KERAS_LAYER}/_feedforward_{word}_dense/vars/1"),
        )
    ),
    Rule(f"{_BLOCK}.final_layer_norm.weight", f"{_KERAS_LAYER}/_feedforward_layer_norm/vars/0"),
    Rule(f"{_BLOCK}.final_layer_norm.bias", f"{_KERAS_LAYER}/_feedforward_layer_norm/vars/1"),
    Rule("decoder.final_layer_norm.weight", "layers/layer_normalization/vars/0"),
    Rule("decoder.final_layer_norm.bias", "layers/layer_normalization/vars/1"),
)  # fmt: skip
_CT2_LAYER = "decoder/layer_{layer}"
_CTRANSLATE2 = (
    Rule("decoder.embed_tokens.weight", "decoder/embeddings/weight"),
    Rule("decoder.embed_positions.weight", "decoder/position_encodings/encodings", skip_rows=2),
    *(
        Rule(f"{_ATTENTION}.{letter}_proj.*", f"{_CT2_LAYER}/self_attention/linear_0/{{0}}", slot=(number, 3))
        for number, letter in enumerate("qkv")
    ),
    Rule(f"{_ATTENTION}.out_proj.*", f"{_CT2_LAYER}/self_attention/linear_1/{{0}}"),
    Rule(f"{_ATTENTION}_layer_norm.weight", f"{_CT2_LAYER}/self_attention/layer_norm/gamma"),
    Rule(f"{_ATTENTION}_layer_norm.bias", f"{_CT2_LAYER}/self_attention/layer_norm/beta"),
    Rule(f"{_BLOCK}.fc1.*", f"{_CT2_LAYER}/ffn/linear_0/{{0}}"),
    Rule(f"{_BLOCK}.fc2.*", f"{_CT2_LAYER}/ffn/linear_1/{{0}}"),
    Rule(f"{_BLOCK}.final_layer_norm.weight", f"{_CT2_LAYER}/ffn/layer_norm/gamma"),
    Rule(f"{_BLOCK}.final_layer_norm.bias", f"{_CT2_LAYER}/ffn/layer_norm/beta"),
    Rule("decoder.final_layer_norm.weight", "decoder/layer_norm/gamma"),
    Rule("decoder.final_layer_norm.bias", "decoder/layer_norm/beta"),
    Rule("decoder.project_*.weight", "decoder/project_{0}/weight"),
    Rule("lm_head.weight", "decoder/projection/weight"),
)
_TF_CHECKPOINT = (Rule("*", "model/{model}{0}"),)
_TF_CHECKPOINT_PUBLISHED = (
    Rule(
        "decoder.embed_tokens.weight",
        "model/decoder/embed_tokens/weight",
        older="model/decoder/embed_tokens/embeddings",
    ),
    Rule("decoder.embed_positions.weight", "model/decoder/embed_positions/embeddings"),
    Rule("*norm.weight", "model/{0}norm/gamma"),
    Rule("*norm.bias", "model/{0}norm/beta"),
    Rule("decoder.*.weight", "model/decoder/{0}/kernel", dims="reversed"),
    Rule("decoder.*.bias", "model/decoder/{0}/bias"),
    Rule("*.weight", "{0}/kernel", dims="reversed"),
    Rule("*.bias", "{0}/bias"),
)
_TWO_CLASSES = ("base", "causal-lm")  # of which the published Flax and TensorFlow code has the OPT model
_ALWAYS_ON = (("enable_bias", True), ("layer_norm_elementwise_affine", True))
_TIED = (*_ALWAYS_ON, ("tie_word_embeddings", True))
_SCOPE = "tfopt_for_causal_lm"
_ANY_SCOPE = r"[^/]+/(?=model/decoder/)"
_ANY_ROOT = r"(?:[^/]+/)*?(?=(?:decoder|lm_head|score|qa_outputs)/)"
_H5_DTYPES = ("float64", "float32", "float16")
_KERAS_HUB_ALWAYS = (
    ("do_layer_norm_before", True), ("has_final_layer_norm", True), *_TIED, ("has_projections", False),
    ("activation_function", "relu"), ("has_all_heads", True),
)  # fmt: skip
_KERAS_HUB_FILES = r"model_\d{5}\.weights\.h5|model\.weights\.json|(metadata|task|preprocessor)\.json|assets"
_METASEQ_ALWAYS = (
    ("_remove_final_layer_norm", False),
    ("activation_function", "relu"),  # its "gelu" is two functions
    ("has_all_heads", True),
)
_MEGATRON = (("do_layer_norm_before", True), ("has_projections", False), *_METASEQ_ALWAYS)
_PARTS = r".+-model_part-\d+(-shard\d+)?\.pt"

# In order of preference where a folder holds several.
FORMATS = {
    format.name: format
    for format in (
        Format("safetensors", "model", ".safetensors", PUBLISHED),
        Format("torch-bin", "pytorch_model", ".bin", PUBLISHED, "torch-zip"),
        Format(
            "flax-safetensors", "model", ".safetensors", _FLAX, "safetensors", "flax", ".", _TWO_CLASSES, _ALWAYS_ON
        ),
        Format("flax-msgpack", "flax_model", ".msgpack", _FLAX, "msgpack", "flax", "/", _TWO_CLASSES, _ALWAYS_ON),
        Format(
            "tf-safetensors", "model", ".safetensors", _TF, "safetensors", "tf", "", _TWO_CLASSES, _TIED, scope=_SCOPE,
            any_scope=_ANY_SCOPE,
        ),
        Format("tf-h5", "tf_model", ".h5", _TF, "h5", "tf", "", _TWO_CLASSES, _TIED, _H5_DTYPES, _SCOPE, _ANY_SCOPE),
        Format(
            "metaseq", "reshard-model_part-0", ".pt", (*_METASEQ_FUSED, *_METASEQ), "metaseq", separator="",
            tasks=("causal-lm",), requires=_MEGATRON, has_shards=False, is_written_in_parts=True, entries=_PARTS,
        ),
        Format(
            "metaseq-singleton", "restored", ".pt", _METASEQ, "metaseq", separator="", tasks=("causal-lm",),
            requires=_METASEQ_ALWAYS, has_shards=False, entries=r"reshard\.pt",
        ),
        Format("torch-pt", "model", ".pt", PUBLISHED, "torch-zip", has_shards=False, is_written=False),
        Format("orbax", "orbax", "", PUBLISHED, "orbax", has_shards=False),
        Format(
            "orbax-flax", "orbax", "", _FLAX, "orbax", tasks=_TWO_CLASSES, requires=_ALWAYS_ON,
            has_shards=False,
        ),
        Format(
            "tf-checkpoint", "ckpt-1", ".index", _TF_CHECKPOINT, "tensor-bundle", separator="/", any_scope=_ANY_ROOT,
            has_shards=False, entries=r"ckpt-1\.data-.*|checkpoint",
        ),
        Format(
            "saved-model", "variables", ".index", _TF_CHECKPOINT, "tensor-bundle", separator="/", any_scope=_ANY_ROOT,
            has_shards=False, is_written=False, entries=r"saved_model\.pb|fingerprint\.pb|variables|assets",
        ),
        Format(
            "tf-checkpoint-published", "ckpt-1", ".index", _TF_CHECKPOINT_PUBLISHED, "tensor-bundle", separator="/",
            tasks=_TWO_CLASSES, requires=_TIED, any_scope=_ANY_ROOT, has_shards=False,
            entries=r"ckpt-1\.data-.*|checkpoint",
        ),
        Format(
            "keras-hub", "model", ".weights.h5", _KERAS_HUB, "keras-h5", separator="", tasks=_TWO_CLASSES,
            requires=_KERAS_HUB_ALWAYS, dtypes=("float32", "float16", "bfloat16"), numbering=_KERAS_COUNTED,
            has_shards=False, entries=_KERAS_HUB_FILES,
        ),
        Format(
            "ctranslate2", "model", ".bin", _CTRANSLATE2, "ctranslate2", separator="", tasks=("causal-lm",),
            numbering=_CT2_NUMBERED, has_shards=False, is_written=False,
        ),
    )
}  # fmt: skip
