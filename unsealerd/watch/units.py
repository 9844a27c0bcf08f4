"""Asking the service manager, through systemctl(1): bounded, and never waiting for what a unit does."""

import logging
import subprocess

_SECONDS = 15  # with --no-block systemctl only puts a job into the queue

_log = logging.getLogger("unsealerd-watch")


def start_notification(letter: str) -> bool:
    """Start ``unsealerd-notify@LETTER.service``. Whether the job was taken.

    ``letter``: as `Places.hand_over` names it. To start an instance that still runs would do nothing, so each has its own.
    """
    return _systemctl("start", f"unsealerd-notify@{letter}.service")


def reload_or_restart(unit: str) -> bool:
    """Have a running unit take up a key's new version; one that does not run is left alone. Whether the job was taken."""
    return _systemctl("try-reload-or-restart", unit)


def _systemctl(verb: str, unit: str) -> bool:
    try:
        done = subprocess.run(
            ["systemctl", "--no-block", verb, "--", unit],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired:
        _log.error("systemctl=%s unit=%s error=no answer after %d s", verb, unit, _SECONDS)
        return False
    except OSError as err:
        _log.error("systemctl=%s unit=%s error=%s", verb, unit, err.strerror)
        return False
    if done.returncode != 0:
        _log.error(
            "systemctl=%s unit=%s exit=%d error=%s", verb, unit, done.returncode, done.stderr.strip()[:200]
        )
        return False
    _log.info("systemctl=%s unit=%s", verb, unit)
    return True
