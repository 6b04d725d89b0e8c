import json
import re

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file

from itae_utils.errors import ItaeError
from itae_utils.models import backbones
from itae_utils.models.backbones import load_backbone
from itae_utils.models.checkpoints import model_from_checkpoint, read_checkpoint, tensors_named
from tests.conftest import images

NAME, REGISTERS = "vit_small_patch14_dinov2", "vit_small_patch14_reg4_dinov2"
TINY = {"embed_dim": 24, "depth": 2, "num_heads": 2}
OPTIONS = {"num_classes": 0, "global_pool": "token", "dynamic_img_size": True}
TIMM = "vit_tiny_patch16_224"


def same_weights(one, other):
    weights = other.state_dict()
    return all(torch.equal(tensor, weights[name]) for name, tensor in one.state_dict().items())


def build(path, name=NAME, **options):
    return model_from_checkpoint(name, path, **{**TINY, **OPTIONS, **options}).eval()


def tiny(name=NAME, **options):
    """Return a small model with random weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(2)
        return timm.create_model(name, **{**TINY, **OPTIONS, "img_size": 56, **options}).eval()


def saved(folder, weights, name="weights.pth"):
    torch.save(weights, folder / name)
    return folder / name


def refused(path, match, **options):
    with pytest.raises(ItaeError, match=match) as error:
        build(path, **options)
    assert "\n" not in str(error.value)
    assert str(path) in str(error.value)
    return str(error.value)


def test_the_model_gets_the_size_of_the_checkpoint_s_position_embedding(tmp_path):
    """At the usual 518 pixels timm would resize the embedding while loading, by its own rule."""
    for name in (NAME, REGISTERS):
        model = tiny(name, img_size=70)
        again = build(saved(tmp_path, model.state_dict()), name)
        assert again.patch_embed.grid_size == (5, 5)
        assert torch.equal(again.pos_embed, model.pos_embed)
        assert torch.equal(again(images(2, 70, 70)), model(images(2, 70, 70)))


def test_a_classifier_is_left_out_but_nothing_else(tmp_path):
    with_head = timm.create_model(TIMM, num_classes=10, embed_dim=24, depth=2, num_heads=2)
    model = build(saved(tmp_path, with_head.state_dict()), TIMM)
    assert torch.equal(model.norm.weight, with_head.norm.weight)
    weights = with_head.state_dict()
    del weights["norm.bias"]
    refused(saved(tmp_path, weights), r"norm\.bias", name=TIMM)  # timm alone accepts gaps if the file has a head


def test_missing_unexpected_and_misshapen_tensors_are_named(tmp_path):
    weights = tiny().state_dict()
    weights["blocks.1.attn.qkv.bias"] = torch.zeros(3)
    weights["blocks.0.gate"] = weights.pop("blocks.0.norm1.weight")
    message = refused(saved(tmp_path, weights), NAME)
    for name in ("blocks.0.norm1.weight", "blocks.0.gate", "blocks.1.attn.qkv.bias"):
        assert name in message
    refused(saved(tmp_path, {"weight": torch.zeros(3)}), "cls_token.*weight")


@pytest.mark.parametrize(("options", "words"), [
    ({"embed_dim": 48}, "width 48, 2 blocks, patch 14, 0 registers"),
    ({"depth": 3}, "width 24, 3 blocks, patch 14, 0 registers"),
    ({"patch_size": 7}, "width 24, 2 blocks, patch 7, 0 registers"),
    ({"name": REGISTERS}, "width 24, 2 blocks, patch 14, 4 registers"),
])
def test_another_architecture_is_described(options, words, tmp_path):
    refused(saved(tmp_path, tiny(**options).state_dict()), f"{words}.* width 24, 2 blocks, patch 14, 0 registers")


def test_meta_s_register_checkpoint_is_refused_by_the_model_without(tmp_path):
    weights = tiny().state_dict() | {"mask_token": torch.zeros(1, 24), "register_tokens": torch.zeros(1, 4, 24)}
    path = saved(tmp_path, weights)
    refused(path, "4 registers.* 0 registers")
    model = build(path, REGISTERS)
    torch.testing.assert_close(model.cls_token, weights["cls_token"] + weights["pos_embed"][:, :1])
    del weights["mask_token"]  # only training needs it
    assert torch.equal(build(saved(tmp_path, weights), REGISTERS).pos_embed, model.pos_embed)


@pytest.mark.parametrize("prefix", ["", "backbone.", "teacher.backbone."])
def test_chunked_training_checkpoints_are_refused_by_name(prefix, tmp_path):
    weights = tiny().state_dict()
    weights = {prefix + name.replace("blocks.1.", "blocks.0.1."): tensor for name, tensor in weights.items()}
    refused(saved(tmp_path, {"teacher": weights}), rf"'{prefix}blocks\.0\.1\..*FSDP")


class TestTransformersFolders:
    """Folders that load or are refused; tests/test_parity.py compares their features."""

    @pytest.fixture
    def folder(self, tmp_path):
        pytest.importorskip("transformers", reason="transformers is not installed: pip install -e '.[dev]'")
        from tests.dinov2 import save_as, theirs

        model = theirs("small", False, 56, hidden_size=24, num_hidden_layers=2, num_attention_heads=2)
        return save_as("transformers 4", model, tmp_path / "folder")

    @staticmethod
    def edit(folder, change):
        weights = load_file(folder / "model.safetensors")
        save_file(change(weights), folder / "model.safetensors")

    def test_with_a_classifier_or_without_a_mask_token(self, folder):
        plain = build(folder)
        self.edit(folder, lambda weights: {f"dinov2.{name}": tensor for name, tensor in weights.items()}
                  | {"classifier.weight": torch.zeros(5, 48), "classifier.bias": torch.zeros(5)})
        assert same_weights(plain, build(folder))
        self.edit(folder, lambda weights: {n: tensor for n, tensor in weights.items() if "mask_token" not in n})
        assert same_weights(plain, build(folder))

    def test_shards(self, folder):
        plain = build(folder)
        weights = sorted(load_file(folder / "model.safetensors").items())
        (folder / "model.safetensors").unlink()
        save_file(dict(weights[:9]), folder / "model-00001-of-00002.safetensors")
        save_file(dict(weights[9:]), folder / "model-00002-of-00002.safetensors")
        assert same_weights(plain, build(folder))
        (folder / "model-00002-of-00002.safetensors").unlink()
        refused(folder, "width 24, 1 blocks")

    def test_half_a_projection(self, folder):
        missing = "0.attention.attention.key"
        self.edit(folder, lambda weights: {n: tensor for n, tensor in weights.items() if missing not in n})
        refused(folder, r"blocks\.0\.attn\.qkv\.weight.*blocks\.0\.attn\.query\.weight")

    @pytest.mark.parametrize(("values", "match"), [
        ({"num_attention_heads": 4}, "num_attention_heads=4.* 2$"),
        ({"layer_norm_eps": 1e-12}, "layer_norm_eps=1e-12.* 1e-06$"),
        ({"hidden_act": "quick_gelu"}, "hidden_act='quick_gelu'.* 'gelu'$"),
        ({"model_type": "vit"}, "'vit'.* dinov2"),
    ])
    def test_the_config_must_agree_with_the_model(self, folder, values, match):
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | values))
        refused(folder, match)

    def test_incomplete_folders(self, folder):
        (folder / "config.json").write_text("{")
        refused(folder, r"config\.json.*JSONDecodeError")
        (folder / "config.json").unlink()
        refused(folder, r"config\.json.*FileNotFoundError")
        (folder / "model.safetensors").unlink()
        refused(folder, r"model\.safetensors")

    def test_through_load_backbone(self, folder, monkeypatch):
        whole = model_from_checkpoint
        monkeypatch.setattr(backbones, "model_from_checkpoint",
                            lambda name, path, **options: whole(name, path, **options, **TINY))
        backbone = load_backbone("dinov2_vits14", checkpoint=folder)
        assert (backbone.source, backbone.kind) == ("local folder folder", "local")
        assert (backbone.pos_embed, backbone.dim) == ("meta", 24)


def test_reading_wrapped_and_bare_state_dicts(tmp_path):
    weights = {"a": torch.arange(3.0)}
    save_file(weights, tmp_path / "w.safetensors")
    contents = [weights, {"module.a": weights["a"]},
                *({wrapper: weights, "epoch": 3} for wrapper in ("model", "state_dict", "teacher"))]
    paths = [saved(tmp_path, content, f"{number}.pth") for number, content in enumerate(contents)]
    for path in (tmp_path / "w.safetensors", *paths):
        read = read_checkpoint(path)
        assert list(read) == ["a"]
        assert torch.equal(read["a"], weights["a"])


class Pickled:
    def __reduce__(self):
        return (pytest.fail, ("code in a checkpoint was run",))


def test_files_without_a_state_dict_are_refused(tmp_path):
    for name, content in [("code", {"model": Pickled()}), ("none", {"epoch": 3}), ("nothing", {})]:
        torch.save(content, tmp_path / f"{name}.pth")
    (tmp_path / "empty.pth").write_bytes(b"")
    (tmp_path / "text.pth").write_text("weights, to come")
    (tmp_path / "text.safetensors").write_text("weights, to come")
    for path in (*tmp_path.iterdir(), tmp_path / "missing.pth"):
        with pytest.raises(ItaeError, match=re.escape(repr(str(path)))) as error:
            read_checkpoint(path)
        assert str(error.value).isprintable()
        assert len(str(error.value)) < 250 + len(str(path))


def test_long_lists_of_tensors_are_shortened():
    lines = ["Error(s) in loading:", *[f"size mismatch for {'x' * 50} {number} " + "y " * 300 for number in range(50)]]
    text = tensors_named(RuntimeError("\n".join(lines)))
    assert len(text) < 700
    assert "47" in text
    assert "\n" not in text
    assert tensors_named(KeyError("pos_embed")) == "'pos_embed'"
