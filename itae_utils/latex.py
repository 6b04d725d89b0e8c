"""Tables as LaTeX."""

from __future__ import annotations

import pandas as pd

LATEX = {"\N{NO-BREAK SPACE}": "~", "−": "$-$", "±": r"$\pm$", "θ": r"$\theta$", "α": r"$\alpha$", "‖": r"$\Vert$",
         "₂": "$_2$", "–": "--", "×": r"$\times$", "≤": r"$\le$", "≥": r"$\ge$", "÷": r"$\div$", "→": r"$\to$",
         "<": "$<$", ">": "$>$", "★": r"$\star$",
         "“": "``", "”": "''"}


def as_latex(table: pd.DataFrame, **options: object) -> str:
    """Return a table of texts as LaTeX, with `options` of pandas.

    It needs the package booktabs, and the project's own signs become commands that every engine knows.
    """
    text = table.to_latex(escape=True, **options)
    for sign, command in LATEX.items():
        text = text.replace(sign, command)
    return text
