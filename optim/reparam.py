"""Where models that were pickled whole look for their layers: :mod:`lissom.optim.layers`."""

from .layers import LoRALinear, NormalizedLinear

__all__ = ["LoRALinear", "NormalizedLinear"]
