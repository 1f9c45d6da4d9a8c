"""``fully_shard`` over a single process: parameters are sharded all the same."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard

import dualhook


@pytest.fixture
def alone(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3)).double()


def train(model: nn.Module) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    torch.manual_seed(1)
    for _ in range(5):
        optimizer.zero_grad()
        model(torch.randn(6, 5, dtype=torch.float64)).square().mean().backward()
        optimizer.step()


def test_shards_in_one_process_are_recorded_like_whole_parameters(alone):
    model, bare = network(), network()
    for each in (model, bare):
        fully_shard(each)
    recorder = dualhook.instrument(model, verbose=False)
    train(model)
    train(bare)
    memory = recorder.close()
    report = memory.verify()
    assert report["exact"].all()
    assert report.max_error < 1e-12
    for one, other in zip(model.parameters(), bare.parameters(), strict=True):
        assert torch.equal(one.full_tensor(), other.full_tensor())
