"""AdamW, dense: torch.optim.AdamW's equations with this package's state options.

The arithmetic is :func:`lissom.optim.dense.step_adamw`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor
from typing_extensions import Unpack

from .base import MatrixOptimizer
from .common import CommonOptions
from .options import Option, choice

__all__ = ["AdamW", "AdamW8bit"]


class AdamW(MatrixOptimizer):
    """AdamW with decoupled weight decay, as ``torch.optim.AdamW``.

    p <- (1 - lr wd) p - lr M / (1 - b1^t) / (sqrt(V / (1 - b2^t)) + eps). Arithmetic is fp32
    whatever the weight's dtype; temporaries are blocks, not copies of the model.

    Args:
        params: tensors, (name, tensor) pairs, or groups of either.
        lr: learning rate, >= 0. Default 1e-3. A tensor of one element is read here, once, unless
            ``capturable``.
        betas: decay of the two averages, each in [0, 1). Default (0.9, 0.999).
        eps: added to the root of the bias-corrected second moment, >= 0. Default 1e-8.
        weight_decay: decoupled, multiplied by lr, before the update, >= 0. Default 0.01.
        amsgrad: divide by the largest second moment so far. Default False.
        maximize: climb instead of descend. Default False.
        state_bits: per moment element: 32 (fp32, default), 16 (bf16, rounded stochastically), 8 or
            4 (dynamic codebooks, a scale for each block of 256 of a row; moments of fewer than
            4096 elements stay in fp32, rows of 4 or fewer in bf16).
        rounding: how results are written into bf16 and fp16 weights: ``"stochastic"`` (default:
            the mean is exact, so that small updates are not lost; reproducible from ``seed``) or
            ``"nearest"``. Weights of 32 bits and more are not rounded.
        master_bits: 8 or 16 more bits of each bf16 weight in the state: with 16 the weights are
            those of fp32 training, bit for bit but where a low-rank product is bf16; with 8 to
            about 2^-16 of a weight per step, without bias. Default None. See
            :meth:`full_precision`.
        nonfinite: what a NaN or Inf gradient does: ``"propagate"`` as in torch (default),
            ``"skip"`` the whole step and count it in ``skipped_steps``, or ``"raise"``.
        seed: of the random bits of 16-bit state and weights, an int >= 0. Default 0. They depend
            on the parameter's name too, or on its place among the parameters where groups have
            no names.
        metrics: measure each step for :meth:`metrics`. Default False.
        shards: of a sharded matrix (DTensor) update the ``"rows"`` where they are, where the rule
            allows it (default), or gather the ``"whole"``: then the result does not depend on the
            number of ranks in any bit.
        algorithm: of a group, the rule of its matrices: ``"adamw"``, and in classes with a rule of
            their own that rule's name, which is their default.
        capturable: keep the count of steps on the device, so that a CUDA graph can hold a step; a
            ``lr`` that is a 0-d tensor there is read when the graph is replayed. Default False. Not
            with ``nonfinite`` but ``"propagate"``, sharded parameters, or work in the backward
            pass. Other classes take it where the host decides nothing: ``Trion``, ``Muon`` and
            ``PolarGrad`` with polar oracles that are products, and low-rank classes with
            ``projection="dct", update_proj_gap=1``.
        foreach, fused, differentiable: torch's switches about how a step runs; the first two are
            accepted and change nothing, the last must be False.

    Raises:
        TypeError, ValueError: an option or parameter that breaks its rule, by name and value.

    Source: Loshchilov and Hutter, "Decoupled Weight Decay Regularization", arXiv 1711.05101.
    """

    def __init__(
        self, params: Any, lr: float | Tensor = 1e-3, betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8, weight_decay: float = 1e-2, amsgrad: bool = False,
        **options: Unpack[CommonOptions],
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps,
                                  "weight_decay": weight_decay, "amsgrad": amsgrad, **options})


class AdamW8bit(AdamW):
    """:class:`AdamW` with ``state_bits=8``, under the name that bitsandbytes gave it.

    Source: Dettmers et al., "8-bit Optimizers via Block-wise Quantization", arXiv 2110.02861.
    """

    options: ClassVar[Mapping[str, Option]] = {"state_bits": choice(8, 32, 16, 8, 4)}
