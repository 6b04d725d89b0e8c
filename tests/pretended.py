"""Notebooks that are only pretended to run, for tests of what happens around them."""

import shutil
from pathlib import Path

from itae_utils.results import write_results
from tests.tiny_notebooks import PROVENANCE, ROWS


class Pretended:
    """In the place of `report.execute`: leaves what a notebook would leave, at once, and keeps count.

    Attributes:
        ran: the folders of the runs, below the report's, since `take`.
        figures: names of the figures that results name and that are drawn.
        undrawn: names of figures that results only name.
        during: called with the parameters in the middle of each run; what it returns is the run's error.
    """

    def __init__(self) -> None:
        self.ran: list[str] = []
        self.figures, self.undrawn = ["cover"], []
        self.during = lambda parameters: None

    def __call__(self, path: Path, target: Path, parameters: dict) -> str | None:
        collects = "results_dir" in parameters
        self.ran.append(target.parent.name if collects else "/".join(target.parts[-3:-1]))
        shutil.copy(path, target)
        for name in self.figures:
            for kind in ("png", "pdf"):
                figure = target.parent / "figures" / f"{name}.{kind}"
                figure.parent.mkdir(exist_ok=True)
                figure.write_bytes(f"{name} {parameters.get('seed')}".encode())
        error = self.during(parameters)
        if error is None:
            about = PROVENANCE if not collects else {
                **{key: PROVENANCE[key] for key in ("versions", "python", "platform", "date", "git")}, "collected": []}
            write_results(target.parent, notebook=path.stem, parameters=parameters, provenance=about, thresholds={},
                          rows=ROWS, figures=self.figures + self.undrawn, headline=[])
        return error

    def take(self) -> list[str]:
        """What ran since the last call."""
        ran, self.ran = self.ran, []
        return ran
