"""A Trainer in one of two processes, recorded and not; see tests/integrations/test_trainer_together.py."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch


def main(rank: int, port: int, folder: Path) -> None:
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
    )
    torch.set_num_threads(1)
    from dualhook.integrations.transformers import DualMemoryCallback
    from trainers import WAYS, trainer_of

    settings = {"ddp_backend": "gloo", "gradient_accumulation_steps": 2, "save_strategy": "steps", "save_steps": 2}
    for name in ("gpt2", "llama-sgd"):
        states = []
        for callbacks in ([], [DualMemoryCallback(folder / name, layers="all", verbose=False)]):
            out = folder / f"{name}-out-{len(callbacks)}"
            trainer = trainer_of(out, WAYS[name], callbacks, per_device_train_batch_size=2, **settings)
            trainer.train()
            states.append({key: value.clone() for key, value in trainer.model.state_dict().items()})
        torch.save(states, folder / f"{name}-{rank}.pt")


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
