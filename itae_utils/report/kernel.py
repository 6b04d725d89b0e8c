"""Notebooks executed one at a time, each in a kernel of its own that is this very Python."""

from __future__ import annotations

import logging
import os
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import papermill
from ipykernel.kernelspec import write_kernel_spec
from jupyter_client import AsyncKernelManager
from nbclient.exceptions import DeadKernelError

from itae_utils.files import PACKAGE


def execute(path: Path, target: Path, parameters: Mapping[str, object]) -> str | None:
    """Run the notebook at `path` into `target`, and say in one line what stopped it; None where it ran through.

    Its kernel works in the notebook's folder, so that what is relative in a notebook means here what it means in
    JupyterLab. To be called within `kernel_of_this_python`.
    """
    try:
        papermill.execute_notebook(
            _literally(path), _literally(target), dict(parameters), kernel_name="python3", cwd=path.parent,
            progress_bar=False, log_output=False, kernel_manager_class=_kernel_class(),
        )
    except papermill.PapermillExecutionError as failure:
        return f"{_one_line(f'{failure.ename}: {failure.evalue}')} (cell [{failure.exec_count}])"
    except DeadKernelError as failure:
        return f"the kernel died: {_one_line(str(failure))}"
    return None


def _literally(path: Path) -> str:
    """A path as papermill takes it, which reads {name} in it as a parameter."""
    return str(path).replace("{", "{{").replace("}", "}}")


def _one_line(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= 300 else line[:299] + "…"


def _kernel_class() -> type[AsyncKernelManager]:
    class Kernel(AsyncKernelManager):
        """Asked to end after a notebook, but killed on Ctrl-C: deep in a computation it would not hear for seconds."""

        async def shutdown_kernel(self, now: bool = False, restart: bool = False) -> None:
            interrupted = isinstance(sys.exc_info()[1], KeyboardInterrupt)
            await super().shutdown_kernel(now=now or interrupted, restart=restart)

    return Kernel


@contextmanager
def kernel_of_this_python() -> Iterator[None]:
    """While open, the kernel `python3` is this interpreter, whatever kernels are installed for the user or the system.

    It imports this very package, even where another copy of it is installed. Its progress bars are off, and figures
    are drawn inline even where the environment asks for another backend.
    """
    logging.getLogger("papermill").setLevel(logging.ERROR)  # it warns of parameters it fails to see; ours are checked
    before = os.environ.get("JUPYTER_PATH")
    paths = os.pathsep.join(filter(None, [str(PACKAGE.parent), os.environ.get("PYTHONPATH")]))
    environment = {"ITAE_PROGRESS": "0", "MPLBACKEND": "module://matplotlib_inline.backend_inline", "PYTHONPATH": paths}
    with tempfile.TemporaryDirectory() as folder:
        write_kernel_spec(
            Path(folder, "kernels", "python3"), {"env": environment}, extra_arguments=["--log-level=CRITICAL"])
        os.environ["JUPYTER_PATH"] = os.pathsep.join(filter(None, [folder, before]))
        try:
            yield
        finally:
            os.environ.pop("JUPYTER_PATH")
            if before is not None:
                os.environ["JUPYTER_PATH"] = before
