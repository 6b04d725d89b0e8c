"""Tiny random ViTs and images that the tests share."""

import numpy as np
import pytest
import torch
from PIL import Image
from timm.layers import SwiGLUPacked
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer

from itae_utils.data.datasets import ImageDataset
from itae_utils.method.anatomy import adapt, block_index, block_inputs
from itae_utils.method.direction import directions_of, has_directions
from itae_utils.method.setting import ITAE, SIDES, SOURCES
from itae_utils.method.statistics import patch_statistic
from itae_utils.models.backbones import Backbone, weights_sha256
from itae_utils.models.preprocessing import make_transform

torch.set_num_threads(min(2, torch.get_num_threads()))

# Every option of timm's ViT that can change the last block's computation.
VIT_STRUCTURES = {
    "plain": {},
    "registers": {"reg_tokens": 4, "no_embed_class": True},
    "layer_scale": {"init_values": 0.3},
    "norm_pre": {"pre_norm": True},
    "qk_norm": {"qk_norm": True},
    "scale_norm": {"scale_attn_norm": True, "scale_mlp_norm": True},
    "no_bias": {"qkv_bias": False},
    "one_block": {"depth": 1},
    "dinov2": {"reg_tokens": 4, "no_embed_class": True, "init_values": 0.5, "class_token": True},
    "swiglu": {"init_values": 0.5, "mlp_layer": SwiGLUPacked, "mlp_ratio": 16 / 3, "act_layer": torch.nn.SiLU},
}
# The same for its Eva: fused or split projections, with and without biases, all kinds of rotation.
_DINOV3 = {"num_reg_tokens": 4, "use_abs_pos_emb": False, "use_rot_pos_emb": True, "rope_type": "dinov3",
           "rope_rotate_half": True, "init_values": 0.5, "use_fc_norm": False}
EVA_STRUCTURES = {
    "eva": {},
    "eva02_fused": {"use_rot_pos_emb": True, "swiglu_mlp": True},
    "eva02_split": {"use_rot_pos_emb": True, "swiglu_mlp": True, "qkv_fused": False, "scale_mlp": True,
                    "scale_attn_inner": True},
    "eva_fc_norm": {"use_fc_norm": True},
    "dinov3": {"qkv_bias": False, **_DINOV3},
    "dinov3_qkvb": {"swiglu_mlp": True, "swiglu_align_to": 8, **_DINOV3},
    "rope_mixed": {"use_rot_pos_emb": True, "rope_type": "mixed", "num_reg_tokens": 1, "attn_only_layer_scale": True,
                   "init_values": 0.5, "qk_norm": True},
}
STRUCTURES = VIT_STRUCTURES | EVA_STRUCTURES


def tiny_vit(structure: str = "plain", **options) -> VisionTransformer | Eva:
    """Return a random ViT of three blocks whose attention is far from uniform, so that edits change its output."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        settings = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 3, "num_heads": 3, "num_classes": 0,
                    "global_pool": "token", "dynamic_img_size": True} | STRUCTURES[structure] | options
        model = (Eva if structure in EVA_STRUCTURES else VisionTransformer)(**settings)
        for name, parameter in model.named_parameters():
            if any(part in name for part in ("qkv", "q_proj", "k_proj", "v_proj", "q_bias", "v_bias")):
                torch.nn.init.normal_(parameter, std=0.4)
            elif "norm" in name:
                torch.nn.init.normal_(parameter, mean=1.0 if name.endswith("weight") else 0.0, std=0.2)
            elif parameter.ndim > 1:
                torch.nn.init.normal_(parameter, std=0.2)
    return model.eval().requires_grad_(False)


def images(count: int, height: int = 32, width: int = 32) -> torch.Tensor:
    return torch.randn(count, 3, height, width, generator=torch.Generator().manual_seed(count))


@torch.no_grad()
def statistic(model, batch: torch.Tensor, source: str, block: int = -1, rank: int = 1) -> torch.Tensor:
    """Return a statistic of the patches (B, N) in one block of the unmodified model."""
    vit, index = adapt(model), block_index(model, block)
    qkv = vit.blocks[index].qkv(block_inputs(model, batch, [index])[index])
    return patch_statistic(source, qkv, vit.num_prefix_tokens, directions_of(model, index, ITAE(source, rank=rank)))


def threshold_at(model, batch: torch.Tensor, source: str, share: float, block: int = -1, *, side: str | None = None,
                 rank: int = 1) -> float:
    """Return a threshold with about that share of the patches on its side, in the middle of the widest gap near.

    So rounding can't move a patch across it.
    """
    values = np.sort(statistic(model, batch, source, block, rank).flatten().double().numpy())
    place = max(1, round(share * len(values)))
    place = place if (side or SIDES[source]) == "low" else len(values) - place
    place = max(range(max(1, place - 2), min(len(values), place + 3)), key=lambda each: values[each] - values[each - 1])
    return float((values[place - 1] + values[place]) / 2)


def setting(source: str, threshold, attenuation: str = "min", **options) -> ITAE:
    """Return a setting for a tiny ViT; the substitutes are random vectors."""
    if attenuation == "substitute":
        vectors = np.random.default_rng(3).normal(size=(options.get("blocks", 1), 24))
        options["substitutes"] = tuple(map(tuple, vectors.tolist()))
    return ITAE(source, threshold, attenuation, **options)


def sources_of(model) -> list[str]:
    """Return the statistics that a model has."""
    return [source for source in SOURCES if source != "direction" or has_directions(model)]


class MadeDataset(torch.utils.data.Dataset):
    """Random pictures in memory, with the classes in turn."""

    name, split, source = "made", "all", "made by the tests"

    def __init__(self, count: int, size: int = 32, classes: int = 3) -> None:
        rng = np.random.default_rng(0)
        self.pictures = [Image.fromarray(rng.integers(0, 255, (size, size, 3), dtype=np.uint8)) for _ in range(count)]
        self.targets = np.arange(count) % classes
        self.classes = [str(number) for number in range(classes)]

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, index: int):
        return self.pictures[index], int(self.targets[index])


def array_dataset(count: int, seed: int = 0):
    """Return random pictures as an array, which has a fingerprint, with three classes in turn."""
    images = np.random.default_rng(seed).integers(0, 255, (count, 32, 32, 3), dtype=np.uint8)
    return ImageDataset("made", "all", "made by the tests", images, np.arange(count) % 3, list("abc"))


def as_backbone(model, image_size: int = 32, precision: str = "fp32") -> Backbone:
    """Return a tiny ViT in the form that `load_backbone` returns."""
    config = {"interpolation": "bicubic", "mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}
    return Backbone("tiny", model, make_transform(image_size, "resize", config), image_size, "resize",
                    torch.device("cpu"), precision, "random weights", "random", None, weights_sha256(model))


def dataset_tensor(backbone, dataset) -> torch.Tensor:
    return torch.stack([backbone.transform(dataset[index][0]) for index in range(len(dataset))])


def setup(structure: str = "registers", count: int = 5, **options):
    """Return a tiny ViT as a backbone, random pictures, and the pictures as one batch."""
    backbone, dataset = as_backbone(tiny_vit(structure)), MadeDataset(count, **options)
    return backbone, dataset, dataset_tensor(backbone, dataset)


@pytest.fixture(autouse=True, scope="session")
def _own_cache(tmp_path_factory):
    """Store the hashes of files in a temporary folder, also in kernels; store features only if a test asks for it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ITAE_CACHE", str(tmp_path_factory.mktemp("cache")))
        patch.setenv("ITAE_STORE", "none")
        yield
