import dataclasses
import multiprocessing
import os
import pickle
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from itae_utils.data.datasets import load_dataset
from itae_utils.errors import ItaeError
from itae_utils.extraction import batches as module
from itae_utils.extraction.batches import auto_workers, image_batches, model_batches
from tests.conftest import MadeDataset, as_backbone, dataset_tensor, tiny_vit
from tests.data.test_datasets import picture, save, to_tensor, truncated_jpeg


class TestBatches:
    @pytest.mark.parametrize("num_workers", [0, 2])
    def test_every_image_in_order(self, num_workers):
        dataset = load_dataset("digits", limit=150)
        batches = list(image_batches(dataset, to_tensor, batch_size=64, num_workers=num_workers))
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

    def test_a_transform_that_returns_different_shapes(self, tmp_path):
        for number in (5, 6):
            save(tmp_path / f"{number}.png", picture(size=(number, 4)))
        with pytest.raises(ItaeError, match=r"\(3, 4, 5\), \(3, 4, 6\)"):
            list(image_batches(load_dataset(f"imagefolder:{tmp_path}"), to_tensor))

    @pytest.mark.parametrize(("item", "labels"), [(picture(), [-1]), ((picture(), None), [-1]), ([picture(), 3], [3]),
                                                  ({"image": picture(), "label": np.int64(4)}, [4])])
    def test_items_with_and_without_labels(self, item, labels):
        (images, found), = image_batches([item], to_tensor)
        assert found.tolist() == labels
        assert torch.equal(images[0], to_tensor(picture()))

    @pytest.mark.parametrize("num_workers", [0, 1])
    def test_items_of_another_kind_are_one_line(self, num_workers):
        with pytest.raises(ItaeError, match=r"item 1 .*\(Image, int, int\)"):
            list(image_batches([picture(), (picture(), 1, 2)], to_tensor, num_workers=num_workers))
        with pytest.raises(ItaeError, match=r"item 0 .*'cat'"):
            list(image_batches([(picture(), "cat")], to_tensor, num_workers=num_workers))

    def test_an_item_whose_file_is_damaged_is_one_line(self, tmp_path):
        truncated_jpeg(tmp_path / "cut.jpg")
        with pytest.raises(ItaeError, match=r"item 0 .*truncated"):
            list(image_batches([Image.open(tmp_path / "cut.jpg")], to_tensor))
        with pytest.raises(ItaeError, match=r"item 0 .*KeyError"):
            list(image_batches(pd.DataFrame({"image": [picture()]}), to_tensor))

    @pytest.mark.parametrize(("name", "value"), [
        ("batch_size", 0), ("batch_size", 2.0), ("batch_size", True), ("batch_size", "auto"), ("num_workers", -1),
        ("num_workers", 1.5), ("num_workers", "many"), ("num_workers", True), ("indices", [0.5]), ("indices", [9]),
        ("indices", [True, False]), ("indices", [[0]]), ("indices", "0")])
    def test_other_numbers_are_refused(self, name, value):
        with pytest.raises(ItaeError, match=name):
            list(image_batches(MadeDataset(3), to_tensor, **{name: value}))

    @pytest.mark.parametrize(("transform", "named"), [
        (None, "transform=None"), ("resize", "'resize'"), (lambda image: image, "Image"), (np.asarray, "ndarray")])
    def test_transforms_that_give_no_tensor_are_refused(self, transform, named):
        with pytest.raises(ItaeError, match=named):
            list(image_batches(MadeDataset(3), transform))

    def test_a_worker_that_dies_is_one_line(self):
        with pytest.raises(ItaeError, match="num_workers=1") as caught:
            list(image_batches(MadeDataset(3), lambda image: os._exit(9), num_workers=1))
        assert "\n" not in str(caught.value)

    def test_data_sets_can_be_pickled_for_workers_that_are_spawned(self, tmp_path):
        save(tmp_path / "1.png")
        dataset = load_dataset(f"imagefolder:{tmp_path}")
        assert pickle.loads(pickle.dumps(dataset))[0] == dataset[0]


class TestModelBatches:
    @pytest.fixture
    def folder(self, tmp_path):
        for number in range(7):
            save(tmp_path / f"{number}.png", picture(number, size=(20 + number % 3 * 5, 30)))
        return load_dataset(f"imagefolder:{tmp_path}")

    def backbone(self, resize):
        return dataclasses.replace(as_backbone(tiny_vit()), resize=resize)

    def test_by_pil_they_are_the_transform_s_to_the_bit(self, folder):
        backbone = self.backbone("pil")
        batches = list(model_batches(backbone, folder, batch_size=3))
        assert [len(batch) for batch in batches] == [3, 3, 1]
        assert torch.equal(torch.cat(batches), dataset_tensor(backbone, folder))

    @pytest.mark.parametrize("num_workers", [0, 2])
    def test_on_the_device_they_are_close_and_in_order(self, folder, num_workers):
        backbone = self.backbone("device")
        expected = dataset_tensor(backbone, folder)
        batches = list(model_batches(backbone, folder, batch_size=3, num_workers=num_workers))
        assert [len(batch) for batch in batches] == [3, 3, 1]
        assert (torch.cat(batches) - expected).abs().max() <= 2.01 / 255 / 0.5
        chosen = torch.cat(list(model_batches(backbone, folder, batch_size=2, indices=[6, 0, 3])))
        assert torch.equal(chosen, torch.cat(batches)[[6, 0, 3]])

    @pytest.mark.parametrize("resize", ["pil", "device"])
    @pytest.mark.parametrize("num_workers", [0, 1])
    def test_a_damaged_image_is_one_line(self, tmp_path, resize, num_workers):
        save(tmp_path / "1.jpg", picture(0, size=(64, 64)))
        truncated_jpeg(tmp_path / "2.jpg")
        dataset = load_dataset(f"imagefolder:{tmp_path}")
        with pytest.raises(ItaeError, match=r"2\.jpg") as caught:
            list(model_batches(self.backbone(resize), dataset, num_workers=num_workers))
        assert "\n" not in str(caught.value)

    def test_automatic_workers_load_the_same_images(self, folder, monkeypatch):
        monkeypatch.setattr(module, "FEWEST_IMAGES", 2)
        monkeypatch.setattr(module, "available_cores", lambda: 4)  # of which one loads
        processes = []
        monkeypatch.setattr(module, "DataLoader", lambda *args, num_workers, **options: processes.append(num_workers)
                            or torch.utils.data.DataLoader(*args, num_workers=num_workers, **options))
        backbone = self.backbone("pil")
        loaded, = model_batches(backbone, folder, batch_size=5, num_workers="auto", indices=[1, 2])
        assert torch.equal(loaded, dataset_tensor(backbone, folder)[[1, 2]])
        assert list(model_batches(backbone, folder, num_workers="auto", indices=[1]))
        assert processes == [1, 0]

    @pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
    @pytest.mark.parametrize("resize", ["pil", "device"])
    @pytest.mark.parametrize("num_workers", [0, 2])
    def test_on_cuda(self, folder, resize, num_workers):
        backbone = dataclasses.replace(self.backbone(resize), device=torch.device("cuda"))
        expected = dataset_tensor(backbone, folder)
        batches = []
        for batch in model_batches(backbone, folder, batch_size=2, num_workers=num_workers):
            assert batch.device.type == "cuda"
            torch.cuda._sleep(10**7)  # so that the next batch is on its way while this one is in use
            batches.append(batch * 1)
        assert (torch.cat(batches).cpu() - expected).abs().max() <= (2.01 / 255 / 0.5 if resize == "device" else 0)


@pytest.mark.parametrize("count", [0, 1, 2, 5])
def test_each_item_is_yielded_after_the_next_one_is_made(count):
    made = []
    for index, item in enumerate(module.one_ahead(made.append(number) or number for number in range(count))):
        assert item == index
        assert made == list(range(min(index + 2, count)))
    assert len(made) == count


class TestAutoWorkers:
    FILES = SimpleNamespace(images=[Path("a.jpg")])
    ON_CPU = SimpleNamespace(device=torch.device("cpu"), image_size=224)
    ON_CUDA = SimpleNamespace(device=torch.device("cuda"), image_size=224)

    @pytest.fixture(autouse=True)
    def machine(self, monkeypatch):
        """A machine with ten cores and plenty of shared memory."""
        monkeypatch.setattr(module, "available_cores", lambda: 10)
        monkeypatch.setattr(module, "available_memory", lambda: None)
        monkeypatch.setattr(module.shutil, "disk_usage", lambda _path: SimpleNamespace(free=10**12))

    @pytest.mark.parametrize(("cores", "on_cuda", "on_cpu"), [(1, 0, 0), (2, 1, 0), (10, 9, 2), (64, 16, 16)])
    def test_files_are_loaded_on_the_cores_that_the_model_leaves(self, monkeypatch, cores, on_cuda, on_cpu):
        monkeypatch.setattr(module, "available_cores", lambda: cores)
        assert auto_workers(self.ON_CUDA, self.FILES, 5000, 64) == on_cuda
        assert auto_workers(self.ON_CPU, self.FILES, 5000, 64) == on_cpu

    def test_none_for_images_in_memory_and_small_sets(self):
        assert auto_workers(self.ON_CUDA, load_dataset("digits"), 1797, 64) == 0
        assert auto_workers(self.ON_CUDA, MadeDataset(3), 5000, 64) == 0
        assert auto_workers(self.ON_CUDA, SimpleNamespace(images=[]), 5000, 64) == 0
        assert auto_workers(self.ON_CUDA, self.FILES, 255, 64) == 0
        assert auto_workers(self.ON_CUDA, self.FILES, 256, 64) > 0

    def test_none_where_children_are_not_allowed(self, monkeypatch):
        monkeypatch.setattr(multiprocessing, "current_process", lambda: SimpleNamespace(daemon=True))
        assert auto_workers(self.ON_CUDA, self.FILES, 5000, 64) == 0

    @pytest.mark.skipif(not module.SHARED_MEMORY.is_dir(), reason="no /dev/shm on this system")
    @pytest.mark.parametrize(("shared", "memory"), [(64 * 2**20, None), (10**12, 64 * 2**20)])
    def test_batches_fit_in_the_shared_memory(self, monkeypatch, shared, memory):
        """A container's shared memory may be larger than the memory it may use."""
        monkeypatch.setattr(module.shutil, "disk_usage", lambda _path: SimpleNamespace(free=shared))
        monkeypatch.setattr(module, "available_memory", lambda: memory)
        assert auto_workers(self.ON_CUDA, self.FILES, 5000, 64) == 0  # 2 batches of 37 MB are more than half of it
        assert auto_workers(self.ON_CUDA, self.FILES, 5000, 8) == 3

    def test_torch_gives_each_worker_one_thread(self):
        """So the number of threads needs no setting."""
        threads = lambda image: torch.tensor([[[torch.get_num_threads()]]] * 3)  # noqa: E731
        (images, _), = image_batches(MadeDataset(2), threads, num_workers=1)
        assert images.flatten().tolist() == [1] * 6
