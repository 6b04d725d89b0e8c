import base64
import hashlib
import io
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import nbformat
import pandas as pd
import pytest
from bs4 import BeautifulSoup
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output
from PIL import Image

from itae_utils.analysis.scoring import score_table
from itae_utils.figures.explorer.page import SCRIPT, explorer_html, script_hashes
from itae_utils.report.pages import index_page, mean_scores, notebook_page
from itae_utils.report.parameters import Notebook
from itae_utils.report.runs import Report, Run
from itae_utils.report.tables import SORTING, table_frame
from tests.tiny_notebooks import PROVENANCE, RESULTS, ROWS, changed

PIXEL = io.BytesIO()
Image.new("RGB", (2, 2)).save(PIXEL, "png")
PNG = base64.b64encode(PIXEL.getvalue()).decode() + "\n"


def external_references(page: str) -> list[str]:
    """Return what a browser would load from elsewhere to show this page, and any script but the page's own."""
    page = page.replace(f"<script>{SORTING}</script>", "")
    page = SCRIPT.sub(lambda match: "" if script_hashes(match[0]) else match[0], page)
    found = re.findall(r"<script\b[^>]*>|@import[^;]*|url\(\s*['\"]?(?:https?:)?//[^)]*", page, re.IGNORECASE)

    class Loads(HTMLParser):
        def handle_starttag(self, tag, attributes):
            for name, value in attributes:
                loads = name in ("src", "srcset", "data", "poster") or (name == "href" and tag == "link")
                if loads and re.match(r"\s*(https?:)?//", value or ""):
                    found.append(value)

    Loads().feed(page)
    return found


def notebook_at(key: str) -> Notebook:
    return Notebook(Path(f"{key}_part.ipynb"), {"backbone": "demo", "seed": 0}, f"Title <{key}>", "It *shows*.")


NOTEBOOKS = [notebook_at(key) for key in ("01", "02", "03")]


def run_of(notebook: Notebook, error: str | None = None, results: dict | None = RESULTS, **parameters) -> Run:
    parameters = {"backbone": "demo", "dataset": "digits", "seed": 3, "output_dir": "/x"} | parameters
    return Run(notebook, parameters, 1.25, error, results)


def test_external_references_are_found():
    for page in ('<script src="//x/y.js">', "<link href='https://x'>", "<style>@import 'x'</style>", "<img src=http://x>",
                 "<style>a{background:url( 'https://x/y.png')}</style>", "<script>1</script>"):
        assert external_references(page), page
    own = explorer_html("{}")
    assert not external_references(own)
    assert external_references(own.replace("mount", "steal", 1))
    assert not external_references('<a href="https://x">x</a><img src="data:image/png;base64,//8="><img src="a/b.png">')


class TestNotebookPage:
    def render(self, folder: Path, *cells, run: Run | None = None) -> str:
        run = run or run_of(NOTEBOOKS[1])
        (folder / run.notebook.name).mkdir()
        nbformat.write(new_notebook(cells=list(cells)), folder / run.notebook.name / f"{run.notebook.name}.ipynb")
        path = notebook_page(run, NOTEBOOKS, folder)
        assert path == folder / run.notebook.name / f"{run.notebook.name}.html"
        page = path.read_text(encoding="utf-8")
        assert not external_references(page)
        return page

    def code(self, *outputs, source: str = "run(1)") -> nbformat.NotebookNode:
        return new_code_cell(source, outputs=list(outputs))

    def stream(self, name: str, text: str) -> nbformat.NotebookNode:
        return new_output("stream", name=name, text=text)

    def display(self, **data: str) -> nbformat.NotebookNode:
        return new_output("display_data", {name.replace("_", "/"): text for name, text in data.items()})

    def test_it_shows_outputs_and_hides_code(self, tmp_path):
        page = self.render(
            tmp_path,
            new_markdown_cell("# Norms\n\nOne *sees*: ‖K‖ ≤ θ."),
            self.code(self.display(image_png=PNG, text_plain="<Figure>")),
            self.code(self.display(text_html="<table><td>0.5</td></table>", text_plain="x"),
                      self.stream("stdout", "printed <b>\n")),
            self.code(self.display(text_markdown="It was **found**."), source="value = 'a<b'"),
        )
        for shown in ("<em>sees</em>", "‖K‖ ≤ θ", "0.5", "printed &lt;b&gt;", "<strong>found</strong>"):
            assert shown in page
        assert re.search(r'<img alt="Figure: Norms" src="data:image/png;base64,[\w+/=]+"/>', page)
        assert "&lt;Figure&gt;" not in page
        assert page.count('<div class="code">') == 3
        assert ".code { display: none; }" in page
        assert ".notebook:has(#show-code:checked) .code { display: block; }" in page

    def test_a_figure_has_its_caption_and_alternative_text(self, tmp_path):
        texts = {"alt": "ACC rises <0.1>", "caption": "Scores & seeds."}
        figure = new_output("display_data", {"image/png": PNG}, metadata={"image/png": texts})
        page = self.render(tmp_path, new_markdown_cell("# A"), self.code(figure))
        assert 'alt="ACC rises &lt;0.1&gt;"' in page
        assert "<figcaption>Scores &amp; seeds.</figcaption>" in page

    def test_contents_lead_to_every_section(self, tmp_path):
        page = self.render(tmp_path, new_markdown_cell("# A\n\n## 1. What *is* θ?\n\nText."),
                           new_markdown_cell("## 2. Ü & so\n\n## 2. Ü & so"))
        contents = page.partition("<ol>")[2].partition("</ol>")[0]
        listed = re.findall('<a href="#([^"]+)">(.*?)</a>', contents)
        assert len(listed) == 3
        assert listed == re.findall('<h2 id="([^"]+)">(.*?)</h2>', page)
        assert "Contents" not in self.render(tmp_path, new_markdown_cell("# A"), run=run_of(NOTEBOOKS[0]))

    def test_tables_scroll_by_keyboard_and_have_no_empty_headers(self, tmp_path):
        table = "<table><thead><tr><th></th><th>ACC</th></tr></thead><tr><th>a</th><td>1</td></tr></table>"
        styled = table.replace("<th></th>", '<th class="blank level0" >&nbsp;</th>')
        page = self.render(tmp_path, new_markdown_cell("# A"), *(
            self.code(self.display(text_html=each, text_plain="x")) for each in (table, styled)))
        assert page.count('<table tabindex="0">') == 2
        assert re.findall(r"<th[^>]*>([^<]*)</th>", page) == ["ACC", "a"] * 2

    def test_it_links_to_its_neighbours_and_the_index(self, tmp_path):
        page = self.render(tmp_path, new_markdown_cell("# A"))
        for target in ("index.html", "01_part/01_part.html", "03_part/03_part.html"):
            assert page.count(f'href="../{target}"') == 2
        assert "Title &lt;03&gt;" in page
        first = self.render(tmp_path, new_markdown_cell("# A"), run=run_of(NOTEBOOKS[0]))
        assert ('rel="prev"' in first, 'rel="next"' in first) == (False, True)

    def test_stderr_scripts_and_widgets_are_left_out(self, tmp_path):
        widget = new_output("display_data", {"application/vnd.jupyter.widget-view+json": {}, "text/plain": "BAR"})
        page = self.render(tmp_path, self.code(
            self.stream("stderr", "WARNING"), self.stream("stdout", "PRINTED"),
            self.display(application_javascript="alert(1)", text_plain="PLAIN"), widget))
        assert [text in page for text in ("PRINTED", "PLAIN", "WARNING", "alert(1)")] == [True, True, False, False]

    def test_only_the_explorers_own_script_may_run(self, tmp_path):
        plain = self.render(tmp_path, new_markdown_cell("# A"), run=run_of(NOTEBOOKS[0]))
        assert "default-src 'none'; script-src 'none'; style-src" in plain.partition("<style")[0]
        html = explorer_html("{}")
        page = self.render(tmp_path, self.code(self.display(text_html=html, text_plain="x")))
        script, = SCRIPT.findall(page)
        digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
        assert f"script-src 'sha256-{digest}';" in page
        assert page.index("Content-Security-Policy") < page.index("<style")

    def test_a_long_table_brings_the_script_that_sorts_it(self, tmp_path):
        table = f"<table><thead><tr><th>a</th></tr></thead><tbody>{'<tr><td>1</td></tr>' * 8}</tbody></table>"
        page = self.render(tmp_path, self.code(self.display(text_html=table, text_plain="x")))
        digest = base64.b64encode(hashlib.sha256(SORTING.encode()).digest()).decode()
        assert f"script-src 'sha256-{digest}';" in page
        assert f"<script>{SORTING}</script>" in page
        plain = self.render(tmp_path, self.code(self.display(text_html="<table></table>", text_plain="x")),
                            run=run_of(NOTEBOOKS[0]))
        assert ("<script" in plain, "script-src 'none'" in plain) == (False, True)

    def test_a_failed_notebook(self, tmp_path):
        mark = new_markdown_cell("PAPERMILL", metadata={"tags": ["papermill-error-cell-tag"]})
        error = new_output("error", ename="ValueError", evalue="<no>", traceback=["\x1b[31mValueError\x1b[0m: <no>"])
        page = self.render(tmp_path, mark, self.code(self.stream("stderr", "EARLIER")),
                           self.code(self.stream("stderr", "LAST"), error),
                           run=run_of(NOTEBOOKS[2], "ValueError: <no> (cell [2])"))
        assert [text in page for text in ("LAST", "EARLIER", "PAPERMILL", "\x1b")] == [True, False, False, False]
        assert "ValueError: &lt;no&gt; (cell [2])" in page
        assert page.count('id="error"') == 1


class TestIndex:
    def render(self, folder: Path, *runs: Run) -> str:
        assert index_page(Report(folder, "demo", "A <short> text.", runs)) == folder / "index.html"
        page = (folder / "index.html").read_text(encoding="utf-8")
        assert not external_references(page)
        assert "default-src &#39;none&#39;; script-src &#39;none&#39;" in page.partition("<style")[0]
        return page.partition("</style>")[2]

    def test_it_shows_settings_and_results(self, tmp_path):
        page = self.render(tmp_path, *map(run_of, NOTEBOOKS))
        for text in (
            "A &lt;short&gt; text.", PROVENANCE["backbone"]["source"], "ab" * 32, "digits · 1,797 images · all",
            "cpu · fp32", "Python 3.11.2", "2026-01-02 03:04 UTC", "torch 2.9.0", "3.8 s for 3 notebooks", "1.2 s",
            "ACC with ITAE", "0.805", "of 1", "<td>1.25</td>", "<td>none found</td>", "<td>none, 1.5</td>",
            "Title &lt;01&gt;", "It <em>shows</em>.", 'src="02_part/figures/cover.png"', 'href="03_part/03_part.html"',
            'href="01_part/results.json"',
        ):
            assert text in page, text
        assert "failed" not in page
        assert "output_dir" not in page

    def test_its_title_has_the_name_of_a_folder_not_its_path(self, tmp_path):
        page = self.render(tmp_path, run_of(NOTEBOOKS[0], dataset="imagefolder:/a/long/path/to/photos"))
        heading = re.search(r"<h1>(.*?)</h1>", page, flags=re.DOTALL)[1]
        assert "<em>photos</em>" in heading
        assert "/long" not in heading

    def test_folders_of_one_name_are_told_apart_in_its_title(self, tmp_path):
        runs = [run_of(NOTEBOOKS[0], dataset=f"imagefolder:/{year}/photos") for year in (2023, 2024)]
        heading = re.search(r"<h1>(.*?)</h1>", self.render(tmp_path, *runs), flags=re.DOTALL)[1]
        assert re.findall("<em>(.*?)</em>", heading)[-2:] == ["/2023/photos", "/2024/photos"]

    def test_it_says_how_many_images_were_used_and_what_was_left_out(self, tmp_path):
        notes = changed(changed(RESULTS, "provenance.dataset.notes", ["Not read: 300 .heic <b>."]),
                        "provenance.dataset.name", "imagefolder:/my/photos")
        header = self.render(tmp_path, run_of(NOTEBOOKS[0], results=notes)).partition("</header>")[0]
        assert "<strong>photos</strong>: 1,797 images are used. Not read: 300 .heic &lt;b&gt;." in header
        assert "images are used" not in self.render(tmp_path, *map(run_of, NOTEBOOKS))

    def test_main_results_of_several_pairings_have_their_labels(self, tmp_path):
        runs = tuple(replace(run_of(NOTEBOOKS[0]), pairing=pairing) for pairing in ("a-b", "c-d"))
        index_page(Report(tmp_path, "grid", "", runs, {"backbone": ["a", "c"]}))
        page = (tmp_path / "index.html").read_text(encoding="utf-8")
        assert "a-b 01: of 1" in page
        assert "c-d 01: of 1" in page

    def test_it_lists_each_threshold_once(self, tmp_path):
        other = changed(RESULTS, "thresholds.itae", 1.5)
        page = self.render(tmp_path, *map(run_of, NOTEBOOKS[:2]), run_of(NOTEBOOKS[2], results=other))
        assert "Thresholds θ (4)" in page
        for value, labels in (("1.25", "01, 02"), ("1.5", "03"), ("none found", "01, 02, 03")):
            assert f"<td>{value}</td><td>{labels}</td>" in page

    @pytest.mark.parametrize("successful", [0, 1])
    def test_it_names_each_failure_once_with_all_its_notebooks(self, tmp_path, successful):
        failed = [run_of(notebook, "ValueError: <no> (cell [2])", None) for notebook in NOTEBOOKS[successful:]]
        page = self.render(tmp_path, *map(run_of, NOTEBOOKS[:successful]), *failed)
        assert f"{len(failed)} of 3 notebooks failed" in page
        assert page.count("<pre>ValueError: &lt;no&gt; (cell [2])</pre>") == 1
        aside = page.partition("<pre>")[0].rpartition("<aside")[2]
        assert [f">{notebook.name}</a>" in aside for notebook in NOTEBOOKS] == [successful == 0, True, True]
        assert "no figure" in page
        assert "Clustering scores" not in page, "scores come from 03 alone"
        assert "<td>3</td>" in page, "parameters of failed notebooks are shown too"

    @pytest.mark.parametrize(("seeds", "metric", "explained"), [
        (2, "acc", "standard deviation"), (1, "acc", "The bar under a number"), (1, "agreement", "no labels")])
    def test_it_explains_the_scores_that_it_shows(self, tmp_path, seeds, metric, explained):
        rows = [{**ROWS[0], "metric": metric, "seed": seed, "value": 0.5 + seed / 10} for seed in range(seeds)]
        page = self.render(tmp_path, run_of(NOTEBOOKS[-1], results={**RESULTS, "rows": rows}))
        assert explained in page
        assert ("standard deviation" in page) == ("±" in page) == (seeds > 1)

    @pytest.mark.parametrize(("planted", "tied", "marks"), [(False, False, 3), (False, True, 2), (True, False, 0)])
    def test_it_marks_the_best_scores_as_the_table_of_03_does(self, tmp_path, planted, tied, marks):
        """A planted model, which alone has an oracle, has no mark: its best row says nothing."""
        rows = [{**row, "value": row["value"] - 0.3} if (row["variant"], row["metric"]) == ("itae", "nmi") else row
                for row in ROWS if row["metric"] != "inertia"]
        rows = [{**row, "value": 0.5} if tied and row["metric"] == "ari" else row for row in rows]
        rows += [{**row, "variant": "oracle"} for row in rows if row["variant"] == "itae" and planted]
        page = self.render(tmp_path, run_of(NOTEBOOKS[-1], results={**RESULTS, "rows": rows}))
        table, = BeautifulSoup(page, "html.parser").select("table.scores")
        shown = table_frame(table).map(lambda text: " ".join(text.split())).set_index("variant")
        scores = pd.DataFrame(rows).pivot(index=["variant", "seed"], columns="metric", values="value").reset_index()
        expected = score_table(scores[["variant", "seed", "acc", "nmi", "ari"]], mark=not planted)
        pd.testing.assert_frame_equal(shown.loc[expected.index], expected, check_names=False)
        marked = [cell.get_text() for cell in table.select("td") if "★" in cell.get_text()]
        assert marked == [cell.get_text() for cell in table.select("td.best")]
        assert len(marked) == marks
        assert ("★ marks the highest mean" in page) == (not planted)

    def test_it_says_how_to_run_it_again(self, tmp_path):
        page = self.render(tmp_path, run_of(NOTEBOOKS[-1]))
        assert f"itae report --from {tmp_path.name}</code>" in page

    def test_it_links_to_the_comparison_that_follows(self, tmp_path):
        report = Report(tmp_path, "demo", "", (run_of(NOTEBOOKS[0]),))
        for beside, links in (("beside-last week.html", ["beside-last%20week.html"]), (None, [])):
            page = index_page(report, beside).read_text(encoding="utf-8")
            assert re.findall(r'href="(beside[^"]*)"', page) == links

    def test_it_labels_settings_in_which_notebooks_differ(self, tmp_path):
        small = changed(RESULTS, "provenance.dataset.size", 500)
        page = self.render(tmp_path, run_of(NOTEBOOKS[0], results=small), *map(run_of, NOTEBOOKS[1:]))
        assert "digits · 500 images · all (01)" in page
        assert "digits · 1,797 images · all (02, 03)" in page


class TestMeanScores:
    def test_cells_hold_mean_standard_deviation_and_number_of_seeds(self):
        table = mean_scores(ROWS)
        assert table["metrics"] == ["acc", "nmi", "ari"]
        assert [row["variant"] for row in table["rows"]] == ["raw pixels", "baseline", "itae"]
        assert table["rows"][2]["cells"][0] == (pytest.approx(0.805), pytest.approx(0.005 * 2**0.5), 2)
        assert table["rows"][0]["backbone"] is None
        assert table["unit"]

    def test_missing_metrics_and_seeds_and_other_metrics(self):
        assert mean_scores([]) is None
        one = {**ROWS[0], "seed": None}
        assert mean_scores([one])["rows"][0]["cells"] == [(0.7, None, 1)]
        agreement = mean_scores([{**one, "metric": "agreement", "value": 3.0}])
        assert (agreement["metrics"], agreement["unit"]) == (["agreement"], False)
        gaps = mean_scores([one, {**one, "variant": "other", "metric": "nmi", "backbone": "clean"}])
        assert [row["cells"] for row in gaps["rows"]] == [[(0.7, None, 1), None], [None, (0.7, None, 1)]]
        assert [row["backbone"] for row in gaps["rows"]] == ["demo", "clean"]
