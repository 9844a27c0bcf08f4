"""The third party's OpenPGP card as a process, run by the interpreter of its own environment: see `rigs.openpgpcard`.

Standard input and output: messages with a length of two bytes before them. The first answer is the ATR. An empty message
is a reset and has no answer; any other is a command.
"""

import importlib
import os
import struct
import sys
import tempfile
from typing import Any


def main() -> None:
    # By name, since here and in the checked tree `smartcard` is another package.
    smartcard = importlib.import_module("smartcard")
    openpgp = importlib.import_module("smartcard.app.openpgp")
    storage = importlib.import_module("ZODB.FileStorage")
    transactions = importlib.import_module("smartcard.utils").transaction_manager

    with tempfile.TemporaryDirectory(prefix="uog") as folder:
        file = storage.FileStorage(file_name=os.path.join(folder, "card"))
        db = importlib.import_module("ZODB.DB").DB(storage=file, pool_size=1)
        connection = db.open(transaction_manager=transactions)
        with transactions:
            card = connection.root.card = smartcard.Card(name=b"openpgp")
            application = openpgp.OpenPGP(
                identifier=b"\x12\x34", manufacturer=b"\xff\xfe", serial=bytes.fromhex(sys.argv[1])
            )
            application.activateSelf()
            card.createFile(card.traverse((smartcard.MASTER_FILE_IDENTIFIER,)), application)
        serve(card)
        connection.close()
        db.close()


def serve(card: Any) -> None:
    out, source = os.fdopen(os.dup(1), "wb"), sys.stdin.buffer
    os.dup2(2, 1)  # what the libraries print is no answer

    def answer(data: bytes) -> None:
        out.write(struct.pack(">H", len(data)) + data)
        out.flush()

    answer(bytes(card.getATR()))
    while head := source.read(2):
        command = source.read(struct.unpack(">H", head)[0])
        if command:
            answer(bytes(card.runAPDU(bytearray(command))))
        else:
            card.clearVolatile()


if __name__ == "__main__":
    main()
