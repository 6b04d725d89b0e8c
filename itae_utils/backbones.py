"""Backbones by name: stock timm ViTs (DINOv3 and EVA too) with their weights, preprocessing, device and precision."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from itae_utils.errors import ItaeError, unknown_name
from itae_utils.vit import check_supported, patches_along

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from itae_utils.artifacts import FiringRule

PREPROCESSING = ("resize", "meta-eval")
PRECISIONS = ("fp32", "bf16")
DINOV2_IMAGE_SIZE = 224  # the checkpoints' own 518 costs 5 times as much; stated wherever it is used
NETWORK_TIMEOUT = 5  # seconds


@dataclass(frozen=True)
class BackboneEntry:
    """A backbone that can be named.

    Attributes:
        timm_name: the timm model behind it; None for the embedded ones.
        parameters: millions.
        patch: pixels a side.
        image_size: default image side in pixels.
        size_mb: download in MB; 0 for what is embedded.
        origin: where the weights come from, in words.
    """

    timm_name: str | None
    parameters: float
    patch: int
    image_size: int
    size_mb: int
    origin: str


def _dinov2(size: str, registers: bool, parameters: float) -> BackboneEntry:
    name = f"vit_{size}_patch14_{'reg4_' if registers else ''}dinov2.lvd142m"
    words = "DINOv2 with 4 registers" if registers else "DINOv2"
    return BackboneEntry(name, parameters, 14, DINOV2_IMAGE_SIZE, round(parameters * 4), f"{words}, Meta, through timm")


PLANTED = "trained on digits without labels, then artifacts were planted in it: they are not natural ones"
BACKBONES: dict[str, BackboneEntry] = {
    "demo": BackboneEntry(None, 0.3, 4, 28, 0, f"embedded tiny ViT, {PLANTED}"),
    "demo-clean": BackboneEntry(None, 0.3, 4, 28, 0, "embedded tiny ViT, trained on digits without labels"),
} | {
    f"dinov2_vit{size[0]}14{'_reg' if registers else ''}": _dinov2(size, registers, parameters)
    for size, parameters in [("small", 22.1), ("base", 86.6), ("large", 304.4), ("giant", 1136.5)]
    for registers in (False, True)
}


@dataclass(frozen=True)
class Backbone:
    """A stock ViT, ready to use.

    Attributes:
        name: what was asked for.
        model: the timm module, in eval mode, untouched.
        transform: PIL image -> (3, H, W) float tensor.
        image_size: side in pixels that `transform` makes.
        preprocess: "resize" or "meta-eval".
        device: where the model is.
        precision: "fp32" or "bf16".
        source: where the weights come from, in words.
        truth: the rule that tells the true artifacts, for a planted backbone; else None.
        weights_sha256: over the names, types and bytes of all weights, in order.
    """

    name: str
    model: nn.Module = field(repr=False)
    transform: Callable = field(repr=False)
    image_size: int
    preprocess: str
    device: torch.device
    precision: str
    source: str
    truth: FiringRule | None
    weights_sha256: str

    @property
    def dim(self) -> int:
        """Width of a token."""
        return self.model.embed_dim

    @property
    def num_blocks(self) -> int:
        """Depth."""
        return len(self.model.blocks)

    @property
    def patch_grid(self) -> tuple[int, int]:
        """Patches in a column and in a row of a square image of `image_size`."""
        rows, columns = self.model.patch_embed.patch_size
        return self.image_size // rows, self.image_size // columns

    def autocast(self) -> contextlib.AbstractContextManager:
        """The context in which to run the model: bfloat16 autocast, or nothing for fp32."""
        import torch

        if self.precision == "fp32":
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, dtype=torch.bfloat16)


def load_backbone(
    name: str,
    *,
    checkpoint: str | Path | None = None,
    pretrained: bool = True,
    image_size: int | None = None,
    preprocess: Literal["resize", "meta-eval"] = "resize",
    device: str = "auto",
    precision: Literal["auto", "fp32", "bf16"] = "auto",
) -> Backbone:
    """Load a ViT by name, with `num_classes=0`, `global_pool="token"` and any image size its patch divides.

    Args:
        name: "demo", "demo-clean", a DINOv2 checkpoint ("dinov2_vits14" … "dinov2_vitg14_reg"), or any timm ViT name.
        checkpoint: a local file of weights (safetensors, or a .pth of plain tensors) instead of the download.
        pretrained: False gives random weights of a fixed seed.
        image_size: pixels a side; None is 28 for the demo, 224 for DINOv2, else the model's own.
        preprocess: "resize" brings the whole image to the size; "meta-eval" resizes the short side to 8/7 of it and
            crops the centre (256 and 224 at the usual size).
        device: "auto" takes CUDA where there is one.
        precision: "auto" is fp32 on a CPU, bf16 on CUDA.

    Raises:
        ItaeError: unknown name, a model the method can't handle, a size the patch doesn't divide, weights that are
            missing, don't fit or can't be downloaded.
    """
    import torch

    if preprocess not in PREPROCESSING:
        raise ItaeError(f"preprocess={preprocess!r} is not known: use one of {', '.join(PREPROCESSING)}")
    device = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device)
    if precision == "auto":
        precision = "bf16" if device.type == "cuda" else "fp32"
    if precision not in PRECISIONS:
        raise ItaeError(f"precision={precision!r} is not known: use auto, {' or '.join(PRECISIONS)}")

    embedded = name in BACKBONES and BACKBONES[name].timm_name is None
    build = _build_demo if embedded else _build_timm
    model, config, source, truth = build(name, checkpoint, pretrained)
    check_supported(model)
    if image_size is None:
        image_size = BACKBONES[name].image_size if name in BACKBONES else config["input_size"][-1]
    patches_along(image_size, model.patch_embed.patch_size[0])
    return Backbone(
        name=name,
        model=model.eval().requires_grad_(False).to(device),
        transform=make_transform(image_size, preprocess, config),
        image_size=image_size,
        preprocess=preprocess,
        device=device,
        precision=precision,
        source=source,
        truth=truth,
        weights_sha256=weights_sha256(model),
    )


def weights_sha256(model: nn.Module) -> str:
    """SHA-256 over the names, types and bytes of a model's weights, in order."""
    import torch

    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def make_transform(image_size: int, preprocess: str, config: dict) -> Callable[[object], Tensor]:
    """PIL image -> (3, image_size, image_size) float tensor; interpolation, mean and std are timm's `config`."""
    import torch
    from torchvision.transforms import v2

    interpolation = v2.InterpolationMode(config["interpolation"])
    if preprocess == "resize":
        shape = [v2.Resize((image_size, image_size), interpolation, antialias=True)]
    else:
        shape = [v2.Resize(round(image_size * 256 / 224), interpolation, antialias=True), v2.CenterCrop(image_size)]
    return v2.Compose([
        *shape,
        v2.PILToTensor(),
        v2.ToDtype(torch.float32, scale=True),
        v2.Normalize(config["mean"], config["std"]),
    ])


def _build_demo(name: str, checkpoint: str | Path | None, pretrained: bool):
    from itae_utils import demo

    if checkpoint is not None:
        raise ItaeError(f"{name} carries its weights: checkpoint={str(checkpoint)!r} goes with a timm name")
    if not pretrained:
        return _seeded(demo.build_model), demo.CONFIG, "the demo's architecture with random weights", None
    planted = name == "demo"
    return demo.load_model(planted), demo.CONFIG, BACKBONES[name].origin, demo.truth() if planted else None


def _seeded(build: Callable[[], nn.Module]) -> nn.Module:
    import torch

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return build()


def _build_timm(name: str, checkpoint: str | Path | None, pretrained: bool):
    import timm
    import torch
    from timm.data import resolve_model_data_config
    from timm.models.eva import Eva

    timm_name = BACKBONES[name].timm_name if name in BACKBONES else name
    if not timm.is_model(timm_name):
        raise unknown_name("backbone", name, [*BACKBONES, *timm.list_models(["vit*", "eva*"])], "`itae backbones`")
    options = {"num_classes": 0, "global_pool": "token", "dynamic_img_size": True}
    with torch.device("meta"):  # its class is known without weights: refuse it before a download
        stock = timm.create_model(timm_name, num_classes=0)
        check_supported(stock)
    if isinstance(stock, Eva) and isinstance(stock.norm, torch.nn.Identity):
        options["use_fc_norm"] = True  # where EVA's weights have the final norm: pooling by token would move it
    if checkpoint is not None:
        weights = read_checkpoint(checkpoint)
        source = f"local file {Path(checkpoint).name}"
        overlay = {"state_dict": weights}
    elif pretrained:
        overlay = None
        source = BACKBONES[name].origin if name in BACKBONES else f"{timm_name}, through timm"
        _check_reachable(timm_name)
    else:
        return (_seeded(lambda: timm.create_model(timm_name, **options)), _config(timm_name),
                f"{timm_name} with random weights", None)
    try:
        model = timm.create_model(timm_name, pretrained=True, pretrained_cfg_overlay=overlay, **options)
    except (RuntimeError, KeyError, OSError, AttributeError) as error:
        first_line = str(error).strip().splitlines()[0]
        raise ItaeError(f"the weights for {name} from {source} can't be loaded: {first_line}") from error
    return model, resolve_model_data_config(model), source, None


def _config(timm_name: str) -> dict:
    from timm.data import resolve_data_config
    from timm.models import get_pretrained_cfg

    return resolve_data_config(pretrained_cfg=get_pretrained_cfg(timm_name).to_dict())


def read_checkpoint(path: str | Path) -> dict[str, Tensor]:
    """A state dict from a local safetensors file or a .pth of plain tensors; pickled code is never run.

    Raises:
        ItaeError: no such file, or not a state dict.
    """
    import torch
    from safetensors.torch import load_file

    path = Path(path)
    if not path.is_file():
        raise ItaeError(f"checkpoint {str(path)!r} is not a file: give a .safetensors or .pth file")
    try:
        weights = load_file(path) if path.suffix == ".safetensors" else torch.load(path, "cpu", weights_only=True)
    except Exception as error:
        why = str(error).splitlines()[0]
        raise ItaeError(f"checkpoint {str(path)!r} is not readable as plain tensors: {why}") from error
    for wrapper in ("state_dict", "model", "teacher"):
        if isinstance(weights, dict) and isinstance(weights.get(wrapper), dict):
            weights = weights[wrapper]
    if not isinstance(weights, dict) or not all(isinstance(value, torch.Tensor) for value in weights.values()):
        raise ItaeError(f"checkpoint {str(path)!r} holds no state dict of tensors")
    return weights


def _check_reachable(timm_name: str) -> None:
    """Answer within seconds, and with a remedy, where weights would have to be downloaded and there is no network."""
    import huggingface_hub
    from timm.models import get_pretrained_cfg

    config = get_pretrained_cfg(timm_name)
    if config is None or not config.has_weights:
        raise ItaeError(f"timm has no weights for {timm_name!r}: add a tag (timm.list_pretrained lists them), "
                        "give checkpoint=FILE, or pretrained=False for random ones")
    repository = config.hf_hub_id
    if not repository:
        return
    files = ("model.safetensors", "open_clip_model.safetensors", "pytorch_model.bin")
    if any(isinstance(huggingface_hub.try_to_load_from_cache(repository, file), str) for file in files):
        return
    url = huggingface_hub.hf_hub_url(repository, "config.json")
    try:
        huggingface_hub.get_hf_file_metadata(url, timeout=NETWORK_TIMEOUT)
    except Exception as error:
        raise ItaeError(f"no way to the weights of {timm_name} at {url.partition('/resolve')[0]} "
                        f"({type(error).__name__}): download model.safetensors there, give checkpoint=FILE") from error
