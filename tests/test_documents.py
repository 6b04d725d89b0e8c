"""The code of README and documents runs, links lead somewhere, and measured numbers are those of reports/readme.json.

Blocks run in a folder with `photos`, `dog.jpg`, `cat.jpg`, `weights.pth` (of timm's test_vit) and `reports/last-week`.
Scripts (`sh`) and blocks after `<!-- not run: REASON -->` are only checked: their commands, options, parameters,
targets of make and extras exist.
"""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote

import click
import pytest
import timm
import torch
from PIL import Image

import benchmarks.readme
import itae_utils
from benchmarks.readme import bench_lines, demo_numbers
from itae_utils.cli import main
from itae_utils.report.rules import RULES
from tests.conftest import MadeDataset

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
PAGES = [page for page in PAGES if page.exists() and "_build" not in page.parts]
BLOCK = re.compile(r"(?:^<!-- not run: (?P<reason>[^\n]+) -->\n+)?"
                   r"^```(?P<language>[\w{}:-]*)[^\n]*\n(?P<code>.*?)^```$", flags=re.MULTILINE | re.DOTALL)
FREE = {"text", "yaml", "{toctree}", "{eval-rst}"}  # blocks without code


@dataclass
class Block:
    """A block of code of a page; `reason` says why it is not run, if it isn't."""

    language: str
    code: str
    reason: str | None

    @property
    def runs(self) -> bool:
        return self.language in ("python", "console") and self.reason is None

    @property
    def commands(self) -> list[tuple[str, list[str]]]:
        """The lines after `$ ` of a console block, without comments, with the lines that each must print."""
        found: list[tuple[str, list[str]]] = []
        for line in self.code.splitlines():
            if line.startswith("$ "):
                found.append((re.sub(r"\s+# .*", "", line[2:]), []))
            elif line.strip():
                found[-1][1].append(line)
        return found


def blocks(page: Path, *languages: str) -> list[Block]:
    found = [Block(match["language"], match["code"], match["reason"])
             for match in BLOCK.finditer(page.read_text(encoding="utf-8"))]
    return [block for block in found if block.language in languages or not languages]


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_block_is_of_a_kind_that_is_tested(page):
    assert {block.language for block in blocks(page)} <= FREE | {"python", "console", "sh"}
    assert page.read_text(encoding="utf-8").count("<!-- not run") == sum(bool(block.reason) for block in blocks(page))


# --- blocks that run --------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """Return a folder with what the examples need."""
    folder = tmp_path_factory.mktemp("documents") / "prepared"
    for number, picture in enumerate(MadeDataset(40).pictures):
        place = folder / "photos" / ("cat", "dog")[number % 2] / f"{number:02}.png"
        place.parent.mkdir(parents=True, exist_ok=True)
        picture.resize((64, 48)).save(place)
    for name in ("cat", "dog"):
        Image.open(next((folder / "photos" / name).iterdir())).save(folder / f"{name}.jpg")
    torch.save(timm.create_model("test_vit").state_dict(), folder / "weights.pth")
    done = shell("itae report --only 03 -p limit 60 --output reports/last-week", folder)
    assert done.returncode == 0, done.stdout
    return folder


def shell(command: str, folder: Path) -> subprocess.CompletedProcess:
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "ITAE_PROGRESS": "0",
                                "ITAE_STORE": str(folder.parent / "store"), "HF_HUB_OFFLINE": "1",
                                "PYTHONPATH": str(ROOT)}
    return subprocess.run(["bash", "-c", command], cwd=folder, env=environment, stdout=subprocess.PIPE,
                          stderr=subprocess.STDOUT, text=True, check=False)


def shown(line: str) -> re.Pattern:
    """Return a pattern of a line of output, in which numbers and `…` stand for any."""
    parts = [re.sub(r"\d+(\\\.\d+)?", r"[\\d.]+", re.escape(part)) for part in line.strip().split("…")]
    return re.compile(r"\s+".join(".*".join(parts).replace(r"\ ", " ").split()))


@pytest.mark.slow
@pytest.mark.parametrize("page", [page for page in PAGES if any(block.runs for block in blocks(page))], ids=name_of)
def test_blocks_run_in_order(page, prepared, tmp_path, monkeypatch):
    folder = tmp_path / "work"
    shutil.copytree(prepared, folder)
    shutil.copytree(prepared.parent / "store", tmp_path / "store")
    monkeypatch.chdir(folder)
    names: dict[str, object] = {"__name__": "__main__"}
    for block in filter(lambda block: block.runs, blocks(page)):
        if block.language == "python":
            exec(compile(block.code, name_of(page), "exec"), names)
        else:
            run_commands(block, folder)


def run_commands(block: Block, folder: Path) -> None:
    for command, printed in block.commands:
        done = shell(command, folder)
        assert done.returncode == 0, f"{command}\n{done.stdout}"
        for line in printed:
            assert shown(line).search(done.stdout), f"{command}\n{line!r} is not in\n{done.stdout}"


# --- blocks that are only checked -------------------------------------------------------------------------------------

@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_names_in_blocks_exist(page):
    for block in blocks(page, "python"):
        compile(block.code, name_of(page), "exec")
        for name in re.findall(r"\bitae\.(\w+)", block.code):
            assert hasattr(itae_utils, name), name
    for block in blocks(page, "sh"):
        assert subprocess.run(["bash", "-n"], input=block.code, text=True, check=False).returncode == 0
    lines = [command for block in blocks(page, "console") for command, _ in block.commands]
    lines += [re.sub(r"\s+# .*", "", line) for block in blocks(page, "sh") for line in block.code.splitlines()
              if line.startswith("itae ")]
    for line in lines:
        for part in re.split(r"\s*(?:;|&&|\|\||\||&(?=\s|$))\s*", line):
            check_command(shlex.split(re.sub(r"\$\{[^}]*\}", "", part)))


def check_command(words: list[str]) -> None:
    """Check the options and names of one command line of ours, of make and of pip."""
    match words:
        case ["itae", *rest]:
            check_options(main, rest)
        case ["make", *rest]:
            targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
            assert {word for word in rest if "=" not in word} <= targets, words
        case ["pip", "install", *rest]:
            extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
            for names in re.findall(r"(?:^|\s)(?:\.|itae-utils)\[([\w,]+)\]", " ".join(rest)):
                assert set(names.split(",")) <= set(extras), words


def check_options(command: click.Command, words: list[str], parent: click.Context | None = None) -> None:
    context = click.Context(command, parent, **command.context_settings)
    values, rest, _ = command.make_parser(context).parse_args([word for word in words if word != "…"])
    if isinstance(command, click.Group) and rest:
        assert rest[0] in command.commands, words
        check_options(command.commands[rest[0]], rest[1:], context)
    for name, _ in values.get("parameters") or ():
        assert name in RULES, words


# --- links and numbers ------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_and_paths_exist(page):
    text = page.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"\w+:", target):
            assert re.fullmatch(r"https://[\w.-]+\.[a-z]+(/[\w.%/#~-]*)?", target), target
            continue
        path, _, anchor = target.partition("#")
        linked = (page.parent / path) if path else page
        assert linked.exists(), target
        if anchor:
            assert anchor in anchors(linked), target
    for target in re.findall(r"\btests/[\w/]+\.py", text):
        assert (ROOT / target).exists(), target


@pytest.mark.slow
def test_links_of_the_built_site_lead_somewhere():
    site = ROOT / "docs" / "_build"
    if not (site / "index.html").exists():
        pytest.skip("`make docs` has not run")
    for page in site.rglob("*.html"):
        for target in re.findall(r'<a [^>]*href="([^"#?]+)', page.read_text(encoding="utf-8")):
            if not re.match(r"\w+:", target):
                assert (page.parent / unquote(target)).exists(), (page, target)


def anchors(page: Path) -> set[str]:
    """Return the anchors of a page's headings, as GitHub and MyST make them."""
    titles = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return {re.sub(r"\s", "-", re.sub(r"[^\w\s-]", "", title.lower())) for title in titles}


def test_the_api_page_has_every_public_name():
    text = (ROOT / "docs/reference/api.md").read_text(encoding="utf-8")
    assert set(itae_utils.__all__) == set(re.findall(r"^\.\. auto\w+:: itae_utils\.(\w+)$", text, flags=re.MULTILINE))


def test_the_page_of_results_names_every_field():
    schema = json.loads((ROOT / "itae_utils/results.schema.json").read_text(encoding="utf-8"))
    text = (ROOT / "docs/reference/results.md").read_text(encoding="utf-8")
    row = schema["properties"]["rows"]["items"]["properties"]
    assert [name for name in [*schema["properties"], *row] if f"`{name}`" not in text] == []


def written() -> dict:
    return json.loads(benchmarks.readme.PATH.read_text(encoding="utf-8"))


def test_the_numbers_of_the_benchmark_are_those_of_its_file():
    assert written()["benchmark"] == bench_lines(json.loads(benchmarks.readme.BENCH.read_text(encoding="utf-8")))
    text = (ROOT / "docs/reference/benchmark.md").read_text(encoding="utf-8")
    for part, lines in written()["benchmark"].items():
        for line in lines:
            assert line in text, (part, line)


def test_the_numbers_of_the_readme_are_those_of_the_demo():
    text = re.sub(r"\s+", " ", (ROOT / "README.md").read_text(encoding="utf-8"))
    for name, words in (written()["demo"] | written()["times"]).items():
        assert re.sub(r"\s+", " ", words) in text, (name, words)


@pytest.mark.slow
def test_the_demo_s_report_has_the_numbers_of_the_readme():
    """Up to 0.005: k-means can take another turn on another machine."""
    report = ROOT / "reports" / "demo-demo-digits"
    if not (report / "index.html").exists():
        pytest.skip("`make report` has not run")
    found, expected = demo_numbers(report), written()["demo"]
    assert found.keys() == expected.keys()
    for name, words in found.items():
        number = r"[+−]?\d+(?:\.\d+)?"
        assert re.sub(number, "", words) == re.sub(number, "", expected[name])
        for one, other in zip(re.findall(number, words), re.findall(number, expected[name]), strict=True):
            one, other = (float(each.replace("−", "-")) for each in (one, other))
            assert abs(one - other) <= (1 if "%" in words else 0.02 if "scores" in name else 0.005), (name, words)


CONSTANTS = {"README.md": {"3.11"}, "docs/reference/parameters.md": {"0.5"}, "docs/explanation/remedies.md": {"0.05"},
             "docs/explanation/theta.md": {"0.05", "0.3"}}
MEASURED = re.compile(r"(?<![\w.=(/:-])\d+\.\d+(?![\w.]*\d{4,})")


@pytest.mark.parametrize("page", [page for page in PAGES if page.name != "benchmark.md"], ids=name_of)
def test_no_page_has_a_number_that_nobody_measured(page):
    """Every number with decimals stands in readme.json, or is one of a page's own constants."""
    known = set(MEASURED.findall(json.dumps(written(), ensure_ascii=False)))
    text = BLOCK.sub("", page.read_text(encoding="utf-8"))
    text = re.sub(r"`[^`]*`|\]\([^)]*\)|\d{4}\.\d{5}", "", text)
    assert set(MEASURED.findall(text)) - known <= CONSTANTS.get(name_of(page), set())


