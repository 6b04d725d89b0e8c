"""The equations of the method, written out in loops over images, heads, rows and patches: slow, and plain to read.

Nothing here is shared with the package: the forward pass of a ViT is spelled out from the model's weights.
"""

import math

import numpy as np
import torch
from torch import Tensor


def artifact_sets(projected: Tensor, source: str, threshold: float, num_prefix: int) -> list[set[int]]:
    """A = {i : ‖P_i‖₂ ≤ θ} of every image, as token numbers; projected is (B, T, 3 · D)."""
    width = projected.shape[-1] // 3
    start = {"query": 0, "key": width, "value": 2 * width}[source]
    found = []
    for image in projected:
        found.append(set())
        for token in range(num_prefix, len(image)):
            if math.sqrt(sum(float(x) ** 2 for x in image[token, start:start + width])) <= threshold:
                found[-1].add(token)
    return found


def edited_row(row: np.ndarray, artifacts: set[int], num_prefix: int, attenuation: str, alpha: float) -> np.ndarray:
    """The attention weights of one query row of one head with the artifacts attenuated."""
    row = row.copy()
    patches = range(num_prefix, len(row))
    normal = [token for token in patches if token not in artifacts]
    smallest = min(row[token] for token in patches)
    if attenuation == "scale":
        weights = softmax(row)
        for token in artifacts:
            weights[token] *= alpha
        return weights / weights.sum()
    for token in artifacts:
        if attenuation == "min":
            row[token] = smallest
        elif attenuation == "mask":
            row[token] = -math.inf
        elif attenuation == "mean" and normal:
            row[token] = sum(row_before for row_before in (float(row[other]) for other in normal)) / len(normal)
    return softmax(row)


def softmax(row: np.ndarray) -> np.ndarray:
    powers = np.exp(row - row.max())
    return powers / powers.sum()


def attention(attn, normed: Tensor, edit) -> Tensor:
    """timm's attention, head by head and row by row; `edit(image, row, logits)` gives the weights of a row."""
    batch, tokens, _ = normed.shape
    projected = attn.qkv(normed)
    width = projected.shape[-1] // 3
    size = width // attn.num_heads
    heads = torch.zeros(batch, tokens, width)
    for image in range(batch):
        for head in range(attn.num_heads):
            q, k, v = (projected[image, :, part * width + head * size:part * width + (head + 1) * size]
                       for part in range(3))
            q, k = attn.q_norm(q), attn.k_norm(k)
            for row in range(tokens):
                logits = np.array([float(q[row] @ k[other]) / math.sqrt(size) for other in range(tokens)])
                weights = edit(image, row, logits)
                mixed = sum(float(weights[other]) * v[other] for other in range(tokens))
                heads[image, row, head * size:(head + 1) * size] = mixed
    return attn.proj(attn.norm(heads))


def forward(model, images: Tensor, itae=None, artifacts=None) -> Tensor:
    """All output tokens (after the final norm) of a timm ViT under a setting; artifacts[block][image] may be given."""
    x = model.norm_pre(model._pos_embed(model.patch_embed(images)))
    depth, prefix = len(model.blocks), model.num_prefix_tokens
    for index, block in enumerate(model.blocks):
        place = index - (depth - itae.blocks) if itae is not None else -1
        normed = block.norm1(x)
        sets = [set()] * len(images)
        if place >= 0:
            sets = (artifacts[index] if artifacts is not None else
                    artifact_sets(block.attn.qkv(normed), itae.source, itae.thresholds[place], prefix))

        def edit(image, row, logits, sets=sets):
            if not sets[image] or (itae.rows == "cls" and row != 0):
                return softmax(logits)
            return edited_row(logits, sets[image], prefix, itae.attenuation, itae.alpha)

        x = x + block.ls1(attention(block.attn, normed, edit))
        x = x + block.ls2(block.mlp(block.norm2(x)))
    return model.norm(x)
