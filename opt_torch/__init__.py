"""OPT in PyTorch."""

try:
    import torch  # noqa: F401
except ModuleNotFoundError as error:
    from opt_core.errors import MissingFrameworkError

    raise MissingFrameworkError("opt_torch needs PyTorch: pip install opt-zoo[torch]") from error

from opt_torch.cache import Cache
from opt_torch.models import (
    OPTForCausalLM,
    OPTForQuestionAnswering,
    OPTForSequenceClassification,
    OPTModel,
)
from opt_torch.pretrained import OPTPreTrainedModel

__all__ = [
    "Cache",
    "OPTForCausalLM",
    "OPTForQuestionAnswering",
    "OPTForSequenceClassification",
    "OPTModel",
    "OPTPreTrainedModel",
]
