from dataclasses import replace

import pytest
import torch

from itae_utils.method.anatomy import adapt
from itae_utils.method.direction import has_directions
from itae_utils.method.setting import SOURCES
from itae_utils.method.statistics import patch_norms, patch_statistic, qkv_norms, token_norms
from tests import reference
from tests.conftest import EVA_STRUCTURES, STRUCTURES, images, statistic, tiny_vit


def test_patch_norms_take_the_whole_vector_of_patches_alone():
    keys = torch.randn(2, 6, 8)
    expected = [[reference.length(token) for token in image[2:]] for image in keys]
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
        expected = torch.tensor([[reference.length(patch) for patch in image] for image in patches])
        assert torch.allclose(norms[:, index].flatten(1), expected, atol=1e-4)


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
        assert norms[source][1, 2, 4] == pytest.approx(reference.length(part[1, 14]), abs=1e-4)
        assert torch.allclose(norms[source].flatten(1), part.square().sum(-1).sqrt(), atol=1e-4)


@pytest.mark.parametrize("structure", STRUCTURES)
def test_every_statistic_of_every_block_follows_its_definition(structure):
    model, batch = tiny_vit(structure), images(2, 24, 40)
    x, options = reference.embedded(model, batch)
    for index, block in enumerate(model.blocks):
        for source in SOURCES if index else [source for source in SOURCES if source != "direction"]:
            if source == "direction" and not has_directions(model):
                continue
            rank = 3 if source == "direction" else 1
            directions = reference.singular_directions(model, index, rank) if rank > 1 else None
            expected = torch.tensor(reference.statistic(source, block, x, model.num_prefix_tokens,
                                                        directions=directions, **options[index]))
            found = statistic(model, batch, source, index, rank)
            assert (found.shape, found.dtype) == ((2, 15), torch.float32)
            assert torch.allclose(found, expected, rtol=1e-5, atol=1e-5), source
        x = block(x, **options[index])


def test_the_direction_of_tokens_of_zeros_and_of_others_also_under_autocast():
    model = tiny_vit()
    directions = torch.eye(24, dtype=torch.float64)[:, 3:5]
    tokens = torch.zeros(1, 4, 24)
    tokens[0, 2, 3], tokens[0, 3, 4], tokens[0, 3, 5] = -7.01, 3.003, 4.004
    qkv = replace(adapt(model).blocks[-1].project_all(tokens, None), tokens=tokens)
    with torch.autocast("cpu", torch.bfloat16):
        assert patch_statistic("direction", qkv, 1, directions).tolist() == [[0, 1, pytest.approx(0.6)]]
    assert patch_statistic("direction", qkv, 1, torch.eye(24, dtype=torch.float64)).tolist() == [
        [0, pytest.approx(1), pytest.approx(1)]]
