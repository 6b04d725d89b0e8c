"""The same weights give the same features as an independent implementation: DINOv2 in `transformers`."""

import copy

import pytest
import torch
from safetensors.torch import save_file

from itae_utils.extraction.features import extract_features
from itae_utils.models.backbones import load_backbone
from itae_utils.models.checkpoints import model_from_checkpoint
from itae_utils.models.pos_embed import use_rule
from tests.conftest import MadeDataset, as_backbone, dataset_tensor, images
from tests.dinov2 import STRUCTURES, meta_weights, save_as, theirs, timm_name
from tests.meta_rule import meta_position

pytest.importorskip("transformers", reason="transformers is not installed: pip install -e '.[dev]'")

TINY = {"small": (48, 2, 3), "base": (64, 2, 4), "large": (64, 4, 4), "giant": (72, 5, 6)}  # width, depth, heads
OPTIONS = {"num_classes": 0, "global_pool": "token", "dynamic_img_size": True}
LAYOUTS = ["meta", "transformers 4", "transformers 5"]
SIDE = 98  # native image size, 7 × 7 patches


def tiny_theirs(size, registers):
    width, depth, heads = TINY[size]
    return theirs(size, registers, SIDE, hidden_size=width, num_hidden_layers=depth, num_attention_heads=heads)


def ours(size, registers, path):
    width, depth, heads = TINY[size]
    name = timm_name(size, registers)
    return model_from_checkpoint(name, path, embed_dim=width, depth=depth, num_heads=heads, **OPTIONS)[0].eval()


def with_meta_s_position(model, rows, columns):
    """Return a `transformers` model for one image size, with its resize replaced by the slow reference."""
    model = copy.deepcopy(model)
    registers = hasattr(model.embeddings, "register_tokens")
    position = meta_position(model.embeddings.position_embeddings, rows, columns, registers)
    model.embeddings.interpolate_pos_encoding = lambda *_: position
    return model


@torch.inference_mode()
def difference(model, reference, batch) -> float:
    """Return the largest absolute difference between the two outputs, whose values are of order 1."""
    mine, expected = model.forward_features(batch), reference(batch).last_hidden_state
    assert mine.shape == expected.shape
    assert 0.3 < expected.std() < 3
    if len(batch) > 1:
        assert expected[:, 0].std(dim=0).mean() > 1e-3  # images differ
    return float((mine - expected).abs().max())


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("size", "registers"), STRUCTURES)
def test_all_structures_at_native_and_other_sizes(size, registers, layout, tmp_path):
    reference = tiny_theirs(size, registers)
    model = ours(size, registers, save_as(layout, reference, tmp_path / "weights"))
    use_rule(model, "meta")
    assert difference(model, reference, images(3, SIDE, SIDE)) < 1e-4
    for rows, columns in [(4, 4), (5, 3), (9, 9), (6, 10)]:
        batch = images(3, 14 * rows, 14 * columns)
        assert difference(model, with_meta_s_position(reference, rows, columns), batch) < 1e-4, (rows, columns)


@pytest.mark.parametrize(("size", "registers"), STRUCTURES)
def test_the_rule_of_transformers_is_that_of_the_library(size, registers, tmp_path):
    reference = tiny_theirs(size, registers)
    model = ours(size, registers, save_as("meta", reference, tmp_path / "weights"))
    use_rule(model, "transformers")
    for rows, columns in [(7, 7), (4, 4), (5, 3), (9, 9), (6, 10)]:
        batch = images(3, 14 * rows, 14 * columns)
        assert difference(model, reference, batch) < 1e-4, (rows, columns)


@pytest.mark.parametrize(("registers", "differs"), [(False, True), (True, False)])
def test_only_without_registers_do_timm_and_transformers_resize_differently_from_meta(registers, differs, tmp_path):
    reference = tiny_theirs("small", registers)
    model = ours("small", registers, save_as("meta", reference, tmp_path / "weights"))
    batch, meta = images(3, 56, 56), with_meta_s_position(reference, 4, 4)
    assert (difference(model, meta, batch) > 1e-2) == differs
    assert (float((reference(batch)[0] - meta(batch)[0]).abs().max()) > 1e-2) == differs


@pytest.mark.parametrize(("size", "registers"), [("small", True), ("giant", False)])
def test_a_file_in_timm_s_layout(size, registers, tmp_path):
    reference = tiny_theirs(size, registers)
    model = ours(size, registers, save_as("meta", reference, tmp_path / "weights"))
    save_file(model.state_dict(), tmp_path / "timm.safetensors")
    again = ours(size, registers, tmp_path / "timm.safetensors")
    assert again.pos_embed.shape == model.pos_embed.shape
    assert difference(again, reference, images(3, SIDE, SIDE)) < 1e-4


def test_extracted_features_are_equal_too(tmp_path):
    reference = tiny_theirs("base", False)
    model = ours("base", False, save_as("transformers 5", reference, tmp_path / "weights"))
    use_rule(model, "meta")
    dataset, backbone = MadeDataset(5), as_backbone(model.requires_grad_(False), image_size=56)
    found = extract_features(backbone, dataset, {"baseline": None})["baseline"]
    expected = with_meta_s_position(reference, 4, 4)(dataset_tensor(backbone, dataset)).pooler_output
    torch.testing.assert_close(torch.from_numpy(found), expected, atol=1e-4, rtol=0)


@pytest.mark.slow
@pytest.mark.parametrize("size", ["small", "large"])
@pytest.mark.parametrize("registers", [False, True])
def test_full_size_from_meta_s_file(size, registers, tmp_path, record_property):
    reference = theirs(size, registers)
    path = tmp_path / "dinov2_pretrain.pth"
    torch.save(meta_weights(reference), path)
    name = f"dinov2_vit{size[0]}14{'_reg' if registers else ''}"
    backbone = load_backbone(name, checkpoint=path, precision="fp32", device="cpu")
    assert (backbone.pos_embed, backbone.image_size, backbone.source) == ("meta", 224, f"local file {path.name}")
    for side, count in [(224, 2), (518, 1)]:
        batch = images(count, side, side)
        here = with_meta_s_position(reference, side // 14, side // 14) if side < 518 else reference
        found = difference(backbone.model, here, batch)
        record_property(f"{name} at {side} px", found)
        assert found < 1e-4, side
