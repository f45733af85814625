"""What each rank of a Trainer under torchrun does: ``torchrun -m tests.trainer_job FOLDER``."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch
from lissom.optim import GaLoreAdamW

from .test_hf import asked, result, trained


def main(folder: Path) -> None:
    """Train, and resume from the checkpoint; the first rank saves both results."""
    ranks = {"ddp_backend": "gloo", "per_device_train_batch_size": 2, "max_grad_norm": 0.5}
    how = asked(GaLoreAdamW, update_proj_gap=3)
    straight = trained(folder / "a", how, **ranks)
    resumed = trained(folder / "b", how, resume=folder / "a/checkpoint-5", **ranks)
    if os.environ["RANK"] == "0":
        torch.save([result(straight), result(resumed)], folder / "results.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
