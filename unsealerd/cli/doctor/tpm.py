"""The TPM: is it there, the one that was pinned, willing, and has anything been measured?"""

from collections.abc import Iterator

from unsealerd.cli.doctor.finding import Finding, fail, ok, refused, warn
from unsealerd.cli.doctor.machine import Machine
from unsealerd.cli.doctor.subject import Answers, Subject
from unsealerd.cli.fields import optional, required
from unsealerd.errors import TpmFailed, named

# PCRs 17 to 22 begin with all ones, the others with zeros (TCG PC Client Platform TPM Profile, section 4.6.2).
_UNTOUCHED = ("00" * 32, "ff" * 32)
_SECURE_BOOT = "sys/firmware/efi/efivars/SecureBoot-8be4df61-93ca-11d2-aa0d-00e098032b8c"
_SECURE_BOOT_PCR = 7


def check(subject: Subject) -> Iterator[Finding]:
    if subject.config.tpm.tcti is None:
        yield warn(
            "tpm",
            "none configured: every reboot needs an operator, and an older backup put back is not noticed",
            "if this machine has a TPM 2.0: [tpm] tcti, and set up anew",
        )
        return
    if not isinstance(subject.answers, Answers):
        return
    tpm = subject.answers.tpm
    error = optional(tpm, "error", str)
    if error is not None:
        yield refused("tpm", (named(error) or TpmFailed)(f"at {tpm.get('tcti')}"))
        return
    yield ok("tpm", f"{tpm.get('manufacturer')} {tpm.get('firmware')} at {tpm.get('tcti')}")
    yield _lockout(tpm.get("in_lockout") is True, optional(tpm, "lockout_counter", int) or 0)
    yield _root_key(str(tpm.get("parent")), pinned=tpm.get("counter") is not None)
    yield _counter(tpm.get("counter"), behind=tpm.get("counter_behind") is True)
    yield _measured(subject.answers, subject.config.tpm.pcrs)
    if _SECURE_BOOT_PCR in subject.config.tpm.pcrs:
        yield _secure_boot(subject.machine)


def _lockout(locked: bool, counter: int) -> Finding:
    clear = "`tpm2_dictionarylockout -c` clears it"
    if locked:
        return fail("tpm lockout", "the TPM is in dictionary-attack lockout", clear)
    if counter:
        return warn(
            "tpm lockout", f"not in lockout, and {counter} failures towards it", f"power cuts count; {clear}"
        )
    return ok("tpm lockout", "no failures counted")


def _root_key(kind: str, *, pinned: bool) -> Finding:
    where = (
        "persistent at 0x81000001" if kind == "persistent" else "made from the standard template at each use"
    )
    if not pinned:
        return warn("storage root key", f"{where}, not pinned yet", "sudo unsealctl init")
    return ok("storage root key", f"{where}, and its name is the pinned one")


def _counter(value: object, *, behind: bool) -> Finding:
    if behind:
        return fail(
            "tpm counter",
            "behind the backup: an older copy of the disk would still be taken for current",
            "the daemon tries again every minute; `journalctl -u unsealerd` says why it cannot",
        )
    return ok("tpm counter", "made at init" if value is None else f"at {value}, as the backup says")


def _measured(answers: Answers, pcrs: tuple[int, ...]) -> Finding:
    """A PCR that nothing was measured into is the same for every boot."""
    values = required(answers.tpm, "pcr_values", dict)
    if not values:
        return fail("pcrs", "the TPM has no SHA-256 bank", "turn the bank on in the firmware's settings")
    untouched = [pcr for pcr in pcrs if values.get(str(pcr), _UNTOUCHED[0]) in _UNTOUCHED]
    listed = " ".join(str(pcr) for pcr in untouched)
    if len(untouched) == len(pcrs):
        return fail(
            "pcrs",
            f"nothing was measured into {listed}: a sealed copy would open for any boot",
            "does the firmware measure the boot (UEFI, TPM on, SHA-256 bank)? Or choose other [tpm] pcrs",
        )
    if untouched:
        return warn("pcrs", f"nothing was measured into {listed}", "[tpm] pcrs: leave out what never changes")
    return ok("pcrs", f"{' '.join(str(pcr) for pcr in pcrs)} are measured")


def _secure_boot(machine: Machine) -> Finding:
    variable = machine.raw(_SECURE_BOOT)  # four bytes of attributes, then the value
    if variable is not None and variable[4:] == b"\x01":
        return ok("secure boot", "on")
    why = "off" if variable is not None else "not known: not booted by UEFI"
    return warn(
        "secure boot",
        f"{why}; PCR 7 then says little about what was booted",
        "turn it on, or add PCRs of the boot loader and kernel (4, 9, 11) to [tpm] pcrs",
    )
