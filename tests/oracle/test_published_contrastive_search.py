"""Contrastive search against the published TensorFlow class, the last of transformers 4.57.6 that has it built in."""

import numpy as np
import pytest
from harness import config_of, save_random, token_ids
from reference_stepper import ReferenceStepper, request_of

from opt_core.searching import search

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.slow  # the published loop is not compiled


@pytest.mark.parametrize(("alpha", "k"), [(0.6, 4), (0.2, 11), (1.0, 3)])
def test_contrastive_search_writes_the_published_text(alpha, k, tmp_path, request):
    if "tf" not in request.config.getoption("--backends").split(","):
        pytest.skip("tf is not among the --backends of this run")
    pytest.importorskip("tf_keras")
    config = config_of(eos_token_id=[70, 94])
    save_random(tmp_path, config)
    ids = token_ids(config, 3, 6)
    model = transformers.TFOPTForCausalLM.from_pretrained(tmp_path, from_pt=True)
    options = dict(penalty_alpha=alpha, top_k=k, max_new_tokens=9)
    theirs = np.asarray(model.generate(ids.astype(np.int32), attention_mask=np.ones_like(ids, np.int32), **options))
    ours = search(request_of(config, ids, **options), ReferenceStepper(config)).sequences
    assert ours.tolist() == theirs.tolist()
