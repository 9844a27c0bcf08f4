"""Fingerprints as words that two people can compare: the English list of BIP-39, 11 bits a word.

The list is data of the package `mnemonic`. Its file is read without importing the package, which costs 15 ms.
"""

import functools
import hashlib
import importlib.util
from collections.abc import Sequence
from pathlib import Path

from unsealerd.errors import NotInstalled

FINGERPRINT_WORDS = 8  # 88 bits: making another key with the same words takes 2^88 tries
SESSION_WORDS = 4  # 44 bits, for a session that lasts two minutes
_BITS = 11
_LIST_SIZE = 1 << _BITS
_SESSION_LABEL = b"unsealerd session words v1"


def fingerprint_words(digest: bytes) -> tuple[str, ...]:
    """The first 88 bits of a digest as eight words, the most significant first.

    Raises ``ValueError`` for a digest of less than 32 bytes, `NotInstalled` without the list.
    """
    if len(digest) < hashlib.sha256().digest_size:
        raise ValueError("a fingerprint is a digest of 32 bytes or more")
    return _words(digest, FINGERPRINT_WORDS)


def session_words(session: bytes, nonce: bytes, points: Sequence[bytes]) -> tuple[str, ...]:
    """Four words that both ends of an unlock session derive: SHA-256 over a label and each value after its length.

    ``points``: the blinded points in the challenge's order. Who sits between the two ends and changes one of the values
    gives them different words. Raises `NotInstalled` without the list.
    """
    digest = hashlib.sha256(_SESSION_LABEL)
    for value in (session, nonce, *points):
        # Lengths first, so that no two different lists of values are hashed as the same bytes.
        digest.update(len(value).to_bytes(4, "big") + value)
    return _words(digest.digest(), SESSION_WORDS)


def _words(digest: bytes, count: int) -> tuple[str, ...]:
    number = int.from_bytes(digest, "big") >> (len(digest) * 8 - count * _BITS)
    words = _word_list()
    return tuple(words[number >> _BITS * place & _LIST_SIZE - 1] for place in reversed(range(count)))


@functools.cache
def _word_list() -> tuple[str, ...]:
    spec = importlib.util.find_spec("mnemonic")
    if spec is None or spec.origin is None:
        raise NotInstalled("the package mnemonic, which brings the BIP-39 word list")
    try:
        words = tuple(
            Path(spec.origin).with_name("wordlist").joinpath("english.txt").read_text("ascii").split()
        )
    except (OSError, UnicodeDecodeError) as err:
        raise NotInstalled(f"the English word list of the package mnemonic: {err}") from err
    if len(words) != _LIST_SIZE:
        raise NotInstalled("the English word list of the package mnemonic is not the one of BIP-39")
    return words
