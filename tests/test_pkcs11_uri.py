"""The names of tokens: RFC 7512, strictly."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from unsealerd.errors import BadRequest
from unsealerd.operator.identities.pkcs11uri import DEFAULT_MODULES, MAX_LENGTH, TokenUri

GOOD = {
    "pkcs11:": TokenUri(),
    "pkcs11:token=ops": TokenUri(token="ops"),
    "pkcs11:token=The%20Software%20PKCS%2311%20Softtoken": TokenUri(
        token="The Software PKCS#11 Softtoken"
    ),  # RFC 7512 section 3
    "pkcs11:object=my-pubkey;type=public": TokenUri(object="my-pubkey"),
    "pkcs11:object=my-key;type=private": TokenUri(object="my-key"),
    "pkcs11:token=Software%20PKCS%2311%20softtoken;manufacturer=Snake%20Oil,%20Inc.;model=1.0;object=my-certificate"
    ";type=private;id=%69%95%3E%5C%F4%BD%EC%91;serial=": TokenUri(
        token="Software PKCS#11 softtoken",
        manufacturer="Snake Oil, Inc.",
        model="1.0",
        object="my-certificate",
        id=bytes.fromhex("69953e5cf4bdec91"),
        serial="",
    ),
    "pkcs11:slot-id=327": TokenUri(slot_id=327),
    "pkcs11:token=M%c3%bcller": TokenUri(token="Müller"),
    "pkcs11:id=%00%ff": TokenUri(id=b"\0\xff"),
    "pkcs11:token=a&b": TokenUri(token="a&b"),
    "pkcs11:?module-path=/usr/lib/libx.so": TokenUri(modules=("/usr/lib/libx.so",)),
    "pkcs11:token=x?module-name=opensc-pkcs11": TokenUri(
        token="x", modules=("opensc-pkcs11.so", "libopensc-pkcs11.so")
    ),
    "pkcs11:?": TokenUri(),
}
BAD = [
    "",
    "pkcs11",
    "PKCS11:token=x",
    "token=x",
    "pkcs11:token",
    "pkcs11:token=x;",
    "pkcs11:;token=x",
    "pkcs11:token=x;token=x",
    "pkcs11:token=x;token=y",
    "pkcs11:token=a b",
    "pkcs11:token=a#b",
    "pkcs11:token=a/b",
    "pkcs11:token=%",
    "pkcs11:token=%4",
    "pkcs11:token=%zz",
    "pkcs11:token=%ff",  # not UTF-8
    "pkcs11:token=Müller",
    "pkcs11:Token=x",
    "pkcs11:slot-id=",
    "pkcs11:slot-id=-1",
    "pkcs11:slot-id=0x1",
    "pkcs11:slot-id=%D9%A3",  # a digit, but not of ASCII
    "pkcs11:type=cert",
    "pkcs11:type=data",
    "pkcs11:type=secret-key",
    "pkcs11:type=",
    "pkcs11:colour=red",
    "pkcs11:library-version=3",  # known to the RFC, no name of a key
    "pkcs11:module-path=/x",  # in the path
    "pkcs11:?token=x",  # in the query
    "pkcs11:?module-path=x.so",
    "pkcs11:?module-path=/x%00.so",
    "pkcs11:?module-path=",
    "pkcs11:?module-name=../x",
    "pkcs11:?module-name=/x",
    "pkcs11:?module-name=",
    "pkcs11:?module-name=a&module-path=/b",
    "pkcs11:?x-vendor=1",
    "pkcs11:token=x?a=b?c=d",
    "pkcs11:token=" + "x" * MAX_LENGTH,
]


@pytest.mark.parametrize(("text", "uri"), GOOD.items())
def test_what_a_uri_says(text: str, uri: TokenUri) -> None:
    assert TokenUri.parse(text) == uri


@pytest.mark.parametrize("text", BAD)
def test_what_is_no_name_of_a_key_is_refused(text: str) -> None:
    with pytest.raises(BadRequest):
        TokenUri.parse(text)


@pytest.mark.parametrize(
    "text",
    [
        "pkcs11:token=x?pin-source=file:/etc/token",
        "pkcs11:token=x?pin-value=934716",
        "pkcs11:token=x;pin-value=934716",
        "pkcs11:?pin-source=|/usr/lib/pinomatic",
    ],
)
def test_a_pin_in_a_uri_is_refused_and_not_repeated(text: str) -> None:
    with pytest.raises(BadRequest, match="refused: a PIN is asked for") as caught:
        TokenUri.parse(text)
    assert "934716" not in str(caught.value)


def test_no_value_is_in_an_error() -> None:
    """Whoever writes the PIN in the wrong place does not find it in a log."""
    for text in (
        "pkcs11:pin=934716",
        "pkcs11:slot-id=934716x",
        "pkcs11:?module-name=/934716",
        "pkcs11:934716",
    ):
        with pytest.raises(BadRequest) as caught:
            TokenUri.parse(text)
        assert "934716" not in str(caught.value)


def test_without_a_module_it_is_the_proxy() -> None:
    assert TokenUri.parse("pkcs11:token=x").modules == DEFAULT_MODULES


@pytest.mark.promise(10)
@given(st.text(max_size=80) | st.from_regex(r"[a-z0-9=;?&%/-]{0,60}", fullmatch=True))
def test_any_text_is_a_uri_or_named(text: str) -> None:
    try:
        TokenUri.parse("pkcs11:" + text)
    except BadRequest:
        return
