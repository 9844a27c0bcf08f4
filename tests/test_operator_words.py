"""Words for people: the same on both sides, different for different things."""

import hashlib
import importlib.util

import pytest
from hypothesis import given
from hypothesis import strategies as st
from mnemonic import Mnemonic

from unsealerd.core import words
from unsealerd.core.words import fingerprint_words, session_words
from unsealerd.errors import NotInstalled

KNOWN_FINGERPRINT = "amount torch dizzy flock work small monster piano"
KNOWN_SESSION = "grab cement stand diet"
ENGLISH = Mnemonic("english").wordlist


@given(st.binary(min_size=32, max_size=64))
def test_fingerprint_words_are_the_first_88_bits(digest: bytes) -> None:
    bits = "".join(f"{byte:08b}" for byte in digest)
    expected = tuple(ENGLISH[int(bits[start : start + 11], 2)] for start in range(0, 88, 11))
    assert fingerprint_words(digest) == expected


def test_known_fingerprints_keep_their_words() -> None:
    """Words that operators wrote down must stay the same for ever."""
    assert fingerprint_words(bytes(32)) == ("abandon",) * 8
    assert fingerprint_words(b"\xff" * 32) == ("zoo",) * 8
    digest = hashlib.sha256(b"unsealerd").digest()
    assert " ".join(fingerprint_words(digest)) == KNOWN_FINGERPRINT
    assert " ".join(session_words(bytes(16), bytes(32), [bytes(65), bytes(32)])) == KNOWN_SESSION


def test_a_short_digest_is_refused() -> None:
    with pytest.raises(ValueError, match="32 bytes"):
        fingerprint_words(bytes(31))


def test_session_words_depend_on_every_value_and_its_place() -> None:
    session, nonce, points = bytes(16), bytes(32), [b"\1" * 65, b"\2" * 32]
    variants = [
        (session, nonce, points),
        (b"\1" + session[1:], nonce, points),
        (session, b"\1" + nonce[1:], points),
        (session, nonce, points[::-1]),
        (session, nonce, points[:1]),
        (session, nonce, [points[0] + points[1]]),
        (session, nonce, []),
        (session + nonce, b"", points),
    ]
    assert len({session_words(*each) for each in variants}) == len(variants)
    assert all(len(session_words(*each)) == 4 for each in variants)


def test_a_missing_list_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    words._word_list.cache_clear()
    monkeypatch.setattr(importlib.util, "find_spec", lambda _name: None)
    with pytest.raises(NotInstalled):
        fingerprint_words(bytes(32))
    words._word_list.cache_clear()
