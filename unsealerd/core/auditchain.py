"""The chain of the audit log: each line carries the hash of the line before it.

::

    {"caller":{…},"event":"key_read","hash":"…","prev":"…","seq":7,"time":"2026-01-31T12:00:00.000Z",…}\\n

A line is canonical JSON (sorted names, no blanks). ``hash`` is the hex SHA-256 of the same object without ``hash``; ``prev`` is
the ``hash`` of the line before, and 64 zeros in the first. Changing, removing or inserting a line breaks every later one.
"""

import hashlib

import msgspec

from unsealerd.errors import AuditBroken

GENESIS = "0" * 64
MAX_LINE_BYTES = 16 << 10

Record = dict[str, object]

_encoder = msgspec.json.Encoder(order="sorted")


def link(fields: Record, prev: str, seq: int) -> tuple[bytes, str]:
    """The line (with its newline) that continues the chain, and its hash.

    Raises ``ValueError`` for a record that `verify_line` would refuse: longer than `MAX_LINE_BYTES`, or not text.
    """
    record = {**fields, "prev": prev, "seq": seq}
    digest = hashlib.sha256(_encoder.encode(record)).hexdigest()
    line = _encoder.encode({**record, "hash": digest})
    if len(line) > MAX_LINE_BYTES:
        raise ValueError(f"a record of {len(line)} bytes; at most {MAX_LINE_BYTES}")
    return line + b"\n", digest


def verify_line(line: bytes, expected_prev: str, expected_seq: int) -> Record:
    """The record of a line (without its newline), if it continues the chain. Raises `AuditBroken`."""
    if len(line) > MAX_LINE_BYTES:
        raise AuditBroken(f"record {expected_seq}: longer than {MAX_LINE_BYTES} bytes")
    try:
        record = msgspec.json.decode(line, type=Record)
    except (ValueError, RecursionError) as err:
        raise AuditBroken(f"record {expected_seq}: not a JSON object") from err
    digest = record.pop("hash", None)
    if record.get("seq") != expected_seq:
        raise AuditBroken(f"record {expected_seq}: its number is {record.get('seq')!r}")
    if record.get("prev") != expected_prev:
        raise AuditBroken(f"record {expected_seq}: does not continue the record before it")
    if digest != hashlib.sha256(_encoder.encode(record)).hexdigest():
        raise AuditBroken(f"record {expected_seq}: was changed")
    record["hash"] = digest
    if _encoder.encode(record) != line:
        raise AuditBroken(f"record {expected_seq}: not canonical")
    return record
