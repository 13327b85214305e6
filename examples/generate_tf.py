"""Generates text with the embedded checkpoint, TensorFlow; for the other backends, only the class has another name."""

from opt_core import OPTTokenizer
from opt_tf import TFOPTForCausalLM
from opt_zoo.embedded import embedded_folder

folder = embedded_folder("opt-tiny")
tokenizer = OPTTokenizer.from_pretrained(folder)
model = TFOPTForCausalLM.from_pretrained(folder)
inputs = tokenizer("ROMEO:\nWhat light is that?", return_tensors="np")
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=60)[0], skip_special_tokens=True))
