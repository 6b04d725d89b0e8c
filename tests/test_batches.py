import pickle

import numpy as np
import pytest
import torch

from itae_utils.batches import image_batches
from itae_utils.datasets import load_dataset
from itae_utils.errors import ItaeError
from tests.test_datasets import picture, save, to_tensor, truncated_jpeg


class TestBatches:
    def test_every_image_in_order(self):
        dataset = load_dataset("digits", limit=150)
        batches = list(image_batches(dataset, to_tensor, batch_size=64))
        assert [tuple(images.shape) for images, _ in batches] == [(64, 3, 8, 8), (64, 3, 8, 8), (22, 3, 8, 8)]
        images, labels = (torch.cat(parts) for parts in zip(*batches, strict=True))
        assert labels.dtype == torch.int64
        assert labels.tolist() == dataset.targets.tolist()
        assert torch.equal(images, torch.stack([to_tensor(image) for image, _ in dataset]))

    def test_indices_choose_and_order(self):
        dataset = load_dataset("digits")
        (images, labels), = image_batches(dataset, to_tensor, indices=np.array([5, 1700, 3]))
        assert labels.tolist() == dataset.targets[[5, 1700, 3]].tolist()
        assert torch.equal(images, torch.stack([to_tensor(dataset[index][0]) for index in (5, 1700, 3)]))

    def test_workers_give_the_same(self, tmp_path):
        for number in range(5):
            save(tmp_path / f"{number}.png")
        dataset = load_dataset(f"imagefolder:{tmp_path}")
        alone = list(image_batches(dataset, to_tensor, batch_size=2))
        shared = list(image_batches(dataset, to_tensor, batch_size=2, num_workers=2))
        assert len(alone) == len(shared) == 3
        for (images, labels), (others, numbers) in zip(alone, shared, strict=True):
            assert torch.equal(images, others)
            assert labels.tolist() == numbers.tolist() == [-1] * len(images)

    @pytest.mark.parametrize("num_workers", [0, 1])
    def test_a_damaged_image_is_one_line_from_workers_too(self, tmp_path, num_workers):
        save(tmp_path / "1.jpg", picture(0, size=(64, 64)))
        truncated_jpeg(tmp_path / "2.jpg")
        with pytest.raises(ItaeError, match=r"2\.jpg") as caught:
            list(image_batches(load_dataset(f"imagefolder:{tmp_path}"), to_tensor, num_workers=num_workers))
        assert "\n" not in str(caught.value)

    def test_a_transform_that_leaves_sizes_different(self, tmp_path):
        for number in (5, 6):
            save(tmp_path / f"{number}.png", picture(size=(number, 4)))
        with pytest.raises(ItaeError, match=r"shapes \[\(3, 4, 5\), \(3, 4, 6\)\]"):
            list(image_batches(load_dataset(f"imagefolder:{tmp_path}"), to_tensor))

    def test_bad_batch_size(self):
        with pytest.raises(ItaeError, match="batch_size=0"):
            list(image_batches(load_dataset("digits"), to_tensor, batch_size=0))

    def test_data_sets_can_be_pickled_for_workers_that_are_spawned(self, tmp_path):
        save(tmp_path / "1.png")
        dataset = load_dataset(f"imagefolder:{tmp_path}")
        assert pickle.loads(pickle.dumps(dataset))[0] == dataset[0]
