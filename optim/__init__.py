"""lissom.optim: optimizers for models that do not fit, in place of torch.optim.AdamW."""

from .adamw import AdamW
from .base import PartialStepError
from .galore import GaLoreAdamW
from .groups import param_groups
from .plan import Plan
from .version import __version__

__all__ = ["AdamW", "GaLoreAdamW", "PartialStepError", "Plan", "__version__", "param_groups"]
