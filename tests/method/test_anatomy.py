import pytest
import timm
import torch
from torch import nn

from itae_utils.errors import ItaeError
from itae_utils.method.anatomy import block_index, block_inputs, check_images, check_supported, tokens_entering
from tests import reference
from tests.conftest import STRUCTURES, as_backbone, images, tiny_vit


@pytest.mark.parametrize(("name", "message"), [
    ("vit_base_patch16_siglip_224", r"no \[CLS\] token"),
    ("swin_tiny_patch4_window7_224", "SwinTransformer is not handled"),
    ("beit_base_patch16_224", "Beit is not handled"),
    ("eva02_enormous_patch14_clip_224", "block 0 is a EvaBlockPostNorm"),
    ("vit_small_patch16_rope_224", "block 0 attends with AttentionRope"),
    ("vit_pe_core_tiny_patch16_384", "block 0 attends with AttentionRope"),
    ("vit_base_patch16_rope_reg1_gap_256", r"no \[CLS\] token"),
    ("resnet18", "ResNet is not handled"),
    ("vit_small_patch16_18x2_224", "block 0 is a ParallelThingsBlock"),
])
def test_models_the_method_is_not_defined_for_are_named(name, message):
    with torch.device("meta"):
        model = timm.create_model(name)
    with pytest.raises(ItaeError, match=message):
        check_supported(model)


@pytest.mark.parametrize("name", [
    "vit_small_patch14_dinov2.lvd142m", "vit_giant_patch14_reg4_dinov2.lvd142m", "vit_small_patch16_224.dino",
    "vit_base_patch16_clip_quickgelu_224.openai", "deit3_small_patch16_224.fb_in1k", "vit_base_patch16_224.mae",
    "vit_tiny_patch16_224.augreg_in21k", "deit_small_distilled_patch16_224", "eva02_tiny_patch14_224",
    "eva02_base_patch16_clip_224", "eva_giant_patch14_224", "vit_small_patch16_dinov3.lvd1689m",
    "vit_small_plus_patch16_dinov3_qkvb.lvd1689m",
])
def test_models_users_will_try_are_handled(name):
    with torch.device("meta"):
        check_supported(timm.create_model(name, num_classes=0))


def test_a_backbone_is_no_model_but_has_one():
    with pytest.raises(ItaeError, match=r"Backbone is no model but has one: give its \.model"):
        check_supported(as_backbone(tiny_vit()))


def test_other_attention_and_projection_classes_are_named():
    model = tiny_vit()
    model.blocks[1].attn.qkv = nn.Sequential(model.blocks[1].attn.qkv)
    with pytest.raises(ItaeError, match="block 1 projects q, k, v with Sequential"):
        check_supported(model)
    model.blocks[1].attn = nn.MultiheadAttention(24, 3)
    with pytest.raises(ItaeError, match="block 1 attends with MultiheadAttention"):
        check_supported(model)


def test_block_index():
    model = tiny_vit()
    assert [block_index(model, block) for block in (-3, -1, 0, 2)] == [0, 2, 0, 2]
    for block in (3, -4):
        with pytest.raises(ItaeError, match=f"there is no block {block}"):
            block_index(model, block)


def test_patch_grid_and_its_errors():
    assert check_images(tiny_vit(), images(1, 24, 40)) == (3, 5)
    for height, remedy in [(30, "use 24 or 32"), (5, "use 8 or 16"), (0, "use 8 or 16")]:
        with pytest.raises(ItaeError, match=f"image size {height} .* {remedy}"):
            check_images(tiny_vit(), torch.zeros(1, 3, height, 32))


@pytest.mark.parametrize("structure", STRUCTURES)
def test_tokens_entering_are_what_the_blocks_get(structure):
    model, batch = tiny_vit(structure), images(2, 24, 40)
    expected = {}
    x, options = reference.embedded(model, batch)
    for index, block in enumerate(model.blocks):
        expected[index] = x
        x = block(x, **options[index])
    caught = tokens_entering(model, batch, list(expected))
    assert all(torch.equal(caught[index], expected[index]) for index in expected)


@pytest.mark.parametrize("structure", ["dinov3", "eva02_split", "rope_mixed"])
def test_rotations_are_caught_with_the_tokens(structure):
    model, batch = tiny_vit(structure), images(2, 24, 40)
    _, options = reference.embedded(model, batch)
    caught = block_inputs(model, batch, range(3))
    assert all(torch.equal(caught[index].rope, options[index]["rope"]) for index in range(3))
    assert torch.equal(model.norm(caught[2].through(model.blocks[2])), model.forward_features(batch))


def test_nothing_after_the_last_door_is_computed_and_hooks_are_gone():
    model = tiny_vit()
    model.blocks[1].forward = model.blocks[2].forward = lambda *_: pytest.fail("computed too much")
    caught = tokens_entering(model, images(1), [0, 1])
    assert list(caught) == [0, 1]
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_hooks_are_gone_after_a_failure():
    model = tiny_vit()
    with pytest.raises(RuntimeError):
        tokens_entering(model, torch.zeros(1, 5, 32, 32), [2])
    assert not any(module._forward_pre_hooks for module in model.modules())
