"""Varlink messages: a call as it is read, an answer as it is written."""

import msgspec

from unsealerd.daemon.interface import Result


class Call(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The envelope. `parameters` stay unparsed until the method is known."""

    method: str
    parameters: msgspec.Raw = msgspec.Raw(b"{}")
    oneway: bool = False
    more: bool = False
    upgrade: bool = False


decode_call = msgspec.json.Decoder(Call).decode
_encode_into = msgspec.json.Encoder().encode_into


def append_reply(out: bytearray, result: Result, continues: bool = False) -> None:
    if isinstance(result, bytes):
        out += result
        return
    if result is None:
        out += b'{"parameters":{}'
    else:
        out += b'{"parameters":'
        _encode_into(result, out, -1)
    out += b',"continues":true}\0' if continues else b"}\0"
