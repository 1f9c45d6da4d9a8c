"""Products of float32 that may be made of fewer digits: TF32 on CUDA devices, bfloat16 on processors, where allowed."""

from __future__ import annotations

from typing import Literal

import torch
from torch import nn

__all__ = ["Operation", "is_reduced", "operation_of"]

Operation = Literal["matmul", "conv", "rnn"]


def operation_of(kind: str, module: nn.Module) -> Operation:
    """What makes the gradients of a layer of a ``kind``, as torch's settings name it."""
    if isinstance(module, nn.RNNBase):
        return "rnn"
    return "conv" if kind in ("conv", "conv_transpose") else "matmul"


def is_reduced(operation: Operation, device: torch.device) -> bool:
    """Whether torch's settings allow an operation on float32 to be made of fewer digits; cuDNN's are by default."""
    backends, is_cuda = torch.backends, device.type == "cuda"
    libraries = {"matmul": backends.cuda, "conv": backends.cudnn, "rnn": backends.cudnn}
    settings = getattr(libraries[operation] if is_cuda else backends.mkldnn, operation, None)
    found = getattr(settings, "fp32_precision", None)
    if found is not None:
        return bool(found not in ("none", "ieee"))
    # before torch 2.9; with the settings above it may be refused to say
    if is_cuda and operation != "matmul":
        return bool(backends.cudnn.allow_tf32)
    return torch.get_float32_matmul_precision() != "highest"
