"""A small table and its three forms: Markdown, LaTeX (booktabs), and HTML by the template."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass

LATEX = {
    "\\": r"\textbackslash{}",
    "_": r"\_",
    "%": r"\%",
    "&": r"\&",
    "#": r"\#",
    "$": r"\$",
    "{": r"\{",
    "}": r"\}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "±": r"$\pm$",
    "\N{MINUS SIGN}": "$-$",
    "<": "$<$",
    ">": "$>$",
    "|": "$|$",
    "\N{BLACK STAR}": r"$\star$",
}
"""What LaTeX reads as something else; both engines print the rest."""


HEADER_LETTERS = 11
"""Letters in a line of a column's title in LaTeX."""


@dataclass(frozen=True)
class Cell:
    """Text of a cell, and whether it is bold."""

    text: str
    bold: bool = False


@dataclass(frozen=True)
class Table:
    """A table.

    name: short, for labels; split: ``test``, ``val`` or empty where the numbers are of neither;
    notes: footnotes in order.
    """

    name: str
    title: str
    split: str
    header: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    notes: tuple[str, ...]

    def __post_init__(self) -> None:
        assert all(len(row) == len(self.header) for row in self.rows), "a cell for every column"

    @property
    def caption(self) -> str:
        """The title, and unmistakably which data the numbers are of."""
        return self.title + {"test": " (TEST DATA)", "val": " (VALIDATION DATA)"}.get(
            self.split, ""
        )


def markdown(table: Table) -> str:
    """Pipe table under its title, columns padded so that it reads in a terminal, then notes."""
    cells = [[_markdown(cell) for cell in row] for row in table.rows]
    header = [text.replace("|", r"\|") for text in table.header]
    widths = [max(len(row[at]) for row in (header, *cells)) for at in range(len(header))]
    rule = ["-" * widths[0], *("-" * (w - 1) + ":" for w in widths[1:])]
    lines = [f"### {table.caption}", "", _line(header, widths), _line(rule, widths)]
    lines += [_line(row, widths) for row in cells]
    if table.notes:
        lines += ["", *(f"- {note}" for note in table.notes)]
    return "\n".join(lines)


def _markdown(cell: Cell) -> str:
    text = cell.text.replace("|", r"\|")
    return f"**{text}**" if cell.bold else text


def _line(cells: Sequence[str], widths: Sequence[int]) -> str:
    first, *rest = zip(cells, widths, strict=True)
    padded = [first[0].ljust(first[1]), *(cell.rjust(width) for cell, width in rest)]
    return f"| {' | '.join(padded)} |"


def escape(text: str) -> str:
    """Text as LaTeX prints it literally."""
    return "".join(LATEX.get(sign, sign) for sign in text)


def latex(table: Table) -> str:
    """A ``table`` environment for ``booktabs``, notes below in a small font."""
    columns = "l" + "r" * (len(table.header) - 1)
    body = [" & ".join(_latex(cell) for cell in row) + r" \\" for row in table.rows]
    notes = [rf"\item {escape(note)}" for note in table.notes]
    lines = [
        r"\begin{table}[ht]",
        r"\centering",
        r"\setlength{\tabcolsep}{4pt}",
        rf"\caption{{{escape(table.caption)}}}",
        rf"\label{{tab:{table.name}}}",
        r"\footnotesize",
        rf"\begin{{tabular}}{{{columns}}}",
        r"\toprule",
        " & ".join(_latex_header(text) for text in table.header) + r" \\",
        r"\midrule",
        *body,
        r"\bottomrule",
        r"\end{tabular}",
    ]
    if notes:
        lines += [r"\begin{itemize}", r"\scriptsize", *notes, r"\end{itemize}"]
    return "\n".join([*lines, r"\end{table}"])


def _latex_header(text: str) -> str:
    """A title in lines of few letters, so that ten columns fit on a page."""
    lines = [escape(line) for line in textwrap.wrap(text, HEADER_LETTERS)]
    if len(lines) == 1:
        return lines[0]
    return r"\shortstack[r]{" + r"\\".join(lines) + "}"


def _latex(cell: Cell) -> str:
    text = escape(cell.text)
    # \boldmath reaches the plus-minus sign too.
    return rf"{{\bfseries\boldmath {text}}}" if cell.bold else text
