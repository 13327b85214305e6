"""Generates text with the embedded checkpoint, PyTorch; for the other backends, only the class has another name."""

from opt_core import OPTTokenizer
from opt_torch import OPTForCausalLM
from opt_zoo.embedded import embedded_folder

folder = embedded_folder("opt-tiny")
tokenizer = OPTTokenizer.from_pretrained(folder)
model = OPTForCausalLM.from_pretrained(folder)
inputs = tokenizer("ROMEO:\nWhat light is that?", return_tensors="np")
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=60)[0], skip_special_tokens=True))
