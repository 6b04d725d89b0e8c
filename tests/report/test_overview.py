import os
import re
from pathlib import Path

import pytest
from click.testing import CliRunner

from itae_utils.cli import main
from itae_utils.errors import ItaeError
from itae_utils.report.overview import list_reports, previous_of
from tests.report.test_compare import write_report
from tests.report.test_pages import external_references
from tests.tiny_notebooks import RESULTS, changed


def dated(day: int, **changes: object) -> dict:
    results = changed(RESULTS, "provenance.date", f"2026-01-{day:02}T03:04:05+00:00")
    for place, value in changes.items():
        results = changed(results, place.replace("__", "."), value)
    return results


@pytest.fixture
def folder(tmp_path) -> Path:
    """Three reports of demo on digits and one of photos without labels, and a damaged one."""
    for name, day in (("a", 3), ("b", 1), ("c", 2)):
        write_report(tmp_path / name, dated(day))
    write_report(tmp_path / "other", dated(4, provenance__dataset__name="photos", rows=[]))
    write_report(tmp_path / "damaged")
    (tmp_path / "damaged" / "report.json").write_text("{")
    return tmp_path


def test_reports_are_listed_the_newest_first_and_compared_with_the_one_before(folder):
    result = CliRunner().invoke(main, ["reports", str(folder)])
    assert result.exit_code == 0, result.output
    page = (folder / "index.html").read_text(encoding="utf-8")
    assert not external_references(page)
    assert re.findall(r'<a href="(\w+)/index\.html">', page) == ["other", "a", "c", "b"]
    links = re.findall(r'<a href="(\w+/beside-\w+\.html)">', page)
    assert links == ["a/beside-c.html", "c/beside-b.html"]
    assert "<h1>c beside a</h1>" in (folder / links[0]).read_text(encoding="utf-8")
    assert page.count("0.605 → 0.805") == 3
    assert "damaged" in page.partition("Left out")[2]


def test_the_report_before_is_the_latest_earlier_one_of_the_same_kind(folder):
    entries, (left_out,) = list_reports(folder)
    before = {entry.report.name: (previous_of(entry, entries) or entry).report.name for entry in entries}
    assert before == {"a": "c", "c": "b", "b": "b", "other": "other"}
    assert "is not JSON" in left_out


def test_a_folder_without_reports_is_refused(tmp_path):
    for place in (tmp_path, tmp_path / "none"):
        with pytest.raises(ItaeError, match=f"'{place}'"):
            list_reports(place)


def test_only_comparisons_of_newer_reports_are_written_again(folder):
    CliRunner().invoke(main, ["reports", str(folder)])
    pages = [folder / "a/beside-c.html", folder / "c/beside-b.html"]
    for page in pages:
        page.write_text("kept")
    later = pages[0].stat().st_mtime_ns + 10**9
    os.utime(folder / "a/report.json", ns=(later, later))
    CliRunner().invoke(main, ["reports", str(folder)])
    assert [page.read_text(encoding="utf-8") == "kept" for page in pages] == [False, True]
