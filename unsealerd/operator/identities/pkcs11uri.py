"""The name of a token and of a key on it: the ``pkcs11:`` URI of RFC 7512, strictly.

    pkcs11:token=ops;object=unlock;id=%03?module-path=/usr/lib/softhsm/libsofthsm2.so
    pkcs11:[PATH ATTRIBUTES, ;]          [?QUERY ATTRIBUTES, &]

What a key cannot be found by is refused, and so are ``pin-source`` and ``pin-value``: a PIN is asked for when it is
needed, and is kept nowhere. Without a module attribute the module is p11-kit's proxy, which has all modules of the machine.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Self, TypeVar

from unsealerd.errors import BadRequest

_T = TypeVar("_T")

DEFAULT_MODULES = ("libp11-kit.so.0",)
"""The proxy module itself; ``p11-kit-proxy.so`` is a link to it that few machines have."""
MAX_LENGTH = 2048
"""Characters."""
_SCHEME = "pkcs11:"
_PIN_ATTRIBUTES = ("pin-source", "pin-value")

# RFC 7512 section 2.3: pk11-pchar is unreserved, pk11-res-avail and percent-encoding; "&" stands in paths alone, "/", "?" and
# "|" in queries alone.
_COMMON = r"(?:[A-Za-z0-9._~\[\]:@!$'()*+,=\-]|%[0-9A-Fa-f]{2}"
_PATH_VALUE = re.compile(_COMMON + r"|&)*")
_QUERY_VALUE = re.compile(_COMMON + r"|[/?|])*")
_SLOT = re.compile(r"[0-9]{1,20}")
_MODULE_NAME = re.compile(r"[A-Za-z0-9._+-]{1,64}")


@dataclass(frozen=True, slots=True)
class TokenUri:
    """None: any. Text is compared as it stands."""

    token: str | None = None
    manufacturer: str | None = None
    serial: str | None = None
    model: str | None = None
    slot_id: int | None = None
    object: str | None = None
    id: bytes | None = None
    modules: tuple[str, ...] = DEFAULT_MODULES
    """Files for the dynamic linker: an absolute path, or names of which the first that is found is meant."""

    @classmethod
    def parse(cls, text: str) -> Self:
        """Raises `BadRequest`, without the value in it: somebody may have put a PIN there."""
        if len(text) > MAX_LENGTH or not text.startswith(_SCHEME):
            raise BadRequest("a PKCS#11 URI begins with pkcs11: and is not longer than 2048 characters")
        path, has_query, query = text.removeprefix(_SCHEME).partition("?")
        attributes = _attributes(path, ";", _PATH_VALUE)
        options = _attributes(query, "&", _QUERY_VALUE) if has_query else {}
        for name in (*attributes, *options):
            if name in _PIN_ATTRIBUTES:
                raise BadRequest(f"{name} is refused: a PIN is asked for when it is needed, and kept nowhere")
        _require_key_type(attributes.pop("type", None))
        uri = cls(
            token=_take(attributes, "token", _text),
            manufacturer=_take(attributes, "manufacturer", _text),
            serial=_take(attributes, "serial", _text),
            model=_take(attributes, "model", _text),
            slot_id=_take(attributes, "slot-id", _slot),
            object=_take(attributes, "object", _text),
            id=_take(attributes, "id", lambda _, value: value),
            modules=_modules(options),
        )
        for name in (*attributes, *options):
            # "MUST refuse": section 2.3, of an attribute that the consumer does not know.
            raise BadRequest(f"a PKCS#11 URI with an attribute that means nothing here: {name}")
        return uri


def _attributes(text: str, separator: str, form: re.Pattern[str]) -> dict[str, bytes]:
    """Names and percent-decoded values. An attribute that comes twice is refused, as section 2.3 wants."""
    found: dict[str, bytes] = {}
    for part in text.split(separator) if text else ():
        name, equals, value = part.partition("=")
        if not re.fullmatch(r"[a-z][a-z0-9-]{0,31}", name) or not equals or not form.fullmatch(value):
            raise BadRequest("a malformed PKCS#11 URI: NAME=VALUE is needed, special characters as %XX")
        if name in found:
            raise BadRequest(f"a PKCS#11 URI with {name} twice")
        found[name] = _decode(value)
    return found


def _decode(value: str) -> bytes:
    return re.sub(
        rb"%([0-9A-Fa-f]{2})", lambda match: bytes.fromhex(match[1].decode()), value.encode("ascii")
    )


def _take(attributes: dict[str, bytes], name: str, convert: Callable[[str, bytes], _T]) -> _T | None:
    value = attributes.pop(name, None)
    return None if value is None else convert(name, value)


def _text(name: str, value: bytes) -> str:
    try:
        return value.decode()
    except UnicodeDecodeError as err:
        raise BadRequest(f"{name} of a PKCS#11 URI is not UTF-8") from err


def _slot(name: str, value: bytes) -> int:
    text = _text(name, value)
    if not _SLOT.fullmatch(text):
        raise BadRequest(f"{name} of a PKCS#11 URI is not a number")
    return int(text)


def _require_key_type(value: bytes | None) -> None:
    # The two halves of a pair have the same name. A token's listing shows the public one first, and it is copied from there.
    if value not in (None, b"private", b"public"):
        raise BadRequest("a PKCS#11 URI of another type than a private or a public key")


def _modules(options: dict[str, bytes]) -> tuple[str, ...]:
    path = _take(options, "module-path", _text)
    name = _take(options, "module-name", _text)
    if path is not None and name is not None:
        raise BadRequest("a PKCS#11 URI with module-path and module-name: one is enough")
    if path is not None:
        # A relative path would load what lies in the folder where somebody happens to be.
        if not path.startswith("/") or "\0" in path:
            raise BadRequest("module-path of a PKCS#11 URI is an absolute path")
        return (path,)
    if name is None:
        return DEFAULT_MODULES
    if not _MODULE_NAME.fullmatch(name):
        raise BadRequest("module-name of a PKCS#11 URI is the bare name of a module")
    # Section 2.3: without the affixes of the system. The linker looks in its own folders, and nowhere else.
    return (f"{name}.so", f"lib{name}.so")
