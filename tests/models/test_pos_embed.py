import copy
import itertools
import pickle

import pytest
import torch

from itae_utils.errors import ItaeError
from itae_utils.method.anatomy import tokens_entering
from itae_utils.models.backbones import load_backbone
from itae_utils.models.pos_embed import resized, use_rule
from tests.conftest import images, tiny_vit
from tests.meta_rule import meta_position

TIMM = "vit_tiny_patch16_224"


def dinov2(registers: bool, side: int = 7):
    """Return a tiny ViT with DINOv2's prefix tokens, for side × side patches of 8 pixels."""
    return tiny_vit("registers" if registers else "plain", img_size=8 * side)


@pytest.mark.parametrize(("rule", "offset"), [("meta", 0.1), ("transformers", 0)])
@pytest.mark.parametrize("registers", [False, True])
@pytest.mark.parametrize(("side", "rows", "columns"), [
    (7, 4, 4), (7, 3, 6), (7, 6, 3), (7, 11, 11), (7, 7, 9), (7, 1, 2), (37, 16, 16)])
def test_the_resize_agrees_with_a_slow_reference(rule, offset, registers, side, rows, columns):
    model = dinov2(registers, side)
    whole = model.pos_embed if not registers else torch.cat([torch.zeros(1, 1, 24), model.pos_embed], dim=1)
    expected = meta_position(whole, rows, columns, registers, offset)[:, 1 if registers else 0:]
    torch.testing.assert_close(resized(model, rows, columns, rule), expected, atol=1e-5, rtol=0)


def test_meta_s_factor_gives_the_right_size_on_the_real_grid():
    model = dinov2(registers=False, side=37)
    for side in range(1, 80):  # torch rounds the size down
        assert resized(model, side, 81 - side, "meta").shape[1] == side * (81 - side) + 1


def both(model, batch, rule="meta"):
    theirs = copy.deepcopy(model)
    use_rule(theirs, rule)
    return model.forward_features(batch), theirs.forward_features(batch)


@pytest.mark.parametrize("rule", ["meta", "transformers"])
def test_with_registers_timm_s_rule_is_the_others_too(rule):
    stock, theirs = both(dinov2(registers=True), images(2, 32, 48), rule)
    torch.testing.assert_close(stock, theirs, atol=1e-5, rtol=0)


def test_without_registers_the_features_differ_away_from_the_native_size_only():
    model, found = dinov2(registers=False), {}
    for rule in ("meta", "transformers"):
        found["timm"], found[rule] = both(model, images(2, 32, 32), rule)
        assert torch.equal(*both(model, images(2, 56, 56), rule))
    for one, other in itertools.combinations(found.values(), 2):
        assert (one - other).abs().max() > 0.01


@pytest.mark.parametrize(("structure", "options"), [
    ("plain", {}), ("registers", {}), ("norm_pre", {}), ("plain", {"reg_tokens": 2}),  # registers have positions
])
def test_only_the_resize_differs_from_timm(structure, options):
    model = tiny_vit(structure, **options)
    assert torch.equal(*both(model, images(2, 32, 32)))
    reshaped = copy.deepcopy(model)
    reshaped.dynamic_img_size, reshaped.patch_embed.strict_img_size = True, False
    reshaped.pos_embed.data = resized(model, 6, 3, "meta")
    reshaped.patch_embed.grid_size = (6, 3)
    use_rule(model, "meta")
    batch = images(2, 48, 24)
    assert torch.equal(model(batch), reshaped(batch))
    assert torch.equal(tokens_entering(model, batch, [2])[2], tokens_entering(reshaped, batch, [2])[2])


def test_the_rule_uses_the_current_weights_of_the_model_and_of_its_copies():
    model = dinov2(registers=False)
    use_rule(model, "meta")
    batch = images(1, 32, 32)
    before = model(batch)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin(batch), before)
        twin.pos_embed.data += 1
        twin.cls_token.data += 1
        assert not torch.equal(twin(batch), before)
        assert torch.equal(model(batch), before)
    model.pos_embed.data += 1
    assert not torch.equal(model(batch), before)


def test_half_precision_is_resized_in_single_precision():
    model = dinov2(registers=False).bfloat16()
    position = resized(model, 4, 4, "meta")
    assert position.dtype == torch.bfloat16
    model.float()
    torch.testing.assert_close(position.float(), resized(model, 4, 4, "meta"), atol=0, rtol=2 ** -8)


@pytest.mark.parametrize(("name", "pos_embed", "expected"), [
    ("dinov2_vits14", "auto", "meta"), ("dinov2_vits14_reg", "auto", "meta"), ("dinov2_vits14", "timm", "timm"),
    ("vit_small_patch14_dinov2", "auto", "meta"), (TIMM, "auto", "timm"), (TIMM, "meta", "meta"),
    ("demo", "auto", "timm"),
])
def test_load_backbone_sets_the_rule(name, pos_embed, expected):
    backbone = load_backbone(name, pretrained=False, pos_embed=pos_embed, image_size=56 if "14" in name else 64,
                             device="cpu")
    assert backbone.pos_embed == expected
    torch.nn.init.normal_(backbone.model.pos_embed)
    added = backbone.model._pos_embed(torch.zeros(1, 6, 6, backbone.dim))[:, -36:]
    for rule in ("meta", "transformers"):
        assert torch.allclose(added, resized(backbone.model, 6, 6, rule)[:, -36:], atol=1e-5) == (expected == rule or (
            name.endswith("_reg")))


def test_refusals():
    with pytest.raises(ItaeError, match="pos_embed='hf'"):
        load_backbone("demo", pos_embed="hf")
    for model, rule in itertools.product((tiny_vit(img_size=(32, 48)), tiny_vit(pos_embed="none"), tiny_vit("eva")),
                                         ("meta", "transformers")):
        with pytest.raises(ItaeError, match=f"pos_embed='{rule}'.*{type(model).__name__}.*pos_embed='timm'"):
            use_rule(model, rule)
