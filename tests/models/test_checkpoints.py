import argparse
import functools
import gzip
import json
import pickle
import shutil
import zipfile
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import load_file, save_file

from itae_utils.errors import ItaeError
from itae_utils.models import backbones
from itae_utils.models.backbones import load_backbone
from itae_utils.models.checkpoints import (
    check_checkpoint,
    model_from_checkpoint,
    read_checkpoint,
    tensors_named,
)
from tests.conftest import images

NAME, REGISTERS = "vit_small_patch14_dinov2", "vit_small_patch14_reg4_dinov2"
TINY = {"embed_dim": 24, "depth": 2, "num_heads": 2}
OPTIONS = {"num_classes": 0, "global_pool": "token", "dynamic_img_size": True}
TIMM = "vit_tiny_patch16_224"


def same_weights(one, other):
    weights = other.state_dict()
    return all(torch.equal(tensor, weights[name]) for name, tensor in one.state_dict().items())


def build(path, name=NAME, **options):
    return model_from_checkpoint(name, path, **{**TINY, **OPTIONS, **options})[0].eval()


def source(path, name=NAME, **options):
    return model_from_checkpoint(name, path, **{**TINY, **OPTIONS, **options})[1]


def tiny(name=NAME, **options):
    """Return a small model with random weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(2)
        return timm.create_model(name, **{**TINY, **OPTIONS, "img_size": 56, **options}).eval()


def saved(folder, weights, name="weights.pth"):
    torch.save(weights, folder / name)
    return folder / name


def refused(path, match, name=NAME, **options):
    """Assert that loading and checking raise the same error, in one line that names the path."""
    with pytest.raises(ItaeError, match=match) as error:
        build(path, name, **options)
    assert "\n" not in str(error.value)
    assert str(path) in str(error.value)
    with pytest.raises(ItaeError) as checked:
        check_checkpoint(name, path, **{**TINY, **options})
    assert str(checked.value) == str(error.value)
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
    ({"in_chans": 1}, "0 registers, 1 colour channel"),
    ({"class_token": False, "global_pool": "avg"}, r"0 registers, no \[CLS\] token"),
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
        refused(folder, "model-00002-of-00002.safetensors is missing")

    def test_half_a_projection(self, folder):
        missing = "0.attention.attention.key"
        self.edit(folder, lambda weights: {n: tensor for n, tensor in weights.items() if missing not in n})
        refused(folder, r"blocks\.0\.attn\.qkv\.weight.*blocks\.0\.attn\.query\.weight")

    @pytest.mark.parametrize(("values", "match"), [
        ({"num_attention_heads": 4}, "num_attention_heads=4.* 2 "),
        ({"layer_norm_eps": 1e-12}, "layer_norm_eps=1e-12.* 1e-06 "),
        ({"hidden_act": "quick_gelu"}, "hidden_act='quick_gelu'.* 'gelu' "),
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
        refused(folder, r"config\.json")
        refused(folder / "model.safetensors", r"transformers.*config\.json")
        (folder / "model.safetensors").unlink()
        refused(folder, r"model\.safetensors")

    def test_through_load_backbone(self, folder, monkeypatch):
        whole = model_from_checkpoint
        monkeypatch.setattr(backbones, "model_from_checkpoint",
                            lambda name, path, **options: whole(name, path, **options, **TINY))
        backbone = load_backbone("dinov2_vits14", checkpoint=folder)
        assert (backbone.source, backbone.kind) == ("local folder folder", "local")
        again = load_backbone("dinov2_vits14", checkpoint=folder / "model.safetensors")
        assert (again.weights_sha256, again.source) == (backbone.weights_sha256, "local file model.safetensors")
        assert (backbone.pos_embed, backbone.dim) == ("meta", 24)


WEIGHTS = tiny().state_dict()


def at(prefix, weights=WEIGHTS):
    return {prefix + name: tensor for name, tensor in weights.items()}


def zeros(weights=WEIGHTS):
    return {name: torch.zeros_like(tensor) for name, tensor in weights.items()}


HEAD = {"head.mlp.0.weight": torch.zeros(4, 24), "head.last_layer.weight_g": torch.zeros(4, 1)}


@pytest.mark.parametrize(("content", "said"), [
    (WEIGHTS, []),
    *(({wrapper: WEIGHTS, "epoch": 3}, [f"({wrapper} taken)"])
      for wrapper in ("model", "state_dict", "teacher", "student", "net")),
    ({"model_state_dict": WEIGHTS, "optimizer_state_dict": {"state": {0: {"exp_avg": torch.zeros(3)}}}},
     ["model_state_dict taken"]),
    ({"state_dict": {"model": WEIGHTS}}, ["state_dict.model taken"]),
    *((at(prefix), [prefix]) for prefix in (
        "module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module.", "backbone.", "teacher.backbone.", "student.",
        "model.", "encoder.", "vit.", "net.", "model.vision_encoder.", "base_model.model.", "visual.trunk.", "a.b.c.")),
    ({name.replace("blocks.0.", "blocks.0._orig_mod."): tensor for name, tensor in WEIGHTS.items()}, []),
    ({"student": at("module.", zeros() | HEAD), "teacher": at("backbone.") | HEAD, "epoch": 10},
     ["teacher.backbone taken", "student.module left out", "backbone.", "head left out"]),
    (at("student.backbone.", zeros()) | at("teacher.backbone.") | {"teacher.dino_head.x": torch.zeros(2)},
     ["teacher.backbone taken", "student.backbone left out", "teacher.dino_head"]),
    ({"state_dict": zeros(), "state_dict_ema": WEIGHTS, "arch": "x"}, ["state_dict_ema taken", "state_dict left out"]),
    ({"model": zeros(), "model_ema": at("module.")}, ["model_ema.module taken", "model left out"]),
    ({"state_dict": WEIGHTS, "state_dict_ema": None}, ["state_dict taken"]),
    (at("model.") | at("ema_model.", zeros()), ["model taken", "ema_model left out"]),
    (WEIGHTS | at("ema.module.", zeros()), ["ema.module left out"]),
    (at("module.base_encoder.") | at("module.momentum_encoder.", zeros()), ["momentum_encoder left out"]),
    (at("module.") | {"n_averaged": torch.tensor(3)}, ["n_averaged left out"]),
    (WEIGHTS | {"decoder_blocks.0.norm1.weight": torch.zeros(4), "mask_token": torch.zeros(1, 1, 24),
                "fc.bias": torch.zeros(9)}, ["decoder_blocks, fc left out"]),
    ({name: tensor.half() for name, tensor in WEIGHTS.items()}, ["float16 read as float32"]),
    ({name: tensor.bfloat16() for name, tensor in WEIGHTS.items()}, ["bfloat16 read as float32"]),
])
def test_the_vit_is_found_in_what_training_saves(content, said, tmp_path):
    path = saved(tmp_path, content)
    model, words = model_from_checkpoint(NAME, path, **TINY, **OPTIONS)
    check_checkpoint(NAME, path, **TINY)
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(tensor, WEIGHTS[name], atol=0.01 if "float" in words else 0, rtol=0)
        assert tensor.dtype == torch.float32
    assert words.startswith("local file weights.pth")
    assert all(word in words for word in said)
    assert ("(" in words) == bool(said)


def test_a_distilled_model_is_another_architecture(tmp_path):
    weights = WEIGHTS | {"dist_token": torch.zeros(1, 1, 24), "pos_embed": torch.zeros(1, 18, 24)}
    refused(saved(tmp_path, weights), "0 registers, a distillation token, and .* 0 registers:")


def test_ambiguous_checkpoints_are_refused_by_naming_the_models(tmp_path):
    refused(saved(tmp_path, at("first.") | at("second.")), "several ViTs, first, second")
    refused(saved(tmp_path, {"best": WEIGHTS, "last": WEIGHTS}), "several ViTs, best, last")


def run(text):
    raise AssertionError(text)


class Pickled:
    def __reduce__(self):
        return (run, ("code in a checkpoint was run",))


class AttributeDict(dict):
    """Stands for Lightning's, which holds settings; torch does not read it."""


def test_objects_of_a_trainer_are_left_out_and_none_of_their_code_is_run(tmp_path):
    extras = {"args": argparse.Namespace(lr=0.1, place=Path("x")), "hyper_parameters": AttributeDict(lr=3),
              "callbacks": {"ModelCheckpoint{'monitor': None}": {"best": np.float64(0.5), "path": Path("y")}},
              "function": functools.partial(max, 3), "code": Pickled(), "array": np.arange(3)}
    path = saved(tmp_path, {"state_dict": at("model."), **extras}, "last.ckpt")
    assert same_weights(build(path), tiny())
    torch.save({"model": WEIGHTS, "args": argparse.Namespace(lr=1)}, path, _use_new_zipfile_serialization=False)
    assert same_weights(build(path), tiny())
    refused(saved(tmp_path, tiny()), r"timm\.layers\..*state_dict\(\)")


def test_files_are_read_by_their_content_not_their_ending(tmp_path):
    save_file(WEIGHTS, tmp_path / "w.bin")
    assert same_weights(build(tmp_path / "w.bin"), tiny())
    refused(saved(tmp_path, WEIGHTS, "w.safetensors"), r"torch\.save.*\.pth")


def test_a_path_may_start_at_home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    path = saved(tmp_path, WEIGHTS, "model.pth")
    assert same_weights(build("~/model.pth"), build(path))
    with pytest.raises(ItaeError, match="URL"):
        build("https://example.org/w.pth")
    for wrong in ("", 3, {"a": 1}, None, b"w.pth"):
        with pytest.raises(ItaeError, match="not a path"):
            build(wrong)


class TestFolders:
    """Which files of a folder are read."""

    @staticmethod
    def in_parts(folder, weights=WEIGHTS, stem="model", parts=2, index=True):
        names = [f"{stem}-{number:05}-of-{parts:05}.safetensors" for number in range(1, parts + 1)]
        places = {name: names[number % parts] for number, name in enumerate(weights)}
        for part in names:
            save_file({name: weights[name] for name, place in places.items() if place == part}, folder / part)
        if index:
            (folder / f"{stem}.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
        return [folder / name for name in names]

    @pytest.mark.parametrize("other", ["model_ema.safetensors", "model_best.pth.tar", "optimizer.pt", "zzz.bin",
                                       "model-00001-of-00003.safetensors", "pytorch_model.bin", "tf_model.h5"])
    def test_the_standard_name_decides(self, other, tmp_path):
        save_file(WEIGHTS, tmp_path / "model.safetensors")
        (tmp_path / other).write_bytes(b"other weights")
        assert same_weights(build(tmp_path), tiny())
        assert (other in source(tmp_path)) == (other not in ("optimizer.pt", "tf_model.h5"))

    def test_the_index_or_any_part_gives_all_parts(self, tmp_path):
        parts = self.in_parts(tmp_path)
        save_file(zeros(), tmp_path / "model-00001-of-00003.safetensors")  # stale
        for path in (tmp_path, tmp_path / "model.safetensors.index.json", *parts):
            assert same_weights(build(path), tiny())
        assert "all 2 parts" in source(parts[1])
        (tmp_path / "model.safetensors.index.json").unlink()
        refused(tmp_path, r"several.*model-\*-of-00002\.safetensors, model-\*-of-00003\.safetensors")
        parts[1].unlink()
        refused(parts[0], rf"part 1 of 2.*{parts[1].name}")

    def test_damaged_indices_and_parts_of_two_models(self, tmp_path):
        parts = self.in_parts(tmp_path)
        shutil.copy(parts[0], parts[1])
        refused(tmp_path, "repeats")
        parts[0].unlink()
        refused(tmp_path, rf"{parts[0].name} is missing")
        for text in ("", "{", "[]", '{"weight_map": 3}', "{}"):
            (tmp_path / "model.safetensors.index.json").write_text(text)
            refused(tmp_path / "model.safetensors.index.json", "index")

    def test_pytorch_model_bin(self, tmp_path):
        saved(tmp_path, WEIGHTS, "pytorch_model.bin")
        assert same_weights(build(tmp_path), tiny())

    def test_one_file_of_any_name_is_taken_and_several_are_refused(self, tmp_path):
        saved(tmp_path, WEIGHTS, "last.pth.tar")
        (tmp_path / "rng_state.pth").write_bytes(b"")
        assert "last.pth.tar taken" in source(tmp_path)
        saved(tmp_path, WEIGHTS, "model_best.pth.tar")
        refused(tmp_path, r"last\.pth\.tar, model_best\.pth\.tar")

    def test_timm_s_folders(self, tmp_path):
        save_file(WEIGHTS, tmp_path / "model.safetensors")
        for architecture in (NAME, f"{NAME}.lvd142m"):
            (tmp_path / "config.json").write_text(json.dumps({"architecture": architecture, "num_classes": 0}))
            assert same_weights(build(tmp_path), tiny())
        (tmp_path / "config.json").write_text(json.dumps({"architecture": "vit_small_patch14_clip_quickgelu"}))
        refused(tmp_path, f"'vit_small_patch14_clip_quickgelu', not '{NAME}'")
        assert same_weights(build(tmp_path / "model.safetensors"), tiny())

    @pytest.mark.parametrize("name", ["", "snapshots", "snapshots/abc"])
    def test_the_cache_of_the_hub(self, name, tmp_path):
        for commit, weights in {"abc": WEIGHTS, "old": zeros()}.items():
            (tmp_path / "snapshots" / commit).mkdir(parents=True)
            save_file(weights, tmp_path / "snapshots" / commit / "model.safetensors")
        (tmp_path / "refs").mkdir()
        (tmp_path / "refs/main").write_text("abc")
        assert same_weights(build(tmp_path / name), tiny())
        (tmp_path / "refs/main").unlink()
        if name != "snapshots/abc":
            refused(tmp_path / name, "snapshot")

    @pytest.mark.parametrize(("name", "word"), [
        ("adapter_config.json", "LoRA"), ("tf_model.h5", "TensorFlow"), ("flax_model.msgpack", "Flax"),
        ("model.onnx", "ONNX"), ("model.gguf", "GGUF"), ("__0_0.distcp", "distributed"), ("readme.md", "no weights"),
        ("run/model.safetensors", "run/model.safetensors"),
    ])
    def test_folders_without_weights(self, name, word, tmp_path):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"{}")
        assert word in refused(tmp_path, "checkpoint")[:len(tmp_path.name) + 80]


def zipped(name, path):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(name, b"x")


def scripted(path):
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), path)


def cut(save, count):
    def write(path):
        save(WEIGHTS, path)
        path.write_bytes(path.read_bytes()[:count])
    return write


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("write", "ending", "word"), [
    (lambda path: path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n"), "pth", "Git LFS"),
    (lambda path: path.write_bytes(b""), "safetensors", "empty"),
    (lambda path: path.write_text("\n<!DOCTYPE html><html>"), "pth", "web page"),
    (lambda path: path.write_text("<?xml version='1.0'?><Error>AccessDenied"), "bin", "web page"),
    (lambda path: path.write_text("weights, to come"), "pth", "text"),
    (lambda path: path.write_text('{"error": "Entry not found"}'), "safetensors", "text"),
    (lambda path: zipped("w.pth", path), "zip", "archive"),
    (lambda path: zipped("w.pth", path), "pth", "zip archive"),
    (lambda path: path.write_bytes(gzip.compress(b"x")), "pth", "archive"),
    (scripted, "pt", "TorchScript"),
    (cut(save_file, 9000), "safetensors", "cut off or damaged, 9,000 bytes"),
    (cut(save_file, 100), "safetensors", "cut off or damaged, 100 bytes"),
    (cut(torch.save, 9000), "pth", "cut off"),
    (cut(functools.partial(torch.save, _use_new_zipfile_serialization=False), 9000), "pth", "cut off"),
    (lambda path: path.write_bytes(b"\x08\x07\x12\x07pytorch"), "onnx", "ONNX"),
    (lambda path: path.write_bytes(b"\x89HDF\r\n"), "pth", "TensorFlow"),
    (lambda path: np.savez(path, a=np.zeros(3)), "npz", "Flax"),
    (lambda path: path.write_bytes(b"GGUF\3"), "bin", "GGUF"),
    (lambda path: path.write_bytes(pickle.dumps({"a": 1})), "pth", "plain pickle"),
    (lambda path: path.write_bytes(b"\xff\xfe\x00" * 99), "bin", "no file of weights"),
    (lambda path: torch.save([torch.zeros(3)], path), "pth", "no state dict"),
    (lambda path: torch.save(torch.optim.Adam([torch.zeros(3)]).state_dict(), path), "pth", "optimizer"),
    (lambda path: torch.save({"optimizer": {"state": {0: {"step": torch.zeros(1)}}}}, path), "pth", "optimizer"),
    (lambda path: save_file(at("base_model.model.blocks.0.attn.qkv.", {"lora_A.weight": torch.zeros(2, 24)}), path),
     "safetensors", "LoRA"),
    (lambda path: torch.save(WEIGHTS | {"blocks.0.attn.qkv.lora_A.default.weight": torch.zeros(2, 24)}, path), "pth",
     "LoRA"),
    (lambda path: torch.save({"conv1.weight": torch.zeros(2), "layer1.0.conv1.weight": torch.zeros(2)}, path), "pth",
     "ResNet"),
    (lambda path: torch.save({"class_token": torch.zeros(2), "conv_proj.weight": torch.zeros(2)}, path), "pth",
     "torchvision"),
    (lambda path: torch.save({"vision_model.embeddings.class_embedding": torch.zeros(2)}, path), "pth", "CLIP"),
    (lambda path: torch.save({name: tensor.to(torch.int8) for name, tensor in WEIGHTS.items()}, path), "pth", "int8"),
    (lambda path: save_file({name: tensor.to(torch.float8_e4m3fn) for name, tensor in WEIGHTS.items()}, path),
     "safetensors", "float8"),
])
def test_what_is_no_checkpoint_is_named_at_the_start(write, ending, word, tmp_path):
    write(path := tmp_path / f"w.{ending}")
    assert word in refused(path, "^checkpoint 'w")[:110]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused(value, tmp_path):
    path = saved(tmp_path, WEIGHTS | {"norm.bias": torch.full((24,), value)})
    check_checkpoint(NAME, path, **TINY)  # which reads no values
    with pytest.raises(ItaeError, match=r"NaN or infinity in norm\.bias"):
        build(path)


@pytest.mark.parametrize(("size", "patches"), [((70, 42), 15), ((56, 28), 8)])
def test_position_embeddings_that_are_not_square_are_refused(size, patches, tmp_path):
    refused(saved(tmp_path, tiny(img_size=size).state_dict()), f"position embedding of {patches} patches.*square")


@pytest.mark.parametrize(("fits", "others"), [("dinov2_vits14_reg", ("dinov2_vits14", "dinov2_vitb14_reg", TIMM)),
                                              ("dinov2_vitb14", ("dinov2_vitb14_reg",))])
def test_the_backbone_that_fits_is_named(fits, others, tmp_path):
    shapes, path = backbones.stock_model(fits).state_dict(), tmp_path / "w.safetensors"
    with path.open("wb") as file:  # a header of safetensors and zeros that take no space on the disk
        places, end = {}, 0
        for name, tensor in shapes.items():
            begin, end = end, end + 2 * tensor.numel()
            places[name] = {"dtype": "F16", "shape": list(tensor.shape), "data_offsets": [begin, end]}
        header = json.dumps(places).encode()
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(file.tell() + end)
    check_checkpoint(fits, path)
    for name in others:
        with pytest.raises(ItaeError, match=f"'w.safetensors' fits {fits}, not {name}.* width"):
            check_checkpoint(name, path)


def test_code_in_a_file_is_not_run(tmp_path):
    for name, content in [("code", {"model": Pickled()}), ("none", {"epoch": 3}), ("nothing", {}), ("bare", Pickled())]:
        refused(saved(tmp_path, content, f"{name}.pth"), "state_dict")
    with pytest.raises(ItaeError, match="state dict of tensors"):
        read_checkpoint(tmp_path / "none.pth")
    refused(tmp_path / "missing.pth", "does not exist")


def test_long_lists_of_tensors_are_shortened():
    lines = ["Error(s) in loading:", *[f"size mismatch for {'x' * 50} {number} " + "y " * 300 for number in range(50)]]
    text = tensors_named(RuntimeError("\n".join(lines)))
    assert len(text) < 700
    assert "47" in text
    assert "\n" not in text
    assert tensors_named(KeyError("pos_embed")) == "'pos_embed'"
