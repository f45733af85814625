"""lissom.optim: optimizers for models that do not fit, in place of torch.optim.AdamW.

Start with ``GaLoreAdamW`` or ``FiraAdamW`` on the groups that ``param_groups(model, rank=128)``
makes. The files of the package by layer, in reading order:

**Methods**

- ``method``: what a method defines, and the names g, p, s, o, r, P, Q, R, N, u
- ``adamw``: AdamW, dense
- ``galore``, ``fira``, ``dctadamw``, ``apollo``, ``frugal``, ``gradnormlorp``: low-rank methods
- ``muon``, ``polargrad``, ``trion``: methods that orthogonalize matrices
- ``switchlora``: AdamW on low-rank pairs whose vectors are exchanged

**Parts of the methods**

- ``lowrank``: base of the low-rank methods: project, inner rule, lift, residual
- ``subspace``: when a basis is refreshed, and R = P^T G Q on it
- ``ranked``: which matrices a class with a rank takes
- ``project``, ``dct``: how a basis is found: singular vectors, random, cosine columns
- ``coordinates``: bases that are columns of another one, known by their numbers
- ``inner``: rules on R: Adam, momentum, Lion, factored Adam
- ``residual``, ``norms``: what is done with the gradient outside the subspace, and its norms
- ``polar``, ``polar_polynomial``, ``polar_rational``: polar factors

**The step**

- ``base``: the one loop from gradient to weight
- ``gradients``: where a step takes gradients from
- ``batches``: which parameters are updated together
- ``whole``: updates that wait for functions of whole matrices
- ``apply``, ``weights``: the update applied to the weight, rounded once
- ``dense``: Adam's arithmetic, and AdamW of whole parameters

**Options**

- ``options``, ``common``: rules of options, and the options that every class has
- ``door``, ``checks``: checks of options; of parameters, gradients and where a step runs

**State**

- ``codec``: how a value is stored: fp32, bf16, 8 and 4 bits
- ``layouts``: which values each parameter has
- ``keys``: keys of random numbers
- ``loading``: checks of a saved state
- ``convert``, ``foreign``: states saved under other options or by other packages

**Ranks**

- ``sharding``, ``owners``: DTensor parameters, and whole matrices put together on one rank
- ``replicas``, ``ddp``: gradients averaged over ranks, in the backward pass and under DDP

**Backward pass**

- ``backward``: hooks and handle that both ways share
- ``backward_project``, ``backward_update``: gradients projected, or applied, as they are ready
- ``backward_buffers``: gradients of shards that lie in one buffer, of which some are freed

**Models**

- ``groups``, ``heads``: from a model to parameter groups; which weights are output heads
- ``pairs``, ``layers``, ``adapters``: low-rank pairs, their layers and their groups

**Reports**

- ``plan``, ``report``, ``metrics``: what happens to each parameter, in one screen, in numbers
- ``version``: of the package

**Integrations**

- ``hf``: Hugging Face's Trainer
"""

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
