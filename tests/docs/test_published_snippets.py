"""Code written for the published classes runs here with the imports, the checkpoint and the device changed, alone.

The snippets are those of the OPT page and docstrings of Hugging Face transformers 4.50 to 4.57 (Apache-2.0); of the
TensorFlow and Flax classes, those of the last version that had them. `ported` makes the three changes.
"""
# ruff: noqa: E501  # the snippets keep their lines

import importlib
import re
from pathlib import Path

import pytest

from opt_core.errors import InputError

OURS = {
    "AutoTokenizer": "opt_core.OPTTokenizer",
    "GPT2Tokenizer": "opt_core.OPTTokenizer",
    "OPTConfig": "opt_core.OPTConfig",
    "AutoModelForCausalLM": "opt_torch.OPTForCausalLM",
}
BACKENDS = {"TFOPT": "opt_tf", "FlaxOPT": "opt_flax", "OPT": "opt_torch"}


def our_name(name: str) -> str:
    """The module and class that stand for a published name."""
    if name in OURS:
        return OURS[name]
    return next(f"{module}.{name}" for prefix, module in BACKENDS.items() if name.startswith(prefix))


def our_imports(line: re.Match) -> str:
    names = [(name, our_name(name).rpartition(".")) for name in line[1].split(", ")]
    return "\n".join(f"from {module} import {ours} as {name}" for name, (module, _, ours) in names)


def ported(snippet: str, checkpoint: Path) -> str:
    """The snippet with its imports, checkpoint and device changed, and nothing else."""
    snippet = re.sub(r"from transformers import (.*)", our_imports, snippet)
    snippet = re.sub(r'"facebook/opt-\w+"', lambda _: repr(str(checkpoint)), snippet)
    return snippet.replace('"cuda"', '"cpu"').replace(', device_map="auto"', "")


def run(snippet: str, checkpoint: Path) -> dict:
    """The names that the snippet leaves behind."""
    names: dict = {}
    exec(compile(ported(snippet, checkpoint), "snippet", "exec"), names)
    return names


@pytest.fixture
def needs(request):
    """Skips where this run was told to leave a backend out."""

    def needs(name: str) -> None:
        if name not in request.config.getoption("--backends").split(","):
            pytest.skip(f"{name} is not among --backends")

    return needs


def test_only_imports_checkpoint_and_device_are_changed(tmp_path):
    snippet = (
        'from transformers import AutoTokenizer, OPTModel\nmodel = OPTModel.from_pretrained("facebook/opt-350m")\n'
    )
    assert ported(snippet, tmp_path) == (
        "from opt_core import OPTTokenizer as AutoTokenizer\nfrom opt_torch import OPTModel as OPTModel\n"
        f"model = OPTModel.from_pretrained({str(tmp_path)!r})\n"
    )


# -- PyTorch ----------------------------------------------------------------------------------------------------------


def test_a_model_is_made_from_a_config_and_keeps_it(needs, checkpoint):
    """The published default has 125 million parameters, so this also measures patience."""
    needs("torch")
    names = run(
        """
from transformers import OPTConfig, OPTModel

# Initializing a OPT facebook/opt-large style configuration
configuration = OPTConfig()

# Initializing a model (with random weights) from the facebook/opt-large style configuration
model = OPTModel(configuration)

# Accessing the model configuration
configuration = model.config
""",
        checkpoint,
    )
    assert names["configuration"] is names["model"].config
    assert names["model"].num_parameters() == 125_239_296


def test_the_base_model_gives_its_last_hidden_states(needs, checkpoint):
    needs("torch")
    names = run(
        """
from transformers import AutoTokenizer, OPTModel
import torch

tokenizer = AutoTokenizer.from_pretrained("facebook/opt-350m")
model = OPTModel.from_pretrained("facebook/opt-350m")

inputs = tokenizer("Hello, my dog is cute", return_tensors="pt")
outputs = model(**inputs)

last_hidden_states = outputs.last_hidden_state
""",
        checkpoint,
    )
    assert names["last_hidden_states"].shape == (1, names["inputs"].input_ids.shape[1], 19)


def test_the_language_model_continues_a_prompt(needs, checkpoint):
    needs("torch")
    names = run(
        """
from transformers import AutoTokenizer, OPTForCausalLM

model = OPTForCausalLM.from_pretrained("facebook/opt-350m")
tokenizer = AutoTokenizer.from_pretrained("facebook/opt-350m")

prompt = "Hey, are you conscious? Can you talk to me?"
inputs = tokenizer(prompt, return_tensors="pt")

# Generate
generate_ids = model.generate(inputs.input_ids, max_length=30)
text = tokenizer.batch_decode(generate_ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)[0]
""",
        checkpoint,
    )
    assert names["text"].startswith(names["prompt"])
    assert names["generate_ids"].shape[1] <= 30


@pytest.mark.parametrize("keyword", ["dtype", "torch_dtype"])
def test_the_language_model_of_the_page_runs_in_half_precision(needs, checkpoint, keyword):
    needs("torch")
    names = run(
        f"""
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("facebook/opt-350m", {keyword}=torch.float16, device_map="auto", attn_implementation="sdpa")
tokenizer = AutoTokenizer.from_pretrained("facebook/opt-350m")

prompt = ("Once upon a time, in a land far, far away, ")

model_inputs = tokenizer([prompt], return_tensors="pt").to(model.device)

generated_ids = model.generate(**model_inputs, max_new_tokens=30, do_sample=False)
text = tokenizer.batch_decode(generated_ids)[0]
""",
        checkpoint,
    )
    assert names["text"].startswith("</s>" + names["prompt"])
    assert str(names["model"].dtype) == "torch.float16"


CHAT = """
import torch
from transformers import OPTForCausalLM, GPT2Tokenizer
device = "cuda" # the device to load the model onto

model = OPTForCausalLM.from_pretrained("facebook/opt-350m", torch_dtype=torch.float16, attn_implementation="{}")
tokenizer = GPT2Tokenizer.from_pretrained("facebook/opt-350m")

prompt = ("A chat between a curious human and the Statue of Liberty.\\n\\nHuman: What is your name?\\nStatue: I am the "
              "Statue of Liberty.\\nHuman: Where do you live?\\nStatue: New York City.\\nHuman: How long have you lived "
              "there?")

model_inputs = tokenizer([prompt], return_tensors="pt").to(device)
model.to(device)

generated_ids = model.generate(**model_inputs, max_new_tokens=30, do_sample=False)
text = tokenizer.batch_decode(generated_ids)[0]
"""


def test_the_chat_with_the_statue_of_liberty_runs(needs, checkpoint):
    needs("torch")
    names = run(CHAT.format("sdpa"), checkpoint)
    assert names["text"].startswith("</s>" + names["prompt"])


def test_an_attention_kernel_that_this_machine_lacks_is_refused_by_name(needs, checkpoint):
    """`flash_attention_2` needs a GPU; SDPA uses such kernels where it finds them."""
    needs("torch")
    if importlib.import_module("torch").cuda.is_available():
        pytest.skip("it may run here")
    with pytest.raises(InputError, match="attn_implementation: flash_attention_2 expects"):
        run(CHAT.format("flash_attention_2"), checkpoint)


def test_single_label_classification_runs_and_trains(needs, checkpoint):
    needs("torch")
    names = run(
        """
import torch
from transformers import AutoTokenizer, OPTForSequenceClassification

tokenizer = AutoTokenizer.from_pretrained("facebook/opt-350m")
model = OPTForSequenceClassification.from_pretrained("facebook/opt-350m")

inputs = tokenizer("Hello, my dog is cute", return_tensors="pt")

with torch.no_grad():
    logits = model(**inputs).logits

predicted_class_id = logits.argmax().item()
label = model.config.id2label[predicted_class_id]

# To train a model on `num_labels` classes, you can pass `num_labels=num_labels` to `.from_pretrained(...)`
num_labels = len(model.config.id2label)
model = OPTForSequenceClassification.from_pretrained("facebook/opt-350m", num_labels=num_labels)

labels = torch.tensor([1])
loss = model(**inputs, labels=labels).loss
rounded = round(loss.item(), 2)
""",
        checkpoint,
    )
    assert names["label"] in ("LABEL_0", "LABEL_1")
    assert names["logits"].shape == (1, 2)
    names["loss"].backward()
    assert names["model"].score.weight.grad.abs().sum() > 0


def test_multi_label_classification_runs_and_trains(needs, checkpoint):
    needs("torch")
    names = run(
        """
import torch
from transformers import AutoTokenizer, OPTForSequenceClassification

tokenizer = AutoTokenizer.from_pretrained("facebook/opt-350m")
model = OPTForSequenceClassification.from_pretrained("facebook/opt-350m", problem_type="multi_label_classification")

inputs = tokenizer("Hello, my dog is cute", return_tensors="pt")

with torch.no_grad():
    logits = model(**inputs).logits

predicted_class_ids = torch.arange(0, logits.shape[-1])[torch.sigmoid(logits).squeeze(dim=0) > 0.5]

# To train a model on `num_labels` classes, you can pass `num_labels=num_labels` to `.from_pretrained(...)`
num_labels = len(model.config.id2label)
model = OPTForSequenceClassification.from_pretrained(
    "facebook/opt-350m", num_labels=num_labels, problem_type="multi_label_classification"
)

labels = torch.sum(
    torch.nn.functional.one_hot(predicted_class_ids[None, :].clone(), num_classes=num_labels), dim=1
).to(torch.float)
loss = model(**inputs, labels=labels).loss
""",
        checkpoint,
    )
    assert names["labels"].shape == (1, 2)
    names["loss"].backward()
    assert names["model"].score.weight.grad.abs().sum() > 0


QUESTION = """
from transformers import AutoTokenizer, OPTForQuestionAnswering
import torch

torch.manual_seed(4)
tokenizer = AutoTokenizer.from_pretrained("facebook/opt-350m")

# note: we are loading a OPTForQuestionAnswering from the hub here,
# so the head will be randomly initialized, hence the predictions will be random
model = OPTForQuestionAnswering.from_pretrained("facebook/opt-350m")

question, text = "Who was Jim Henson?", "Jim Henson was a nice puppet"

inputs = tokenizer(question, text, return_tensors="pt")
with torch.no_grad():
    outputs = model(**inputs)

answer_start_index = outputs.start_logits.argmax()
answer_end_index = outputs.end_logits.argmax()
"""


def test_a_question_is_answered_with_a_stretch_of_text(needs, checkpoint):
    needs("torch")
    names = run(
        QUESTION
        + """
answer_offset = len(tokenizer(question)[0])

predict_answer_tokens = inputs.input_ids[
    0, answer_offset + answer_start_index : answer_offset + answer_end_index + 1
]
predicted = tokenizer.decode(predict_answer_tokens)
""",
        checkpoint,
    )
    assert names["answer_offset"] == len(names["tokenizer"](names["question"])["input_ids"])
    assert isinstance(names["predicted"], str)


def test_question_answering_trains_on_target_positions(needs, checkpoint):
    needs("torch")
    names = run(
        QUESTION
        + """
predict_answer_tokens = inputs.input_ids[0, answer_start_index : answer_end_index + 1]
predicted = tokenizer.decode(predict_answer_tokens, skip_special_tokens=True)

# target is "nice puppet"
target_start_index = torch.tensor([5])
target_end_index = torch.tensor([6])

outputs = model(**inputs, start_positions=target_start_index, end_positions=target_end_index)
loss = outputs.loss
rounded = round(loss.item(), 2)
""",
        checkpoint,
    )
    assert isinstance(names["predicted"], str)
    names["loss"].backward()
    assert names["model"].qa_outputs.weight.grad.abs().sum() > 0


# -- TensorFlow and Flax ----------------------------------------------------------------------------------------------


def test_the_tensorflow_base_model_gives_its_last_hidden_states(needs, checkpoint):
    needs("tf")
    names = run(
        """
from transformers import AutoTokenizer, TFOPTModel
import tensorflow as tf

tokenizer = AutoTokenizer.from_pretrained("facebook/opt-350m")
model = TFOPTModel.from_pretrained("facebook/opt-350m")

inputs = tokenizer("Hello, my dog is cute", return_tensors="tf")
outputs = model(inputs)

last_hidden_states = outputs.last_hidden_state
""",
        checkpoint,
    )
    assert tuple(names["last_hidden_states"].shape) == (1, names["inputs"].input_ids.shape[1], 19)


def test_the_tensorflow_language_model_gives_logits(needs, checkpoint):
    needs("tf")
    names = run(
        """
from transformers import AutoTokenizer, TFOPTForCausalLM
import tensorflow as tf

tokenizer = AutoTokenizer.from_pretrained("facebook/opt-350m")
model = TFOPTForCausalLM.from_pretrained("facebook/opt-350m")

inputs = tokenizer("Hello, my dog is cute", return_tensors="tf")
outputs = model(inputs)
logits = outputs.logits

generated = model.generate(**inputs, max_new_tokens=5)
text = tokenizer.batch_decode(generated, skip_special_tokens=True)[0]
""",
        checkpoint,
    )
    assert names["logits"].shape[-1] == len(names["tokenizer"])
    assert names["text"].startswith("Hello, my dog is cute")


def test_the_flax_base_model_gives_its_last_hidden_states(needs, checkpoint):
    needs("flax")
    names = run(
        """
from transformers import AutoTokenizer, FlaxOPTModel

tokenizer = AutoTokenizer.from_pretrained("facebook/opt-350m")
model = FlaxOPTModel.from_pretrained("facebook/opt-350m")

inputs = tokenizer("Hello, my dog is cute", return_tensors="jax")
outputs = model(**inputs)

last_hidden_states = outputs.last_hidden_state
""",
        checkpoint,
    )
    assert names["last_hidden_states"].shape == (1, names["inputs"].input_ids.shape[1], 19)


@pytest.mark.parametrize("tensors", ["np", "jax"])
def test_the_flax_language_model_gives_the_logits_of_the_next_token(needs, checkpoint, tensors):
    needs("flax")
    names = run(
        f"""
from transformers import AutoTokenizer, FlaxOPTForCausalLM

tokenizer = AutoTokenizer.from_pretrained("facebook/opt-350m")
model = FlaxOPTForCausalLM.from_pretrained("facebook/opt-350m")

inputs = tokenizer("Hello, my dog is cute", return_tensors="{tensors}")
outputs = model(**inputs)

# retrieve logts for next token
next_token_logits = outputs.logits[:, -1]

generated = model.generate(**inputs, max_new_tokens=5)
text = tokenizer.batch_decode(generated, skip_special_tokens=True)[0]
""",
        checkpoint,
    )
    assert names["next_token_logits"].shape == (1, len(names["tokenizer"]))
    assert names["text"].startswith("Hello, my dog is cute")
