import copy
from functools import partial

import numpy as np
import pytest
import torch
from torch._dynamo.backends.registry import lookup_backend

from itae_utils.errors import ItaeError
from itae_utils.extraction.features import extract_features
from itae_utils.extraction.fitting import sampled_statistics
from itae_utils.extraction.observation import observe
from itae_utils.method.attention import attention_map, attenuate
from itae_utils.method.setting import ITAE
from itae_utils.method.statistics import token_norms
from itae_utils.models.backbones import load_backbone
from itae_utils.models.compiled import compile_blocks
from tests.conftest import MadeDataset, as_backbone, dataset_tensor, images, threshold_at, tiny_vit

torch_compile = torch.compile


def use_backend(monkeypatch, backend):
    """Let torch trace the code and `backend` compile the graphs, which needs no C++ compiler."""
    torch._dynamo.reset()
    monkeypatch.setattr(torch, "compile", partial(torch_compile, backend=backend))


@pytest.fixture
def graphs(monkeypatch, request):
    """Collect the graphs that torch has traced; they run unchanged, unless a test names another backend."""
    compiled, compile_graph = [], lookup_backend(getattr(request, "param", "eager"))

    def backend(graph, inputs):
        compiled.append(graph)
        return compile_graph(graph, inputs)

    use_backend(monkeypatch, backend)
    yield compiled
    torch._dynamo.reset()


def compiled_vit(structure="registers"):
    model = tiny_vit(structure)
    compile_blocks(model)
    return model


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


@pytest.mark.parametrize("structure", ["dinov2", "dinov3"])
@pytest.mark.parametrize("graphs", ["eager", pytest.param("inductor", marks=pytest.mark.slow)], indirect=True)
def test_measurements_change_only_by_rounding(structure, graphs):
    plain, compiled = tiny_vit(structure), compiled_vit(structure)
    dataset, backbones = MadeDataset(7), [as_backbone(plain), as_backbone(compiled)]
    batch = dataset_tensor(backbones[0], dataset)
    compiled(batch)  # code compiled now ignores later hooks
    assert graphs
    key = threshold_at(plain, batch, "key", 0.3)
    both = [threshold_at(plain, batch, "key", 0.3, block) for block in (-2, -1)]
    variants = {"baseline": None, "min": ITAE("key", key), "mask": ITAE("key", key, "mask"),
                "two blocks": ITAE("key", both, blocks=2), "all rows": ITAE("key", both, blocks=2, rows="all")}
    features, others = (extract_features(backbone, dataset, variants, batch_size=3) for backbone in backbones)
    for name in variants:
        np.testing.assert_allclose(features[name], others[name], rtol=0, atol=1e-5)
    close = partial(torch.testing.assert_close, rtol=0, atol=1e-5)
    for itae in list(variants.values())[1:]:
        close(attention_map(compiled, batch, itae=itae), attention_map(plain, batch, itae=itae))
        with attenuate(plain, itae), attenuate(compiled, itae):
            attenuated = plain(batch)
            close(compiled(batch), attenuated)
        close(compiled(batch), plain(batch))  # the hooks are removed
        assert (plain(batch) - attenuated).abs().max() > 1e-3
    close(compiled(batch[:1]), plain(batch[:1]))
    close(token_norms(compiled, batch), token_norms(plain, batch), atol=1e-4)
    seen, others = (observe(backbone, dataset, variants["min"], batch_size=3) for backbone in backbones)
    np.testing.assert_allclose(seen.hidden_norms, others.hidden_norms, rtol=0, atol=1e-4)
    norms, others = (sampled_statistics(backbone, dataset, sample=7, seed=0, batch_size=3) for backbone in backbones)
    for place in norms:
        np.testing.assert_allclose(norms[place], others[place], rtol=0, atol=1e-4)
