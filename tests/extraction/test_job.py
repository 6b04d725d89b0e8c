import dataclasses

import pytest
import torch

from itae_utils.errors import ItaeError
from itae_utils.extraction import job
from itae_utils.extraction.features import extract_features
from tests.conftest import as_backbone, setup, tiny_vit


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


@pytest.mark.parametrize(("batch_size", "remedy"), [(2, "batch_size=1"), ("auto", "batch_size=32")])
def test_a_batch_that_does_not_fit_is_one_line(batch_size, remedy):
    backbone, dataset, _ = setup()

    def full(*_arguments):
        raise torch.cuda.OutOfMemoryError("CUDA out of memory.\nTried to allocate 20.00 MiB")

    backbone.model.blocks[1].register_forward_pre_hook(full)
    with pytest.raises(ItaeError, match=remedy) as caught:
        extract_features(backbone, dataset, {"it": None}, batch_size=batch_size)
    assert "auto" not in str(caught.value)
    assert "\n" not in str(caught.value)
