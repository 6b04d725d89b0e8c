import ast
import copy
import dataclasses
import functools
import gc
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import Subset
from torchvision import transforms
from torchvision.transforms import v2

from itae_utils.errors import ItaeError
from itae_utils.extraction.features import extract_features
from itae_utils.extraction.fitting import fit_thresholds
from itae_utils.files import PACKAGE
from itae_utils.method.setting import ITAE
from itae_utils.store import identity, variants
from itae_utils.store.identity import model_identity
from itae_utils.store.store import code_digest, digest
from itae_utils.store.variants import deciding_modules, entry_key
from tests.conftest import MadeDataset, array_dataset, as_backbone, tiny_vit


def test_all_that_decides_features_is_in_their_key(tmp_path, monkeypatch):
    backbone, dataset = as_backbone(tiny_vit("registers")), array_dataset(11)

    def computed(backbone=backbone, dataset=dataset, batch_size=2, itae=None):
        return extract_features(backbone, dataset, {"it": itae}, batch_size=batch_size, store=tmp_path).computed["it"]

    assert computed() == 11
    assert computed() == 0
    others = {
        "weights": {"backbone": as_backbone(tiny_vit("registers", reg_tokens=3))},
        "heads": {"backbone": as_backbone(tiny_vit("registers", num_heads=2))},
        "name": {"backbone": dataclasses.replace(backbone, name="other")},
        "precision": {"backbone": as_backbone(backbone.model, precision="bf16")},
        "preprocessing": {"backbone": as_backbone(backbone.model, image_size=64)},
        "pos_embed": {"backbone": dataclasses.replace(backbone, pos_embed="meta")},
        "another pos_embed": {"backbone": dataclasses.replace(backbone, pos_embed="transformers")},
        "resize": {"backbone": dataclasses.replace(backbone, resize="device")},
        "compiled": {"backbone": dataclasses.replace(backbone, compiled=True)},
        "images": {"dataset": array_dataset(11, seed=1)},
        "batch": {"batch_size": 4},
        "order": {"dataset": dataclasses.replace(dataset, images=dataset.images[::-1])},
        "variant": {"itae": ITAE("key", 9.0)},
        "threshold": {"itae": ITAE("key", np.nextafter(9.0, 10))},
        "source": {"itae": ITAE("value", 9.0)},
        "random": {"itae": ITAE("key", 9.0, select="random", seed=1)},
        "seed": {"itae": ITAE("key", 9.0, select="random", seed=2)},
        "alpha": {"itae": ITAE("key", 9.0, "scale", alpha=0.2)},
        "another alpha": {"itae": ITAE("key", 9.0, "scale", alpha=0.3)},
        "blocks": {"itae": ITAE("key", [9.0, 9.0], blocks=2)},
        "a block's own": {"itae": ITAE("key", [9.0, None], blocks=2)},
        "rows": {"itae": ITAE("key", [9.0, 9.0], blocks=2, rows="all")},
        "tail": {"itae": ITAE("key", 9.0, tail="high")},
        "direction": {"itae": ITAE("direction", 0.4)},
        "rank": {"itae": ITAE("direction", 0.4, rank=2)},
        "substitute": {"itae": ITAE("key", 9.0, "substitute", substitutes=((0.5,) * 24,))},
        "another substitute": {"itae": ITAE("key", 9.0, "substitute", substitutes=((0.5,) * 23 + (0.6,),))},
    }
    assert others["heads"]["backbone"].weights_sha256 == backbone.weights_sha256
    for name, given in others.items():
        assert computed(**given) == 11, name
        assert computed(**given) == 0, name
    monkeypatch.setattr(variants, "deciding_code", lambda: "changed")
    assert computed() == 11, "code"


class Photos:
    """A data set of one's own: arrays, with a transform that may be replaced."""

    def __init__(self, count=3, **attributes):
        self.images, self.targets = array_dataset(count).images, None
        self.transform = None
        vars(self).update(attributes)

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        image = Image.fromarray(self.images[index])
        return (image if self.transform is None else self.transform(image)), 0


class Crop:
    def __init__(self, size):
        self.size = size

    def __call__(self, image):
        return image.crop((0, 0, self.size, self.size))

    def __repr__(self):
        return "Crop()"


class Filled(Crop):
    """Fills the image with a colour, a tensor."""

    def __call__(self, image):
        return Image.new("RGB", image.size, tuple((self.size * 255).int().tolist()))


def halved(image):
    return image.reduce(2)


def resized(image, size):
    return image.resize((size, size))


KNOWN = {
    "none": None, "torchvision": transforms.CenterCrop(16), "other size": transforms.CenterCrop(8),
    "composed": transforms.Compose([transforms.CenterCrop(16), transforms.Grayscale(3)]), "v2": v2.CenterCrop((16, 8)),
    "tensor": Filled(torch.zeros(3)), "other tensor": Filled(torch.ones(3)), "object": Crop(16),
    "same repr": Crop(8), "function": halved, "partial": functools.partial(resized, size=16),
    "other partial": functools.partial(resized, size=8), "method": Crop(12).__call__}
UNKNOWN = {
    "lambda": lambda image: image.reduce(2), "wrapped lambda": transforms.Lambda(lambda image: image.reduce(2)),
    "composed lambda": transforms.Compose([transforms.CenterCrop(16), lambda image: image]),
    "v2 lambda": v2.Lambda(lambda image: image.reduce(2)),
    "partial of a lambda": functools.partial(lambda image: image)}
RANDOM = {"random": transforms.RandomCrop(8), "v2 random": v2.Compose([v2.RandomRotation(90)])}


def key_of(backbone=None, dataset=None) -> dict:
    return entry_key(backbone or as_backbone(tiny_vit()), dataset or array_dataset(3))


def test_transforms_of_a_data_set_are_told_apart_by_their_values():
    keys = {name: digest(key_of(dataset=Photos(transform=transform))) for name, transform in KNOWN.items()}
    assert len(set(keys.values())) == len(KNOWN)
    assert keys == {name: digest(key_of(dataset=Photos(transform=copy.deepcopy(transform))))
                    for name, transform in KNOWN.items()}
    edited = Photos(transform=Crop(16))
    edited.transform.size = 8
    assert digest(key_of(dataset=edited)) == keys["same repr"]
    assert key_of(dataset=Photos(target_transform=lambda label: label)) == key_of(dataset=Photos())


@pytest.mark.parametrize("attributes", [
    *({"transform": each} for each in (UNKNOWN | RANDOM).values()), {"transforms": UNKNOWN["lambda"]},
    {"loader": UNKNOWN["lambda"]}, {"steps": [halved, UNKNOWN["lambda"]]}, {"by_name": {"crop": UNKNOWN["lambda"]}}])
def test_a_data_set_with_unknown_or_random_code_is_not_stored(attributes, tmp_path, monkeypatch):
    backbone, dataset = as_backbone(tiny_vit()), Photos(**attributes)
    with pytest.raises(ItaeError, match=r"store=None") as error:
        extract_features(backbone, dataset, {"it": None}, store=tmp_path)
    assert "\n" not in str(error.value)
    assert not list(tmp_path.iterdir())
    monkeypatch.setenv("ITAE_STORE", str(tmp_path))
    assert extract_features(backbone, dataset, {"it": None}).settings["store"] is None
    assert fit_thresholds(backbone, dataset, store=tmp_path)
    assert not list(tmp_path.iterdir())


def test_items_that_are_not_the_images_have_a_key_of_their_own(monkeypatch):
    class Turned(Photos):
        angle = 90

        def __getitem__(self, index):
            return Image.fromarray(self.images[index]).rotate(self.angle)

    class Chosen(Photos):
        numbers = (0, 1, 2)

        def __getitem__(self, index):
            return super().__getitem__(self.numbers[index])

    keys = {digest(key_of(dataset=each)) for each in (array_dataset(3), Photos(), Turned(), Chosen())}
    monkeypatch.setattr(Turned, "angle", 180)
    monkeypatch.setattr(Chosen, "numbers", (1, 0, 2))
    keys |= {digest(key_of(dataset=each)) for each in (Turned(), Chosen())}
    assert len(keys) == 6


@pytest.mark.parametrize(("attributes", "named"), [
    ({"images": [1, 2, 3]}, "images"), ({"images": ["a.png", "b.png", "c.png"]}, r"a\.png"),
    ({"images": len}, "images"),
    ({"images": None}, r"no \.images"), ({"targets": [0, 1]}, "2"), ({"images": np.zeros((2, 4, 4), np.uint8)}, "3")])
def test_images_that_identify_nothing(attributes, named):
    class Fixed(Photos):
        __len__ = lambda self: 3  # noqa: E731
        __getitem__ = lambda self, index: Image.new("RGB", (8, 8))  # noqa: E731

    with pytest.raises(ItaeError, match=named):
        key_of(dataset=Fixed(**attributes))
    assert extract_features(as_backbone(tiny_vit()), Fixed(**attributes), {"it": None})["it"].shape == (3, 24)


def shifted(image, shift):
    return as_backbone(tiny_vit()).transform(image) + shift


def test_a_replaced_transform_of_a_backbone(tmp_path):
    def with_shift(shift):
        return dataclasses.replace(as_backbone(tiny_vit()), transform=functools.partial(shifted, shift=shift))

    first, second = (extract_features(with_shift(shift), array_dataset(3), {"it": None}, store=tmp_path)["it"]
                     for shift in (0, 1))
    assert np.abs(first - second).max() > 1e-3
    assert key_of(with_shift(1)) == key_of(with_shift(1))
    for unknown in UNKNOWN.values():
        with pytest.raises(ItaeError, match="transform"):
            key_of(dataclasses.replace(as_backbone(tiny_vit()), transform=unknown))


def test_a_model_edited_after_it_was_loaded_has_another_key(tmp_path):
    backbone, dataset = as_backbone(tiny_vit("registers")), array_dataset(3)
    keys = [key_of(backbone)]

    def edit(change):
        change(backbone.model)
        keys.append(key_of(backbone))
        assert keys[-1] not in keys[:-1]

    edit(lambda model: model.blocks[0].attn.qkv.weight.mul_(2))
    edit(lambda model: model.blocks[0].mlp.fc1.weight.data.__setitem__(3, 0))
    edit(lambda model: model.blocks[1].mlp.fc1.weight.data.copy_(model.blocks[1].mlp.fc1.weight.flip(0).clone()))
    edit(lambda model: model.blocks[1].mlp.fc1.weight.data.copy_(model.blocks[1].mlp.fc1.weight.flip(1).clone()))
    edit(lambda model: setattr(model.norm, "bias", torch.nn.Parameter(model.norm.bias + 1)))
    edit(lambda model: setattr(model.norm, "eps", 0.1))
    edit(lambda model: setattr(model.blocks[2].mlp, "act", torch.nn.ReLU().eval()))
    edit(lambda model: model.register_buffer("mean", torch.zeros(3), persistent=False))
    before = extract_features(backbone, dataset, {"it": None}, store=tmp_path)["it"]
    backbone.model.norm.bias.data += 1
    after = extract_features(backbone, dataset, {"it": None}, store=tmp_path)["it"]
    assert np.abs(after - before).max() > 0.5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_one_bit_of_any_weight_changes_the_key(dtype):
    backbone = as_backbone(tiny_vit("registers").to(dtype))
    before = model_identity(backbone)
    for parameter in backbone.model.parameters():
        bits = parameter.data.view(torch.int32 if dtype == torch.float32 else torch.int16).flatten()
        bits[-1] ^= 1
        assert model_identity(backbone) != before
        bits[-1] ^= 1
    assert model_identity(backbone) == before


def zeroed(_module, _args, output):
    return output * 0


def test_hooks_and_replaced_code_of_a_model():
    backbone, plain = as_backbone(tiny_vit()), key_of()
    last = backbone.model.blocks[2]
    handle = last.register_forward_hook(zeroed)
    assert key_of(backbone) == key_of(backbone) != plain
    handle.remove()
    handle = last.register_forward_pre_hook(lambda *_: None)
    with pytest.raises(ItaeError, match="hook"):
        key_of(backbone)
    handle.remove()
    last.attn.forward = lambda x, **_: x
    with pytest.raises(ItaeError, match="method"):
        key_of(backbone)
    del last.attn.forward
    backbone.model.forward_features = lambda images: images
    with pytest.raises(ItaeError, match="method"):
        key_of(backbone)
    del backbone.model.forward_features
    last.compile(backend="eager")
    with pytest.raises(ItaeError, match="method"):
        key_of(backbone)
    last._compiled_call_impl = None
    assert key_of(backbone) == plain
    backbone.model.train()
    with pytest.raises(ItaeError, match=r"eval\(\)"):
        key_of(backbone)


def test_images_and_weights_are_read_once_per_extraction(tmp_path, monkeypatch):
    calls = {name: Mock(wraps=getattr(identity, name)) for name in ("fingerprint", "_weights_now", "_sample")}
    for name, call in calls.items():
        monkeypatch.setattr(identity, name, call)
    for store in (tmp_path, None):
        extract_features(as_backbone(tiny_vit()), Photos(), {"auto": ITAE()}, store=store)
        assert {name: call.call_count for name, call in calls.items()} == {
            "fingerprint": 1, "_weights_now": 1, "_sample": 2}


def test_a_subset_of_a_loaded_data_set_is_stored(tmp_path):
    whole, backbone = array_dataset(20), as_backbone(tiny_vit())
    run = functools.partial(extract_features, backbone, variants={"it": None}, store=tmp_path)
    features = run(dataset=Subset(whole, [5, 9, 2]))
    assert features.targets.tolist() == whole.targets[[5, 9, 2]].tolist()
    assert features.computed["it"] == run(dataset=Subset(whole, [5, 9, 3])).computed["it"] == 3
    assert run(dataset=Subset(Subset(whole, [2, 9, 5]), [2, 1, 0])).computed["it"] == 0
    with pytest.raises(ItaeError, match=r"Subset.*\.images"):
        run(dataset=Subset(MadeDataset(3), [0]))


def test_an_entry_key_needs_as_many_images_as_items():
    dataset = MadeDataset(5)
    dataset.images, dataset.targets = array_dataset(10).images, np.zeros(10)
    with pytest.raises(ItaeError, match=r"5 .*10 \.images"):
        entry_key(as_backbone(tiny_vit()), dataset)


def test_two_kinds_of_gpu_have_two_keys(monkeypatch):
    names = {"cuda:0": "NVIDIA A100", "cuda:1": "NVIDIA A100", "cuda:2": "NVIDIA H100"}
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: names[str(device)])
    backbone, dataset = as_backbone(tiny_vit()), array_dataset(3)
    on = {name: entry_key(dataclasses.replace(backbone, device=torch.device(name)), dataset)
          for name in ("cpu", *names)}
    assert on["cuda:0"] == on["cuda:1"]
    assert len({digest(key) for key in on.values()}) == 3
    assert entry_key(backbone, dataset) | {"device": "NVIDIA H100"} == on["cuda:2"]


# Modules that decide features.
DECIDING = ("method/setting.py", "method/layers.py", "method/artifacts.py", "method/attention.py", "method/one_pass.py",
            "method/anatomy.py", "method/statistics.py", "method/direction.py", "method/thresholds.py",
            "models/backbones.py", "models/preprocessing.py", "models/pos_embed.py", "models/checkpoints.py",
            "models/state_dicts.py", "models/transformers_layout.py", "models/weight_files.py", "models/compiled.py",
            "models/demo/__init__.py", "data/folders.py", "data/datasets.py", "data/images.py", "data/items.py",
            "data/huggingface.py", "data/published.py", "extraction/batches.py", "extraction/job.py",
            "extraction/observation.py", "extraction/fitting.py", "extraction/pooling.py")


def with_another_constant(code: str) -> str:
    tree = ast.parse(code)
    docstrings = [node.value for node in ast.walk(tree) if isinstance(node, ast.Expr)]
    node = next(node for node in ast.walk(tree) if isinstance(node, ast.Constant) and node not in docstrings)
    node.value = f"{node.value} changed"
    return ast.unparse(tree)


@pytest.mark.parametrize("name", DECIDING)
def test_changed_code_has_another_digest_and_changed_text_the_same(tmp_path, name):
    assert PACKAGE / name in deciding_modules()
    code, module = (PACKAGE / name).read_text(), tmp_path / "module.py"

    def digest_of(code: str) -> str:
        module.write_text(code)
        return code_digest([module])

    key = digest_of(code)
    head, function, tail = code.partition("\ndef ")
    signature, colon, body = tail.partition(":\n    ")
    with_docstring = f'{head}{function}{signature}{colon}"""Another docstring."""\n    {body}' if function else code
    for same in (f"# a comment\n{code}", code.replace("\n\n", "\n\n\n"), f'"""Another docstring."""\n{code}',
                 with_docstring, ast.unparse(ast.parse(code))):
        assert digest_of(same) == key
    for other in (with_another_constant(code), f"{code}\nADDED = 1\n"):
        assert digest_of(other) != key


def test_the_code_of_the_deciding_modules_alone_is_in_the_key(tmp_path, monkeypatch):
    copy = shutil.copytree(PACKAGE, tmp_path / "itae_utils", ignore=lambda folder, names: [
        name for name in names if not name.endswith(".py") and not Path(folder, name).is_dir()])
    monkeypatch.setattr(variants, "PACKAGE", copy)
    digests = {variants.deciding_code.__wrapped__()}
    for name, expected in {"figures/style.py": 1, "analysis/kmeans.py": 1, "method/attention.py": 2,
                           "models/pos_embed.py": 3}.items():
        with (copy / name).open("a") as file:
            file.write("\nADDED = 1\n")
        digests.add(variants.deciding_code.__wrapped__())
        assert len(digests) == expected, name


def test_threads_may_hash_code_at_once():
    """Threads change at garbage collections, which Python's parser does not expect."""
    before = gc.get_threshold()
    gc.set_threshold(50)
    gc.callbacks.append(switch := lambda *_: time.sleep(0))
    modules = [PACKAGE / "errors.py"]
    try:
        with ThreadPoolExecutor(4) as pool:
            assert set(pool.map(code_digest, [modules] * 100)) == {code_digest(modules)}
    finally:
        gc.callbacks.remove(switch)
        gc.set_threshold(*before)
