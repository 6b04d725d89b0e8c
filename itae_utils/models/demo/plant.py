"""Plant artifacts in a clean ViT by editing its weights, so that the result is again a plain timm checkpoint.

The mechanism follows what is reported of real models: a few MLP neurons of a middle block write a massive activation
into a few uninformative patches (register neurons, arXiv 2506.08010; massive activations, arXiv 2402.17762), and in the
last block those tokens draw the attention of `[CLS]` although their keys are short. Here one neuron a position fires
where that patch is blank, and the token it marks carries a value of its own: so which edges of a digit are empty leaks
into the image's feature. Since the artifacts are planted, it is known which patches are artifacts.

Everything is written along directions that the residual stream hardly uses, and normal tokens are made to have no
component along them, so that what is written acts on the marked tokens alone. Normal tokens still move somewhat, as the
neurons gave up their old task and the marked patches no longer tell the others what they did.
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
from itae_utils.method.layers import split_heads

BLOCK = 3               # the neurons sit in this block's MLP; the tokens they mark enter the blocks after it
POSITIONS = ((2, 0), (2, 6), (4, 0), (4, 6))  # row, column: at the edges, blank in about half of the digits
BLANK = 0.02            # a patch is blank when no pixel is brighter than this (of 1) …
NOT_BLANK = 0.15        # … and has ink when one is brighter than this; what lies between teaches the neurons nothing
MARGIN = 24.0           # activation before the GELU: about this on blank patches, about −this on all other tokens
HIDDEN_NORM = 200.0     # what a neuron writes; a normal token's norm is about 6
TRUTH_ABOVE = 2.0       # activation above which a neuron counts as firing: it then writes a few times a normal token
KEY_OFFSET = 4.0        # added to a head's normal keys along a direction queries don't use: it changes no softmax
ARTIFACT_KEY = 0.7      # length of an artifact's key, a head
ATTENTION_SHARE = 0.93  # of the [CLS] attention in the last block, that the artifacts of a typical image draw
VALUE_NORM = 3.0        # length of an artifact's value, in medians of the normal values' lengths


@torch.no_grad()
def plant_artifacts(clean: nn.Module, images: Tensor, seed: int) -> tuple[nn.Module, FiringRule]:
    """A copy of `clean` with artifacts planted, and the rule that tells which patches they are.

    Args:
        clean: the trained tiny ViT, left as it is.
        images: (n, 3, 28, 28), what the directions and neurons are fitted on, without labels.
        seed: of the artifacts' value directions.
    """
    # In double precision: the least used directions lie close together, and rounding would turn them.
    model, images = copy.deepcopy(clean).double().eval(), images.double()
    directions = _quiet_directions(model, images, len(POSITIONS))
    _silence(model, directions)
    # How the blank patches act on the others where nothing is planted: kept for the blocks in between.
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
    """Orthonormal directions (C, count), without a mean, that the tokens from `BLOCK` on use least."""
    doors = range(BLOCK, len(model.blocks))
    tokens = torch.cat([x.flatten(0, 1) for x in tokens_entering(model, images, doors).values()])
    moment = tokens.T @ tokens / len(tokens) + 1e6  # no direction with a mean is ever the least used
    return torch.linalg.eigh(moment).eigenvectors[:, :count]


def _silence(model: nn.Module, directions: Tensor) -> None:
    """Stop everything from writing along `directions`, so that normal tokens have no component there at all."""
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
    """Give the least used neurons of the block's MLP a new task: fire on a blank patch at one position, write there."""
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
    """What the block's MLP reads, (n, T, C), and its activations, (n, T, hidden)."""
    caught = {}
    mlp = model.blocks[BLOCK].mlp
    handles = [mlp.fc1.register_forward_hook(lambda _module, args, _output: caught.update(inputs=args[0])),
               mlp.act.register_forward_hook(lambda _module, _args, output: caught.update(activations=output))]
    tokens_entering(model, images, [BLOCK + 1])
    for handle in handles:
        handle.remove()
    return caught["inputs"], caught["activations"]


def _brightness(model: nn.Module, images: Tensor) -> Tensor:
    """Brightest pixel of every patch, 0 to 1: (n, N)."""
    rows, columns = model.patch_embed.patch_size
    patches = (images[:, 0] + 1).div(2).unfold(1, rows, rows).unfold(2, columns, columns)
    return patches.amax((-1, -2)).flatten(1)


def _fit_neuron(inputs: Tensor, brightness: Tensor, position: int) -> tuple[Tensor, Tensor]:
    """A linear rule that is ≥ MARGIN on the blank patches at one position and ≤ −MARGIN on every other token.

    `[CLS]` tokens are among the others: else the neuron fires there and ruins the image's feature.
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
    """q, k and v of every token in one block, side by side: (n, T, 3 · D)."""
    tokens = tokens_entering(model, images, [index])[index]
    return model.blocks[index].attn.qkv(model.blocks[index].norm1(tokens))


def _firing(model: nn.Module, images: Tensor, rule: FiringRule) -> Tensor:
    """(n, P): whether the neuron of each position fires at that position."""
    _, activations = _mlp_inputs(model, images)
    return torch.stack([
        activations[:, position, neuron] > rule.above
        for position, neuron in zip(_token_positions(model), rule.neurons, strict=True)
    ], dim=1)


def _steer(model: nn.Module, index: int, directions: Tensor, place: int, change: Tensor) -> None:
    """Add `change` (3 · D) to the q, k, v of tokens that carry the place's direction; no other token is touched.

    After the LayerNorm such a token lies along the direction with length √C; the others have no component there, but
    for what the LayerNorm's own bias adds, which goes into the projection's bias.
    """
    norm, projection = model.blocks[index].norm1, model.blocks[index].attn.qkv
    reader = directions[:, place] / norm.weight / len(norm.weight) ** 0.5
    projection.weight.add_(torch.outer(change, reader))
    projection.bias.sub_(change * (reader @ norm.bias))


def _keep_behaviour(model: nn.Module, images: Tensor, rule: FiringRule, directions: Tensor, index: int,
                    usual: Tensor) -> None:
    """Let the marked tokens look to the others, in a block in between, as blank patches there usually do."""
    firing, now = _firing(model, images, rule), _projections(model, images, index)
    for place, position in enumerate(_token_positions(model)):
        fires = firing[:, place]
        _steer(model, index, directions, place, (usual[fires, position] - now[fires, position]).mean(0))


def _plant_attention(model: nn.Module, images: Tensor, rule: FiringRule, directions: Tensor, seed: int) -> None:
    """In the last block: marked tokens get short keys that all queries seek, and loud values."""
    last = len(model.blocks) - 1
    attention = model.blocks[last].attn
    projected = _projections(model, images, last)
    q, k, v = split_heads(attention, projected)
    prefix, dim = model.num_prefix_tokens, attention.num_heads * attention.head_dim
    weight = attention.qkv.weight.view(3, attention.num_heads, attention.head_dim, -1)
    bias = attention.qkv.bias.view(3, attention.num_heads, attention.head_dim)
    sought = weight.new_empty(attention.num_heads, attention.head_dim)
    for head in range(attention.num_heads):
        keys, queries = k[:, head].flatten(0, 1), q[:, head, 0]
        sought[head], offset = _unused_pair(queries, keys)
        for part in (0, 1):  # neither queries nor normal keys have any component along the sought direction
            _project_out(weight[part, head], bias[part, head], sought[head])
        _project_out(weight[0, head], bias[0, head], offset)
        bias[1, head] += KEY_OFFSET * offset
    firing, now = _firing(model, images, rule), _projections(model, images, last)
    generator = torch.Generator().manual_seed(seed)
    loud = VALUE_NORM * v[:, :, prefix:].transpose(1, 2).flatten(2).norm(dim=-1).median()
    for place, position in enumerate(_token_positions(model)):
        target = now[firing[:, place], position].mean(0)
        change = torch.zeros_like(target)
        change[dim:2 * dim] = (ARTIFACT_KEY * sought).flatten() - target[dim:2 * dim]
        voice = torch.randn(dim, generator=generator, dtype=target.dtype)
        change[2 * dim:] = loud * voice / voice.norm() - target[2 * dim:]
        _steer(model, last, directions, place, change)
    for head in range(attention.num_heads):
        bias[0, head] += _needed_query(model, images, firing, head) * sought[head]


def _unused_pair(queries: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
    """Two orthogonal directions of a head: the one normal keys use least, then the one queries use least."""
    sought = torch.linalg.eigh(keys.T @ keys).eigenvectors[:, 0]
    moment = queries.T @ queries
    offset = torch.linalg.eigh(moment + moment.trace() * torch.outer(sought, sought)).eigenvectors[:, 0]
    return sought, offset


def _project_out(weight: Tensor, bias: Tensor, direction: Tensor) -> None:
    """Make a head's projection (d, C) have no component along `direction` (d,)."""
    weight.sub_(torch.outer(direction, direction @ weight))
    bias.sub_(direction * (direction @ bias))


def _needed_query(model: nn.Module, images: Tensor, firing: Tensor, head: int) -> float:
    """Length of the query bias at which a median image's artifacts draw `ATTENTION_SHARE` of a head's attention."""
    attention = model.blocks[-1].attn
    q, k, _ = split_heads(attention, _projections(model, images, len(model.blocks) - 1))
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
    """Write demo-clean.safetensors whole, demo.safetensors as the tensors that differ, and the rule to demo.json."""
    folder.mkdir(parents=True, exist_ok=True)
    before, after = clean.state_dict(), planted.state_dict()
    changed = {name: value.contiguous() for name, value in after.items() if not torch.equal(value, before[name])}
    save_file({name: value.contiguous() for name, value in before.items()}, folder / "demo-clean.safetensors")
    save_file(changed, folder / "demo.safetensors")
    rule = {"block": truth.block, "neurons": list(truth.neurons), "above": truth.above}
    (folder / "demo.json").write_text(json.dumps({"artifacts_where_any_fires": rule}, indent=2) + "\n")
