import pytest
import timm
import torch
from torch import nn

from itae_utils.errors import ItaeError
from itae_utils.method.anatomy import adapt, block_index, block_inputs, patch_grid, tokens_entering
from tests import reference
from tests.conftest import STRUCTURES, as_backbone, images, tiny_vit


@pytest.mark.parametrize(("name", "named"), [
    ("vit_base_patch16_siglip_224", r"\[CLS\]"),
    ("swin_tiny_patch4_window7_224", "SwinTransformer"),
    ("beit_base_patch16_224", "Beit"),
    ("eva02_enormous_patch14_clip_224", "block 0 .*EvaBlockPostNorm"),
    ("vit_small_patch16_rope_224", "block 0 .*AttentionRope"),
    ("vit_pe_core_tiny_patch16_384", "block 0 .*AttentionRope"),
    ("vit_base_patch16_rope_reg1_gap_256", r"\[CLS\]"),
    ("resnet18", "ResNet"),
    ("vit_small_patch16_18x2_224", "block 0 .*ParallelThingsBlock"),
])
def test_unsupported_models_are_named(name, named):
    with torch.device("meta"):
        model = timm.create_model(name)
    with pytest.raises(ItaeError, match=named):
        adapt(model)


def test_a_backbone_in_place_of_its_model_is_refused():
    with pytest.raises(ItaeError, match=r"Backbone .*\.model"):
        adapt(as_backbone(tiny_vit()))


def test_unsupported_attention_and_projection_classes_are_named():
    model = tiny_vit()
    model.blocks[1].attn.qkv = nn.Sequential(model.blocks[1].attn.qkv)
    with pytest.raises(ItaeError, match=r"block 1 .*Sequential"):
        adapt(model)
    model.blocks[1].attn = nn.MultiheadAttention(24, 3)
    with pytest.raises(ItaeError, match=r"block 1 .*MultiheadAttention"):
        adapt(model)


def test_block_index():
    model = tiny_vit()
    assert [block_index(model, block) for block in (-3, -1, 0, 2)] == [0, 2, 0, 2]
    for block in (3, -4):
        with pytest.raises(ItaeError, match=f"block {block}"):
            block_index(model, block)


def test_patch_grid_and_its_errors():
    assert patch_grid(tiny_vit(), images(1, 24, 40)) == (3, 5)
    for height, nearest in [(30, "24 or 32"), (5, "8 or 16"), (0, "8 or 16")]:
        with pytest.raises(ItaeError, match=f"size {height} .*{nearest}"):
            patch_grid(tiny_vit(), torch.zeros(1, 3, height, 32))
    with pytest.raises(ItaeError, match=r"\(3, 32, 32\)"):
        patch_grid(tiny_vit(), images(1)[0])


@pytest.mark.parametrize("structure", STRUCTURES)
def test_block_inputs_are_the_arguments_that_each_block_gets(structure):
    model, batch = tiny_vit(structure), images(2, 24, 40)
    blocks = range(len(model.blocks))
    inputs = block_inputs(model, batch, blocks)
    x, options = reference.embedded(model, batch)
    for index, block in enumerate(model.blocks):
        assert torch.equal(inputs[index].tokens, x)
        if options[index].get("rope") is not None:
            assert torch.equal(inputs[index].rope, options[index]["rope"])
        x = block(x, **options[index])
    assert torch.equal(inputs[blocks[-1]].run(model.blocks[-1]), x)
    tokens = tokens_entering(model, batch, blocks)
    assert all(torch.equal(tokens[index], inputs[index].tokens) for index in blocks)


def test_the_forward_pass_stops_at_the_last_block_asked_for_and_removes_its_hooks():
    model = tiny_vit()
    model.blocks[1].forward = model.blocks[2].forward = lambda *_: pytest.fail("computed too much")
    assert list(tokens_entering(model, images(1), [0, 1])) == [0, 1]
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_hooks_are_removed_after_a_failure():
    model = tiny_vit()
    with pytest.raises(RuntimeError):
        tokens_entering(model, torch.zeros(1, 5, 32, 32), [2])
    assert not any(module._forward_pre_hooks for module in model.modules())
