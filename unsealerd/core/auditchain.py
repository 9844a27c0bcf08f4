"""The chain of the audit log: each line carries the hash of the line before it, over the seams between its files too.

::

    {"caller":{…},"event":"key_read","hash":"…","prev":"…","seq":7,"time":"2026-01-31T12:00:00.000Z",…}\\n

A line is canonical JSON (sorted names, no blanks). ``hash`` is the hex SHA-256 of the same object without ``hash``; ``prev`` is
the ``hash`` of the line before, and 64 zeros in the first. Changing, removing or inserting a line breaks every later one.

The log is one file that is written to, and files that are closed and never change again, each named by its first record::

    audit-000000000001.jsonl   records      1 to 220134   removed when there are too many; then the kept part begins with...
    audit-000000220135.jsonl   records 220135 to 441003   ...a record `audit_rotated`, as every file but the first does
    audit.jsonl                records 441004 to now      its first record says in `kept_from` where the kept part begins
"""

import hashlib

import msgspec

from unsealerd.errors import AuditBroken

GENESIS = "0" * 64
MAX_LINE_BYTES = 16 << 10

Record = dict[str, object]
Facts = dict[str, object]
"""Who asked, and for what, as it stands in a record."""

AUDIT_LOG = "audit.jsonl"
ROTATED = "audit_rotated"

_DIGITS = 12  # of the number in a name, so that names sort as the numbers do
_encoder = msgspec.json.Encoder(order="sorted")
_decoder = msgspec.json.Decoder(Record)


def closed_name(first: int) -> str:
    """The name of the closed file that begins with this record."""
    return f"audit-{first:0{_DIGITS}}.jsonl"


def closed_first(name: str) -> int | None:
    """The number of the first record of a closed file; None for any other name."""
    number = name.removeprefix("audit-").removesuffix(".jsonl")
    if not (number.isascii() and number.isdigit() and len(number) <= 2 * _DIGITS):
        return None
    first = int(number)
    return first if first and closed_name(first) == name else None


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
        record = _decoder.decode(line)
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


def verify_alone(line: bytes) -> tuple[int, Record]:
    """The number and the record of a line, at the place in the chain that it says itself. Raises `AuditBroken`."""
    try:
        claimed = _decoder.decode(line)
    except (ValueError, RecursionError) as err:
        raise AuditBroken("not a JSON object") from err
    seq, prev = claimed.get("seq"), claimed.get("prev")
    if type(seq) is not int or seq < 1 or not isinstance(prev, str):
        raise AuditBroken("it has no place in a chain")
    return seq, verify_line(line, GENESIS if seq == 1 else prev, seq)


def kept_from(seq: int, record: Record) -> int:
    """Where the kept part began when the file was begun of which this record is the first. Raises `AuditBroken`."""
    if seq == 1:
        return 1
    first = record.get("kept_from")
    if record.get("event") != ROTATED or type(first) is not int or not 1 <= first < seq:
        raise AuditBroken(f"record {seq}: the first of a file, and no {ROTATED}")
    return first


class Chain:
    """Checks lines in their order, from the first that is kept. Every method raises `AuditBroken`."""

    def __init__(self) -> None:
        self.first = 1
        self.count = 0
        self.head = GENESIS
        self._kept_from = 1

    def begin_file(self, line: bytes, named: int | None) -> Record:
        """The first record of a file. ``named``: the number of it that the file is named by; None for the open one."""
        seq, record = verify_alone(line)
        if named not in (None, seq):
            raise AuditBroken(f"record {seq}: the first of a file that is named by record {named}")
        if self.count:
            due = self.first + self.count
            if seq > due:
                raise AuditBroken(f"record {seq}: records {due} to {seq - 1} before it are missing")
            verify_line(line, self.head, due)
        self._kept_from = kept_from(seq, record)
        if not self.count:
            self.first = seq
        return self._take(record)

    def continue_file(self, line: bytes) -> Record:
        """Any other record."""
        return self._take(verify_line(line, self.head, self.first + self.count))

    def _take(self, record: Record) -> Record:
        self.head = str(record["hash"])
        self.count += 1
        return record

    def check_beginning(self) -> None:
        """After the last line: what is not there any more was removed by the daemon."""
        if self.first > self._kept_from:
            raise AuditBroken(
                f"records {self._kept_from} to {self.first - 1} are missing: nothing in the log says that they were removed"
            )
