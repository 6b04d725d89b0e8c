import math

import numpy as np
import pytest
import torch

from itae_utils.errors import ItaeError
from itae_utils.method.artifacts import (
    FiringRule,
    patch_norms,
    precision_recall,
    qkv_norms,
    random_patches,
    token_norms,
)
from tests import reference
from tests.conftest import EVA_STRUCTURES, STRUCTURES, images, tiny_vit


def length(vector) -> float:
    return math.sqrt(sum(float(x) ** 2 for x in vector))


def test_patch_norms_take_the_whole_vector_of_patches_alone():
    keys = torch.randn(2, 6, 8)
    expected = [[length(token) for token in image[2:]] for image in keys]
    assert torch.allclose(patch_norms(keys, 2), torch.tensor(expected), atol=1e-5)


@pytest.mark.parametrize("structure", STRUCTURES)
def test_token_norms_of_every_block_on_the_grid(structure):
    model, batch = tiny_vit(structure), images(2, 24, 40)
    norms = token_norms(model, batch)
    assert norms.shape == (2, len(model.blocks), 3, 5)
    x, options = reference.embedded(model, batch)
    for index, block in enumerate(model.blocks):
        x = block(x, **options[index])
        patches = x[:, model.num_prefix_tokens:]
        expected = torch.tensor([[[length(patches[i, 5 * row + column]) for column in range(5)] for row in range(3)]
                                 for i in range(2)])
        assert torch.allclose(norms[:, index], expected, atol=1e-4)


@pytest.mark.parametrize("structure", ["registers", "qk_norm", "no_bias", *EVA_STRUCTURES])
@pytest.mark.parametrize("block", [0, 1, -1])
def test_qkv_norms_are_measured_before_any_qk_norm(structure, block):
    model, batch = tiny_vit(structure), images(2, 24, 40)
    norms = qkv_norms(model, batch, block)
    x, options = reference.embedded(model, batch)
    for index in range(block % 3):
        x = model.blocks[index](x, **options[index])
    layer = model.blocks[block]
    parts = reference.projected(layer.attn, layer.norm1(x))[:, model.num_prefix_tokens:].split(24, dim=-1)
    for source, part in zip(["query", "key", "value"], parts, strict=True):
        assert norms[source].shape == (2, 3, 5)
        assert norms[source][1, 2, 4] == pytest.approx(length(part[1, 14]), abs=1e-4)
        assert torch.allclose(norms[source].flatten(1), part.square().sum(-1).sqrt(), atol=1e-4)


def test_images_of_a_wrong_size_are_named():
    with pytest.raises(ItaeError, match="image size 30 is not a multiple of the patch, 8: use 24 or 32"):
        token_norms(tiny_vit(), images(1, 32, 30))
    with pytest.raises(ItaeError, match="batch"):
        qkv_norms(tiny_vit(), images(1)[0])


def test_random_patches_are_as_many_seeded_and_bound_to_the_image():
    counts = torch.tensor([0, 3, 16, 1])
    chosen = random_patches(counts, 16, seed=1, block=2, first_image=10)
    assert chosen.sum(1).tolist() == counts.tolist()
    assert torch.equal(chosen[1:], random_patches(counts[1:], 16, seed=1, block=2, first_image=11))
    many = torch.full((200,), 4)
    draws = random_patches(many, 16, 1, 2, 0)
    for other in (random_patches(many, 16, 2, 2, 0), random_patches(many, 16, 1, 1, 0)):
        assert not torch.equal(draws, other)
    assert draws.float().mean(0).min() > 0.1  # every patch is drawn now and then


def test_firing_rule_watches_any_of_its_neurons_on_patches():
    model, batch = tiny_vit("registers"), images(3)
    caught = []
    handle = model.blocks[1].mlp.act.register_forward_hook(lambda _m, _a, out: caught.append(out))
    rule = FiringRule(1, (4, 9), 0.5)
    with rule.watch(model) as watch:
        model(batch)
    handle.remove()
    expected = [[any(float(token[n]) > 0.5 for n in (4, 9)) for token in image[5:]] for image in caught[0]]
    assert watch.mask.tolist() == expected
    assert 0 < watch.mask.float().mean() < 1
    model(images(1))
    assert len(watch.mask) == 3  # closed: later passes are not watched


def test_precision_and_recall():
    found = np.array([[True, True, False, False]])
    truth = np.array([[True, False, True, True]])
    assert precision_recall(found, truth) == (1 / 2, 1 / 3)
    assert all(math.isnan(value) for value in precision_recall(found & False, truth & False))
    with pytest.raises(ItaeError, match="shape"):
        precision_recall(found, truth[:, :3])
