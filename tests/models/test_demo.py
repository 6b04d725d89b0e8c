import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from itae_utils.analysis.metrics import evaluate_clustering
from itae_utils.data.datasets import load_dataset
from itae_utils.extraction.features import extract_features
from itae_utils.extraction.fitting import fit_setting, fit_thresholds
from itae_utils.extraction.observation import observe
from itae_utils.method.artifacts import precision_recall
from itae_utils.method.setting import ITAE, SOURCES
from itae_utils.models import demo
from itae_utils.models.backbones import load_backbone
from itae_utils.models.demo import plant, train


@pytest.fixture(scope="module")
def digits():
    return load_dataset("digits", limit=600)


def test_weights_are_small_and_few_of_them_are_planted():
    sizes = [(demo.FOLDER / name).stat().st_size for name in ("demo-clean.safetensors", "demo.safetensors")]
    assert sum(sizes) < 2_000_000
    clean, planted = load_file(demo.FOLDER / "demo-clean.safetensors"), load_file(demo.FOLDER / "demo.safetensors")
    assert set(planted) < set(clean)
    assert all(not torch.equal(value, clean[name]) for name, value in planted.items())


def test_detection_without_labels_finds_the_planted_artifacts(digits):
    backbone = load_backbone("demo")
    fits = fit_thresholds(backbone, digits)
    assert fits[-1, "key"].threshold is not None
    seen = observe(backbone, digits, ITAE("key", fits[-1, "key"].threshold))
    precision, recall = precision_recall(seen.artifacts, seen.truth)
    assert precision >= 0.99
    assert recall >= 0.99


def test_tokens_find_what_keys_find_and_each_direction_a_part_of_it(digits):
    """Four orthogonal directions were planted, so one singular direction is not enough."""
    backbone, found, scores = load_backbone("demo"), {}, {}
    for source, rank in [("key", 1), ("token", 1), ("direction", 1), ("direction", 2)]:
        seen = observe(backbone, digits, fit_setting(backbone, digits, ITAE(source, rank=rank)))
        found[source, rank], scores[source, rank] = seen.artifacts, precision_recall(seen.artifacts, seen.truth)
    keys, tokens = found["key", 1], found["token", 1]
    assert (keys & tokens).sum() / (keys | tokens).sum() >= 0.95
    assert min(precision for precision, _ in scores.values()) > 0.97
    assert scores["direction", 1][1] + 0.2 < scores["direction", 2][1] < 0.9


def test_nothing_is_found_in_the_clean_model(digits):
    backbone = load_backbone("demo-clean")
    fits = fit_thresholds(backbone, digits)
    assert {key: fit.threshold for key, fit in fits.items() if fit.threshold is not None} == {}
    features = extract_features(backbone, digits, {"baseline": None} | {source: ITAE(source) for source in SOURCES},
                                thresholds=fits)
    assert all(np.array_equal(features[source], features["baseline"]) for source in SOURCES)


def test_artifacts_are_large_hidden_tokens_with_short_keys_and_much_attention(digits):
    backbone = load_backbone("demo")
    seen = observe(backbone, digits)
    hidden = seen.hidden_norms.transpose(0, 2, 1)
    assert np.median(hidden[seen.truth][:, 3:]) > 10 * np.median(hidden[~seen.truth][:, 3:])
    assert np.median(hidden[seen.truth][:, :3]) < 2 * np.median(hidden[~seen.truth][:, :3])
    keys = seen.statistics["key"]
    assert keys[seen.truth].max() < np.median(keys[~seen.truth])
    taken = (seen.attention * seen.truth).sum(1)[seen.truth.any(1)]
    assert np.median(taken) > 0.8
    assert 0.01 < seen.truth.mean() < 0.25


def test_clean_and_planted_agree_on_normal_tokens(digits):
    """Normal tokens change little before the last block, so planting lowers the scores through the artifacts."""
    planted, clean = (load_backbone(name, device="cpu") for name in ("demo", "demo-clean"))
    batch = torch.stack([planted.transform(digits[index][0]) for index in range(200)])
    with planted.truth.capture(planted.model) as captured:
        inner = [backbone.model.forward_intermediates(batch, indices=[4], output_fmt="NLC", intermediates_only=True)[0]
                 for backbone in (planted, clean)]
    normal = ~captured.mask
    error = (inner[0] - inner[1])[normal].norm(dim=-1) / inner[1][normal].norm(dim=-1)
    assert error.median() < 0.3


def test_random_augmentation_keeps_shape_and_depends_on_the_seed():
    images = train.digits_tensor()[:16, :1]
    views = [train.augment(images, torch.Generator().manual_seed(seed)) for seed in (0, 0, 1)]
    assert views[0].shape == images.shape
    assert torch.equal(views[0], views[1])
    assert not torch.equal(views[0], views[2])
    assert (views[0] - images).abs().mean() > 0.05


def test_contrastive_loss_agrees_with_a_slow_nt_xent():
    first, second = F.normalize(torch.randn(4, 8), dim=1), F.normalize(torch.randn(4, 8), dim=1)
    views = torch.cat([first, second])
    losses = []
    for i in range(8):
        similar = {j: float(views[i] @ views[j]) / train.TEMPERATURE for j in range(8) if j != i}
        losses.append(np.log(sum(np.exp(list(similar.values())))) - similar[(i + 4) % 8])
    assert float(train.contrastive_loss(first * 3, second * 2)) == pytest.approx(np.mean(losses), abs=1e-5)


def test_training_is_repeatable_and_seeded():
    once, again, other = (train.train(seed, steps=2).state_dict() for seed in (0, 0, 1))
    assert all(torch.equal(once[name], again[name]) for name in once)
    assert any(not torch.equal(once[name], other[name]) for name in once)


@pytest.mark.slow
def test_planting_reproduces_the_committed_weights():
    clean = demo.load_model(planted=False)
    planted, rule = plant.plant_artifacts(clean, train.digits_tensor(), seed=0)
    assert rule == demo.truth()
    committed = demo.load_model(planted=True).state_dict()
    for name, weights in planted.state_dict().items():  # the fit of the neurons depends on rounding
        assert (weights - committed[name]).abs().max() <= 0.02 * committed[name].abs().max(), name


def test_saved_checkpoints_equal_the_committed_ones(tmp_path):
    clean, planted = demo.load_model(False), demo.load_model(True)
    plant.save_checkpoints(tmp_path / "new", clean, planted, demo.truth())
    for name in ("demo-clean.safetensors", "demo.safetensors", "demo.json"):
        assert (tmp_path / "new" / name).read_bytes() == (demo.FOLDER / name).read_bytes()


@pytest.mark.slow
def test_the_bench_meets_its_targets():
    dataset, planted, clean = load_dataset("digits"), load_backbone("demo"), load_backbone("demo-clean")
    variants = {"baseline": None, "itae": ITAE(), "random": ITAE(select="random")}
    features = dict(extract_features(planted, dataset, variants))
    features["clean"] = extract_features(clean, dataset, {"baseline": None})["baseline"]
    features["pixels"] = np.stack([planted.transform(image).flatten().numpy() for image, _ in dataset])
    acc = {name: evaluate_clustering(values, dataset.targets, seeds=3)["acc"].mean()
           for name, values in features.items()}
    gap = acc["clean"] - acc["baseline"]
    assert acc["clean"] - acc["pixels"] >= 0.08
    assert gap >= 0.08
    assert acc["itae"] - acc["baseline"] >= 0.8 * gap
    assert acc["random"] - acc["baseline"] < 0.2 * gap


@pytest.mark.slow
def test_refitting_on_another_sample_moves_acc_by_no_more_than_the_seeds_of_k_means():
    dataset, backbone = load_dataset("digits"), load_backbone("demo")
    thresholds = [fit_thresholds(backbone, dataset, sample=256, seed=seed)[-1, "key"].threshold for seed in range(4)]
    assert len(set(thresholds)) == 4
    variants = {str(threshold): ITAE(threshold=threshold) for threshold in thresholds}
    features = extract_features(backbone, dataset, variants)
    scores = [evaluate_clustering(features[name], dataset.targets, seeds=5, n_init=1)["acc"] for name in features]
    assert np.ptp([score.mean() for score in scores]) <= max(score.std() for score in scores)
