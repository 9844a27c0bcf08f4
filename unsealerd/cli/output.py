"""What goes to stdout: JSON for programs, lines and tables for people."""

import json
import sys
from collections.abc import Iterable, Mapping, Sequence


def printable(text: str) -> str:
    """One line that cannot steer a terminal: control characters, line breaks and stray surrogates become
    escapes.

    Host names, details and audit records come from elsewhere, and some of them from an enemy.
    """
    return "".join(
        character if character.isprintable() else character.encode("unicode_escape").decode()
        for character in text
    )


def print_json(value: Mapping[str, object]) -> None:
    """One object on one line; the order of the names is kept."""
    # ASCII only: no terminal, locale or surrogate can make it fail.
    sys.stdout.write(json.dumps(value, separators=(",", ":")) + "\n")


def print_line(text: str = "") -> None:
    data = printable(text) + "\n"
    # A locale without UTF-8 must not turn an answer into a traceback.
    encoding = sys.stdout.encoding or "ascii"
    sys.stdout.write(data.encode(encoding, "backslashreplace").decode(encoding))


def print_table(rows: Iterable[Sequence[str]], headers: Sequence[str] = ()) -> None:
    """Aligned columns; on a terminal they wrap to its width, in a file or a pipe a row is a line."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, show_header=bool(headers), pad_edge=False, header_style="bold")
    cells = [tuple(row) for row in rows]
    width = max((len(row) for row in cells), default=len(headers))
    for column in range(width):
        # Text, not str: a str would be read as markup.
        table.add_column(Text(headers[column]) if headers else "", overflow="fold")
    for row in cells:
        table.add_row(*(Text(printable(cell)) for cell in row))
    terminal = sys.stdout.isatty()
    console = Console(file=sys.stdout, width=None if terminal else 4096, highlight=False)
    with console.capture() as capture:
        console.print(table)
    for line in capture.get().splitlines():
        sys.stdout.write(line.rstrip() + "\n")
