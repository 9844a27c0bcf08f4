"""Another program that uses a card: ``READER shared|exclusive|direct [APDU...]``.

Prints what came of the connection, then the answer to each command, in hex, and waits for the end of its standard input
with the card in its hands. Then it lets go without a reset.
"""

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def other_program(reader: str, mode: str, *apdus: bytes) -> Iterator[list[str]]:
    """The lines that it printed; it holds the card as long as this is open."""
    command = [sys.executable, __file__, reader, mode, *(apdu.hex() for apdu in apdus)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        lines = []
        for line in process.stdout:
            if not line.strip():
                break
            lines.append(line.strip())
        yield lines


def main() -> None:
    from smartcard import scard

    reader, mode, *apdus = sys.argv[1:]
    share = {
        "shared": scard.SCARD_SHARE_SHARED,
        "exclusive": scard.SCARD_SHARE_EXCLUSIVE,
        "direct": scard.SCARD_SHARE_DIRECT,
    }[mode]
    _, context = scard.SCardEstablishContext(scard.SCARD_SCOPE_SYSTEM)
    code, card, _ = scard.SCardConnect(
        context, reader, share, scard.SCARD_PROTOCOL_T0 | scard.SCARD_PROTOCOL_T1
    )
    print(f"{code & 0xFFFFFFFF:08X}")
    if code == scard.SCARD_S_SUCCESS:
        for apdu in apdus:
            code, answer = scard.SCardTransmit(card, scard.SCARD_PCI_T1, list(bytes.fromhex(apdu)))
            print(bytes(answer).hex() if code == 0 else f"{code & 0xFFFFFFFF:08X}")
    print(flush=True)
    sys.stdin.read()
    if code == scard.SCARD_S_SUCCESS:
        scard.SCardDisconnect(card, scard.SCARD_LEAVE_CARD)
    scard.SCardReleaseContext(context)


if __name__ == "__main__":
    main()
