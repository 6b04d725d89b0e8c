import copy
from functools import partial

import numpy as np
import pytest
import torch

from itae_utils.errors import ItaeError
from itae_utils.extraction.features import extract_features
from itae_utils.extraction.observation import observe, sampled_norms
from itae_utils.method.artifacts import token_norms
from itae_utils.method.attention import attention_map, attenuate
from itae_utils.method.setting import ITAE
from itae_utils.models.backbones import load_backbone
from itae_utils.models.compiled import compile_blocks
from tests.conftest import MadeDataset, as_backbone, dataset_tensor, images, threshold_at, tiny_vit

torch_compile = torch.compile


def use_backend(monkeypatch, backend):
    """Let torch trace the code, and `backend` compile the graphs: no C++ compiler is needed."""
    torch._dynamo.reset()
    monkeypatch.setattr(torch, "compile", partial(torch_compile, backend=backend))


@pytest.fixture
def graphs(monkeypatch):
    """The graphs that torch has compiled; they run unchanged."""
    compiled = []

    def backend(graph, _inputs):
        compiled.append(graph)
        return graph.forward

    use_backend(monkeypatch, backend)
    yield compiled
    torch._dynamo.reset()


def compiled_vit(structure="registers"):
    model = tiny_vit(structure)
    compile_blocks(model)
    return model


def test_hooks_act_on_a_compiled_model(graphs):
    plain, compiled, batch = tiny_vit("registers"), compiled_vit(), images(2)
    compiled(batch)  # code compiled now ignores later hooks
    assert graphs
    itae = ITAE("key", threshold_at(plain, batch, "key", 0.3))
    with attenuate(plain, itae), attenuate(compiled, itae):
        attenuated = plain(batch)
        torch.testing.assert_close(compiled(batch), attenuated)
    torch.testing.assert_close(compiled(batch), plain(batch))
    assert (plain(batch) - attenuated).abs().max() > 1e-3
    torch.testing.assert_close(token_norms(compiled, batch), token_norms(plain, batch))


def test_an_extraction_runs_compiled(graphs):
    plain, compiled = as_backbone(tiny_vit("registers")), as_backbone(compiled_vit())
    variants = {"baseline": None, "itae": ITAE(threshold=threshold_at(plain.model, images(2), "key", 0.3))}
    features, others = (extract_features(backbone, MadeDataset(3), variants) for backbone in (plain, compiled))
    assert graphs
    for name in variants:
        np.testing.assert_allclose(features[name], others[name], atol=1e-5)


def test_blocks_of_one_class_are_compiled_once(graphs):
    model, batch = compiled_vit(), images(2)
    model.blocks[0](torch.zeros(2, 21, 24))
    count = len(graphs)
    model(batch)
    model(batch)
    assert count == len(graphs) > 0


def test_a_copy_of_the_model_runs_its_own_weights(graphs):
    model, batch = compiled_vit(), images(2)
    other = copy.deepcopy(model)
    for parameter in other.parameters():
        parameter.zero_()
    assert other(batch).abs().max() == 0
    assert model(batch).abs().max() > 0
    assert model.state_dict().keys() == tiny_vit("registers").state_dict().keys()
    assert graphs


def test_a_failing_compiler_is_one_line(monkeypatch):
    def backend(_graph, _inputs):
        raise RuntimeError("No working C++ compiler found\n\nSet TORCHDYNAMO_VERBOSE=1")

    use_backend(monkeypatch, backend)
    with pytest.raises(ItaeError, match=r"C\+\+ compiler.*compile=False") as caught:
        compiled_vit()(images(2))
    assert "\n" not in str(caught.value)


def test_through_load_backbone(graphs):
    compiled, plain = load_backbone("demo", compile=True), load_backbone("demo")
    assert (compiled.compiled, plain.compiled) == (True, False)
    assert compiled.weights_sha256 == plain.weights_sha256
    batch = images(1, 28, 28).to(plain.device)
    plain.model(batch)
    assert not graphs
    compiled.model(batch)
    assert graphs


@pytest.mark.slow
@pytest.mark.parametrize("structure", ["dinov2", "dinov3"])
def test_measurements_change_only_by_rounding(structure):
    plain, compiled = tiny_vit(structure), compiled_vit(structure)
    dataset, backbones = MadeDataset(7), [as_backbone(plain), as_backbone(compiled)]
    batch = dataset_tensor(backbones[0], dataset)
    key = threshold_at(plain, batch, "key", 0.3)
    both = [threshold_at(plain, batch, "key", 0.3, block) for block in (-2, -1)]
    variants = {"baseline": None, "min": ITAE("key", key), "mask": ITAE("key", key, "mask"),
                "two blocks": ITAE("key", both, blocks=2), "all rows": ITAE("key", both, blocks=2, rows="all")}
    features, others = (extract_features(backbone, dataset, variants, batch_size=3) for backbone in backbones)
    for name, itae in variants.items():
        assert np.abs(features[name] - others[name]).max() < 1e-5, name
        if itae is None:
            continue
        shown = [attention_map(model, batch, itae=itae) for model in (plain, compiled)]
        assert (shown[0] - shown[1]).abs().max() < 1e-5
        with attenuate(plain, itae), attenuate(compiled, itae):
            assert (plain(batch) - compiled(batch)).abs().max() < 1e-5
    assert (plain(batch) - compiled(batch)).abs().max() < 1e-5  # after the hooks are removed
    assert (plain(batch[:1]) - compiled(batch[:1])).abs().max() < 1e-5
    seen = [observe(backbone, dataset, variants["min"], batch_size=3) for backbone in backbones]
    assert np.abs(seen[0].hidden_norms - seen[1].hidden_norms).max() < 1e-4
    norms = [sampled_norms(backbone, dataset, sample=7, seed=0, batch_size=3) for backbone in backbones]
    assert all(np.abs(norms[0][place] - norms[1][place]).max() < 1e-4 for place in norms[0])
