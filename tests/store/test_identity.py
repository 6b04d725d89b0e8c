import dataclasses

import numpy as np
import pytest

from itae_utils.errors import ItaeError
from itae_utils.extraction.features import extract_features
from itae_utils.method.setting import ITAE
from itae_utils.store.variants import entry_key
from tests.conftest import MadeDataset, array_dataset, as_backbone, tiny_vit


def test_whatever_decides_features_is_in_their_key(tmp_path):
    backbone, dataset = as_backbone(tiny_vit("registers")), array_dataset(11)

    def computed(backbone=backbone, dataset=dataset, batch_size=2, itae=None):
        return extract_features(backbone, dataset, {"it": itae}, batch_size=batch_size, store=tmp_path).computed["it"]

    assert computed() == 11
    assert computed() == 0
    others = {
        "weights": {"backbone": as_backbone(tiny_vit("registers", reg_tokens=3))},
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
    for what, given in others.items():
        assert computed(**given) == 11, what
        assert computed(**given) == 0, what


def test_images_of_another_number_than_items_are_refused():
    class Half(MadeDataset):
        def __len__(self):
            return 5

    dataset = Half(10)
    dataset.images = array_dataset(10).images
    with pytest.raises(ItaeError, match=r"a data set of 5 items has 10 \.images"):
        entry_key(as_backbone(tiny_vit()), dataset, 2)


def test_heads_are_in_the_key_though_no_weight_tells_them(tmp_path):
    dataset = array_dataset(11)
    one, other = (as_backbone(tiny_vit(num_heads=heads)) for heads in (3, 2))
    assert one.weights_sha256 == other.weights_sha256
    for backbone in (one, other):
        features = extract_features(backbone, dataset, {"it": None}, batch_size=2, store=tmp_path)
        assert features.computed["it"] == 11


