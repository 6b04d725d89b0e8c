"""What pip installs works by itself: the wheel in a new environment, its extras, and the tests in the sdist.

The new environment gets everything from the package index but torch, torchvision and what only these need: they are
links to the tested environment, because they take gigabytes.
"""

import json
import os
import re
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
LARGE = {"torch", "torchvision"}
OFFLINE = {"HF_HUB_OFFLINE": "1", **dict.fromkeys(("http_proxy", "https_proxy", "HTTPS_PROXY", "ALL_PROXY"),
                                                  "http://127.0.0.1:9")}  # nothing listens there
LITTER = ("notebooks/.ipynb_checkpoints/a-checkpoint.ipynb", "notebooks/__pycache__/a.pyc", "itae_utils/a.pyc",
          "reports/mine/report.json", ".pytest_cache/README.md", "docs/_build/index.html")


def run(*command: object, cwd: Path, check: bool = True, **environment: str) -> subprocess.CompletedProcess:
    """Run a command without this process's variables for Python and for the project."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "ITAE_"))}
    done = subprocess.run([*map(str, command)], cwd=cwd, env=kept | environment, text=True, check=False,
                          capture_output=True)
    assert not check or done.returncode == 0, done.stdout + done.stderr
    return done


def needed(names: set[str], without: frozenset[str] = frozenset()) -> set[str]:
    """Return the installed distributions that some need, themselves included, and do not go on from `without`."""
    found, to_do = set(), [(name, frozenset()) for name in names]
    while to_do:
        name, extras = to_do.pop()
        name = canonicalize_name(name)
        if (name, extras) in found or name in without:
            continue
        try:
            requirements = [Requirement(text) for text in metadata.requires(name) or ()]
        except metadata.PackageNotFoundError:  # an extra that is not installed
            continue
        found.add((name, extras))
        to_do += [(each.name, frozenset(each.extras)) for each in requirements if each.marker is None
                  or any(each.marker.evaluate({"extra": extra}) for extra in ("", *extras))]
    return {name for name, _ in found}


def link_large(folder: Path) -> None:
    """Link torch, torchvision and what only they need into a folder, with their metadata."""
    folder.mkdir()
    extras = [text for texts in PROJECT["optional-dependencies"].values() for text in texts]
    others = {Requirement(text).name for text in PROJECT["dependencies"] + extras}
    for name in needed(LARGE) - needed(others, without=frozenset(LARGE)):
        distribution = metadata.distribution(name)
        for top in {path.parts[0] for path in distribution.files} - {"..", "__pycache__"}:
            if not top.endswith(".pth") and not (folder / top).is_symlink():
                (folder / top).symlink_to(distribution.locate_file(top))


@dataclass
class Environment:
    """A virtual environment without pip; the pip of the tested one installs into it."""

    folder: Path

    @property
    def packages(self) -> Path:
        return next((self.folder / "lib").glob("python*")) / "site-packages"

    def pip(self, *arguments: object, check: bool = True) -> subprocess.CompletedProcess:
        python = self.folder / "bin" / "python"
        return run(sys.executable, "-m", "pip", "--python", python, "install", "--no-input", *arguments,
                   cwd=self.folder, check=check)


def build_sdist(project: Path, folder: Path) -> Path:
    run(sys.executable, "-m", "hatchling", "build", "-t", "sdist", "-d", folder, cwd=project)
    return next(folder.glob("*.tar.gz"))


def members(sdist: Path) -> set[str]:
    with tarfile.open(sdist) as archive:
        return {name.partition("/")[2] for name in archive.getnames()}


@pytest.fixture(scope="module")
def sdist(tmp_path_factory):
    return build_sdist(ROOT, tmp_path_factory.mktemp("sdist"))


@pytest.fixture(scope="module")
def unpacked(sdist):
    """Return the folder of the unpacked sdist, with litter in it that does not belong into a package."""
    with tarfile.open(sdist) as archive:
        archive.extractall(sdist.parent, filter="data")
    project = sdist.parent / sdist.name.removesuffix(".tar.gz")
    for litter in LITTER:
        (project / litter).parent.mkdir(parents=True, exist_ok=True)
        (project / litter).touch()
    return project


@pytest.fixture(scope="module")
def wheel(unpacked):
    """Return the wheel that pip builds from the sdist."""
    folder = unpacked.parent
    run(sys.executable, "-m", "pip", "wheel", "--no-build-isolation", "--no-deps", "-w", folder, unpacked, cwd=folder)
    return next(folder.glob("*.whl"))


@pytest.fixture(scope="module")
def collecting(unpacked, tmp_path_factory):
    """Start to collect the tests of the sdist and of the checkout, and return the processes and their output."""
    started = {}
    for folder in (unpacked, ROOT):
        output = tmp_path_factory.mktemp("collected") / "output"
        command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--collect-only"]
        with output.open("w") as file:
            process = subprocess.Popen(command, cwd=folder, env=os.environ | {"PYTHONPATH": str(folder)}, stdout=file)
        started[folder] = process, output
    yield started
    for process, _ in started.values():
        process.kill()
        process.wait()


@pytest.fixture(scope="module")
def installed(wheel, collecting, tmp_path_factory):  # tests are collected while pip downloads
    """Return a new environment with the wheel, in the versions of requirements.lock."""
    environment = Environment(tmp_path_factory.mktemp("environment") / "venv")
    run(sys.executable, "-m", "venv", "--without-pip", environment.folder, cwd=ROOT)
    link_large(environment.folder / "large")
    (environment.packages / "large.pth").write_text(f"{environment.folder / 'large'}\n", encoding="utf-8")
    probe = environment.pip("--dry-run", "--no-deps", "--retries", "0", "iniconfig", check=False)
    if probe.returncode:
        pytest.skip(f"no package index can be reached: {probe.stderr.strip().splitlines()[-1]}")
    environment.pip("--no-compile", "--constraint", ROOT / "requirements.lock", wheel)
    return environment


def files_of(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def write_report(environment: Environment, folder: Path) -> None:
    """Make a report by the installed command, offline, in an empty folder and with an empty home."""
    work, home = folder / "work", folder / "home"
    work.mkdir()
    home.mkdir()
    command = ["report", "--profile", "demo", "--only", "01", "-p", "limit", "60"]
    run(environment.folder / "bin" / "itae", *command, cwd=work, HOME=str(home), OMP_NUM_THREADS="1", **OFFLINE)
    assert [path.name for path in work.iterdir()] == ["reports"]
    report = work / "reports" / "demo-demo-digits"
    assert {"index.html", "01_artifact_discovery/01_artifact_discovery.html"} <= files_of(report)
    results = json.loads((report / "01_artifact_discovery" / "results.json").read_text(encoding="utf-8"))
    assert results["provenance"]["versions"]["itae-utils"] == PROJECT["version"]
    assert results["provenance"]["git"] is None  # so it is not the checkout's code


def test_the_wheel_has_all_files_of_the_package_and_nothing_else(wheel):
    tracked = run("git", "ls-files", "--cached", "--others", "--exclude-standard", "itae_utils", "notebooks", cwd=ROOT,
                  check=False).stdout.splitlines()
    if not tracked:
        pytest.skip("this is not a git checkout")
    names = {re.sub("^notebooks/", "itae_utils/_notebooks/", name) for name in tracked}
    assert {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name} == names


def test_the_installed_command_writes_a_report(installed, tmp_path):
    write_report(installed, tmp_path)


def test_it_runs_from_a_folder_that_is_read_only(installed, tmp_path):
    packages = installed.packages
    for options in (["--bind", packages, packages], ["-o", "remount,ro,bind", packages]):
        done = run("mount", *options, cwd=tmp_path, check=False)
        if done.returncode:
            run("umount", packages, cwd=tmp_path, check=False)
            pytest.skip(f"no file system can be mounted here: {done.stderr.strip()}")
    try:
        with pytest.raises(OSError, match="Read-only"):
            (packages / "probe").touch()
        write_report(installed, tmp_path)
    finally:
        run("umount", "-l", packages, cwd=tmp_path)


def test_all_extras_resolve_together(installed, wheel):
    extras = sorted(set(PROJECT["optional-dependencies"]) - {"dev"})
    planned = installed.pip("--dry-run", f"{wheel}[{','.join(extras)}]").stdout
    missing = [name for name in ("faiss-cpu", "distributed", "datasets", "anywidget", "s3fs", "transformers")
               if f" {name}-" not in planned]
    assert not missing, planned


def test_the_sdist_has_the_tests_and_what_they_need(unpacked, collecting):
    of_sdist, of_checkout = (sorted(collected(folder, *started)) for folder, started in collecting.items())
    assert of_sdist == of_checkout
    assert len(of_sdist) > 1000
    run(sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "tests/test_files.py", "tests/test_project.py",
        cwd=unpacked)


def collected(folder: Path, process: subprocess.Popen, output: Path) -> list[str]:
    """Return the names of the tests that pytest found in a folder, without the folder."""
    assert process.wait() == 0, output.read_text()
    return [line for line in output.read_text().replace(str(folder), "").splitlines() if "::" in line]


def test_the_sdist_has_no_litter(sdist, unpacked, tmp_path):
    assert members(build_sdist(unpacked, tmp_path)) == members(sdist)
    reports = {name for name in members(sdist) if name.startswith("reports/")}
    assert reports
    assert {name.split("/")[1] for name in reports} <= {"bench.json", "readme.json", "figures"}
