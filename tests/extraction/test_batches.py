import contextlib
import dataclasses
import multiprocessing
import os
import pickle
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from itae_utils.data.datasets import load_dataset
from itae_utils.errors import ItaeError
from itae_utils.extraction import batches as module
from itae_utils.extraction.batches import auto_workers, image_batches, model_batches
from tests.conftest import MadeDataset, as_backbone, dataset_tensor, tiny_vit
from tests.data.test_datasets import picture, save, to_tensor, truncated_jpeg


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

    @pytest.mark.parametrize(("item", "kinds"), [
        ((torch.zeros(3, 8, 8), 1), r"\(Tensor, int\)"), ((np.zeros((8, 8, 3)), 1), r"\(ndarray, int\)"),
        (picture(), r"\(Image\)"), ((picture(), 1, 2), r"\(Image, int, int\)"), (("a.png", 1), r"\(str, int\)")])
    def test_items_of_another_kind_are_one_line(self, item, kinds):
        with pytest.raises(ItaeError, match=rf"item 0 of the data set is {kinds}: it must be \(PIL image, label\)"):
            list(image_batches([item], to_tensor))

    def test_bad_batch_size(self):
        with pytest.raises(ItaeError, match="batch_size=0"):
            list(image_batches(load_dataset("digits"), to_tensor, batch_size=0))

    @pytest.mark.parametrize("num_workers", [-1, 1.5, "many"])
    def test_bad_num_workers(self, num_workers):
        with pytest.raises(ItaeError, match=f"num_workers={num_workers!r}"):
            list(image_batches(load_dataset("digits"), to_tensor, num_workers=num_workers))

    def test_a_worker_that_dies_is_one_line(self):
        with pytest.raises(ItaeError, match="one of num_workers=1 processes that load images died") as caught:
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

    def test_automatic_workers_are_asked_for(self, folder, monkeypatch):
        asked = []
        monkeypatch.setattr(module, "auto_workers", lambda *args: asked.append(args) or 0)
        backbone = self.backbone("pil")
        list(model_batches(backbone, folder, batch_size=5, num_workers="auto", indices=[1, 2]))
        list(model_batches(backbone, folder, batch_size=5))
        assert asked == [(backbone, folder, 2, 5)]

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


class Stream:
    """A CUDA stream's stand-in that writes down what it is told."""

    def __init__(self, name: str, log: list) -> None:
        self.name, self.log = name, log

    def record_event(self):
        self.log.append(("event after", self.log[-1][1]))
        return self.log[-1][1]

    def wait_event(self, event) -> None:
        self.log.append((f"{self.name} waits for", event))


def test_the_next_batch_is_issued_before_one_is_handed_out(monkeypatch):
    log, open_stream = [], []
    side, current = Stream("side", log), Stream("current", log)

    @contextlib.contextmanager
    def use(stream):
        open_stream.append(stream.name)
        yield
        open_stream.pop()

    def issue(batch):
        log.append((f"issued on {open_stream[-1]}", batch))
        return SimpleNamespace(batch=batch, record_stream=lambda stream: log.append((f"kept for {stream.name}", batch)))

    monkeypatch.setattr(torch.cuda, "Stream", lambda device: side)
    monkeypatch.setattr(torch.cuda, "stream", use)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: current)
    for images in module._issued_ahead(iter([1, 2, 3]), issue, torch.device("cuda")):
        assert not open_stream  # the side stream is not left open while others work
        log.append(("used", images.batch))
    issued = lambda batch: [("issued on side", batch), ("event after", batch)]  # noqa: E731
    used = lambda batch: [("current waits for", batch), ("kept for current", batch), ("used", batch)]  # noqa: E731
    assert log == issued(1) + issued(2) + used(1) + issued(3) + used(2) + used(3)


@pytest.mark.parametrize("count", [0, 1, 2, 5])
def test_one_ahead_leaves_nothing_out(count):
    assert list(module._one_ahead(iter(range(count)))) == list(range(count))


class TestAutoWorkers:
    FILES = SimpleNamespace(images=[Path("a.jpg")])
    ON_CPU = SimpleNamespace(device=torch.device("cpu"), image_size=224)
    ON_CUDA = SimpleNamespace(device=torch.device("cuda"), image_size=224)

    @pytest.fixture(autouse=True)
    def machine(self, monkeypatch):
        """Ten cores and plenty of shared memory."""
        monkeypatch.setattr(os, "sched_getaffinity", lambda _pid: range(10), raising=False)
        monkeypatch.setattr(module.shutil, "disk_usage", lambda _path: SimpleNamespace(free=10**12))

    def test_files_by_the_cores_that_the_model_leaves(self, monkeypatch):
        assert auto_workers(self.ON_CUDA, self.FILES, 5000, 64) == 9
        assert auto_workers(self.ON_CPU, self.FILES, 5000, 64) == 2
        for cores, on_cuda, on_cpu in [(1, 0, 0), (2, 1, 0), (64, 16, 16)]:
            monkeypatch.setattr(os, "sched_getaffinity", lambda _pid, cores=cores: range(cores), raising=False)
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
    def test_batches_fit_the_shared_memory(self, monkeypatch):
        megabytes = 2**20
        monkeypatch.setattr(module.shutil, "disk_usage", lambda _path: SimpleNamespace(free=64 * megabytes))
        assert auto_workers(self.ON_CUDA, self.FILES, 5000, 64) == 0  # 2 batches of 37 MB are more than half of it
        assert auto_workers(self.ON_CUDA, self.FILES, 5000, 8) == 3

    def test_torch_gives_each_worker_one_thread(self):
        """Why there is nothing to set."""
        threads = lambda image: torch.tensor([[[torch.get_num_threads()]]] * 3)  # noqa: E731
        (images, _), = image_batches(MadeDataset(2), threads, num_workers=1)
        assert images.flatten().tolist() == [1] * 6
