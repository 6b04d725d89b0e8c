import json

import pytest

from itae_utils.analysis import baseline, comparison
from itae_utils.analysis.collection import BY_DATASET, MTEB, MTEB_SETTINGS, PublishedRow, collect
from itae_utils.data.published import DATASETS
from itae_utils.models.registry import BACKBONES
from itae_utils.report import report
from itae_utils.results import check_results
from tests.made_results import score_rows, write_as_mteb, write_pairing
from tests.tiny_notebooks import RESULTS

B, S = "dinov2_vitb14", "dinov2_vits14"
# ACC, NMI and ARI within, below and above 0.7540 to 0.7740
NEAR = [{**row, "value": row["value"] + 0.064} for row in score_rows(B, "cifar10")]


def collected(folder):
    found, left_out = collect(folder)
    return found, [pairing for pairing in found if pairing.mteb_rule], left_out


def lines_of(table):
    return {line.Index: [text.replace("\N{NO-BREAK SPACE}", " ") for text in line[1:]] for line in table.itertuples()}


def test_mteb_s_numbers():
    expected = """
        cifar10        .8006 .7925 .7121  .7544 .8262 .7041  .7276 .7990 .6041  .6923 .7684 .5443
        cifar100       .5716 .7262 .4057  .6021 .7720 .3884  .6576 .7993 .3835  .5940 .7577 .1539
        tiny-imagenet  .4776 .7065 .2854  .5553 .7431 .1916  .6077 .7722 .1818  .4883 .7013 .0454
    """
    found = {}
    for (dataset, backbone), scores in MTEB.items():
        assert backbone in BACKBONES
        assert dataset in DATASETS
        found.setdefault(dataset, []).extend(scores[metric] for metric in ("acc", "nmi", "ari"))
    assert found == {name: list(map(float, scores)) for name, *scores in map(str.split, expected.split("\n")[1:-1])}


@pytest.mark.parametrize(("changes", "follows"), [
    ({}, True), ({"pos_embed": "transformers"}, True), ({"pos_embed": "timm"}, True), ({"preprocess": "resize"}, False),
    ({"image_size": 518}, False), ({"options": {"n_init": 10}}, False), ({"options": {}}, False),
    *(({"options": {"algorithm": "mini-batch", "n_init": 1, "normalize": False, "fit_split": None} | other}, False)
      for other in ({"algorithm": "exact"}, {"n_init": 10}, {"normalize": True}, {"fit_split": "train"})),
])
def test_what_follows_mteb_s_protocol(tmp_path, changes, follows):
    write_as_mteb(tmp_path / "x", B, "cifar10", **changes)
    ((pairing,), as_mteb, _) = collected(tmp_path)
    assert as_mteb == ([pairing] if follows else [])
    assert (f"pos_embed={pairing.mteb_rule}" in pairing.title) == follows


def test_such_runs_stand_beside_those_by_our_protocol(tmp_path):
    write_pairing(tmp_path / "ours", B, "cifar10", date="2026-01-01T00:00:00+00:00")
    for day, rule in enumerate(["meta", "transformers", "meta"], start=2):
        write_as_mteb(tmp_path / str(day), B, "cifar10", rule, date=f"2026-01-0{day}T00:00:00+00:00")
    found, as_mteb, left_out = collected(tmp_path)
    assert {(each.folder.name, each.mteb_rule) for each in found} == {
        ("4", "meta"), ("ours", None), ("3", "transformers")}
    assert len(found) == 3
    assert len(as_mteb) == 2
    assert len(left_out) == 1
    assert left_out[0].startswith("2 ")


def test_scores_beside_mteb_s(tmp_path):
    write_as_mteb(tmp_path / "a", B, "cifar10", rows=NEAR)
    write_as_mteb(tmp_path / "b", S, "cifar10", rows=score_rows(S, "cifar10"), size=24)
    write_as_mteb(tmp_path / "c", B, "stl10")
    _, as_mteb, _ = collected(tmp_path)
    lines = lines_of(baseline.baseline_table(as_mteb))
    assert lines["CIFAR-10", B, "MTEB"] == ["0.7544", "0.8262", "0.7041"]
    assert lines["CIFAR-10", B, "here, pos_embed=meta"] == [
        f"0.7640 [0.7540, 0.7740]: theirs is {verdict}" for verdict in ("within", "higher", "lower")]
    assert ("CIFAR-10", f"{S}, other images: 24", "here, pos_embed=meta") in lines
    assert lines["STL-10", B, "here, pos_embed=meta"] == ["0.7000 [0.6900, 0.7100]"] * 3
    assert len(lines) == 12 + 3
    numbers = baseline.baseline_numbers(as_mteb)
    assert len(numbers) == 9
    first = numbers[(numbers.backbone == B) & (numbers.dataset == "cifar10")].iloc[0]
    assert [first[name] for name in ("pos_embed", "metric", "n", "seeds", "mean", "lowest", "highest", "mteb")] == [
        "meta", "acc", 10_000, 3, pytest.approx(0.764), pytest.approx(0.754), pytest.approx(0.774), 0.7544]
    (fact,) = baseline.baseline_headline(as_mteb)
    assert fact["value"] == "1 of 3", "other images are not counted"
    assert "1 of 3" in baseline.describe_baseline(as_mteb)
    rows = baseline.baseline_rows(as_mteb)
    check_results(RESULTS | {"rows": rows})
    assert {row["variant"] for row in rows} == {"baseline, pos_embed=meta"}
    assert rows[0]["value"] == pytest.approx(0.764 - 0.7544)
    assert len(rows) == 6


def test_runs_on_other_images_do_not_answer_the_question(tmp_path):
    write_as_mteb(tmp_path / "a", B, "cifar10", size=24)
    _, as_mteb, _ = collected(tmp_path)
    assert "None" in baseline.describe_baseline(as_mteb)
    assert baseline.baseline_headline(as_mteb) == []


def test_without_such_runs_the_page_says_how_to_get_them(tmp_path, shown):
    baseline.show_baseline([], [], tmp_path)
    assert "--profile mteb" in shown[0].data
    assert (tmp_path / "tables/baseline.csv").is_file()
    shown.clear()
    write_pairing(tmp_path / "x", "demo", "imagefolder:/a/cats")
    baseline.show_baseline([], collect(tmp_path)[0], tmp_path)
    assert len(shown) == 1, "nothing more on images of one's own"


def test_what_the_published_numbers_say_is_computed(monkeypatch):
    lines = baseline.describe_published().splitlines()[2:]
    assert len(lines) == 2
    assert all(part in lines[0] for part in ("CIFAR-100", "NMI", "0.7710", "0.7720"))
    assert all(part in lines[1] for part in ("CIFAR-10 ", "0.8006, 0.7544, 0.7276, 0.6923"))
    monkeypatch.setitem(BY_DATASET, "cifar10", PublishedRow("cifar10", "CIFAR-10", 0.5, 0.9, 0.9, "DINOv2 ViT-B/14"))
    monkeypatch.setitem(MTEB, ("cifar10", "dinov2_vitg14"), {"acc": 0.8, "nmi": 0.8, "ari": 0.8})
    lines = baseline.describe_published().splitlines()[2:]
    assert "ACC" in lines[0]
    assert "0.5000" in lines[0]
    assert not any("falls" in line for line in lines)


def test_every_comparison_names_normalisation_starts_and_split(tmp_path):
    write_pairing(tmp_path / "one", B, "cifar10")
    (one,), _ = collect(tmp_path)
    text = comparison.describe_protocols([one])
    assert all(part in text for part in ("length 1", "10 starts", "scored images, test (10,000)"))
    write_pairing(tmp_path / "two", B, "stl10", fitted_on="train (5,000)", options={"normalize": False})
    pairings, _ = collect(tmp_path)
    lines = comparison.describe_protocols(pairings).split("\n\n")
    assert len(lines) == 2
    assert all(part in lines[1] for part in ("not normalised", "train (5,000)", "stl10"))
    numbers = comparison.comparison_numbers(pairings).drop_duplicates("dataset")
    assert numbers[["normalize", "n_init", "fitted_on"]].values.tolist() == [
        [True, 10, "test (10,000)"], [False, 10, "train (5,000)"]]
    json.dumps(comparison.comparison_rows(pairings))


def test_the_profile_is_mteb_s_protocol():
    steps = report.plan_report(profile="mteb").steps
    assert len(steps) == 4 * 3 * 2 + 1
    assert {(step.setting("dataset"), step.setting("backbone")) for step in steps[:-1]} == set(MTEB)
    for step in steps[:-1]:
        assert {name: step.setting(name) for name in MTEB_SETTINGS} == MTEB_SETTINGS
        assert [step.setting(name) for name in ("preprocess", "precision", "seeds", "image_size")] == [
            "meta-eval", "fp32", 10, None]
