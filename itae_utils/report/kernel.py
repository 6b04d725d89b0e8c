"""Execute notebooks one at a time, each in a kernel of its own that runs the same Python as this process."""

from __future__ import annotations

import logging
import sys
from collections.abc import Mapping
from pathlib import Path

import papermill
from jupyter_client import AsyncKernelManager
from jupyter_client.kernelspec import KernelSpecManager
from nbclient.exceptions import DeadKernelError

from itae_utils.environment import for_a_kernel
from itae_utils.files import PACKAGE, in_one_line

LONGEST = 1500  # characters of an error


class _Kernel(AsyncKernelManager):
    """A kernel of this Python, whatever kernels are installed for the user or the system.

    It imports this copy of the package, even if another one is installed, shows no progress bars, and draws figures
    inline. It is shut down after a notebook but killed on Ctrl-C: in a long computation it would not react for seconds.
    """

    def __init__(self, **options: object) -> None:
        super().__init__(kernel_spec_manager=KernelSpecManager(kernel_dirs=[]), **options)

    async def start_kernel(self, **options: object) -> None:
        await super().start_kernel(**{"env": for_a_kernel(PACKAGE.parent), **options})

    async def shutdown_kernel(self, now: bool = False, restart: bool = False) -> None:
        interrupted = isinstance(sys.exc_info()[1], KeyboardInterrupt)
        await super().shutdown_kernel(now=now or interrupted, restart=restart)


def execute(path: Path, target: Path, parameters: Mapping[str, object]) -> str | None:
    """Run the notebook at `path` into `target`; return the error that stopped it in one line, or None.

    The kernel's working directory is the notebook's folder, so that relative paths mean the same as in JupyterLab.
    """
    logging.getLogger("papermill").setLevel(logging.ERROR)  # it warns about parameters that it can't parse
    try:
        papermill.execute_notebook(
            _literally(path), _literally(target), dict(parameters), kernel_name="python3", cwd=path.parent,
            progress_bar=False, log_output=False, kernel_manager_class=_Kernel,
            extra_arguments=["--log-level=CRITICAL"],
        )
    except papermill.PapermillExecutionError as failure:
        return f"{in_one_line(f'{failure.ename}: {failure.evalue}', LONGEST)} (cell [{failure.exec_count}])"
    except DeadKernelError as failure:
        return f"the kernel died: {in_one_line(failure, LONGEST)}"
    return None


def _literally(path: Path) -> str:
    """Return a path for papermill, which reads {name} in it as a parameter."""
    return str(path).replace("{", "{{").replace("}", "}}")
