import copy

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


@pytest.fixture
def ran(monkeypatch) -> list[int]:
    """Blocks that ran "compiled", by their places; the compiler is a stand-in that leaves code as it is."""
    calls = []

    def compiler(function, **_options):
        def compiled(block, *args, **options):
            calls.append(block.place)
            return function(block, *args, **options)

        return compiled

    monkeypatch.setattr(torch, "compile", compiler)
    return calls


def compiled_vit(structure="registers"):
    model = tiny_vit(structure)
    compile_blocks(model)
    for place, block in enumerate(model.blocks):
        block.place = place
    return model


def test_every_block_runs_compiled(ran):
    model, batch = compiled_vit(), images(2)
    assert torch.equal(model(batch), tiny_vit("registers")(batch))
    assert ran == [0, 1, 2]


def test_a_block_with_a_hook_inside_runs_as_it_is(ran):
    model, batch = compiled_vit(), images(2)
    with attenuate(model, ITAE("key", threshold_at(model, batch, "key", 0.3))):
        ran.clear()
        model(batch)
        assert ran == [0, 1]
    ran.clear()
    model(batch)
    assert ran == [0, 1, 2]


def test_hooks_of_the_block_itself_run_outside(ran):
    model, batch = compiled_vit(), images(2)
    assert torch.equal(token_norms(model, batch), token_norms(tiny_vit("registers"), batch))
    assert ran == [0, 1, 2]


def test_the_pass_of_an_extraction_runs_compiled(ran):
    backbone = as_backbone(compiled_vit())
    extract_features(backbone, MadeDataset(3), {"baseline": None, "itae": ITAE(threshold=1.0)})
    assert ran == [0, 1]  # of the last block only `[CLS]` is computed


def test_a_copy_of_the_model_runs_its_own_weights(ran):
    model, batch = compiled_vit(), images(2)
    other = copy.deepcopy(model)
    for parameter in other.parameters():
        parameter.zero_()
    assert other(batch).abs().max() == 0
    assert model(batch).abs().max() > 0
    assert model.state_dict().keys() == tiny_vit("registers").state_dict().keys()


def test_a_failing_compiler_is_one_line(monkeypatch):
    def fails(_function, **_options):
        def compiled(*_args, **_options):
            raise torch._dynamo.exc.TorchDynamoException("No working C++ compiler found\n\nSet TORCHDYNAMO_VERBOSE=1")

        return compiled

    monkeypatch.setattr(torch, "compile", fails)
    with pytest.raises(ItaeError, match=r"\(No working C\+\+ compiler found\): use compile=False") as caught:
        compiled_vit()(images(2))
    assert "\n" not in str(caught.value)


def test_through_load_backbone(ran):
    backbone, plain = load_backbone("demo", compile=True), load_backbone("demo")
    assert (backbone.compiled, plain.compiled) == (True, False)
    assert backbone.weights_sha256 == plain.weights_sha256
    for place, block in enumerate(backbone.model.blocks):
        block.place = place
    backbone.model(images(1, 28, 28).to(backbone.device))
    assert ran == [0, 1, 2, 3, 4, 5]


@pytest.mark.slow
@pytest.mark.parametrize("structure", ["dinov2", "dinov3"])
def test_all_that_is_measured_is_the_same_but_for_rounding(structure):
    plain, compiled = tiny_vit(structure), tiny_vit(structure)
    compile_blocks(compiled)
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
    assert (plain(batch) - compiled(batch)).abs().max() < 1e-5  # and after the hooks are gone
    assert (plain(batch[:1]) - compiled(batch[:1])).abs().max() < 1e-5
    seen = [observe(backbone, dataset, variants["min"], batch_size=3) for backbone in backbones]
    assert np.abs(seen[0].hidden_norms - seen[1].hidden_norms).max() < 1e-4
    norms = [sampled_norms(backbone, dataset, sample=7, seed=0, batch_size=3) for backbone in backbones]
    assert all(np.abs(norms[0][place] - norms[1][place]).max() < 1e-4 for place in norms[0])
