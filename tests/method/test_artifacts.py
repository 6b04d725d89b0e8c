import math

import numpy as np
import pytest
import torch

from itae_utils.errors import ItaeError
from itae_utils.method.artifacts import FiringRule, precision_recall, select_artifacts
from itae_utils.method.setting import ITAE
from tests.conftest import images, tiny_vit

# --- selection --------------------------------------------------------------------------------------------------------

NORMS = torch.arange(16.0).expand(5, 16) + torch.tensor([[9.0], [0.0], [-3.0], [-20.0], [20.0]])  # (5, 16)


def selected(norms=NORMS, threshold=8.0, block=2, image_numbers=range(10, 15), truth=None, **options):
    return select_artifacts(norms, threshold, ITAE(threshold=1.0, **options), block=block, image_numbers=image_numbers,
                            truth=truth)


def test_threshold_selects_the_values_on_its_side_and_those_at_it():
    assert selected().tolist() == selected(source="token", tail="low").tolist() == (NORMS <= 8).tolist()
    assert selected(tail="high").tolist() == selected(source="attention").tolist() == (NORMS >= 8).tolist()
    for tail in ("low", "high"):
        assert not selected(threshold=None, tail=tail).any()


@pytest.mark.parametrize("image_numbers", [range(10, 15), (3, 4, 11, 700, 2**40)])
def test_random_control_depends_on_seed_block_and_image_number_alone(image_numbers):
    found = selected(select="random", image_numbers=image_numbers)
    assert found.sum(1).tolist() == (NORMS <= 8).sum(1).tolist() == [0, 9, 12, 16, 0]
    one_by_one = [selected(NORMS[[row]], select="random", image_numbers=(number,))
                  for row, number in enumerate(image_numbers)]
    assert torch.equal(torch.cat(one_by_one), found)
    for other in ({"seed": 1}, {"block": 3}, {"image_numbers": range(20, 25)}):
        assert not torch.equal(selected(select="random", **({"image_numbers": image_numbers} | other)), found)


def test_random_control_draws_every_patch_alike():
    many = torch.zeros(2000, 16)
    many[:, 4:] = 9.0
    draws = selected(many, image_numbers=range(2000), select="random")
    assert (draws.sum(1) == 4).all()
    assert draws.float().mean(0).sub(0.25).abs().max() < 0.05


def test_oracle_takes_the_truth_of_the_right_shape():
    truth = torch.rand(5, 16) < 0.5
    assert torch.equal(selected(select="oracle", truth=truth), truth)
    for wrong, named in [(None, "oracle"), (truth[:, 1:], r"\(5, 15\)")]:
        with pytest.raises(ItaeError, match=named):
            selected(select="oracle", truth=wrong)


# --- ground truth -----------------------------------------------------------------------------------------------------

def test_firing_rule_captures_any_of_its_neurons_on_patches():
    model, batch = tiny_vit("registers"), images(3)
    activations = []
    handle = model.blocks[1].mlp.act.register_forward_hook(lambda _m, _a, out: activations.append(out))
    with FiringRule(1, (4, 9), 0.5).capture(model) as captured:
        model(batch)
    handle.remove()
    expected = [[any(float(token[n]) > 0.5 for n in (4, 9)) for token in image[5:]] for image in activations[0]]
    assert captured.mask.tolist() == expected
    assert 0 < captured.mask.float().mean() < 1
    model(images(1))
    assert len(captured.mask) == 3  # a closed context captures nothing


def test_precision_and_recall():
    found = np.array([[True, True, False, False]])
    truth = np.array([[True, False, True, True]])
    assert precision_recall(found, truth) == (1 / 2, 1 / 3)
    assert all(math.isnan(value) for value in precision_recall(found & False, truth & False))
    with pytest.raises(ItaeError, match=r"\(1, 3\)"):
        precision_recall(found, truth[:, :3])


@pytest.mark.parametrize("form", [np.asarray, torch.tensor, list, lambda mask: np.asarray(mask, dtype=int)])
def test_precision_and_recall_of_masks_in_other_forms(form):
    assert precision_recall(form([True, True, False]), form([True, False, False])) == (0.5, 1.0)


@pytest.mark.parametrize("other", [[0.5, 1.0], np.array([2, 0]), torch.tensor([0.0, 1.0]), ["a"], None, {"a": [True]}])
def test_precision_and_recall_of_other_values_are_refused(other):
    with pytest.raises(ItaeError, match="truth"):
        precision_recall(np.array([True, False]), other)
