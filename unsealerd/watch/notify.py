"""``unsealerd-notify LETTER``: runs the administrator's command and calls the webhook, without rights of its own.

Started by the watcher as ``unsealerd-notify@LETTER.service``, where LETTER is an event and a number (``locked-7``); what to tell,
and to whom, is in the credential ``event``.
Exit codes: 0 all were told, 1 somebody could not be, 2 wrong usage.
"""

import http.client
import json
import logging
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from unsealerd import __version__
from unsealerd.errors import BadMessage, NotInitialised
from unsealerd.watch.event import MAX_BYTES, Letter, decode

EX_FAILED = 1
EX_USAGE = 2
CREDENTIAL = "event"
COMMAND_SECONDS = 60
WEBHOOK_SECONDS = 10  # for each step of a request
TRIES = 3
PAUSE_SECONDS = 2.0  # before the second try; doubled before each further one
_MAX_ANSWER = 1 << 16  # bytes that are read of an answer, for the connection's sake
_USAGE = "usage: unsealerd-notify locked[-NUMBER]|unlocked[-NUMBER]"
_NAME = re.compile(r"(locked|unlocked)(?:-[0-9]+)?")

_log = logging.getLogger("unsealerd-notify")


def main(arguments: Sequence[str] | None = None) -> int:
    given = list(sys.argv[1:] if arguments is None else arguments)
    name = _NAME.fullmatch(given[0]) if len(given) == 1 else None
    if name is None:
        print(_USAGE, file=sys.stderr)
        return EX_USAGE
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    try:
        letter = read(os.environ.get("CREDENTIALS_DIRECTORY"))
        if letter.event.event != name[1]:
            raise BadMessage(f"the event is {letter.event.event}, not {name[1]}")
    except (BadMessage, NotInitialised) as err:
        _log.error("error=%s detail=%s", err.name, err.detail)
        return EX_FAILED
    return deliver(letter, time.sleep)


def read(directory: str | None) -> Letter:
    """The event, out of the unit's credentials (systemd.exec(5)). Raises `NotInitialised`, `BadMessage`."""
    if not directory:
        raise NotInitialised(
            "CREDENTIALS_DIRECTORY is not set: this program is started by the service manager"
        )
    try:
        with (Path(directory) / CREDENTIAL).open("rb") as file:
            data = file.read(MAX_BYTES)
    except OSError as err:
        raise NotInitialised(f"the credential {CREDENTIAL!r}: {err.strerror}") from err
    return decode(data)


def deliver(letter: Letter, pause: Callable[[float], None]) -> int:
    """Tell each, whatever becomes of the other. The exit code."""
    told = True
    if letter.command:
        told = run_command(letter)
    if letter.webhook is not None:
        told = call_webhook(letter.webhook, letter, pause) and told
    return os.EX_OK if told else EX_FAILED


def run_command(letter: Letter) -> bool:
    """Whether it ended well. The facts are in its environment and nowhere in its arguments; its output goes to the journal."""
    program = letter.command[0]
    environment = {name: value for name, value in os.environ.items() if name != "CREDENTIALS_DIRECTORY"}
    try:
        # A session of its own, so that what the command left behind can be ended with it.
        process = subprocess.Popen(
            letter.command,
            stdin=subprocess.DEVNULL,
            env={**environment, **letter.event.environment()},
            start_new_session=True,
        )
    except (OSError, ValueError) as err:
        _log.error(
            "command=%s error=%s", program, err.strerror if isinstance(err, OSError) else "not a command"
        )
        return False
    try:
        code = process.wait(COMMAND_SECONDS)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        _log.error("command=%s error=not done after %d s", program, COMMAND_SECONDS)
        return False
    (_log.info if code == 0 else _log.error)("command=%s exit=%d", program, code)
    return code == 0


def call_webhook(address: str, letter: Letter, pause: Callable[[float], None]) -> bool:
    """Whether it took the event, in one of three tries. Neither its path nor its answer is ever logged: both may be secret."""
    from urllib.parse import urlsplit

    body = json.dumps(letter.event.facts()).encode()
    try:
        host = urlsplit(address).hostname
    except ValueError:
        host = None
    for attempt in range(1, TRIES + 1):
        problem = _post(address, body)
        if problem is None:
            _log.info("webhook=%s told", host)
            return True
        _log.error("webhook=%s try=%d error=%s", host, attempt, problem)
        if attempt < TRIES:
            pause(PAUSE_SECONDS * 2 ** (attempt - 1))
    return False


def _post(address: str, body: bytes) -> str | None:
    """One request, with the server's certificate verified against the system's authorities. What went wrong, or None."""
    import ssl
    from urllib.error import HTTPError, URLError
    from urllib.request import HTTPRedirectHandler, HTTPSHandler, Request, build_opener

    class Refuse(HTTPRedirectHandler):
        """No redirect at all: a POST would become a GET, and might leave TLS (RFC 9110, section 15.4)."""

        def redirect_request(self, *_: object) -> None:
            return None

    if not address.startswith("https://"):
        return "not an https address"
    headers = {"Content-Type": "application/json", "User-Agent": f"unsealerd/{__version__}"}
    try:
        opener = build_opener(HTTPSHandler(context=ssl.create_default_context()), Refuse)
        request = Request(address, data=body, headers=headers, method="POST")  # noqa: S310 - https, see above
        with opener.open(request, timeout=WEBHOOK_SECONDS) as answer:
            answer.read(_MAX_ANSWER)
    except HTTPError as err:
        err.close()
        return f"it answers {err.code}"
    except URLError as err:
        return _reason(err.reason)
    except OSError as err:
        return _reason(err)
    except (http.client.HTTPException, ValueError) as err:
        return type(err).__name__  # its text may quote the address
    return None


def _reason(error: object) -> str:
    """The kernel's or OpenSSL's words, which never quote the address."""
    if isinstance(error, TimeoutError):
        return "no answer in time"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return type(error).__name__


if __name__ == "__main__":
    raise SystemExit(main())
