"""A stand-in for the execution of notebooks, for tests of everything around it."""

import shutil
from pathlib import Path

from itae_utils.results import write_results
from tests.tiny_notebooks import PROVENANCE, ROWS


class FakeExecute:
    """Replaces `report.execute`: writes the files of a successful notebook at once, and lists the runs.

    Attributes:
        ran: the folders of the runs since `take`, with that of the report or pairing.
        missing_figures: names of figures that the results name but that are not drawn.
        during: called with the parameters in the middle of each run; its return value is the run's error.
    """

    def __init__(self) -> None:
        self.ran: list[str] = []
        self.missing_figures: list[str] = []
        self.during = lambda parameters: None

    def __call__(self, path: Path, target: Path, parameters: dict, _kernels: object = None) -> str | None:
        collects = "results_dir" in parameters
        self.ran.append(target.parent.name if collects else "/".join(target.parts[-3:-1]))
        shutil.copy(path, target)
        (target.parent / "figures").mkdir()
        for kind in ("png", "pdf"):
            (target.parent / "figures" / f"cover.{kind}").write_text(f"seed {parameters.get('seed')}")
        error = self.during(parameters)
        if error is None:
            about = PROVENANCE if not collects else {
                **{key: PROVENANCE[key] for key in ("versions", "python", "platform", "date", "git")}, "collected": []}
            write_results(target.parent, notebook=path.stem, parameters=parameters, provenance=about, thresholds={},
                          rows=ROWS, figures=["cover", *self.missing_figures], headline=[])
        return error

    def take(self) -> list[str]:
        """Return the runs since the last call."""
        ran, self.ran = self.ran, []
        return ran
