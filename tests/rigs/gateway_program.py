"""``gateway_program.py CONFIG REPORT [LIMIT=VALUE ...]``: the gateway's own `main` or, with limits, its `serve`.

At the end it writes to REPORT what the process imported, mapped and opened. It imports nothing itself that the gateway does not.
"""

import ctypes
import json
import sys
from pathlib import Path

PR_GET_DUMPABLE = 3


def run(config: str, report: str, *limits: str) -> int:
    opened: list[str] = []

    def hook(event: str, arguments: tuple[object, ...]) -> None:
        if event == "open":
            opened.append(str(arguments[0]))

    sys.addaudithook(hook)
    from unsealerd.gateway.main import main, serve

    try:
        if not limits:
            return main(["--config", config])
        import logging

        from unsealerd.gateway.limits import Limits
        from unsealerd.gateway.settings import load

        logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
        values = {name: float(value) for name, _, value in (limit.partition("=") for limit in limits)}
        whole = {name: int(value) if value.is_integer() else value for name, value in values.items()}
        return serve(load(Path(config)), Limits(**whole))  # type: ignore[arg-type]
    finally:
        facts = {"modules": sorted(sys.modules), "opened": list(opened)}
        facts["dumpable"] = [str(ctypes.CDLL(None).prctl(PR_GET_DUMPABLE, 0, 0, 0, 0))]
        facts["maps"] = Path("/proc/self/maps").read_text().splitlines()
        Path(report).write_text(json.dumps(facts))


if __name__ == "__main__":
    raise SystemExit(run(*sys.argv[1:]))
