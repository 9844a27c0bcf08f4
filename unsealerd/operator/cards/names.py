"""Names that devices give themselves, fit for a terminal."""


def printable(text: str) -> str:
    """Nothing moves a cursor or hides what follows: whoever makes a USB device chooses its name."""
    return "".join(each if each.isprintable() else "?" for each in text)
