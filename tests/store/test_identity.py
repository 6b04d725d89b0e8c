import ast
import dataclasses
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from itae_utils.errors import ItaeError
from itae_utils.extraction.features import extract_features
from itae_utils.files import PACKAGE
from itae_utils.method.setting import ITAE
from itae_utils.store import variants
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
    }
    assert others["heads"]["backbone"].weights_sha256 == backbone.weights_sha256
    for name, given in others.items():
        assert computed(**given) == 11, name
        assert computed(**given) == 0, name
    monkeypatch.setattr(variants, "deciding_code", lambda: "changed")
    assert computed() == 11, "code"


def test_an_entry_key_needs_as_many_images_as_items():
    dataset = MadeDataset(5)
    dataset.images, dataset.targets = array_dataset(10).images, np.zeros(10)
    with pytest.raises(ItaeError, match=r"5 .*10 \.images"):
        entry_key(as_backbone(tiny_vit()), dataset, 2)


def test_two_kinds_of_gpu_have_two_keys(monkeypatch):
    names = {"cuda:0": "NVIDIA A100", "cuda:1": "NVIDIA A100", "cuda:2": "NVIDIA H100"}
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: names[str(device)])
    backbone, dataset = as_backbone(tiny_vit()), array_dataset(3)
    on = {name: entry_key(dataclasses.replace(backbone, device=torch.device(name)), dataset, 2)
          for name in ("cpu", *names)}
    assert on["cuda:0"] == on["cuda:1"]
    assert len({digest(key) for key in on.values()}) == 3
    assert entry_key(backbone, dataset, 2, "NVIDIA H100") == on["cuda:2"]


# Modules that decide features.
DECIDING = ("method/setting.py", "method/layers.py", "method/artifacts.py", "method/attention.py", "method/one_pass.py",
            "method/anatomy.py", "method/thresholds.py", "models/backbones.py", "models/preprocessing.py",
            "models/pos_embed.py", "models/checkpoints.py", "models/weight_files.py", "models/compiled.py",
            "models/demo/__init__.py", "data/folders.py", "data/datasets.py", "extraction/batches.py",
            "extraction/job.py", "extraction/observation.py")


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
