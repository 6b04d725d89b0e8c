import dataclasses

import torch

from itae_utils.extraction import job
from tests.conftest import as_backbone, tiny_vit


def test_shards_are_multiples_of_the_batch_near_2000():
    backbone = as_backbone(tiny_vit())
    assert [job.shard_size(backbone, size) for size in (1, 64, 300, 5000)] == [2000, 1984, 2100, 5000]


def test_a_slow_model_on_a_cpu_gets_smaller_shards(monkeypatch):
    backbone = as_backbone(tiny_vit())
    monkeypatch.setattr(job, "CPU_RATE", 5e5)
    small = job.shard_size(backbone, 4)
    assert small % 4 == 0
    assert 4 <= small < 200
    assert job.shard_size(backbone, 512) == 512
    on_gpu = dataclasses.replace(backbone, device=torch.device("cuda"))
    assert job.shard_size(on_gpu, 4) == 2000
