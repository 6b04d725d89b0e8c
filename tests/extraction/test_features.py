import dataclasses
import re
from functools import partial

import numpy as np
import pytest
import torch
from torch.utils.data import Subset, TensorDataset

from itae_utils.errors import ItaeError
from itae_utils.extraction import fitting
from itae_utils.extraction.features import extract_features
from itae_utils.extraction.fitting import fit_thresholds
from itae_utils.extraction.observation import observe
from itae_utils.method import thresholds as thresholds_module
from itae_utils.method.artifacts import FiringRule
from itae_utils.method.attention import attenuate
from itae_utils.method.setting import ATTENUATIONS, ITAE, SOURCES
from itae_utils.method.thresholds import ThresholdFit, Thresholds
from tests.conftest import array_dataset, as_backbone, setting, setup, threshold_at


def test_auto_is_resolved_to_numbers_block_by_block(monkeypatch):
    backbone, dataset, batch = setup()
    model = backbone.model
    numbers = {1: threshold_at(model, batch, "key", 0.3, 1), 2: threshold_at(model, batch, "key", 0.2)}
    variants = {"auto": ITAE(), "deep": ITAE(blocks=3), "fixed": ITAE(threshold=numbers[2]), "baseline": None}
    monkeypatch.setattr(thresholds_module, "fit_threshold", lambda block, **_: ThresholdFit(
        numbers.get(block), 0.1, 5.0, "made", np.empty(0)))
    fits = Thresholds({(block, source): block for block in range(3) for source in SOURCES})
    features = extract_features(backbone, dataset, variants, thresholds=fits)
    assert features.thresholds == {"auto": (numbers[2],), "deep": (None, numbers[1], numbers[2]),
                                   "fixed": (numbers[2],), "baseline": ()}
    assert np.array_equal(features["auto"], features["fixed"])
    with attenuate(backbone.model, ITAE(threshold=[numbers[1], numbers[2]], blocks=2)):
        expected = backbone.model.forward_features(batch)[:, 0].numpy()
    assert np.abs(features["deep"] - expected).max() < 1e-5


def test_auto_fits_once_and_does_no_harm_where_nothing_is_found(monkeypatch):
    backbone, dataset, _ = setup(count=4)
    calls, fit = [], fitting.fitted_thresholds
    monkeypatch.setattr(fitting, "fitted_thresholds", lambda *args, **options: calls.append(1) or fit(*args, **options))
    features = extract_features(backbone, dataset, {"baseline": None, "a": ITAE(), "b": ITAE("value", blocks=2),
                                                    "c": ITAE("direction", attenuation="substitute")})
    assert len(calls) == 1
    assert features.thresholds["b"] == (None, None)  # too few patches to fit
    for name in "abc":
        assert np.array_equal(features[name], features["baseline"])
    extract_features(backbone, dataset, {"fixed": ITAE(threshold=1.0), "oracle-free": None})
    assert len(calls) == 1


def test_oracle_edits_the_backbone_s_true_artifacts():
    backbone, dataset, batch = setup("plain")
    backbone = dataclasses.replace(backbone, truth=FiringRule(0, (5, 6), 0.9))
    variants = {"oracle": ITAE(select="oracle"), "deep": ITAE(select="oracle", blocks=2, rows="all")}
    features = extract_features(backbone, dataset, variants, batch_size=2)
    with backbone.truth.capture(backbone.model) as captured:
        backbone.model(batch)
    assert features.artifact_counts["oracle"].tolist() == captured.mask.sum(1).tolist()
    for name, itae in variants.items():
        with attenuate(backbone.model, itae, truth=backbone.truth):
            expected = backbone.model.forward_features(batch)[:, 0].numpy()
        assert np.abs(features[name] - expected).max() < 1e-5
    with pytest.raises(ItaeError, match="'oracle'"):
        extract_features(setup()[0], dataset, {"oracle": ITAE(select="oracle")})


@pytest.mark.parametrize("structure", ["dinov2", "dinov3", "eva02_split"])
def test_bfloat16_is_close(structure):
    backbone, dataset, batch = setup(structure, count=4)
    threshold = threshold_at(backbone.model, batch, "token", 0.3)
    variants = {"baseline": None} | {name: setting("token", threshold, name) for name in ATTENUATIONS}
    full = extract_features(backbone, dataset, variants)
    half = extract_features(as_backbone(backbone.model, precision="bf16"), dataset, variants)
    for name in variants:
        lengths = np.linalg.norm(full[name], axis=1) * np.linalg.norm(half[name], axis=1)
        cosine = (full[name] * half[name]).sum(1) / lengths
        assert cosine.min() > 0.99
        assert not np.array_equal(full[name], half[name])


def test_features_that_are_not_finite_name_the_batch():
    backbone, dataset, _ = setup(count=5)

    def spoil(_module, _args, output):
        return output if len(output) == 2 else output * float("nan")

    handle = backbone.model.blocks[0].register_forward_hook(spoil)
    with pytest.raises(ItaeError, match=r"'baseline'.* images 4 to 4"):
        extract_features(backbone, dataset, {"baseline": None}, batch_size=2)
    handle.remove()


def test_more_blocks_than_the_model_has_are_refused():
    backbone, dataset, _ = setup()
    with pytest.raises(ItaeError, match="blocks=4"):
        extract_features(backbone, dataset, {"deep": ITAE(threshold=1.0, blocks=4)})


@pytest.mark.parametrize("variants", [{}, ["baseline"], "baseline", ITAE(threshold=1.0), None])
def test_variants_without_names_are_refused(variants):
    backbone, dataset, _ = setup()
    with pytest.raises(ItaeError, match=re.escape(f"variants={variants!r}")):
        extract_features(backbone, dataset, variants)


@pytest.mark.parametrize(("variants", "named"), [
    ({1: None}, "1: None"), ({None: ITAE(threshold=1.0)}, "None"), ({"a": 3.0}, "'a': 3.0"), ({"a": {}}, "'a': {}"),
    ({"a": "baseline"}, "'baseline'"), ({"a": ITAE}, "ITAE"), ({"a": None, "b": [ITAE()]}, "'b'"),
    ({"a": False}, "False")])
def test_variants_of_another_kind_are_refused(variants, named):
    backbone, dataset, _ = setup()
    with pytest.raises(ItaeError, match=named) as error:
        extract_features(backbone, dataset, variants)
    assert "variants" in str(error.value)


FITS = fit_thresholds(setup()[0], setup()[1])


@pytest.mark.parametrize("thresholds", [
    3.0, "auto", [1.0], FITS[-1, "key"], {}, {(-1, "key"): 3.0}, {"key": FITS[-1, "key"]},
    Thresholds({(block, source): np.ones(5) for block in range(24) for source in SOURCES})])
def test_thresholds_of_another_kind_or_model_are_refused(thresholds):
    backbone, dataset, _ = setup()
    with pytest.raises(ItaeError, match="thresholds"):
        extract_features(backbone, dataset, {"it": ITAE()}, thresholds=thresholds)


RUNS = [partial(extract_features, variants={"it": None}), fit_thresholds, observe]


@pytest.mark.parametrize(("name", "value"), [
    ("batch_size", 2.0), ("batch_size", True), ("batch_size", "2"), ("batch_size", None), ("batch_size", 0),
    ("num_workers", True), ("num_workers", 1.0), ("num_workers", -1), ("num_workers", None), ("num_workers", "all")])
@pytest.mark.parametrize("run", RUNS)
def test_numbers_of_another_kind_are_refused_before_anything_is_stored(run, name, value, tmp_path):
    with pytest.raises(ItaeError, match=re.escape(f"{name}={value!r}")):
        run(setup()[0], array_dataset(3), store=tmp_path, **{name: value})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("name", "value"), [
    ("sample", 0), ("sample", 2.0), ("sample", True), ("sample", "all"), ("seed", -1), ("seed", None), ("seed", 0.5)])
@pytest.mark.parametrize("run", RUNS[1:])
def test_samples_of_another_kind_are_refused(run, name, value):
    with pytest.raises(ItaeError, match=re.escape(f"{name}={value!r}")):
        run(setup()[0], array_dataset(3), **{name: value})


@pytest.mark.parametrize("run", RUNS)
def test_backbones_and_data_sets_of_another_kind_are_refused(run):
    backbone, dataset, _ = setup()
    for given, named in [("demo", "'demo'"), (backbone.model, "VisionTransformer"), (None, "NoneType"),
                         (dataset, "MadeDataset")]:
        with pytest.raises(ItaeError, match=f"{named}.*load_backbone"):
            run(given, dataset)
    for given, named in [("digits", "load_dataset"), ({"test": dataset}, "'test'"), ([], "empty"),
                         (backbone, "Backbone")]:
        with pytest.raises(ItaeError, match=named):
            run(backbone, given)


@pytest.mark.parametrize("run", RUNS)
def test_a_model_under_attenuate_is_refused(run):
    backbone, dataset, _ = setup()
    with attenuate(backbone.model, ITAE(threshold=1.0, blocks=2)), pytest.raises(ItaeError, match="attenuate"):
        run(backbone, dataset)
    run(backbone, dataset)


@pytest.mark.parametrize("itae", [{"threshold": 1.0}, "min", 1.0])
def test_observe_refuses_other_settings(itae):
    backbone, dataset, _ = setup()
    with pytest.raises(ItaeError, match="itae="):
        observe(backbone, dataset, itae)


def test_pictures_in_other_forms_give_the_same_features():
    backbone, dataset, _ = setup()
    run = partial(extract_features, backbone, variants={"it": None})
    expected = run(dataset=dataset)
    pixels = np.stack([np.asarray(image) for image, _ in dataset])
    tensor = torch.from_numpy(pixels).permute(0, 3, 1, 2)
    labels = dataset.targets.tolist()
    for other in [list(dataset), [image for image, _ in dataset], list(zip(pixels, labels, strict=True)), pixels,
                  tensor, tensor / 255, TensorDataset(tensor, torch.tensor(labels)), Subset(dataset, range(5)),
                  [{"img": image, "fine_label": label} for image, label in dataset],
                  [(image, "cat") for image, _ in dataset], [(image, None) for image, _ in dataset]]:
        found = run(dataset=other)
        assert np.array_equal(found["it"], expected["it"])
        assert found.targets is None or found.targets.dtype.kind == "U" or found.targets.tolist() == labels
    assert run(dataset=list(dataset)).targets.tolist() == labels


def test_settings_are_recorded():
    backbone, dataset, _ = setup()
    features = extract_features(backbone, dataset, {"baseline": None}, batch_size=4)
    assert features.settings == {"backbone": "tiny", "device": "cpu", "precision": "fp32", "batch_size": 4,
                                 "store": None}
    assert len(features) == 1
