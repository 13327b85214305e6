"""The published perplexities of WikiText-2: Frantar et al., GPTQ, arXiv:2210.17323, the rows of 16 bits.

Needs the checkpoints from the hub and the text of the test split, wikitext-2-raw-v1, joined by blank lines; its file is
named by WIKITEXT2_TEST, or made with the `datasets` package where that is installed. Slow on a CPU: 287,645 tokens.
"""

import json
import os
from pathlib import Path

import pytest

from opt_zoo.main import main

PUBLISHED = {"facebook/opt-125m": 27.65, "facebook/opt-350m": 22.00}  # in float16; later papers have 27.66
WITHIN = 0.05
TOKENS, SEGMENTS = 287_645, 140


@pytest.fixture(scope="module")
def wikitext(tmp_path_factory) -> Path:
    if path := os.environ.get("WIKITEXT2_TEST"):
        return Path(path)
    datasets = pytest.importorskip("datasets")
    rows = datasets.load_dataset("Salesforce/wikitext", "wikitext-2-raw-v1", split="test")["text"]
    path = tmp_path_factory.mktemp("wikitext") / "test.txt"
    path.write_text("\n\n".join(rows), encoding="utf-8", newline="")
    return path


@pytest.mark.hub
@pytest.mark.slow
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("model", PUBLISHED)
def test_the_published_perplexity_is_reproduced(backend, model, wikitext, capsys):
    assert main(["perplexity", model, str(wikitext), "--backend", backend.name, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["length"], report["tokens"], report["segments"]) == (2048, TOKENS, SEGMENTS)
    assert report["results"][0]["perplexity"] == pytest.approx(PUBLISHED[model], abs=WITHIN)
