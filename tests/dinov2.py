"""Random DINOv2 models of `transformers`, and their weights in every layout that users have."""

import json

import torch
from safetensors.torch import save_file
from torch import Tensor

# Width, depth, heads, and whether the MLP is gated.
SIZES = {"small": (384, 12, 6, False), "base": (768, 12, 12, False), "large": (1024, 24, 16, False),
         "giant": (1536, 40, 24, True)}
STRUCTURES = [(size, registers) for size in SIZES for registers in (False, True)]


def timm_name(size: str, registers: bool) -> str:
    return f"vit_{size}_patch14_{'reg4_' if registers else ''}dinov2"


def theirs(size: str, registers: bool, side: int = 518, **tiny):
    """Return a model of `transformers` with random weights, each large enough to affect the output."""
    import transformers

    width, depth, heads, gated = SIZES[size]
    settings = {"hidden_size": width, "num_hidden_layers": depth, "num_attention_heads": heads, "use_swiglu_ffn": gated,
                "image_size": side, "patch_size": 14} | tiny
    prefix = "Dinov2WithRegisters" if registers else "Dinov2"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(11)
        config = getattr(transformers, f"{prefix}Config")(**settings)
        model = getattr(transformers, f"{prefix}Model")(config).eval().requires_grad_(False)
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1 and "weight" in name:
                torch.nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5)
            elif "norm" in name or "lambda" in name:
                torch.nn.init.normal_(parameter, mean=0.7, std=0.2)
            else:
                torch.nn.init.normal_(parameter, std=0.3)
    return model


def meta_weights(model) -> dict[str, Tensor]:
    """Return Meta's state dict of a model of `transformers`, built module by module."""
    embeddings = model.embeddings
    weights = {
        "cls_token": embeddings.cls_token, "pos_embed": embeddings.position_embeddings,
        "mask_token": embeddings.mask_token, "patch_embed.proj.weight": embeddings.patch_embeddings.projection.weight,
        "patch_embed.proj.bias": embeddings.patch_embeddings.projection.bias,
        "norm.weight": model.layernorm.weight, "norm.bias": model.layernorm.bias,
    }
    if hasattr(embeddings, "register_tokens"):
        weights["register_tokens"] = embeddings.register_tokens
    for number, layer in enumerate(model.encoder.layer):
        attention, mlp = layer.attention, layer.mlp
        projections = [attention.q_proj, attention.k_proj, attention.v_proj]
        block = {"ls1.gamma": layer.layer_scale1.lambda1, "ls2.gamma": layer.layer_scale2.lambda1}
        for kind in ("weight", "bias"):
            block[f"norm1.{kind}"] = getattr(layer.norm1, kind)
            block[f"norm2.{kind}"] = getattr(layer.norm2, kind)
            block[f"attn.qkv.{kind}"] = torch.cat([getattr(linear, kind) for linear in projections])
            block[f"attn.proj.{kind}"] = getattr(attention.o_proj, kind)
            if hasattr(mlp, "fc1"):
                block[f"mlp.fc1.{kind}"], block[f"mlp.fc2.{kind}"] = getattr(mlp.fc1, kind), getattr(mlp.fc2, kind)
            else:
                block[f"mlp.w12.{kind}"] = torch.cat([getattr(mlp.gate_proj, kind), getattr(mlp.up_proj, kind)])
                block[f"mlp.w3.{kind}"] = getattr(mlp.down_proj, kind)
        weights |= {f"blocks.{number}.{name}": tensor for name, tensor in block.items()}
    return {name: tensor.detach().clone() for name, tensor in weights.items()}


def save_as(layout: str, model, folder):
    """Write the weights of `model` as "meta", "transformers 4" (its own `save_pretrained`) or "transformers 5"."""
    folder.mkdir(parents=True)
    if layout == "meta":
        torch.save(meta_weights(model), folder / "dinov2_pretrain.pth")
        return folder / "dinov2_pretrain.pth"
    if layout == "transformers 4":
        model.save_pretrained(folder)
        return folder
    save_file({name: tensor.contiguous() for name, tensor in model.state_dict().items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(model.config.to_dict()))
    return folder
