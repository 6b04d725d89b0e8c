import math
from functools import partial

import numpy as np
import pytest
import torch
from scipy.stats import norm
from timm.layers import GluMlp, Mlp, SwiGLU, SwiGLUPacked
from torch import nn

from itae_utils.errors import ItaeError
from itae_utils.extraction.fitting import fit_thresholds
from itae_utils.method import direction
from itae_utils.method.attention import attention_map, attenuate
from itae_utils.method.direction import singular_directions
from itae_utils.method.setting import ITAE
from tests import reference
from tests.conftest import STRUCTURES, MadeDataset, array_dataset, as_backbone, images, tiny_vit
from tests.method.test_layers import twins

WITHOUT = ("scale_norm", "eva02_split")  # norms inside their MLP


def projector(vectors):
    """Return the projection on the span of the columns, which does not depend on their signs."""
    return vectors @ vectors.T


def fitted_mlp(mlp: nn.Module) -> torch.Tensor:
    first, last = direction._linear_mlp(mlp)
    return last @ first


def drawn(mlp: nn.Module, spread: float = 0.2) -> nn.Module:
    generator = torch.Generator().manual_seed(2)
    for parameter in mlp.parameters():
        nn.init.normal_(parameter, std=spread, generator=generator)
    return mlp.double().requires_grad_(False)


MLPS = {
    "gelu": Mlp(12, 40), "tanh gelu": Mlp(12, 40, act_layer=partial(nn.GELU, "tanh")),
    "silu": Mlp(12, 40, act_layer=nn.SiLU), "no bias": Mlp(12, 40, bias=False), "swiglu": SwiGLU(12, 40),
    "packed": SwiGLUPacked(12, 80), "gate first": GluMlp(12, 80, act_layer=nn.SiLU, gate_last=True),
    "many units": Mlp(12, 1100),
}


@pytest.mark.parametrize("name", MLPS)
def test_the_linear_part_of_an_mlp_is_its_best_fit_on_samples(name):
    mlp = drawn(MLPS[name])
    found, sampled = fitted_mlp(mlp), reference.sampled_jacobian(mlp)
    assert (found - sampled).norm() < 0.06 * sampled.norm()
    if name != "gate first":
        assert torch.allclose(found, reference.mean_jacobian(mlp), atol=1e-9)


@pytest.mark.parametrize("sigma", [0.01, 1.0, 8.0])
@pytest.mark.parametrize("level", [-2.0, 0.0, 3.0])
def test_the_mean_derivative_of_gelu_in_closed_form(level, sigma):
    """For a ~ N(b, s²) and c = b / √(1 + s²): E[GELU′(a)] = Φ(c) + b φ(c) / √(1 + s²)³."""
    mlp = Mlp(2, 1, 2).double().requires_grad_(False)
    mlp.fc1.weight.copy_(sigma * torch.tensor([[0.6, -0.8]], dtype=torch.float64))
    mlp.fc1.bias.fill_(level)
    mlp.fc2.weight.copy_(torch.tensor([[1.0], [3.0]]))
    root = math.sqrt(1 + sigma ** 2)
    slope = norm.cdf(level / root) + level * norm.pdf(level / root) / root ** 3
    expected = slope * sigma * torch.tensor([[0.6, -0.8], [1.8, -2.4]], dtype=torch.float64)
    assert torch.allclose(fitted_mlp(mlp), expected, rtol=1e-9, atol=1e-12)


def test_of_a_unit_without_weights_only_the_gate_counts():
    mlp = drawn(SwiGLU(12, 40))
    mlp.fc1_g.weight[3], mlp.fc1_g.bias[3] = 0, 5.0
    first, _ = direction._linear_mlp(mlp)
    assert torch.allclose(first[3], mlp.act(mlp.fc1_g.bias[3]) * mlp.fc1_x.weight[3])


@pytest.mark.parametrize("structure", [name for name in STRUCTURES if name not in ("one_block", *WITHOUT)])
def test_directions_of_every_block_follow_the_definition(structure):
    model = tiny_vit(structure)
    for block in range(1, len(model.blocks)):
        for rank in (1, 3):
            found = singular_directions(model, block, rank)
            assert (found.shape, found.dtype) == ((24, rank), torch.float64)
            expected = reference.singular_directions(model, block, rank)
            assert torch.allclose((found * expected).sum(0).abs(), torch.ones(rank).double(), atol=1e-6)
    sampled = reference.singular_directions(model, 1, jacobian=reference.sampled_jacobian)
    assert (sampled.T @ singular_directions(model, 1)).abs() > 0.999


@pytest.mark.parametrize("gated", [False, True])
def test_a_transformers_model_has_the_directions_of_its_timm_twin(gated):
    found, expected = (projector(singular_directions(model, 2, rank=4)) for model in twins(False, gated))
    assert torch.allclose(found, expected, atol=1e-6)


def test_directions_are_computed_once_until_the_weights_change(monkeypatch):
    model, calls, compute = tiny_vit(), [], direction._compute
    monkeypatch.setattr(direction, "_compute", lambda *args: calls.append(1) or compute(*args))
    first = singular_directions(model, 2)
    assert torch.equal(singular_directions(model, 2), first)
    singular_directions(model, 1)
    assert len(calls) == 1
    model.blocks[0].mlp.fc1.weight *= 2
    assert torch.allclose(projector(singular_directions(model, 2)), projector(reference.singular_directions(model, 2)))
    assert len(calls) == 2


def test_a_store_keeps_the_directions_for_later_processes(tmp_path, monkeypatch):
    def fit(count):
        fits = fit_thresholds(as_backbone(tiny_vit("dinov2")), array_dataset(count), store=tmp_path, rank=2)
        return fits[-1, "direction"].values[:4]

    first = fit(4)
    monkeypatch.setattr(direction, "_compute", lambda *_: pytest.fail("computed again"))
    assert np.allclose(fit(5), first, atol=1e-6)


def with_part(name: str, part: nn.Module):
    model = tiny_vit()
    setattr(model.blocks[0].attn if name == "gate" else model.blocks[0], name, part)
    return model


@pytest.mark.parametrize(("model", "options", "named"), [
    (tiny_vit(), {"blocks": 3}, "no block before the first: use blocks=2"), (tiny_vit(), {"rank": 25}, "rank=25 .*24"),
    (tiny_vit("one_block"), {}, "no block before the first: use another source"),
    (tiny_vit(scale_mlp_norm=True), {}, "block 0 has a norm inside its MLP"),
    (tiny_vit("scale_norm"), {}, "block 0 has a norm inside its attention"),
    (with_part("gate", nn.Linear(24, 24)), {}, "a gated attention"),
    (with_part("mlp", nn.Sequential(nn.Linear(24, 24))), {}, "an MLP of class Sequential"),
    (with_part("norm2", nn.BatchNorm1d(24)), {}, "BatchNorm1d")])
def test_models_without_directions_are_refused_in_one_line(model, options, named):
    itae = ITAE("direction", 0.5, **options)
    for use in (lambda: attenuate(model, itae).__enter__(), lambda: attention_map(model, images(1), itae=itae)):
        with pytest.raises(ItaeError, match=named) as error:
            use()
        assert "\n" not in str(error.value)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_a_model_without_directions_has_the_other_statistics():
    fits = fit_thresholds(as_backbone(tiny_vit("scale_norm")), MadeDataset(3))
    assert {source for _, source in fits} == {"query", "key", "value", "token", "attention"}
    with pytest.raises(ItaeError, match="from block 1 on"):
        _ = fit_thresholds(as_backbone(tiny_vit()), MadeDataset(3))[0, "direction"]
