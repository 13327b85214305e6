"""The checks of published results, without a network: on small random checkpoints in a hub cache.

The numbers of the float64 reference stand in for the published ones, so each check must pass, and must fail where one
number is off.
"""

import copy
from pathlib import Path

import numpy as np
import pytest
from harness import reference_of
from published_checks import CHECKS, PUBLISHED
from tiny_checkpoint import publish_in_cache, save_checkpoint

from opt_core import OPTConfig, OPTTokenizer
from opt_core.reference import causal_lm_loss

EOS, PAD = 2, 1
EXPECTED = ("values", "outputs", "output", "cross_entropy_loss", "ids")


def all_texts(value, key: str = "") -> list[str]:
    """The prompts and texts anywhere in the published file."""
    if isinstance(value, str):
        return [value] if key in ("prompt", "prompts", "text") else []
    items = value.items() if isinstance(value, dict) else ((key, item) for item in value)
    return [text for name, item in items if isinstance(item, (str, list, dict)) for text in all_texts(item, name)]


@pytest.fixture(scope="session")
def repositories(tmp_path_factory) -> dict[str, Path]:
    """Small random checkpoints under the published names."""
    folder, repositories = tmp_path_factory.mktemp("repositories"), {}
    for repo_id in sorted({expected["model"] for name, expected in PUBLISHED.items() if "model" in expected}):
        repositories[repo_id] = folder / repo_id.replace("/", "--")
        variant = "350m style" if repo_id.endswith("350m") else "pre-norm"
        save_checkpoint(repositories[repo_id], all_texts(PUBLISHED), variant)
    return repositories


@pytest.fixture(scope="session")
def hub(repositories, tmp_path_factory) -> dict:
    """Arguments of `from_pretrained` that find them in a hub cache, and nothing on the network."""
    cache = tmp_path_factory.mktemp("cache")
    for repo_id, folder in repositories.items():
        publish_in_cache(cache, repo_id, folder)
    return dict(cache_dir=cache, local_files_only=True)


class Republished:
    """An entry of the published file with the numbers of the reference on a random checkpoint."""

    def __init__(self, name: str, folder: Path):
        self.entry = copy.deepcopy(PUBLISHED[name])
        self.reference = reference_of(OPTConfig.from_json(folder))
        self.tokenizer = OPTTokenizer.from_pretrained(folder)
        getattr(self, name.replace(".", "_"))(self.entry)

    def logits(self, ids, mask=None) -> np.ndarray:
        return self.reference.logits(self.reference(ids, mask).last_hidden_state)

    def continued(self, ids: list[int], steps: int) -> list[int]:
        """The reference's best token, one after another; padding after the end."""
        new = []
        while len(new) < steps:
            ended = EOS in new
            new.append(PAD if ended else int(self.logits([ids + new])[0, -1].argmax()))
        return ids + new

    def text(self, prompt: str, length: int, columns: int) -> str:
        """The prompt, padded to `columns`, continued to `length`."""
        ids = self.continued(self.tokenizer(prompt)["input_ids"], length - columns)
        return self.tokenizer.decode(ids, skip_special_tokens=True)

    def columns(self, *prompts: str) -> int:
        return max(len(self.tokenizer(prompt)["input_ids"]) for prompt in prompts)

    def hidden_350m(self, entry):
        entry["input_ids"] = [[i % self.reference.config.vocab_size for i in entry["input_ids"][0]]]
        hidden = self.reference(entry["input_ids"]).last_hidden_state
        entry["last_hidden_state_shape"] = list(hidden.shape)
        entry["torch"]["values"] = hidden[0, :3, :3].tolist()

    def logits_mean_350m(self, entry):
        encoded = self.tokenizer(entry["prompts"], padding=True, add_special_tokens=False)
        entry["values"] = self.logits(encoded["input_ids"], encoded["attention_mask"]).mean(-1).tolist()

    def greedy_350m(self, entry):
        entry["outputs"] = [self.text(prompt, 10, self.columns(prompt)) for prompt in entry["prompts"]]

    greedy_125m = greedy_350m

    def left_padded_batch_350m(self, entry):
        columns = self.columns(*entry["prompts"])
        entry["outputs"] = [self.text(prompt, 20, columns) for prompt in entry["prompts"]]

    def docstring_350m(self, entry):
        entry["output"] = self.text(entry["prompt"], 30, self.columns(entry["prompt"]))

    def fp16_left_padded_1_3b(self, entry):
        """Nothing to replace: the check wants finite numbers."""

    def loss_125m(self, entry):
        ids = np.array([self.tokenizer(entry["prompt"])["input_ids"]])
        logits = self.logits(ids)
        largest = logits[0].max(-1, keepdims=True)
        entry["n_tokens_with_bos"] = ids.shape[1]
        entry["argmax_ids"] = logits[0].argmax(-1).tolist()
        entry["argmax_logprob"] = (-np.log(np.exp(logits[0] - largest).sum(-1))).tolist()
        entry["cross_entropy_loss"] = causal_lm_loss(logits, ids)

    def tokenizer_350m(self, entry):
        entry["ids"] = self.tokenizer(entry["text"])["input_ids"]

    tokenizer_1_3b = tokenizer_350m

    def tiny_random(self, entry):
        for case in (entry["single"], entry["batch"]):
            texts = case["text"] if isinstance(case["text"], list) else [case["text"]]
            columns = self.columns(*texts)
            rows = [self.tokenizer(text)["input_ids"] for text in texts]
            case["ids"] = [[PAD] * (columns - len(row)) + self.continued(row, 10 - columns) for row in rows]


@pytest.mark.parametrize("name", CHECKS)
def test_a_check_passes_on_the_numbers_of_the_reference(backend, name, repositories, hub):
    CHECKS[name](backend, Republished(name, repositories[PUBLISHED[name]["model"]]).entry, **hub)


def spoil(entry: dict) -> None:
    """Changes the first expected number or text a little."""
    where = next(part for part in (entry, entry.get("torch"), entry.get("batch")) if part and part.keys() & EXPECTED)
    key = next(key for key in EXPECTED if key in where)
    while isinstance(where[key], list):
        where, key = where[key], 0
    where[key] = where[key] + ("!" if isinstance(where[key], str) else type(where[key])(1.001))


@pytest.mark.parametrize("name", [name for name in CHECKS if not name.startswith("fp16")])
def test_a_check_fails_where_one_number_is_off(backends, name, repositories, hub):
    entry = Republished(name, repositories[PUBLISHED[name]["model"]]).entry
    spoil(entry)
    with pytest.raises(AssertionError):
        CHECKS[name](backends[0], entry, **hub)  # a check is the same in every backend


def test_every_entry_of_the_published_file_is_checked():
    unchecked = {name for name in PUBLISHED if not name.startswith("_")} - CHECKS.keys()
    assert unchecked == {"first_position_125m"}  # the same number as the first of loss_125m
    first = PUBLISHED["first_position_125m"]["argmax_logprob_after_bos"]
    assert abs(first - PUBLISHED["loss_125m"]["argmax_logprob"][0]) < 1e-5
