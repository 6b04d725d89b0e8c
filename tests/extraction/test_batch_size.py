import dataclasses
import gc
import weakref
from functools import partial

import pytest
import torch

from itae_utils.errors import ItaeError
from itae_utils.extraction import batches
from itae_utils.extraction.batches import (
    chosen_batch_size,
    fitting_batch_size,
    memory_errors,
    resolve_batch_size,
)
from itae_utils.extraction.features import extract_features
from itae_utils.extraction.fitting import fit_thresholds
from itae_utils.extraction.observation import observe
from itae_utils.store.store import open_store
from itae_utils.store.variants import Place
from tests.conftest import array_dataset, as_backbone, tiny_vit

CPU = torch.device("cpu")
ERRORS = {
    "cuda": torch.cuda.OutOfMemoryError("CUDA out of memory.\nTried to allocate 20.00 MiB"),
    "cublas": RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    "cpu": RuntimeError("[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you "
                        "tried to allocate 140737488355328 bytes. Error code 12 (Cannot allocate memory)"),
    "windows": RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 8 bytes."),
    "python": MemoryError(),
}


class Device:
    """Runs batches of up to `capacity` images, and records the sizes that were tried."""

    def __init__(self, capacity: int, error: Exception = ERRORS["cuda"]) -> None:
        self.capacity, self.error, self.tried = capacity, error, []

    def __call__(self, size: int) -> None:
        self.tried.append(size)
        if size > self.capacity:
            raise self.error


@pytest.mark.parametrize("error", ERRORS.values(), ids=ERRORS)
def test_halved_until_it_fits(error):
    device = Device(20, error)
    assert fitting_batch_size(device, CPU, start=100) == 12
    assert device.tried == [100, 50, 25, 12]


def test_torch_s_own_error():
    assert fitting_batch_size(lambda size: torch.empty(10**6, size, 10**8) if size > 1 else None, CPU, start=4) == 1


def test_not_even_one_image():
    device = Device(0)
    with pytest.raises(ItaeError, match=r"cpu.*image_size") as caught:
        fitting_batch_size(device, CPU, start=5)
    assert device.tried == [5, 2, 1]
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("error", [RuntimeError("mat1 and mat2 shapes cannot be multiplied"), ItaeError("bad"),
                                   KeyError("out of memory")])
def test_other_errors_are_raised_as_they_are(error):
    device = Device(0, error)
    with pytest.raises(type(error)):
        fitting_batch_size(device, CPU, start=8)
    assert device.tried == [8]
    with pytest.raises(type(error)) as caught, memory_errors(2, CPU):
        raise error
    assert caught.value is error


def test_the_cache_is_emptied_when_nothing_holds_the_failed_batch(monkeypatch):
    held, alive = [], []

    def run(size: int) -> None:
        batch = torch.zeros(size)
        circle = [batch]
        circle.append(circle)
        held.append(weakref.ref(batch))
        if size > 3:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: alive.append(sum(ref() is not None for ref in held)))
    gc.disable()
    try:
        assert fitting_batch_size(run, torch.device("cuda"), start=8) == 2
    finally:
        gc.enable()
    assert alive == [0, 0]


def test_a_batch_size_is_a_whole_number_from_1():
    backbone = as_backbone(tiny_vit())
    assert resolve_batch_size(7, backbone) == 7
    for bad in (0, -1, 2.0, True, "many"):
        with pytest.raises(ItaeError, match=f"batch_size={bad!r}"):
            resolve_batch_size(bad, backbone)


def test_automatic_elsewhere_tries_the_model_s_own_pass(monkeypatch):
    """The device is torch's "meta", which has no memory; the model raises the error instead."""
    model, tried = tiny_vit().to("meta"), []
    forward = model.forward_features

    def with_little_memory(images):
        tried.append(tuple(images.shape))
        if len(images) > 20:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")
        return forward(images)

    monkeypatch.setattr(model, "forward_features", with_little_memory)
    backbone = dataclasses.replace(as_backbone(tiny_vit()), model=model, device=torch.device("meta"))
    assert resolve_batch_size("auto", backbone) == 16
    assert tried == [(64, 3, 32, 32), (32, 3, 32, 32), (16, 3, 32, 32)]


@pytest.mark.parametrize(("device", "largest"), [("cuda", 256), ("mps", 64), ("cpu", 64)])
def test_the_largest_automatic_batch_size(monkeypatch, device, largest):
    monkeypatch.setattr(batches, "fitting_batch_size", lambda _run, _device, start: start)
    backbone = dataclasses.replace(as_backbone(tiny_vit()), device=torch.device(device))
    assert resolve_batch_size("auto", backbone) == largest


def test_an_automatic_batch_size_is_chosen_once(tmp_path, monkeypatch):
    """Features, thresholds and observations need one size, but the free memory of a GPU changes."""
    backbone, dataset = as_backbone(tiny_vit()), array_dataset(5)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"NVIDIA {device}")
    on_gpu, on_another = (dataclasses.replace(backbone, device=torch.device("cuda", index)) for index in (0, 1))
    fitting = iter([128, 64, 32, 16])
    monkeypatch.setattr(batches, "resolve_batch_size", lambda size, _: next(fitting) if size == "auto" else size)
    store = open_store(tmp_path)
    assert [chosen_batch_size("auto", Place(store, on_gpu, dataset)) for _ in range(3)] == [128] * 3
    assert chosen_batch_size("auto", Place(store, on_gpu, array_dataset(6))) == 64, "other images"
    assert chosen_batch_size("auto", Place(store, on_another, dataset)) == 32, "another kind of GPU"
    assert chosen_batch_size(7, Place(store, on_gpu, dataset)) == 7
    assert chosen_batch_size("auto", Place(None, on_gpu, dataset)) == 16


@pytest.mark.parametrize("error", ERRORS.values(), ids=ERRORS)
@pytest.mark.parametrize(("size", "remedy"), [(128, "batch_size=64"), (3, "batch_size=1"), (1, "image_size")])
def test_a_batch_that_does_not_fit_names_a_remedy_that_does(error, size, remedy):
    """A remembered automatic size may have stopped fitting: "auto" would choose it again."""
    with pytest.raises(ItaeError, match=remedy) as caught, memory_errors(size, CPU):
        raise error
    assert "auto" not in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("function", [fit_thresholds, observe, partial(extract_features, variants={"it": None})])
@pytest.mark.parametrize(("size", "remedy"), [(4, "batch_size=2"), ("auto", "batch_size=32")])
def test_every_pass_over_a_data_set_names_the_remedy(function, size, remedy):
    backbone = as_backbone(tiny_vit())
    backbone.model.patch_embed.register_forward_hook(lambda *_: (_ for _ in ()).throw(ERRORS["cuda"]))
    with pytest.raises(ItaeError, match=remedy):
        function(backbone, array_dataset(5), batch_size=size, store=None)
