"""What the log of a long run says while it lasts."""

import sys
import time


def progress(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)
