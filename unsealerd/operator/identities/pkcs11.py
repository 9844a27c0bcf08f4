"""A PKCS#11 token or HSM: any P-256 key that does CKM_ECDH1_DERIVE. The only importer of python-pkcs11.

The module is initialised for each use and finalised after it, which logs out, closes every session, also those that the
library leaves behind after a wrong PIN, and makes the module forget a PIN that it keeps for itself, as OpenSC's does.

What cannot be wiped: the library takes the PIN as ``str`` and copies it once, and gives the derived value as ``bytes``. They
die within the call. The derived value is what is answered to the host: without the host's blinding it opens nothing.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any, Final

from unsealerd.core.age import P256TagRecipient
from unsealerd.core.blinding import P256_POINT_SIZE, validate_point
from unsealerd.core.secret import SecretBuffer
from unsealerd.errors import (
    BadPoint,
    CardFailed,
    CardMissing,
    CardRemoved,
    NotInstalled,
    PinBlocked,
    PinCancelled,
    PinLastTry,
    PinWrong,
    ReaderMissing,
    TouchMissed,
    UnsealerdError,
    WrongCard,
)
from unsealerd.model import Curve
from unsealerd.operator.cards.names import printable
from unsealerd.operator.events import OnEvent, PinPadUsed
from unsealerd.operator.identities.coordinate import compressed, x_of
from unsealerd.operator.identities.pkcs11uri import TokenUri
from unsealerd.operator.prompts import PinRequest, Prompts

if TYPE_CHECKING:
    import pkcs11
    from pkcs11 import _pkcs11

_P256_PARAMETERS: Final = bytes.fromhex(
    "06082a8648ce3d030107"
)  # RFC 5480 section 2.1.1.1: OID of secp256r1, DER
_REMOVAL_SECONDS: Final = 2.0  # a PC/SC service looks every 0.4 s whether a card is there
_LOOK_SECONDS: Final = 0.1
_MAX_TOKENS: Final = 64
_MAX_KEYS: Final = 256


def find(uri: str, *, prompts: Prompts, on_event: OnEvent, last_try: bool = False) -> "list[Pkcs11Identity]":
    """The P-256 keys that the URI names, on every token that it names.

    Asks for a PIN only if one token alone is named and shows no public key without it. Raises `BadRequest` for the URI,
    `NotInstalled` (the library or the module), `ReaderMissing`, `CardMissing` if there is no such token, `WrongCard` if it
    has no such key, and what logging in raises.
    """
    wanted = TokenUri.parse(uri)
    access = _Access(prompts, on_event, last_try)
    with _module(wanted.modules) as module:
        tokens = [token for token in _tokens(module) if _is_named(token, wanted)]
        if not tokens:
            raise _nothing(module)
        used = [_Used(module, token, _name_of(token)) for token in tokens]
        found = [identity for each in used for identity in _identities(each, wanted, access, log_in=False)]
        if not found and len(used) == 1:
            found = _identities(used[0], wanted, access, log_in=True)
    if not found:
        raise WrongCard(f"{used[0].device}: no P-256 key of this name")
    return found


@dataclass(frozen=True, slots=True)
class _Access:
    prompts: Prompts
    on_event: OnEvent
    last_try: bool


@dataclass(frozen=True, slots=True)
class _Key:
    """How a key is found again."""

    id: bytes
    label: str
    public: bytes
    """65 bytes, uncompressed SEC 1."""


@dataclass(frozen=True, slots=True)
class _Used:
    """The token that is in use."""

    module: "_pkcs11.lib"
    token: "pkcs11.Token"
    device: str


class Pkcs11Identity:
    """One key on one token. Nothing is open between two exchanges, and no PIN is kept."""

    __slots__ = ("_access", "_key", "_token", "device", "recipient")

    def __init__(self, token: TokenUri, key: _Key, device: str, access: _Access) -> None:
        self._token = token
        self._key = key
        self._access = access
        self.device = device
        self.recipient = P256TagRecipient(compressed(key.public))

    def exchange(self, point: bytes) -> SecretBuffer:
        """x(d·point), 32 bytes with leading zeros.

        Raises ``BadPoint`` before the token is touched, then `CardRemoved` if the token is not there any more,
        `PinLastTry`, `PinBlocked`, `PinCancelled`, `PinWrong`, `WrongCard`, `TouchMissed`, `CardFailed`, `NotInstalled`.
        """
        validate_point(Curve.P256, point)
        with _module(self._token.modules) as module:
            tokens = [token for token in _tokens(module) if _is_named(token, self._token)]
            if not tokens:
                raise CardRemoved(f"{self.device}: the token is not there any more")
            used = _Used(module, tokens[0], self.device)
            with _session(used, self._access, log_in=True) as session, _named(used):
                return self._derive(session, point)

    def _derive(self, session: "pkcs11.Session", point: bytes) -> SecretBuffer:
        import pkcs11

        derived = self._private_key(session).derive_key(
            pkcs11.KeyType.GENERIC_SECRET,
            256,
            mechanism=pkcs11.Mechanism.ECDH1_DERIVE,
            mechanism_param=(pkcs11.KDF.NULL, None, point),
            template={
                # The value is to be read, so it must not be sensitive: both are needed, on every module seen.
                pkcs11.Attribute.SENSITIVE: False,
                pkcs11.Attribute.EXTRACTABLE: True,
                pkcs11.Attribute.TOKEN: False,
                pkcs11.Attribute.VALUE_LEN: 32,
            },
        )
        try:
            return x_of(derived[pkcs11.Attribute.VALUE], self.device)
        finally:
            derived.destroy()

    def _private_key(self, session: "pkcs11.Session") -> "pkcs11.DeriveMixin":
        import pkcs11

        shown = [key.public for key in _public_keys(session) if key.id == self._key.id]
        if shown and self._key.public not in shown:
            raise WrongCard(f"{self.device}: another key than before")
        search: dict[pkcs11.Attribute, Any] = {
            pkcs11.Attribute.CLASS: pkcs11.ObjectClass.PRIVATE_KEY,
            pkcs11.Attribute.KEY_TYPE: pkcs11.KeyType.EC,
            pkcs11.Attribute.ID: self._key.id,
        }
        for found in list(session.get_objects(search)):
            if isinstance(found, pkcs11.DeriveMixin):  # CKA_DERIVE
                return found
        raise WrongCard(f"{self.device}: the token has no private key for it, or one that must not derive")


# --- modules and tokens


@contextmanager
def _module(names: tuple[str, ...]) -> Iterator["_pkcs11.lib"]:
    """The module, initialised until the end of the block. Raises `NotInstalled`."""
    try:
        import pkcs11
    except ImportError as err:
        text = "python-pkcs11, which speaks with PKCS#11 modules: pip install 'unsealerd[pkcs11]'"
        raise NotInstalled(text) from err
    module = None
    for name in names:
        with suppress(pkcs11.PKCS11Error):
            module = pkcs11.lib(name)
            break
    if module is None:
        raise NotInstalled(f"the PKCS#11 module {names[0]}: it is not there, or cannot be loaded")
    try:
        yield module
    finally:
        with suppress(pkcs11.PKCS11Error):
            module.finalize()


def _tokens(module: "_pkcs11.lib") -> "list[pkcs11.Token]":
    """Every token that can be used."""
    import pkcs11

    try:
        slots = module.get_slots(token_present=True)
    except pkcs11.PKCS11Error as err:
        raise CardFailed(f"the PKCS#11 module cannot say what is there: {type(err).__name__} {err}") from err
    found = []
    for slot in slots[:_MAX_TOKENS]:
        # An empty slot, a card of a kind that the module does not know, one that is pulled out now.
        with suppress(pkcs11.PKCS11Error):
            token = slot.get_token()
            if token.flags & pkcs11.TokenFlag.TOKEN_INITIALIZED:
                found.append(token)
    return found


def _nothing(module: "_pkcs11.lib") -> UnsealerdError:
    import pkcs11

    with suppress(pkcs11.PKCS11Error):
        if not module.get_slots():
            return ReaderMissing("the PKCS#11 module has neither a token nor a reader")
    return CardMissing("no PKCS#11 token of this name is plugged in")


def _is_named(token: "pkcs11.Token", wanted: TokenUri) -> bool:
    pairs = (
        (wanted.token, token.label),
        (wanted.manufacturer, token.manufacturer_id),
        (wanted.serial, _serial(token)),
        (wanted.model, token.model),
        (wanted.slot_id, token.slot.slot_id),
    )
    return all(name is None or name == value for name, value in pairs)


def _serial(token: "pkcs11.Token") -> str:
    return token.serial.rstrip(b"\0 ").decode(errors="replace")


def _pinned(token: "pkcs11.Token", wanted: TokenUri) -> TokenUri:
    """The name of exactly this token."""
    return TokenUri(
        token.label,
        token.manufacturer_id,
        _serial(token),
        token.model,
        wanted.slot_id,
        modules=wanted.modules,
    )


def _name_of(token: "pkcs11.Token") -> str:
    """For people. The token may say anything; nothing that moves a cursor comes through."""
    return printable(f"{token.label or token.model or 'token'}, serial {_serial(token) or 'unknown'}")


# --- keys


def _identities(used: _Used, wanted: TokenUri, access: _Access, *, log_in: bool) -> list[Pkcs11Identity]:
    with _session(used, access, log_in=log_in) as session, _named(used):
        keys = [
            key
            for key in _public_keys(session)
            if wanted.object in (None, key.label) and wanted.id in (None, key.id)
        ]
    name = _pinned(used.token, wanted)
    return [
        Pkcs11Identity(name, key, f"{used.device}, key {printable(key.label or key.id.hex())}", access)
        for key in keys
    ]


def _public_keys(session: "pkcs11.Session") -> list[_Key]:
    """Every public key on P-256 that the session sees."""
    import pkcs11

    search = {
        pkcs11.Attribute.CLASS: pkcs11.ObjectClass.PUBLIC_KEY,
        pkcs11.Attribute.KEY_TYPE: pkcs11.KeyType.EC,
    }
    found = []
    for item in islice(session.get_objects(search), _MAX_KEYS):
        # A module may leave an attribute out. Such a key cannot be told from others, so it is none of ours.
        with suppress(pkcs11.AttributeTypeInvalid, pkcs11.AttributeSensitive, BadPoint, UnicodeDecodeError):
            if item[pkcs11.Attribute.EC_PARAMS] == _P256_PARAMETERS:
                point = _point(item[pkcs11.Attribute.EC_POINT])
                found.append(_Key(item[pkcs11.Attribute.ID], item[pkcs11.Attribute.LABEL], point))
    return found


def _point(value: bytes) -> bytes:
    """CKA_EC_POINT: a DER octet string; the bare point, as some modules have it, is taken too. Raises ``BadPoint``."""
    wrapped = bytes((0x04, P256_POINT_SIZE))
    point = value[2:] if len(value) == 2 + P256_POINT_SIZE and value.startswith(wrapped) else value
    validate_point(Curve.P256, point)
    return point


# --- the PIN


@contextmanager
def _session(used: _Used, access: _Access, *, log_in: bool) -> Iterator["pkcs11.Session"]:
    """A session, read only. Raises what the PIN and the token raise."""
    import pkcs11

    if log_in and used.token.flags & pkcs11.TokenFlag.LOGIN_REQUIRED:
        session = _logged_in(used, access)
    else:
        with _named(used):
            session = used.token.open()
    try:
        yield session
    finally:
        # The token may be gone; the end of the module closes what is left.
        with suppress(pkcs11.PKCS11Error):
            session.close()


def _logged_in(used: _Used, access: _Access) -> "pkcs11.Session":
    import pkcs11

    token, device = used.token, used.device
    flags = token.flags
    if flags & pkcs11.TokenFlag.USER_PIN_LOCKED:
        raise PinBlocked(f"{device}: the PIN is blocked")
    if not flags & pkcs11.TokenFlag.USER_PIN_INITIALIZED:
        raise CardFailed(f"{device}: the token has no PIN yet")
    last = bool(flags & pkcs11.TokenFlag.USER_PIN_FINAL_TRY)
    if last and not access.last_try:
        raise PinLastTry(f"{device}: one try is left")
    tries_left = 1 if last else None
    try:
        # PIN pad: the PIN goes from the reader to the card, and the module gets none.
        if flags & pkcs11.TokenFlag.PROTECTED_AUTHENTICATION_PATH:
            access.on_event(PinPadUsed(device, tries_left))
            return token.open(user_pin=pkcs11.PROTECTED_AUTH)
        if flags & pkcs11.TokenFlag.USER_PIN_COUNT_LOW and not last:
            asked = PinRequest(f"{device} (a wrong PIN was entered before)", tries_left)
        else:
            asked = PinRequest(device, tries_left)
        return token.open(user_pin=_typed(access.prompts.pin(asked)))
    except pkcs11.PKCS11Error as err:
        raise _login_error(err, used) from err


def _typed(pin: bytes) -> str:
    if not pin:
        raise PinCancelled("no PIN was entered")
    try:
        return pin.decode()  # CK_UTF8CHAR
    except UnicodeDecodeError:
        # Without its cause, whose text would show the PIN.
        raise PinWrong("a PIN is UTF-8; no try was used") from None


def _login_error(err: "pkcs11.PKCS11Error", used: _Used) -> UnsealerdError:
    import pkcs11

    device = used.device
    match err:
        case pkcs11.PinIncorrect() | pkcs11.UserNotLoggedIn():  # the latter is OpenSC's, for an OpenPGP card
            return _wrong_pin(used.token, device)
        case pkcs11.PinLocked():
            return PinBlocked(f"{device}: the PIN is blocked")
        case pkcs11.PinInvalid() | pkcs11.PinLenRange():
            return PinWrong(f"{device}: the token takes no PIN of this form")
        case pkcs11.FunctionCancelled() | pkcs11.FunctionRejected():
            return PinCancelled(f"{device}: the PIN was not entered")
        case _:
            return _error(err, used)


def _wrong_pin(token: "pkcs11.Token", device: str) -> UnsealerdError:
    """What a wrong PIN leaves, as far as the token says so."""
    import pkcs11

    flags = pkcs11.TokenFlag(0)
    with suppress(pkcs11.PKCS11Error):
        flags = token.slot.get_token().flags
    if flags & pkcs11.TokenFlag.USER_PIN_LOCKED:
        return PinBlocked(f"{device}: wrong PIN, and now it is blocked")
    if flags & pkcs11.TokenFlag.USER_PIN_FINAL_TRY:
        return PinWrong(f"{device}: wrong PIN, one try is left", 1)
    return PinWrong(f"{device}: wrong PIN")


# --- errors


@contextmanager
def _named(used: _Used) -> Iterator[None]:
    import pkcs11

    try:
        yield
    except pkcs11.PKCS11Error as err:
        raise _error(err, used) from err


def _error(err: "pkcs11.PKCS11Error", used: _Used) -> UnsealerdError:
    import pkcs11

    device = used.device
    match err:
        case (
            pkcs11.TokenNotPresent()
            | pkcs11.DeviceRemoved()
            | pkcs11.SlotIDInvalid()
            | pkcs11.SessionHandleInvalid()
            | pkcs11.SessionClosed()
        ):
            return CardRemoved(f"{device}: the token was pulled out")
        case pkcs11.UserNotLoggedIn():
            # The PIN was right a moment ago: such keys want a touch as well.
            return TouchMissed(f"{device}: the token did not let the key be used; it may want a touch")
        case (
            pkcs11.MechanismInvalid()
            | pkcs11.MechanismParamInvalid()
            | pkcs11.FunctionNotSupported()
            | pkcs11.KeyTypeInconsistent()
        ):
            return WrongCard(f"{device}: the token cannot do ECDH with this key")
        case _ if not _is_there(used):
            return CardRemoved(f"{device}: the token was pulled out")
        case _:
            return CardFailed(f"{device}: {type(err).__name__} {err}".rstrip())


def _is_there(used: _Used) -> bool:
    """Modules say CKR_GENERAL_ERROR and the like when a card is pulled out in the middle, and notice it a moment later."""
    deadline = time.monotonic() + _REMOVAL_SECONDS
    while time.monotonic() < deadline:
        # A new list of slots makes a module look; a question about one token may be answered from memory.
        if used.token.serial not in [each.serial for each in _tokens(used.module)]:
            return False
        time.sleep(_LOOK_SECONDS)
    return True
