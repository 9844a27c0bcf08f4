"""Shamir's sharing: the vectors of a second implementation, and the proof that too few shares say nothing."""

import ast
import inspect
import itertools
import json
import os
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from shamir_reference import multiply, secret, vectors

from unsealerd.core import shamir
from unsealerd.core.secret import SecretBuffer

VECTORS = json.loads((Path(__file__).parent / "vectors" / "shamir.json").read_text())


def split(whole: bytes, threshold: int, count: int) -> list[bytes]:
    """As bytes, for comparison."""
    size = len(whole)
    with SecretBuffer.copy_of(whole) as buffer, SecretBuffer(count * size) as out:
        shamir.split(buffer.view, threshold, [out.view[i * size : (i + 1) * size] for i in range(count)])
        return [bytes(out.view[i * size : (i + 1) * size]) for i in range(count)]


def combine(shares: Sequence[tuple[int, bytes]]) -> bytes:
    with SecretBuffer(len(shares[0][1]) if shares else 0) as out:
        shamir.combine([(x, memoryview(share)) for x, share in shares], out.view)
        return bytes(out.view)


# --- it agrees with another implementation


def test_the_vectors_are_those_of_the_script() -> None:
    assert vectors() == VECTORS


@pytest.mark.parametrize("vector", VECTORS, ids=[str(vector["name"]) for vector in VECTORS])
def test_a_vector(vector: dict[str, object]) -> None:
    rows, shares = ([bytes.fromhex(each) for each in vector[name]] for name in ("coefficients", "shares"))  # type: ignore[attr-defined]
    for number, share in enumerate(shares, 1):
        out = bytearray(len(share))
        shamir.evaluate([memoryview(row) for row in rows], number, memoryview(out))
        assert out == share
    numbered = list(enumerate(shares, 1))
    assert combine(numbered[-len(rows) :]) == combine(numbered[: len(rows)]) == rows[0]


def test_the_product_is_the_fields() -> None:
    """All 65536 of them. FIPS 197 section 4.2 has one as its example: 57 times 83 is c1."""
    assert shamir.times(0x57, 0x83) == 0xC1
    assert all(shamir.times(a, b) == multiply(a, b) for a in range(256) for b in range(256))


@given(st.binary(min_size=1, max_size=40), st.data())
def test_any_threshold_shares_give_the_secret_and_the_other_implementation_agrees(
    whole: bytes, data: st.DataObject
) -> None:
    count = data.draw(st.integers(1, 8))
    threshold = data.draw(st.integers(1, count))
    shares = dict(enumerate(split(whole, threshold, count), 1))
    chosen = data.draw(st.permutations(range(1, count + 1)))[: data.draw(st.integers(threshold, count))]
    assert combine([(x, shares[x]) for x in chosen]) == whole
    assert secret({x: shares[x] for x in chosen}) == whole


def test_every_subset_of_three_of_five() -> None:
    whole = os.urandom(16)
    shares = list(enumerate(split(whole, 3, 5), 1))
    assert all(combine(chosen) == whole for chosen in itertools.combinations(shares, 3))
    assert all(combine(chosen) != whole for chosen in itertools.combinations(shares, 2))


def test_the_coefficients_are_drawn_anew() -> None:
    whole = os.urandom(16)
    assert split(whole, 2, 3) != split(whole, 2, 3)
    assert split(whole, 1, 3) == [whole] * 3


# --- fewer than the threshold say nothing


@pytest.mark.promise(2)
@pytest.mark.parametrize("number", [1, 2, 3, 255])
def test_one_share_of_two_leaves_every_byte_equally_likely(number: int) -> None:
    """Exhaustive: for each secret byte, the 256 coefficients give each of the 256 shares exactly once."""
    for whole in range(256):
        seen = bytearray(256)
        for coefficient in range(256):
            out = bytearray(1)
            rows = [memoryview(bytes([whole])), memoryview(bytes([coefficient]))]
            shamir.evaluate(rows, number, memoryview(out))
            seen[out[0]] += 1
        assert seen == b"\x01" * 256


@pytest.mark.promise(2)
@pytest.mark.parametrize("threshold", [2, 3, 4, 7])
def test_one_share_too_few_leaves_every_byte_possible(threshold: int) -> None:
    """Whatever the others are: the last share's 256 values stand for the 256 secrets, one each."""
    held = [(x, os.urandom(1)) for x in range(1, threshold)]
    secrets = {combine([*held, (threshold, bytes([value]))])[0] for value in range(256)}
    assert secrets == set(range(256))


@pytest.mark.promise(2)
def test_two_shares_of_three_are_uniform_whatever_the_secret_is() -> None:
    """Exhaustive over one linear part: with two free coefficients each pair of shares comes up exactly once."""
    for whole in (0, 1, 0x53, 255):
        first = [shamir.times(1, a) ^ whole for a in range(256)]
        second = [shamir.times(2, a) ^ whole for a in range(256)]
        squares = [(b, shamir.times(4, b)) for b in range(256)]
        pairs = {(first[a] ^ one, second[a] ^ four) for a in range(256) for one, four in squares}
        assert len(pairs) == 65536


# --- what cannot be split or combined


@pytest.mark.parametrize(("threshold", "count"), [(0, 1), (2, 1), (-1, 3), (1, 0), (1, 256), (256, 256)])
def test_an_impossible_split(threshold: int, count: int) -> None:
    with pytest.raises(ValueError, match="shares"):
        split(bytes(16), threshold, count)


@pytest.mark.parametrize("numbers", [[], [0], [1, 1], [1, 256], [-1, 2]])
def test_impossible_numbers(numbers: list[int]) -> None:
    with pytest.raises(ValueError, match="different numbers"):
        combine([(number, bytes(16)) for number in numbers])


# --- constant time in what is secret


def test_nothing_branches_on_a_secret_or_looks_it_up() -> None:
    """Reads the source: conditions are on counts and share numbers only, and no index is computed from a byte."""
    tree = ast.parse(inspect.getsource(shamir))
    public = {"factor", "number", "numbers", "other", "x", "threshold", "shares", "len", "set", "all"} | {
        "MAX_SHARES"
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.If | ast.While | ast.IfExp):
            assert {name.id for name in ast.walk(node.test) if isinstance(name, ast.Name)} <= public
        if isinstance(node, ast.Subscript) and not isinstance(node.slice, ast.Slice):
            names = {name.id for name in ast.walk(node.slice) if isinstance(name, ast.Name)}
            assert names <= {"at", "memoryview", "int", "tuple", "Sequence"}
