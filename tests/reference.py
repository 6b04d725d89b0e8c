"""The equations of the method as loops over images, heads, rows and patches: slow and plain.

Nothing here is shared with the package. The forward pass of a ViT is written out from the model's weights, and
gradients can pass through it.
"""

import math

import torch
from torch import Tensor


def artifact_sets(qkv: Tensor, source: str, threshold: float, num_prefix: int) -> list[set[int]]:
    """Return A = {i : ‖P_i‖₂ ≤ θ} of every image, as token numbers; qkv is (B, T, 3 · D)."""
    width = qkv.shape[-1] // 3
    start = {"query": 0, "key": width, "value": 2 * width}[source]
    found = []
    for image in qkv.detach():
        found.append(set())
        for token in range(num_prefix, len(image)):
            if math.sqrt(sum(float(x) ** 2 for x in image[token, start:start + width])) <= threshold:
                found[-1].add(token)
    return found


def edited_row(row: Tensor, artifacts: set[int], num_prefix: int, attenuation: str, alpha: float) -> Tensor:
    """Return the attention weights of one query row of one head with the artifacts attenuated; row holds its logits."""
    logits = list(row)
    patches = range(num_prefix, len(logits))
    normal = [token for token in patches if token not in artifacts]
    if attenuation == "scale":
        weights = list(row.softmax(0))
        for token in artifacts:
            weights[token] = weights[token] * alpha
        return torch.stack(weights) / sum(weights)
    for token in artifacts:
        if attenuation == "min":
            logits[token] = min(row[other] for other in patches)
        elif attenuation == "mask":
            logits[token] = row.new_tensor(-math.inf)
        elif attenuation == "mean" and normal:
            logits[token] = sum(row[other] for other in normal) / len(normal)
    return torch.stack(logits).softmax(0)


def projected(attn, normed: Tensor) -> Tensor:
    """Return q, k and v side by side, (B, T, 3 · D), biases included."""
    if attn.qkv is None:
        return torch.cat([attn.q_proj(normed), attn.k_proj(normed), attn.v_proj(normed)], dim=-1)
    if getattr(attn, "q_bias", None) is not None:
        return normed @ attn.qkv.weight.T + torch.cat([attn.q_bias, torch.zeros_like(attn.q_bias), attn.v_bias])
    return attn.qkv(normed)


def rotated(x: Tensor, angles: Tensor, half: bool) -> Tensor:
    """Return one vector, rotated pair by pair; `angles` holds the sines, then the cosines."""
    size, turned = len(x), x.clone()
    for pair in range(size // 2):
        i, j = (pair, pair + size // 2) if half else (2 * pair, 2 * pair + 1)
        sine, cosine = angles[i], angles[size + i]
        turned[i], turned[j] = x[i] * cosine - x[j] * sine, x[j] * cosine + x[i] * sine
    return turned


def rotated_patches(attn, x: Tensor, rope: Tensor | None, head: int) -> Tensor:
    """Return the queries or keys (T, d) of one head, with those of the patches rotated."""
    if rope is None:
        return x
    angles = rope[head] if rope.ndim == 3 else rope  # one rotation per head, or one for all
    prefix = len(x) - len(angles)
    patches = [rotated(token, turn, attn.rotate_half) for token, turn in zip(x[prefix:], angles, strict=True)]
    return torch.stack([*x[:prefix], *patches])


def attention(attn, normed: Tensor, edit, rope: Tensor | None = None) -> Tensor:
    """Compute timm's attention head by head and row by row; `edit(image, row, logits)` returns the weights of a row."""
    batch, tokens, _ = normed.shape
    qkv = projected(attn, normed)
    width = qkv.shape[-1] // 3
    size = width // attn.num_heads
    images = []
    for image in range(batch):
        heads = []
        for head in range(attn.num_heads):
            q, k, v = (qkv[image, :, part * width + head * size:part * width + (head + 1) * size]
                       for part in range(3))
            q, k = (rotated_patches(attn, x, rope, head) for x in (attn.q_norm(q), attn.k_norm(k)))
            rows = []
            for row in range(tokens):
                logits = torch.stack([q[row] @ k[other] / math.sqrt(size) for other in range(tokens)])
                rows.append(edit(image, row, logits) @ v)
            heads.append(torch.stack(rows))
        images.append(torch.cat(heads, dim=-1))
    return attn.proj(attn.norm(torch.stack(images)))


def embedded(model, images: Tensor) -> tuple[Tensor, list[dict[str, Tensor]]]:
    """Return the tokens that enter the first block, and the keyword arguments of each block."""
    x, depth = model._pos_embed(model.patch_embed(images)), len(model.blocks)
    if not isinstance(x, tuple):
        return model.norm_pre(x), [{}] * depth
    x, rope = x
    return model.norm_pre(x), [{"rope": rope[index] if model.rope_mixed else rope} for index in range(depth)]


def scaled(block, branch: int, x: Tensor) -> Tensor:
    """Apply LayerScale to the attention branch (1) or the MLP branch (2)."""
    if hasattr(block, f"ls{branch}"):
        return getattr(block, f"ls{branch}")(x)
    gamma = getattr(block, f"gamma_{branch}")
    return x if gamma is None else x * gamma


def forward(model, images: Tensor, itae=None, artifacts=None) -> Tensor:
    """Return all output tokens of a timm ViT, after the final norm, under a setting.

    `artifacts[block][image]` replaces the sets that the thresholds give.
    """
    x, options = embedded(model, images)
    depth, prefix = len(model.blocks), model.num_prefix_tokens
    for index, block in enumerate(model.blocks):
        edited = index - (depth - itae.blocks) if itae is not None else -1
        normed = block.norm1(x)
        sets = [set()] * len(images)
        if edited >= 0:
            sets = (artifacts[index] if artifacts is not None else
                    artifact_sets(projected(block.attn, normed), itae.source, itae.thresholds[edited], prefix))

        def edit(image, row, logits, sets=sets):
            if not sets[image] or (itae.rows == "cls" and row != 0):
                return logits.softmax(0)
            return edited_row(logits, sets[image], prefix, itae.attenuation, itae.alpha)

        x = x + scaled(block, 1, attention(block.attn, normed, edit, **options[index]))
        x = x + scaled(block, 2, block.mlp(block.norm2(x)))
    return model.norm(x)
