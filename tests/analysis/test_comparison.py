import csv
import io
import re
from pathlib import Path

import pandas as pd
import pytest
from IPython.display import Image
from nbconvert.filters import markdown2html

from itae_utils import results
from itae_utils.analysis import comparison
from itae_utils.analysis.collection import collect, show_figures
from itae_utils.analysis.comparison import comparison_table, difference_rows, save_table
from itae_utils.report import report, runs
from itae_utils.results import check_results
from tests.made_results import SCORES, pairing_of, score_rows, write_pairing
from tests.tiny_notebooks import RESULTS

EXPECTED = ["dinov2_vitb14", "dinov2_vitb14_reg"]


def lines_of(pairings, expected=EXPECTED) -> dict[tuple, list[str]]:
    table = comparison_table(pairings, expected).map(lambda text: text.replace("\N{NO-BREAK SPACE}", " "))
    return {line.Index: list(line[1:]) for line in table.itertuples()}


def test_rows_of_an_interval():
    table = pd.DataFrame(
        {"difference": [0.1, 0.2], "low": [0.0, 0.1], "high": [0.2, 0.3], "words": ["x", "y"]},
        index=pd.MultiIndex.from_tuples([("itae", "acc"), ("itae", "nmi")], names=["variant", "metric"]))
    rows = difference_rows(table, backbone="b", dataset="d", n=3)
    assert {row["metric"]: row["value"] for row in rows} == {
        "acc_difference": 0.1, "acc_difference_low": 0.0, "acc_difference_high": 0.2,
        "nmi_difference": 0.2, "nmi_difference_low": 0.1, "nmi_difference_high": 0.3}
    check_results(RESULTS | {"rows": rows})
    assert difference_rows(table.rename(index={"itae": "raw pixels"}), backbone="b", dataset="d", n=3) == []


def test_the_table_of_nothing_says_not_run_and_unknown():
    lines = lines_of([])
    assert lines["CIFAR-10", "published: DINOv2 ViT-B/14", "ITAE"] == ["0.8449", "0.8682", "0.7946"]
    assert lines["CIFAR-10", "published: DINOv2 ViT-B/14", "baseline"] == ["unknown to us"] * 3
    assert ("Tiny-ImageNet", "published: backbone unknown to us", "ITAE") in lines
    assert lines["STL-10", "dinov2_vitb14_reg", "not run"] == ["not run"] * 3
    assert len(lines) == 4 * 4


def test_published_weights_and_images(tmp_path):
    lines = lines_of([pairing_of(tmp_path, "dinov2_vitb14", "cifar10")])
    name = ("CIFAR-10", "dinov2_vitb14")
    assert lines[*name, "baseline"] == ["0.7000 ± 0.0100"] * 3
    assert lines[*name, "random control"] == ["0.6900 ± 0.0100"] * 3
    assert lines[*name, "ITAE"] == ["0.8000 ± 0.0100"] * 3
    assert lines[*name, "ITAE − published"] == ["-0.0449", "-0.0682", "+0.0054"]
    assert lines[*name, "ITAE − baseline [95 %]"] == ["+0.100 [+0.050, +0.150]"] * 3
    assert (*name, "not run") not in lines
    assert not any("other" in " ".join(key) for key in lines)


def test_an_interval_with_0_is_pointed_out(tmp_path):
    rows = score_rows("dinov2_vitb14", "cifar10", SCORES, (0.1, -0.1, 0.2))
    pairing = pairing_of(tmp_path, "dinov2_vitb14", "cifar10", rows=rows)
    for text in lines_of([pairing])["CIFAR-10", "dinov2_vitb14", "ITAE − baseline [95 %]"]:
        numbers, _, words = text.partition(": ")
        assert numbers == "+0.100 [-0.100, +0.200]"
        assert words


def test_older_results_without_control_and_interval(tmp_path):
    rows = score_rows("dinov2_vitb14", "cifar10", {"baseline": 0.7, "itae": 0.8}, None)
    lines = lines_of([pairing_of(tmp_path, "dinov2_vitb14", "cifar10", rows=rows)])
    for row in ("random control", "ITAE − baseline [95 %]"):
        assert lines["CIFAR-10", "dinov2_vitb14", row] == ["not in these results"] * 3


def test_trained_registers_and_no_artifacts(tmp_path):
    lines = lines_of([pairing_of(tmp_path, "dinov2_vitb14_reg", "stl10", theta=None)])
    assert ("STL-10", "dinov2_vitb14_reg", "baseline, with trained registers") in lines
    assert ("STL-10", "dinov2_vitb14_reg", "ITAE, no artifacts found") in lines


def test_what_is_not_the_papers_is_labelled(tmp_path):
    pairing = pairing_of(tmp_path, "demo", "cifar10", size=200)
    lines = lines_of([pairing])
    assert lines["CIFAR-10", "demo (other weights), other images: 200", "ITAE − published"][0] == "-0.0449"
    assert ("CIFAR-10", "dinov2_vitb14", "not run") in lines
    words = comparison.caveat_lines([pairing, pairing])
    assert len(words) == 2
    assert words[1] == "**cifar10**: other images, 200 images (test (10,000)) instead of 10,000."
    local = pairing_of(tmp_path / "local", "dinov2_vitb14", "stl10", kind="local", source="local file x.pth")
    (line,) = comparison.caveat_lines([local])
    assert "weights not checked" in line
    assert "x.pth" in line


def test_other_data_sets_have_no_published_line(tmp_path):
    lines = lines_of([pairing_of(tmp_path, "dinov2_vitb14", "digits")])
    names = [key for key in lines if key[0].startswith("digits")]
    assert {key[2] for key in names} == {"baseline", "random control", "ITAE", "ITAE − baseline [95 %]"}


def test_results_on_images_of_ones_own_say_nothing_about_the_paper(tmp_path):
    pairings = [pairing_of(tmp_path / place, "demo", f"imagefolder:/{place}/cats") for place in "ab"]
    lines = lines_of(pairings)
    assert {key[0] for key in lines} == {"imagefolder:/a/cats", "imagefolder:/b/cats"}
    assert not any("published" in " ".join(key) or "CIFAR" in key[0] for key in lines)
    facts = comparison.comparison_headline(pairings, EXPECTED)
    assert [fact["value"] for fact in facts] == ["0.700 → 0.800"] * 2
    assert comparison.caveat_lines(pairings) == []
    assert set(comparison.settings_table(pairings).index) < set(comparison.settings_table([]).index)


def test_images_without_labels(tmp_path):
    rows = [{**score_rows("demo", "imagefolder:/a/cats")[0], "metric": "agreement"}]
    pairing = pairing_of(tmp_path, "demo", "imagefolder:/a/cats", rows=rows)
    assert lines_of([pairing])["cats", "demo", "no labels"] == ["not measured"] * 3
    assert comparison.comparison_numbers([pairing]).empty
    assert comparison.ablation_table(pairing_of(tmp_path, "demo", "stl10", rows=[])) is None


def test_scores_of_other_backbones_are_ignored(tmp_path):
    rows = score_rows("demo", "digits") + score_rows("demo-clean", "digits", {"baseline": 0.9}, None)
    pairing = pairing_of(tmp_path, "demo", "digits", rows=rows)
    assert comparison.score_values(pairing, "baseline", "acc") == pytest.approx([0.69, 0.70, 0.71])


def test_numbers(tmp_path):
    numbers = comparison.comparison_numbers([pairing_of(tmp_path, "dinov2_vitb14", "cifar10", size=200)])
    row = numbers[(numbers.variant == "itae") & (numbers.metric == "acc")].iloc[0]
    assert (row["n"], row.seeds, row["mean"], row.published) == (200, 3, pytest.approx(0.8), 0.8449)
    assert (row.minus_published, row.minus_baseline, row.low, row.high) == (pytest.approx(-0.0449), 0.1, 0.05, 0.15)
    assert row.images.startswith("other images: 200 images")
    assert row.weights is None
    baseline = numbers[numbers.variant == "baseline"]
    assert baseline[["published", "minus_published", "minus_baseline"]].isna().all(axis=None)
    (acc, *_) = comparison.comparison_rows([pairing_of(tmp_path, "dinov2_vitb14", "cifar10")])
    assert (acc["metric"], acc["value"]) == ("acc_minus_published", pytest.approx(-0.0449))


def test_unknown_settings_are_listed_with_the_values_used(tmp_path):
    table = comparison.settings_table([pairing_of(tmp_path, "dinov2_vitb14", "tiny-imagenet")])
    assert table["used here"].tolist() == [
        "key", "θ = 2.5 on ‖key‖₂, last block (found without labels)", "28 px", "resize",
        "scaled to length 1, not reduced", "k-means++, best of 10 starts, 3 seeds from 4", "dinov2_vitb14",
        "measured here, in the rows “baseline”"]
    assert (comparison.settings_table([])["used here"] == "not run").all()
    write_pairing(tmp_path / "two" / "a", "demo", "digits", theta=None)
    write_pairing(tmp_path / "two" / "b", "demo", "stl10")
    pairings, _ = collect(tmp_path / "two")
    assert comparison.settings_table(pairings)["used here"].iloc[1] == (
        "θ = 2.5 on ‖key‖₂, last block (found without labels) (demo on stl10); "
        "no θ found on ‖key‖₂, last block (demo on digits)")


@pytest.mark.parametrize(("threshold", "how"), [(2.5, "given"), (2, "given"), ("auto", "found without labels"),
                                                ("share:2%", "share:2%"), ("sd:3", "sd:3")])
def test_the_threshold_used_is_listed_with_its_origin(tmp_path, threshold, how):
    pairing = pairing_of(tmp_path, "demo", "digits")
    pairing.scores["parameters"]["threshold"] = threshold
    assert comparison.settings_table([pairing])["used here"].iloc[1] == f"θ = 2.5 on ‖key‖₂, last block ({how})"


def test_ablation_table(tmp_path):
    table = comparison.ablation_table(pairing_of(tmp_path, "demo", "digits"))
    assert table.loc[("key", "min")].tolist() == ["0.6000", "0.8000"]
    assert table.loc[("query", "min")].tolist() == ["0.5000", "no θ found"]
    assert list(table.columns) == ["0.00001 %", "auto"]


def test_ablations_are_shown_and_saved(tmp_path, shown):
    pairings = [pairing_of(tmp_path / name, "demo", "digits") for name in "ab"]
    comparison.show_ablations(pairings, tmp_path / "04_x")
    text, table, other, _ = shown
    assert table.equals(comparison.ablation_table(pairings[0]))
    links = [link for words in (text, other) for link in re.findall(r"\((tables/.*?)\)", words.data)]
    assert len(set(links)) == 4, "folders of one name"
    assert all((tmp_path / "04_x" / link).is_file() for link in links)


def test_a_missing_ablation_table_is_explained(tmp_path, shown):
    older = pairing_of(tmp_path / "older", "demo", "digits")
    for row in older.results["02"]["rows"]:
        for name in ("source", "attenuation", "theta"):
            del row[name]
    pairings = [older, pairing_of(tmp_path / "not run", "demo", "stl10", notebooks=("01", "03")),
                pairing_of(tmp_path / "no labels", "demo", "cifar10", rows=[])]
    comparison.show_ablations(pairings, tmp_path / "04_x")
    assert [comparison.ablation_table(pairing) for pairing in pairings] == [None] * 3
    reasons = [text.data for text in shown]
    assert all(pairing.title in reason for pairing, reason in zip(pairings, reasons, strict=True))
    assert len({reason.partition(": ")[2] for reason in reasons}) == 3
    assert not (tmp_path / "04_x").exists()


def test_names_of_folders_are_shown_literally(tmp_path, shown):
    tag = "<img src=x onerror=alert(1)>"
    write_pairing(tmp_path / "in" / tag, "demo", f"imagefolder:{tag}")
    write_pairing(tmp_path / "in" / "new", tag, "digits", source=f"local file {tag}", kind="local",
                  notebooks=("02", "03"))
    pairings, left_out = collect(tmp_path / "in")
    table = comparison_table(pairings, [])
    comparison.show_comparison(table)
    comparison.show_ablations(pairings, tmp_path)
    show_figures(pairings, "01", "attention_maps", tmp_path)
    shown.append(comparison.styled(comparison.settings_table(pairings)))
    pages = [markdown2html(comparison.describe_collection(pairings, [*left_out, f"{tag} is old"]))]
    pages += [thing._repr_html_() if hasattr(thing, "_repr_html_") else markdown2html(thing.data) for thing in shown
              if not isinstance(thing, Image)]
    assert sum("&lt;img src=x onerror=alert(1)&gt;" in page for page in pages) >= 7
    assert not any("<img" in page for page in pages)
    assert (tmp_path / "tables" / f"ablation_{tag}.csv").is_file()


def test_the_collection_is_described(tmp_path):
    write_pairing(tmp_path / "a", "demo", "digits")
    text = comparison.describe_collection(collect(tmp_path)[0], ["old_one is older"])
    assert "demo on digits" in text
    assert "published" in text, "none of these data sets has published numbers"
    assert text.endswith(r"old\_one is older")
    assert "nothing" in comparison.describe_collection([], [])


def test_tables_are_saved_as_csv_and_latex(tmp_path):
    pairings = [pairing_of(tmp_path, "dinov2_vitb14", "cifar10")]
    links = save_table(comparison_table(pairings, EXPECTED), tmp_path, "t", csv=comparison.comparison_numbers(pairings))
    assert links == "[CSV](tables/t.csv) · [LaTeX](tables/t.tex)"
    rows = list(csv.DictReader(io.StringIO((tmp_path / "tables" / "t.csv").read_text(encoding="utf-8"))))
    assert float(rows[6]["mean"]) == pytest.approx(0.8)
    latex = (tmp_path / "tables" / "t.tex").read_text(encoding="utf-8")
    for sign in (r"\toprule", r"\midrule", r"\bottomrule", r"dinov2\_vitb14", r"0.8000~$\pm$~0.0100", r"95 \%",
                 "ITAE $-$ published"):
        assert sign in latex, sign
    save_table(comparison.settings_table(pairings), tmp_path, "s")
    for name in "ts":
        assert (tmp_path / "tables" / f"{name}.tex").read_text(encoding="utf-8").isascii(), name


def test_headline(tmp_path):
    real, other = (pairing_of(tmp_path / name, name, "cifar10") for name in ("dinov2_vitb14", "demo"))
    facts = comparison.comparison_headline([real, other], EXPECTED)
    assert [fact["value"] for fact in facts] == ["1 of 8", "0.700 → 0.800", "0.700 → 0.800"]
    assert facts[1]["note"] == "baseline → ITAE on dinov2_vitb14; published 0.8449"
    assert "demo (other weights)" in facts[2]["note"]


def collected(folder: Path) -> runs.Report:
    """Return notebook 04 as a report of its own over the results in `folder / "in"`."""
    made = report.run_report(
        only=["04"], parameters={"results_dir": str(folder / "in")}, output=folder / "out", say=str)
    assert not made.failed, made.failed[0].error
    return made


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """Notebook 04 as a report of its own, over results of all kinds."""
    folder = tmp_path_factory.mktemp("paper")
    write_pairing(folder / "in" / "real", "dinov2_vitb14", "cifar10")
    write_pairing(folder / "in" / "zero", "dinov2_vitb14_reg", "cifar10", theta=None,
               rows=score_rows("dinov2_vitb14_reg", "cifar10", SCORES, (0.0, -0.1, 0.1)))
    write_pairing(folder / "in" / "small", "demo", "stl10", size=30, notebooks=("03",))
    write_pairing(folder / "in" / "unlabelled", "demo", "imagefolder:/a/cats", rows=[
        {**score_rows("demo", "imagefolder:/a/cats")[0], "metric": "agreement"}])
    made = collected(folder)
    return made, (folder / "out" / made.runs[0].page).read_text(encoding="utf-8")


@pytest.mark.slow
def test_notebook_04_shows_every_kind_of_pairing(page):
    _, text = page
    for words in (
        "not run", "unknown to us", "CIFAR-10", "0.8449", "demo (other weights), other images: 30", "cats",
        "+0.000 [-0.100, +0.100]: ", "ITAE, no artifacts found", "baseline, with trained registers",
        "not measured", "ITAE − published", "k-means++, best of 10 starts", "demo on stl10",
        "tables/comparison.csv", "tables/settings.tex", "tables/ablation_real.csv", "2410.04801",
        "../../in/real/01_artifact_discovery/figures/attention_maps.pdf", "image size", "resize and crop rule",
    ):
        assert words in text.replace("\N{NO-BREAK SPACE}", " "), words


@pytest.mark.slow
def test_links_of_notebook_04_lead_somewhere(page):
    made, text = page
    folder = (made.folder / made.runs[0].page).parent
    for name in ("comparison.csv", "comparison.tex", "settings.csv", "ablation_real.tex"):
        assert f'href="tables/{name}"' in text
        assert (folder / "tables" / name).is_file()
    assert (folder / "figures" / "published_and_measured.pdf").is_file()


@pytest.mark.slow
def test_results_of_notebook_04_fit_the_schema(page):
    made, _ = page
    content = results.read_results(made.folder / made.runs[0].folder / "results.json")
    assert len(content["provenance"]["collected"]) == 10
    assert {row["metric"].partition("_")[2] for row in content["rows"]} == {"minus_published"}
    index = made.index.read_text(encoding="utf-8")
    assert made.runs[0].notebook.title in index
    assert "2 of 8" in index


@pytest.mark.slow
def test_notebook_04_over_nothing(tmp_path):
    (tmp_path / "in").mkdir()
    made = collected(tmp_path)
    assert "Nothing was run." in (made.folder / made.runs[0].page).read_text(encoding="utf-8")


@pytest.mark.slow
def test_the_paper_profile_offline_at_reduced_size(tmp_path):
    made = report.run_report(
        profile="paper", backbone="demo", dataset="digits", output=tmp_path / "out", say=str,
        parameters={"limit": 200, "seeds": 2, "n_init": 1, "percents": [5.0],
                    "attenuations": ["min"]})
    assert not made.failed, made.failed[0].error
    assert [run.label for run in made.runs] == [*(f"demo-digits 0{number}" for number in (0, 1, 2, 3, 5)), "04"]
    text = (made.folder / made.runs[-1].page).read_text(encoding="utf-8")
    for words in ("digits", "No data set is the paper's", "ITAE − baseline [95 %]"):
        assert words in text, words
    assert "not in these results" not in text, "03 gives the interval"
    assert "0 of 8" not in made.index.read_text(encoding="utf-8")
