import pytest
from PIL import Image

from itae_utils.analysis.remedies import remedy_facts
from itae_utils.analysis.scoring import HARMS
from itae_utils.extraction.fitting import SAMPLE
from itae_utils.extraction.neurons import TOP_K
from itae_utils.method.register_setting import TestTimeRegisters
from itae_utils.method.setting import ATTENUATIONS
from itae_utils.models.registry import BACKBONES
from itae_utils.report import estimate, report
from itae_utils.report.estimate import Size, backbone_size, dry_run, kmeans_operations, matmul_rate, work
from tests.conftest import as_backbone, tiny_vit
from tests.report.test_plan import write_weights


@pytest.fixture(autouse=True)
def _empty_caches(tmp_path, monkeypatch):
    monkeypatch.setenv("ITAE_DATA", str(tmp_path / "data"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(estimate, "matmul_rate", lambda device: 1e12)


def text_of(**asked) -> str:
    return "\n".join(dry_run(report.plan_report(**asked)))


def test_the_paper_profile_is_described_completely(tmp_path):
    text = text_of(profile="paper")
    assert "profile paper: 41 runs" in text
    assert text.count("00_explore, 01_artifact_discovery, 02_itae_ablation, 03_clustering, 05_remedies") == 8
    for name in ("weights dinov2_vitb14 ", "weights dinov2_vitb14_reg", "images cifar10 ", "images stl10"):
        assert name in text
    assert text.count(" MB  missing") == 6
    assert "3,919 MB\n" in text
    assert not list(tmp_path.iterdir())


def test_the_demo_and_a_local_checkpoint_download_nothing(tmp_path):
    weights = write_weights(tmp_path / "weights.pth", "vit_tiny_patch16_224")
    local = {"backbone": "vit_tiny_patch16_224", "parameters": {"checkpoint": weights}}
    for asked in ({}, local):
        text = text_of(**asked)
        assert "nothing to download" in text
        assert "disk: about 25 MB " in text


def test_present_files_are_not_counted(tmp_path):
    (tmp_path / "data" / "stl10_binary").mkdir(parents=True)
    text = text_of(profile="paper", backbone="demo")
    assert "weights" not in text.partition("disk")[0]
    assert "images stl10                           2,640 MB  present" in text
    assert " 587 MB\n" in text


@pytest.mark.parametrize(("asked", "named"), [
    ({"backbone": "vit_tiny_patch16_224"}, "weights vit_tiny_patch16_224 "), ({"dataset": "hf:a/b"}, "images hf:a/b ")])
def test_a_download_of_unknown_size_is_named(asked, named):
    text = text_of(**asked)
    assert named in text
    assert "size unknown  missing" in text
    assert "0 MB and 1 of unknown size" in text
    assert "disk: at least 25 MB" in text
    assert ("number of images is unknown" in text) == ("dataset" in asked)


@pytest.mark.parametrize(("asked", "weights"), [
    ({}, ["dinov2_vits14", "dinov2_vits14_reg"]), ({"only": ["03"]}, ["dinov2_vits14"]),
    ({"only": ["05"], "backbone": "dinov2_vits14_reg"}, ["dinov2_vits14_reg"])])
def test_the_checkpoint_with_trained_registers_is_downloaded_too(asked, weights):
    text = text_of(**{"backbone": "dinov2_vits14"} | asked)
    assert [line.split()[1] for line in text.splitlines() if line.startswith("  weights ")] == weights
    assert text.count("missing\n") == len(weights)


def test_a_folder_of_images_has_an_estimate(tmp_path):
    for number in range(4):
        Image.new("RGB", (4, 4)).save(tmp_path / f"{number}.png")
    assert "time: about" in text_of(dataset=f"imagefolder:{tmp_path}")


@pytest.mark.parametrize("name", ["dinov2_vits14", "dinov2_vits14_reg"])
def test_sizes_are_those_of_the_structure(name):
    size = backbone_size(name, None)
    assert size.parameters / 1e6 == pytest.approx(BACKBONES[name].parameters, abs=0.1)
    assert (size.dim, size.tokens) == (384, 257 + 4 * name.endswith("_reg"))
    assert backbone_size(name, 28).tokens == size.tokens - 256 + 4
    assert backbone_size("demo", None).tokens == 50


def test_work_grows_with_images_seeds_and_classes():
    size, base = Size(100, 8, 10), {"sample": 2000, "seeds": 2, "n_init": 3, "sources": ["key"], "percents": [1, 2],
                                    "attenuations": ["min"]}
    assert work("01", base, size, 10_000, 10).kmeans == 0
    for key in ("02", "03"):
        few = work(key, base, size, 10_000, 10)
        assert 1.9 < work(key, base, size, 20_000, 10).kmeans / few.kmeans < 2.1
        assert 1.9 < work(key, base, size, 20_000, 10).model / few.model < 2
        assert 1.9 < work(key, base | {"seeds": 4}, size, 10_000, 10).kmeans / few.kmeans < 2.1
        assert 9 < work(key, base, size, 10_000, 100).kmeans / few.kmeans < 12
        assert work(key, base | {"clusters": 100}, size, 10_000, 10) == work(key, base, size, 10_000, 100)
        few, many = (work(key, base, size, 10_000, k).interval_seconds for k in (10, 200))
        assert 0 < 2 * few < many


def test_the_ablation_clusters_its_grid_and_every_edit_and_compares_the_steps_between_edits():
    size, base = Size(100, 8, 10), {"seeds": 2, "n_init": 3, "sources": ["key", "token"], "percents": [1, 2, 5],
                                    "attenuations": ["min", "mask"]}
    grid = [(source, theta, edit) for source in ("key", "token") for theta in (1, 2, 5, "auto")
            for edit in ("min", "mask", "random control")]
    one = kmeans_operations(10_000, size.dim, 10, 2 * 3)
    assert work("02", base, size, 10_000, 10).kmeans == pytest.approx((len(grid) + len(ATTENUATIONS)) * one)
    steps, differences = (work(key, base, size, 10_000, 10).interval_seconds for key in ("02", "03"))
    assert steps / len(HARMS) == pytest.approx(differences / 5)


@pytest.mark.parametrize(("backbone", "others"), [("dinov2_vits14", 1), ("demo", 0)])
def test_the_remedies_run_cluster_and_compare_what_the_notebook_lists(backbone, others):
    size, base = Size(100, 8, 10), {"seeds": 2, "n_init": 3, "sample": 300, "backbone": backbone}
    of_images = [("plain", 1), ("start", 1), ("bias", 1), ("late", 0.5), ("zeroed", 0.5), ("patches", 1)]
    of_images += [("trained", 1)] * others
    of_the_first_sample = ["θ", "activations", "means of bias", "θ on top"]
    of_the_second = ["outliers before"] + [f"the {number} best" for number in TOP_K[:len(TOP_K) // 2]]
    of_the_maps = ["observed", "no patches", "start", "late", "bias", "zeroed", "on top"]
    passes = (10_000 * sum(cost for _, cost in of_images) + SAMPLE * len(of_the_first_sample + of_the_second)
              + 300 * len(of_the_maps))
    found = work("05", base, size, 10_000, 10)
    assert found.model == pytest.approx(2 * size.parameters * size.tokens * passes)
    rows = [8] * (10 + others) + [16]  # widths; `[CLS]` and mean are side by side
    names = remedy_facts(as_backbone(tiny_vit()), TestTimeRegisters({}), {"baseline": 0.0})
    assert len(rows) == len(names) - (not others)
    expected = sum(kmeans_operations(10_000, dim, 10, 2 * 3) + 2 * dim * 10_000**2 for dim in rows)
    assert found.kmeans == pytest.approx(expected, rel=0.1)
    one_difference = work("03", base, size, 10_000, 10).interval_seconds / 5
    assert found.interval_seconds == pytest.approx((len(rows) - 1) * one_difference)


def test_a_split_to_fit_on_is_counted():
    size, base = Size(100, 8, 10), {"seeds": 2, "n_init": 3}
    plain, fitted = (work("03", base, size, 10_000, 10, count) for count in (0, 50_000))
    assert 4 < fitted.kmeans / plain.kmeans < 6
    assert 5 < fitted.model / plain.model < 6
    assert fitted.interval_seconds == plain.interval_seconds


def test_the_dry_run_counts_the_images_of_a_split_to_fit_on(monkeypatch):
    counted = []
    monkeypatch.setattr(estimate, "work", lambda *given: counted.append(given[3:]) or work(*given))
    for split in (None, "train"):
        text_of(dataset="cifar10", only=["03"], parameters={"fit_split": split})
    assert counted == [(10_000, 10, 0), (10_000, 10, 50_000)]


def test_the_rate_of_a_matrix_product_has_a_plausible_size():
    assert 1e7 < matmul_rate("cpu", side=64, seconds=0.01) < 1e15


def test_durations():
    assert [estimate._duration(seconds) for seconds in (5, 600, 36_000)] == ["5 s", "10 min", "10.0 h"]
