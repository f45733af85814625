"""Run by itself, where lissom is installed from its wheel: imports, and two steps.

Arguments: the folder that lissom must come from, then modules that must not be importable.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import sys
from pathlib import Path

folder, *absent = sys.argv[1:]


class Absent:
    """Makes modules impossible to find."""

    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in absent:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


if "--hide" in absent:
    absent.remove("--hide")
    sys.meta_path.insert(0, Absent())
    sys.path.insert(0, folder)
else:
    assert not [name for name in absent if importlib.util.find_spec(name)]

import torch  # noqa: E402
from lissom import bench, kernels, optim  # noqa: E402
from lissom.bench import recipes  # noqa: E402
from lissom.kernels import dynamic  # noqa: E402
from lissom.optim import AdamW, GaLoreAdamW, param_groups  # noqa: E402

for module in (bench, kernels, optim, recipes):
    assert Path(module.__file__).is_relative_to(folder), module.__file__
assert importlib.metadata.version("lissom") == optim.__version__

for bits in (32, 8):
    model = torch.nn.Sequential(torch.nn.Linear(64, 128), torch.nn.ReLU(), torch.nn.Linear(128, 64))
    x = torch.randn(16, 64)
    for optimizer in (AdamW(model.parameters(), lr=1e-2, state_bits=bits),
                      GaLoreAdamW(param_groups(model, rank=8), lr=1e-2, state_bits=bits)):
        losses = []
        for _ in range(5):
            loss = (model(x) - x).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        assert losses[-1] < losses[0], losses
        assert "bytes" in str(optim.report(optimizer))
codes, scale = dynamic.quantize_dynamic(x, 8, True)
assert (dynamic.dequantize_dynamic(codes, scale, 64, 8, True) - x).abs().max() < 0.1
sys.stdout.write(f"smoke: ok, torch {torch.__version__}\n")
