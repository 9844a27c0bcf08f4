"""Messages for people: on stderr, one line each, with the program's name or as a hint."""

import sys


def complain(message: str, *, hint: str = "") -> None:
    note(f"unsealctl: {message}")
    if hint:
        note(f"hint: {hint}")


def note(line: str = "") -> None:
    if sys.stderr is None:
        return  # closed by the caller; print() would fall back to stdout, which is for data
    encoding = sys.stderr.encoding or "ascii"
    print(line.encode(encoding, "backslashreplace").decode(encoding), file=sys.stderr, flush=True)
