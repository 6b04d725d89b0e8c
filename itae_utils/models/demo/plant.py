"""Plant artifacts in a clean ViT by editing its weights, so that the result is again a plain timm checkpoint.

The mechanism follows reports on real models. A few MLP neurons of a middle block write a massive activation into a few
uninformative patches (register neurons, arXiv 2506.08010; massive activations, arXiv 2402.17762). In the last block
those tokens attract the attention of `[CLS]` although their keys are short. Here each of a few positions has one
neuron. It fires if the patch at its position is blank, and that token gets a value vector of its own. So the image's
feature depends on which edges of the digit are empty, and the true artifacts are known.

All edits write along directions that the residual stream hardly uses, and normal tokens lose their component along
them. So the edits act on the marked tokens alone. Normal tokens still change a little: the neurons lose their old
function, and the other tokens no longer receive the old content of the marked patches.
"""

from __future__ import annotations

import copy
import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from itae_utils.method.anatomy import tokens_entering
from itae_utils.method.artifacts import FiringRule

BLOCK = 3               # block whose MLP holds the neurons; marked tokens enter the blocks after it
POSITIONS = ((2, 0), (2, 6), (4, 0), (4, 6))  # (row, column) at the edges, blank in about half of the digits
BLANK = 0.02            # a patch is blank if no pixel is brighter than this; the brightest possible pixel is 1
NOT_BLANK = 0.15        # a patch has ink if a pixel is brighter than this; the fit leaves out patches in between
MARGIN = 24.0           # activation before the GELU: about this on blank patches, about −this on all other tokens
HIDDEN_NORM = 200.0     # norm of the vector that a neuron writes; a normal token's norm is about 6
TRUTH_ABOVE = 2.0       # a neuron fires above this activation: it then writes a few times a normal token's norm
KEY_OFFSET = 4.0        # added to a head's keys along a direction that queries don't use, which changes no softmax
ARTIFACT_KEY = 0.7      # length of an artifact's key in each head
ATTENTION_SHARE = 0.93  # share of the last block's [CLS] attention on the artifacts of a typical image
VALUE_NORM = 3.0        # length of an artifact's value, relative to the median length of the patches' values


@torch.no_grad()
def plant_artifacts(clean: nn.Module, images: Tensor, seed: int) -> tuple[nn.Module, FiringRule]:
    """Return a copy of `clean` with planted artifacts, and the rule that identifies them.

    Args:
        clean: the trained tiny ViT; it is not changed.
        images: (n, 3, 28, 28), on which the directions and neurons are fitted, without labels.
        seed: seed of the artifacts' value directions.
    """
    # Double precision: the variances along the least used directions are close, so rounding would rotate them.
    model, images = copy.deepcopy(clean).double().eval(), images.double()
    directions = _quiet_directions(model, images, len(POSITIONS))
    _silence(model, directions)
    # Record q, k, v of the blocks in between before planting, for `_keep_behaviour`.
    usual = {index: _projections(model, images, index) for index in range(BLOCK + 1, len(model.blocks) - 1)}
    neurons = _plant_neurons(model, images, directions)
    rule = FiringRule(BLOCK, tuple(neurons), TRUTH_ABOVE)
    for index, projections in usual.items():
        _keep_behaviour(model, images, rule, directions, index, projections)
    _plant_attention(model, images, rule, directions, seed)
    return model.float(), rule


def _token_positions(model: nn.Module) -> list[int]:
    columns = model.patch_embed.grid_size[1]
    return [model.num_prefix_tokens + row * columns + column for row, column in POSITIONS]


def _quiet_directions(model: nn.Module, images: Tensor, count: int) -> Tensor:
    """Return the orthonormal directions (C, count) of mean 0 that the tokens from `BLOCK` on use least."""
    blocks = range(BLOCK, len(model.blocks))
    tokens = torch.cat([x.flatten(0, 1) for x in tokens_entering(model, images, blocks).values()])
    moment = tokens.T @ tokens / len(tokens) + 1e6  # so no direction with a mean is among the least used
    return torch.linalg.eigh(moment).eigenvectors[:, :count]


def _silence(model: nn.Module, directions: Tensor) -> None:
    """Remove `directions` from the output of every layer, so that normal tokens have no component along them."""
    away = torch.eye(len(directions), dtype=directions.dtype) - directions @ directions.T
    model.pos_embed.copy_(model.pos_embed @ away)
    model.cls_token.copy_(model.cls_token @ away)
    embedding = model.patch_embed.proj
    embedding.weight.copy_(torch.einsum("cd,dijk->cijk", away, embedding.weight))
    embedding.bias.copy_(away @ embedding.bias)
    for block in model.blocks:
        for layer in (block.attn.proj, block.mlp.fc2):
            layer.weight.copy_(away @ layer.weight)
            layer.bias.copy_(away @ layer.bias)


def _plant_neurons(model: nn.Module, images: Tensor, directions: Tensor) -> list[int]:
    """Make the least used neurons of the block's MLP fire on blank patches, one neuron per position; return them."""
    block = model.blocks[BLOCK]
    inputs, activations = _mlp_inputs(model, images)
    hidden = block.mlp.fc2.weight
    neurons = (activations.flatten(0, 1).std(0) * hidden.norm(dim=0)).argsort()[:len(POSITIONS)].tolist()
    block.mlp.fc2.bias.add_(hidden[:, neurons] @ activations.flatten(0, 1).mean(0)[neurons])
    brightness = _brightness(model, images)
    for place, (position, neuron) in enumerate(zip(_token_positions(model), neurons, strict=True)):
        weight, bias = _fit_neuron(inputs, brightness, position)
        block.mlp.fc1.weight[neuron], block.mlp.fc1.bias[neuron] = weight, bias
        blank = brightness[:, position - model.num_prefix_tokens] <= BLANK
        typical = (inputs[blank, position] @ weight + bias).median()
        hidden[:, neuron] = directions[:, place] * HIDDEN_NORM / typical
    return neurons


def _mlp_inputs(model: nn.Module, images: Tensor) -> tuple[Tensor, Tensor]:
    """Return the input (n, T, C) of the block's MLP and its activations (n, T, hidden)."""
    caught = {}
    mlp = model.blocks[BLOCK].mlp
    handles = [mlp.fc1.register_forward_hook(lambda _module, args, _output: caught.update(inputs=args[0])),
               mlp.act.register_forward_hook(lambda _module, _args, output: caught.update(activations=output))]
    tokens_entering(model, images, [BLOCK + 1])
    for handle in handles:
        handle.remove()
    return caught["inputs"], caught["activations"]


def _brightness(model: nn.Module, images: Tensor) -> Tensor:
    """Return the brightest pixel of every patch, 0 to 1: (n, N)."""
    rows, columns = model.patch_embed.patch_size
    patches = (images[:, 0] + 1).div(2).unfold(1, rows, rows).unfold(2, columns, columns)
    return patches.amax((-1, -2)).flatten(1)


def _fit_neuron(inputs: Tensor, brightness: Tensor, position: int) -> tuple[Tensor, Tensor]:
    """Fit a linear rule that is ≥ MARGIN on the blank patches at one position and ≤ −MARGIN on all other tokens.

    The fit includes `[CLS]` tokens; otherwise the neuron fires on them and ruins the image's feature.
    """
    patch = position - (inputs.shape[1] - brightness.shape[1])
    sign = -torch.ones(inputs.shape[:2], dtype=inputs.dtype)
    sign[:, position] = torch.where(brightness[:, patch] <= BLANK, 1.0, -1.0)
    sign[(brightness[:, patch] > BLANK) & (brightness[:, patch] < NOT_BLANK), position] = 0
    x, sign = inputs.flatten(0, 1), sign.flatten()
    share = 0.5 / torch.stack([(sign < 0).sum(), (sign > 0).sum()])
    importance = torch.where(sign > 0, share[1], torch.where(sign < 0, share[0], 0.0))
    weight, bias = x.new_zeros(x.shape[1], requires_grad=True), x.new_zeros((), requires_grad=True)
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=300, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        with torch.enable_grad():
            shortfall = (1 - sign * (x @ weight + bias)).clamp(min=0)
            value = (importance * shortfall ** 2).sum() + 1e-5 * weight.square().sum()
        value.backward()
        return value

    optimizer.step(loss)
    return weight.detach() * MARGIN, bias.detach() * MARGIN


def _projections(model: nn.Module, images: Tensor, index: int) -> Tensor:
    """Return q, k and v of every token in one block, concatenated: (n, T, 3 · D)."""
    tokens = tokens_entering(model, images, [index])[index]
    return model.blocks[index].attn.qkv(model.blocks[index].norm1(tokens))


def _heads(model: nn.Module, images: Tensor, index: int) -> Tensor:
    """Return q, k and v of every token in one block, by head: (3, n, H, T, d)."""
    attention, projected = model.blocks[index].attn, _projections(model, images, index)
    return projected.unflatten(2, (3, attention.num_heads, attention.head_dim)).permute(2, 0, 3, 1, 4)


def _firing(model: nn.Module, images: Tensor, rule: FiringRule) -> Tensor:
    """Return whether the neuron of each of the P positions fires at its position: (n, P) bool."""
    _, activations = _mlp_inputs(model, images)
    return torch.stack([
        activations[:, position, neuron] > rule.above
        for position, neuron in zip(_token_positions(model), rule.neurons, strict=True)
    ], dim=1)


def _steer(model: nn.Module, index: int, directions: Tensor, place: int, change: Tensor) -> None:
    """Add `change` (3 · D) to the q, k, v of the tokens along direction number `place` only.

    After the LayerNorm such a token lies along the direction with length √C. All other tokens have only the component
    of the LayerNorm's bias, which the projection's bias cancels.
    """
    norm, projection = model.blocks[index].norm1, model.blocks[index].attn.qkv
    reader = directions[:, place] / norm.weight / len(norm.weight) ** 0.5
    projection.weight.add_(torch.outer(change, reader))
    projection.bias.sub_(change * (reader @ norm.bias))


def _keep_behaviour(model: nn.Module, images: Tensor, rule: FiringRule, directions: Tensor, index: int,
                    usual: Tensor) -> None:
    """Give the marked tokens, in a block in between, the mean q, k, v that blank patches have without planting."""
    firing, now = _firing(model, images, rule), _projections(model, images, index)
    for place, position in enumerate(_token_positions(model)):
        fires = firing[:, place]
        _steer(model, index, directions, place, (usual[fires, position] - now[fires, position]).mean(0))


def _plant_attention(model: nn.Module, images: Tensor, rule: FiringRule, directions: Tensor, seed: int) -> None:
    """In the last block, give marked tokens short keys that attract all queries, and large values."""
    last = len(model.blocks) - 1
    attention = model.blocks[last].attn
    q, k, v = _heads(model, images, last)
    prefix, dim = model.num_prefix_tokens, attention.num_heads * attention.head_dim
    weight = attention.qkv.weight.view(3, attention.num_heads, attention.head_dim, -1)
    bias = attention.qkv.bias.view(3, attention.num_heads, attention.head_dim)
    sought = weight.new_empty(attention.num_heads, attention.head_dim)
    for head in range(attention.num_heads):
        keys, queries = k[:, head].flatten(0, 1), q[:, head, 0]
        sought[head], offset = _unused_pair(queries, keys)
        for part in (0, 1):  # queries and normal keys lose their component along the sought direction
            _project_out(weight[part, head], bias[part, head], sought[head])
        _project_out(weight[0, head], bias[0, head], offset)
        bias[1, head] += KEY_OFFSET * offset
    firing, now = _firing(model, images, rule), _projections(model, images, last)
    generator = torch.Generator().manual_seed(seed)
    value_norm = VALUE_NORM * v[:, :, prefix:].transpose(1, 2).flatten(2).norm(dim=-1).median()
    for place, position in enumerate(_token_positions(model)):
        target = now[firing[:, place], position].mean(0)
        change = torch.zeros_like(target)
        change[dim:2 * dim] = (ARTIFACT_KEY * sought).flatten() - target[dim:2 * dim]
        value = torch.randn(dim, generator=generator, dtype=target.dtype)
        change[2 * dim:] = value_norm * value / value.norm() - target[2 * dim:]
        _steer(model, last, directions, place, change)
    for head in range(attention.num_heads):
        bias[0, head] += _needed_query(model, images, firing, head) * sought[head]


def _unused_pair(queries: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
    """Return two orthogonal directions of a head: the one that keys use least, and the one that queries use least."""
    sought = torch.linalg.eigh(keys.T @ keys).eigenvectors[:, 0]
    moment = queries.T @ queries
    offset = torch.linalg.eigh(moment + moment.trace() * torch.outer(sought, sought)).eigenvectors[:, 0]
    return sought, offset


def _project_out(weight: Tensor, bias: Tensor, direction: Tensor) -> None:
    """Remove the component along `direction` (d,) from a head's projection (d, C)."""
    weight.sub_(torch.outer(direction, direction @ weight))
    bias.sub_(direction * (direction @ bias))


def _needed_query(model: nn.Module, images: Tensor, firing: Tensor, head: int) -> float:
    """Return the query bias with which a median image's artifacts attract `ATTENTION_SHARE` of a head's attention."""
    attention = model.blocks[-1].attn
    q, k, _ = _heads(model, images, len(model.blocks) - 1)
    logits = (q[:, head, :1] @ k[:, head].mT)[:, 0] * attention.scale
    marked = torch.zeros_like(logits, dtype=torch.bool)
    for place, position in enumerate(_token_positions(model)):
        marked[:, position] = firing[:, place]
    some = marked.any(1)
    others = logits.masked_fill(marked, -torch.inf).logsumexp(1)[some]
    count = marked.sum(1)[some].log()
    odds = torch.tensor(ATTENTION_SHARE / (1 - ATTENTION_SHARE)).log()
    return float((others - count + odds).median() / attention.scale / ARTIFACT_KEY)


def save_checkpoints(folder: Path, clean: nn.Module, planted: nn.Module, truth: FiringRule) -> None:
    """Write demo-clean.safetensors (all tensors), demo.safetensors (those that differ) and demo.json (the rule)."""
    folder.mkdir(parents=True, exist_ok=True)
    before, after = clean.state_dict(), planted.state_dict()
    changed = {name: value.contiguous() for name, value in after.items() if not torch.equal(value, before[name])}
    save_file({name: value.contiguous() for name, value in before.items()}, folder / "demo-clean.safetensors")
    save_file(changed, folder / "demo.safetensors")
    rule = {"block": truth.block, "neurons": list(truth.neurons), "above": truth.above}
    (folder / "demo.json").write_text(json.dumps({"artifacts_where_any_fires": rule}, indent=2) + "\n")
