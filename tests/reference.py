"""The equations of the method as loops over images, heads, rows and patches: slow and plain.

Nothing here is shared with the package. The forward pass of a ViT is written out from the model's weights, and
gradients can pass through it.
"""

import copy
import math

import numpy as np
import torch
from torch import Tensor


def length(vector) -> float:
    return math.sqrt(sum(float(x) ** 2 for x in vector))


def statistic(source: str, block, x: Tensor, num_prefix: int, rope: Tensor | None = None,
              directions: Tensor | None = None) -> list[list[float]]:
    """Return a statistic of every patch, by image; x (B, T, C) enters the block, `directions` are columns (C, rank)."""
    x = x.detach()
    qkv = projected(block.attn, block.norm1(x)).detach()
    width, found = qkv.shape[-1] // 3, []
    for image in range(len(x)):
        tokens = range(num_prefix, x.shape[1])
        if source == "token":
            found.append([length(x[image, token]) for token in tokens])
        elif source == "direction":
            found.append([length(x[image, token].double() @ each for each in directions.T) / length(x[image, token])
                          for token in tokens])
        elif source == "attention":
            rows = []
            for head in range(block.attn.num_heads):
                q, k, _ = one_head(block.attn, qkv[image], head, rope)
                rows.append(row_logits(q, k, 0).softmax(0).detach())
            found.append([sum(float(row[token]) for row in rows) / len(rows) for token in tokens])
        else:
            start = ["query", "key", "value"].index(source) * width
            found.append([length(qkv[image, token, start:start + width]) for token in tokens])
    return found


def artifact_sets(values: list[list[float]], threshold: float | None, side: str, num_prefix: int) -> list[set[int]]:
    """Return the patches on one side of θ in every image, as token numbers."""
    found = []
    for image in values:
        found.append(set())
        for patch, value in enumerate(image):
            if threshold is not None and (value <= threshold if side == "low" else value >= threshold):
                found[-1].add(num_prefix + patch)
    return found


def edited_row(row: Tensor, artifacts: set[int], num_prefix: int, attenuation: str, alpha: float) -> Tensor:
    """Return the attention weights of one query row of one head with the artifacts attenuated; row holds its logits."""
    logits, weights = list(row), list(row.softmax(0))
    patches = range(num_prefix, len(logits))
    normal = [token for token in patches if token not in artifacts]
    if attenuation == "scale":
        for token in artifacts:
            weights[token] = weights[token] * alpha
        return torch.stack(weights) / sum(weights)
    if attenuation == "spread" and normal:
        taken = sum(weights[token] for token in artifacts)
        for token in patches:
            weights[token] = weights[token] + taken / len(normal) if token in normal else weights[token] * 0
        return torch.stack(weights)
    for token in artifacts:
        if attenuation == "min":
            logits[token] = min(row[other] for other in patches)
        elif attenuation == "mask":
            logits[token] = row.new_tensor(-math.inf)
        elif attenuation == "mean" and normal:
            logits[token] = sum(row[other] for other in normal) / len(normal)
        elif attenuation == "clip" and normal:
            logits[token] = min(row[token], max(row[other] for other in normal))
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


def one_head(attn, qkv: Tensor, head: int, rope: Tensor | None) -> list[Tensor]:
    """Return q, k and v of one head of one image (T, d) as they enter the attention; qkv is (T, 3 · D)."""
    width = qkv.shape[-1] // 3
    size = width // attn.num_heads
    q, k, v = (qkv[:, part * width + head * size:part * width + (head + 1) * size] for part in range(3))
    return [*(rotated_patches(attn, x, rope, head) for x in (attn.q_norm(q), attn.k_norm(k))), v]


def row_logits(q: Tensor, k: Tensor, row: int) -> Tensor:
    return k @ q[row] / math.sqrt(q.shape[1])


def attention(attn, normed: Tensor, edit, rope: Tensor | None = None, replaced=None, substitute=None) -> Tensor:
    """Compute timm's attention head by head and row by row; `edit(image, row, logits)` returns the weights of a row.

    The tokens `replaced(image, row)` have the value of the normed token `substitute` (C,) there.
    """
    qkv, images = projected(attn, normed), []
    other = None if substitute is None else projected(attn, substitute.expand(1, 1, -1))[0]
    for image in range(len(qkv)):
        heads = []
        for head in range(attn.num_heads):
            q, k, v = one_head(attn, qkv[image], head, rope)
            rows = []
            for row in range(len(q)):
                values = list(v)
                for token in () if other is None else replaced(image, row):
                    values[token] = one_head(attn, other, head, None)[2][0]
                rows.append(edit(image, row, row_logits(q, k, row)) @ torch.stack(values))
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


def forward(model, images: Tensor, itae, artifacts=None, seen=None) -> Tensor:
    """Return all output tokens of a timm ViT, after the final norm, under a setting.

    `artifacts[block][image]` replaces the sets that the thresholds give. The weights of every `[CLS]` row are appended
    to `seen[block]`, head by head. Blocks that are not edited are the model's own.
    """
    x, options = embedded(model, images)
    depth, prefix = len(model.blocks), model.num_prefix_tokens
    for index, block in enumerate(model.blocks):
        edited = index - (depth - itae.blocks)
        if edited < 0:
            x = block(x, **options[index])
            continue
        if artifacts is None:
            directions = singular_directions(model, index, itae.rank) if itae.source == "direction" else None
            values = statistic(itae.source, block, x, prefix, directions=directions, **options[index])
            sets = artifact_sets(values, itae.thresholds[edited], itae.side, prefix)
        else:
            sets = artifacts[index]

        def in_row(image, row, sets=sets):
            return sets[image] if itae.rows == "all" or row == 0 else set()

        def edit(image, row, logits, index=index, in_row=in_row):
            tokens = in_row(image, row)
            weights = edited_row(logits, tokens, prefix, itae.attenuation, itae.alpha) if tokens else logits.softmax(0)
            if row == 0 and seen is not None:
                seen.setdefault(index, []).append(weights)
            return weights

        substitute = itae.substitutes and torch.tensor(itae.substitutes[edited])
        x = x + scaled(block, 1, attention(block.attn, block.norm1(x), edit, replaced=in_row, substitute=substitute,
                                           **options[index]))
        x = x + scaled(block, 2, block.mlp(block.norm2(x)))
    return model.norm(x)


def mean_jacobian(mlp) -> Tensor:
    """Return E[∂mlp(x)/∂x] for x ~ N(0, I), (C, C): one hidden unit after the other, by quadrature in two dimensions.

    A unit is act(u) · t, with u = w·x + b and t = v·x + c, or 1 without a gate. Its mean derivative is
    E[∂/∂u] w + E[∂/∂t] v. Both are functions of z₁ and z₂ ~ N(0, 1), where z₁ is the standardised u.
    """
    layers = [mlp.fc1_g, mlp.fc1_x] if hasattr(mlp, "fc1_g") else [mlp.fc1]
    weights = torch.cat([layer.weight for layer in layers])
    biases = torch.cat([layer.weight[:, 0] * 0 if layer.bias is None else layer.bias for layer in layers])
    if len(weights) == mlp.fc2.in_features:
        weights, biases = torch.cat([weights, weights * 0]), torch.cat([biases, biases * 0 + 1])
    (w, v), (b, c) = weights.chunk(2), biases.chunk(2)
    nodes, shares = map(torch.from_numpy, np.polynomial.hermite_e.hermegauss(40))
    z1, z2 = torch.meshgrid(nodes, nodes, indexing="ij")
    shares = torch.outer(shares, shares) / shares.sum() ** 2
    rows = []
    for unit in range(len(w)):
        sigma = w[unit].norm()
        along = w[unit] @ v[unit] / sigma
        u = (b[unit] + sigma * z1).detach().requires_grad_(True)
        t = c[unit] + along * z1 + (v[unit] @ v[unit] - along ** 2).clamp(min=0).sqrt() * z2
        t = t.detach().requires_grad_(True)
        by_u, by_t = torch.autograd.grad((mlp.act(u) * t * shares).sum(), [u, t])
        rows.append(by_u.sum() * w[unit] + by_t.sum() * v[unit])
    return mlp.fc2.weight @ torch.stack(rows)


def sampled_jacobian(mlp, samples: int = 50_000) -> Tensor:
    """Return the matrix (C, C) that fits the MLP best on samples x ~ N(0, I), by least squares."""
    x = torch.randn(samples, mlp.fc2.out_features, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    with_one = torch.cat([x, torch.ones(samples, 1, dtype=torch.float64)], dim=1)
    return torch.linalg.lstsq(with_one, mlp(x)).solution[:-1].T


def singular_directions(model, index: int, rank: int = 1, jacobian=mean_jacobian) -> Tensor:
    """Return the leading left singular vectors (C, rank) of the blocks before a block, each replaced by a linear map.

    The unit vectors are passed through these maps.
    """
    x = torch.eye(model.embed_dim, dtype=torch.float64)
    for block in copy.deepcopy(model).double().requires_grad_(False).blocks[:index]:
        normed = (x - x.mean(1, keepdim=True)) * block.norm1.weight
        value = (projected(block.attn, normed) - projected(block.attn, normed * 0)).chunk(3, dim=-1)[2]
        x = x + scaled(block, 1, value @ block.attn.proj.weight.T)
        normed = (x - x.mean(1, keepdim=True)) * block.norm2.weight
        x = x + scaled(block, 2, normed @ jacobian(block.mlp).T)
    return torch.linalg.svd(x.T).U[:, :rank]


# --- test-time registers ----------------------------------------------------------------------------------------------
# The extra token stands at place 1 here, behind [CLS]. Its place changes nothing.

def hidden_units(mlp, token: Tensor) -> Tensor:
    """Return the inputs of the last layer of an MLP for one token, (hidden,)."""
    if hasattr(mlp, "fc1_g"):
        return mlp.norm(mlp.act(mlp.fc1_g(token)) * mlp.fc1_x(token))
    x = mlp.fc1(token)
    if len(x) == mlp.fc2.in_features:
        return mlp.norm(mlp.act(x))
    first, second = x.chunk(2)
    return mlp.norm(first * mlp.act(second) if mlp.gate_last else mlp.act(first) * second)


def with_neurons_moved(mlp, tokens: Tensor, units, place: int | None) -> Tensor:
    """Return the output of an MLP for the tokens of one image; no place: the units are silent."""
    hidden = [hidden_units(mlp, token).clone() for token in tokens]
    for unit in units:
        largest = max(float(each[unit]) for each in hidden)
        for number, each in enumerate(hidden):
            each[unit] = largest if number == place else 0.0
    return torch.stack([mlp.fc2(each) for each in hidden])


def attention_with_column(attn, normed: Tensor, weigh, column, rope: Tensor | None = None) -> Tensor:
    """Compute timm's attention row by row, with one more key and value (H, d) each at place 1, if there is a column."""
    qkv, images = projected(attn, normed), []
    for image in range(len(qkv)):
        heads = []
        for head in range(attn.num_heads):
            q, k, v = one_head(attn, qkv[image], head, rope)
            if column is not None:
                k, v = (torch.cat([x[:1], further[head][None], x[1:]]) for x, further in zip((k, v), column,
                                                                                             strict=True))
            heads.append(torch.stack([weigh(image, row, row_logits(q, k, row)) @ v for row in range(len(q))]))
        images.append(torch.cat(heads, dim=-1))
    return attn.proj(attn.norm(torch.stack(images)))


def forward_with_registers(model, images: Tensor, neurons, *, first: int | None = 0, columns=None, itae=None,
                           seen=None) -> Tensor:
    """Return the output tokens (B, T, C) after the final norm, the extra token left out.

    It enters at block `first`; None adds no token. `columns` hold a further key and value for each block. `itae` edits
    the last block. `seen` gets the key and value (B, H, d) of the extra token in each block, and the patches after it.
    """
    x, options = embedded(model, images)
    prefix, here, last = model.num_prefix_tokens, False, len(model.blocks) - 1
    for index, block in enumerate(model.blocks):
        if index == first:
            token = torch.zeros_like(x[:, :1])
            x, here = torch.cat([x[:, :1], model.norm_pre(token) if index == 0 else token, x[:, 1:]], dim=1), True
        further = int(here or columns is not None)
        sets = None
        if itae is not None and index == last:
            values = statistic(itae.source, block, x, prefix + int(here), **options[index])
            sets = artifact_sets(values, itae.thresholds[-1], itae.side, prefix + further)

        def weigh(image, row, logits, sets=sets, further=further):
            if sets is None or row or not sets[image]:
                return logits.softmax(0)
            return edited_row(logits, sets[image], prefix + further, itae.attenuation, itae.alpha)

        normed = block.norm1(x)
        if seen is not None and here:
            parts = [[one_head(block.attn, projected(block.attn, normed)[image], head, options[index].get("rope"))
                      for head in range(block.attn.num_heads)] for image in range(len(x))]
            seen.append([torch.stack([torch.stack([head[part][1] for head in image]) for image in parts])
                         for part in (1, 2)])
        attended = attention_with_column(block.attn, normed, weigh, columns and columns[index], **options[index])
        x = x + scaled(block, 1, attended)
        normed, units = block.norm2(x), neurons.get(index, ())
        moved = [with_neurons_moved(block.mlp, image, units, 1 if here else None) for image in normed]
        x = x + scaled(block, 2, torch.stack(moved))
    x = model.norm(x)
    return torch.cat([x[:, :1], x[:, 2:]], dim=1) if here else x


def neuron_scores(model, images: Tensor, outliers: list[set[int]]) -> list[list[float]]:
    """Return s(block, unit): the mean over images with outliers of a unit's mean over the image's outlier patches."""
    x, options = embedded(model, images)
    scores = []
    for index, block in enumerate(model.blocks):
        entering = x + scaled(block, 1, block.attn(block.norm1(x), **options[index]))
        hidden = [[hidden_units(block.mlp, token) for token in image] for image in block.norm2(entering)]
        scores.append([])
        for unit in range(block.mlp.fc2.in_features):
            means = [sum(float(hidden[image][token][unit]) for token in tokens) / len(tokens)
                     for image, tokens in enumerate(outliers) if tokens]
            scores[-1].append(sum(means) / len(means))
        x = block(x, **options[index])
    return scores
