"""lissom.optim: optimizers for models that do not fit, in place of torch.optim.AdamW."""

from .adamw import AdamW, AdamW8bit
from .adapters import adapter_groups, base_weights
from .apollo import APOLLO
from .backward_project import project_in_backward
from .backward_update import update_in_backward
from .base import PartialStepError
from .convert import convert_state
from .dctadamw import DCTAdamW
from .fira import FiraAdamW
from .frugal import FRUGAL
from .galore import GaLoreAdamW, GaLoreAdamW8bit
from .gradnormlorp import GradNormLoRPAdamW
from .groups import param_groups
from .layers import lora, merge
from .lowrank import LowRankOptimizer
from .muon import Muon
from .plan import Plan
from .polargrad import PolarGrad
from .report import Report, report
from .switchlora import SwitchLoRAAdamW
from .trion import Trion
from .version import __version__

__all__ = ["APOLLO", "AdamW", "AdamW8bit", "DCTAdamW", "FRUGAL", "FiraAdamW", "GaLoreAdamW",
           "GaLoreAdamW8bit", "GradNormLoRPAdamW", "LowRankOptimizer", "Muon", "PartialStepError",
           "Plan", "PolarGrad", "Report", "SwitchLoRAAdamW", "Trion", "__version__",
           "adapter_groups", "base_weights", "convert_state", "lora", "merge", "param_groups",
           "project_in_backward", "report", "update_in_backward"]
