"""What was published about real checkpoints, in all backends: hidden states, logits, texts, losses and token ids.

These download checkpoints (0.25 GB for 125m, 0.7 GB for 350m, 2.6 GB for 1.3b). That the checks themselves work is
tested without a network, in `test_published_checks_offline.py`.
"""

import pytest
from published_checks import CHECKS, PUBLISHED


@pytest.mark.hub
@pytest.mark.slow
@pytest.mark.parametrize("name", CHECKS)
def test_a_published_result_is_reproduced(backend, name):
    CHECKS[name](backend, PUBLISHED[name])
