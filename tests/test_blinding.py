"""Blinding: what the operator is asked says nothing, what comes back is x(d·R), and bad points are refused."""

import contextlib
import pickle

import pytest
from cryptography.hazmat.primitives.asymmetric import ec, x25519
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from hypothesis import given
from hypothesis import strategies as st

from unsealerd.core import blinding
from unsealerd.core.age import Identity, P256Identity, X25519Identity, decrypt_payload, encrypt, parse_header
from unsealerd.core.blinding import Blinding, validate_point
from unsealerd.core.secret import SecretBuffer
from unsealerd.errors import AgeNoMatch, BadAnswer, BadPoint, SessionExpired
from unsealerd.model import Curve

P256_PRIME = 2**256 - 2**224 + 2**192 + 2**96 - 1
P256_ORDER = 0xFFFFFFFF00000000FFFFFFFFFFFFFFFFBCE6FAADA7179E84F3B9CAC2FC632551
X25519_PRIME = 2**255 - 19
BOTH = pytest.mark.parametrize("curve", Curve, ids=[c.value for c in Curve])


def sec1(key: ec.EllipticCurvePublicKey, form: PublicFormat = PublicFormat.UncompressedPoint) -> bytes:
    return key.public_bytes(Encoding.X962, form)


def identity_on(curve: Curve) -> Identity:
    match curve:
        case Curve.P256:
            return P256Identity(ec.generate_private_key(ec.SECP256R1()))
        case Curve.X25519:
            return X25519Identity.generate()


def point_on(curve: Curve) -> bytes:
    match curve:
        case Curve.P256:
            return sec1(ec.generate_private_key(ec.SECP256R1()).public_key())
        case Curve.X25519:
            return x25519.X25519PrivateKey.generate().public_key().public_bytes_raw()


def taken(buffer: SecretBuffer) -> bytes:
    with buffer:
        return bytes(buffer.view)


# --- it is right


@BOTH
def test_500_blinded_exchanges_agree_with_the_plain_one(curve: Curve) -> None:
    identity = identity_on(curve)
    for _ in range(500):
        point = point_on(curve)
        session = Blinding.draw(curve, point)
        answer = taken(identity.exchange(session.point))
        assert taken(session.unblind(answer)) == taken(identity.exchange(point))


@BOTH
def test_leading_zeros_survive_on_every_way(curve: Curve) -> None:
    """One result in 256 begins with a zero byte: each of the three x coordinates is made to, once."""
    identity = identity_on(curve)
    end = 0 if curve is Curve.P256 else 31  # the most significant byte
    seen: set[str] = set()
    while seen != {"sent", "answered", "unblinded"}:
        point = point_on(curve)
        session = Blinding.draw(curve, point)
        answer = taken(identity.exchange(session.point))
        result = taken(identity.exchange(point))
        found = {
            name
            for name, x in {"sent": session.point[-64:][:32], "answered": answer, "unblinded": result}.items()
            if x[end] == 0
        } - seen
        if found:
            seen |= found
            assert len(answer) == 32
            assert taken(session.unblind(answer)) == result


@pytest.mark.parametrize("sign", [b"\x02", b"\x03"])
def test_p256_takes_the_whole_point_too(sign: bytes) -> None:
    """An OpenPGP card may answer so; which of the two points it is does not matter."""
    identity = identity_on(Curve.P256)
    point = point_on(Curve.P256)
    expected = taken(identity.exchange(point))
    for form in PublicFormat.CompressedPoint, PublicFormat.UncompressedPoint:
        session = Blinding.draw(Curve.P256, point)
        x = taken(identity.exchange(session.point))
        whole = ec.EllipticCurvePublicKey.from_encoded_point(ec.SECP256R1(), sign + x)
        assert taken(session.unblind(sec1(whole, form))) == expected


@pytest.mark.promise(4)
@BOTH
def test_an_operator_opens_a_backup_without_seeing_it(curve: Curve) -> None:
    operator, other = identity_on(curve), identity_on(curve)
    with SecretBuffer.random(16) as key:
        data = encrypt(memoryview(b"keyring"), key, [other.recipient, operator.recipient])
    header = parse_header(data)
    stanza = header.stanzas[1]
    point = operator.recipient.ephemeral(stanza)
    assert point is not None
    session = Blinding.draw(curve, point)
    answer = taken(operator.exchange(session.point))
    with (
        session.unblind(answer) as shared,
        operator.recipient.unwrap(stanza, shared) as file_key,
        decrypt_payload(data, header, file_key) as plaintext,
    ):
        assert bytes(plaintext.view) == b"keyring"


# --- it is blind


@pytest.mark.promise(4)
@BOTH
def test_two_sessions_on_one_point_share_nothing(curve: Curve) -> None:
    point = point_on(curve)
    sent = [Blinding.draw(curve, point).point for _ in range(200)]
    x_of = [p[1:33] if curve is Curve.P256 else p for p in sent]
    assert len({*x_of}) == 200
    # No six bytes of the point, or of another session, at any place.
    pieces = [{p[i : i + 6] for i in range(len(p) - 5)} for p in (point, *sent[:20])]
    assert sum(len(p) for p in pieces) == len(set.union(*pieces))


@pytest.mark.promise(4)
@BOTH
def test_what_is_sent_looks_uniform_whatever_the_point(curve: Curve) -> None:
    """Chi-squared of the nibbles and, on P-256, the sign: a fixed or biased scalar would show."""
    for point in (point_on(curve), point_on(curve)):
        sent = [Blinding.draw(curve, point).point for _ in range(1000)]
        # Inner bytes: the outer ones of a coordinate are uniform only up to the prime.
        digits = "".join(p[2:30].hex() for p in sent)
        expected = len(digits) / 16
        chi_squared = sum((digits.count(d) - expected) ** 2 / expected for d in "0123456789abcdef")
        assert chi_squared < 85  # 15 degrees of freedom: exceeded once in a hundred thousand million
        if curve is Curve.P256:
            odd = sum(p[64] & 1 for p in sent)
            assert 400 < odd < 600  # six standard deviations


@pytest.mark.promise(4)
@BOTH
def test_the_answer_to_one_session_is_useless_in_another(curve: Curve) -> None:
    operator = identity_on(curve)
    with SecretBuffer.random(16) as key:
        stanza = operator.recipient.wrap(key)
    point = operator.recipient.ephemeral(stanza)
    assert point is not None
    first, second = Blinding.draw(curve, point), Blinding.draw(curve, point)
    answer = taken(operator.exchange(first.point))
    with second.unblind(answer) as shared, pytest.raises(AgeNoMatch):
        operator.recipient.unwrap(stanza, shared)


# --- it works once


@BOTH
def test_a_blinding_is_used_once(curve: Curve) -> None:
    identity = identity_on(curve)
    session = Blinding.draw(curve, point_on(curve))
    answer = taken(identity.exchange(session.point))
    session.unblind(answer).close()
    with pytest.raises(SessionExpired):
        session.unblind(answer)


@BOTH
@pytest.mark.parametrize("bad", [b"", bytes(32), b"\xff" * 32])
def test_a_bad_answer_uses_it_up_as_well(curve: Curve, bad: bytes) -> None:
    identity = identity_on(curve)
    session = Blinding.draw(curve, point_on(curve))
    answer = taken(identity.exchange(session.point))
    with pytest.raises(BadAnswer):
        session.unblind(bad)
    with pytest.raises(SessionExpired):
        session.unblind(answer)


@pytest.mark.promise(1)
@BOTH
def test_the_scalar_is_wiped(curve: Curve) -> None:
    session = Blinding.draw(curve, point_on(curve))
    scalar = session._unblinding
    assert scalar is not None
    assert any(scalar.view)
    session.close()
    session.close()
    assert scalar.closed
    with pytest.raises(SessionExpired):
        session.unblind(point_on(curve)[:32])


@pytest.mark.promise(1)
@BOTH
def test_a_blinding_shows_nothing_and_stays_here(curve: Curve) -> None:
    session = Blinding.draw(curve, point_on(curve))
    assert repr(session) == f"<Blinding on {curve.value}>"
    with pytest.raises(TypeError):
        pickle.dumps(session)


# --- what is refused

GOOD = sec1(ec.derive_private_key(7, ec.SECP256R1()).public_key())
X, Y = GOOD[1:33], GOOD[33:]
K1 = sec1(ec.derive_private_key(7, ec.SECP256K1()).public_key())
# A point with an x so small that x + p fits into 32 bytes as well.
FIVE = sec1(ec.EllipticCurvePublicKey.from_encoded_point(ec.SECP256R1(), b"\x02" + (5).to_bytes(32, "big")))


def negated(y: bytes) -> bytes:
    return (P256_PRIME - int.from_bytes(y, "big")).to_bytes(32, "big")


BAD_P256 = {
    "empty": b"",
    "the identity": b"\x00",
    "the identity, padded": bytes(65),
    "x and y zero": b"\x04" + bytes(64),
    "off the curve": b"\x04" + X + Y[:-1] + bytes([Y[-1] ^ 1]),
    "x and y swapped": b"\x04" + Y + X,
    "y zero": b"\x04" + X + bytes(32),
    "another curve": K1,
    "x above the prime": b"\x04" + (P256_PRIME + 5).to_bytes(32, "big") + FIVE[33:],
    "y above the prime": b"\x04" + X + b"\xff" * 32,
    "x is the prime": b"\x04" + P256_PRIME.to_bytes(32, "big") + Y,
    "compressed": b"\x02" + X,
    "x alone": X,
    "64 bytes": GOOD[1:],
    "66 bytes": GOOD + b"\0",
    "hybrid form": bytes([6 + Y[-1] % 2]) + X + Y,
    "an X25519 point": (9).to_bytes(32, "little"),
}


def little(number: int) -> bytes:
    return number.to_bytes(32, "little")


# https://cr.yp.to/ecdh.html#validate: all u of small order, on the curve and its twist.
ORDER_8 = 325606250916557431795983626356110631294008115727848805560023387167927233504
ORDER_8_TOO = 39382357235489614581723060781553021112529911719440698176882885853963445705823
BAD_X25519 = {
    "empty": b"",
    "31 bytes": little(9)[:31],
    "33 bytes": little(9) + b"\0",
    "order 4": little(0),
    "order 1": little(1),
    "order 8": little(ORDER_8),
    "order 8, the other": little(ORDER_8_TOO),
    "order 2, p - 1": little(X25519_PRIME - 1),
    "p": little(X25519_PRIME),
    "p + 1": little(X25519_PRIME + 1),
    "the base point above the prime": little(X25519_PRIME + 9),
    "the top bit": little(9 + 2**255),
    "all ones": b"\xff" * 32,
    "a P-256 point": GOOD,
}

BAD_POINTS = [
    pytest.param(curve, point, id=f"{curve.value}: {name}")
    for curve, points in {Curve.P256: BAD_P256, Curve.X25519: BAD_X25519}.items()
    for name, point in points.items()
]


@pytest.mark.promise(10)
@pytest.mark.parametrize(("curve", "point"), BAD_POINTS)
def test_bad_points_are_refused(curve: Curve, point: bytes) -> None:
    with pytest.raises(BadPoint):
        validate_point(curve, point)
    with pytest.raises(BadPoint):
        Blinding.draw(curve, point)
    with pytest.raises(BadPoint):
        identity_on(curve).exchange(point)


@BOTH
def test_good_points_are_not(curve: Curve) -> None:
    for point in [point_on(curve) for _ in range(50)] + [GOOD if curve is Curve.P256 else little(9)]:
        validate_point(curve, point)
    if curve is Curve.P256:
        validate_point(curve, b"\x04" + X + negated(Y))


UNLIFTABLE = (1).to_bytes(32, "big")
BAD_ANSWERS = {
    Curve.P256: {
        "empty": b"",
        "zero": bytes(32),
        "a zero point": bytes(65),
        "the identity": b"\x00",
        "a leading zero is missing": X[1:],
        "a zero too many": b"\x00" + X,
        "64 bytes": X + Y,
        "does not lift": UNLIFTABLE,
        "does not lift, compressed": b"\x02" + UNLIFTABLE,
        "the prime": P256_PRIME.to_bytes(32, "big"),
        "above the prime": (P256_PRIME + 5).to_bytes(32, "big"),
        "off the curve": BAD_P256["off the curve"],
        "another curve": K1,
        "hybrid form": BAD_P256["hybrid form"],
        "an unknown form": b"\x05" + X,
        "long": bytes(range(1, 256)) * 300,
    },
    Curve.X25519: {**BAD_X25519, "zero": bytes(32), "a P-256 point, compressed": b"\x02" + X},
}


@pytest.mark.promise(10)
@pytest.mark.parametrize(
    ("curve", "answer"),
    [
        pytest.param(curve, answer, id=f"{curve.value}: {name}")
        for curve, answers in BAD_ANSWERS.items()
        for name, answer in answers.items()
    ],
)
def test_bad_answers_are_refused(curve: Curve, answer: bytes) -> None:
    with pytest.raises(BadAnswer):
        Blinding.draw(curve, point_on(curve)).unblind(answer)


@pytest.mark.promise(10)
@given(st.sampled_from(Curve), st.binary(max_size=70) | st.binary(min_size=32, max_size=32))
def test_any_bytes_as_an_answer(curve: Curve, answer: bytes) -> None:
    session = Blinding.draw(curve, GOOD if curve is Curve.P256 else little(9))
    with contextlib.suppress(BadAnswer):
        assert len(taken(session.unblind(answer))) == 32
    with pytest.raises(SessionExpired):
        session.unblind(answer)


@pytest.mark.promise(10)
@given(
    st.sampled_from(Curve), st.binary(max_size=70) | st.binary(min_size=65, max_size=65).map(b"\x04".__add__)
)
def test_any_bytes_as_a_point(curve: Curve, point: bytes) -> None:
    try:
        validate_point(curve, point)
    except BadPoint:
        with pytest.raises(BadPoint):
            Blinding.draw(curve, point)
    else:
        Blinding.draw(curve, point).close()


# --- the scalars


def test_x25519_scalars_are_clamped_and_inverse_to_each_other() -> None:
    """The library clamps what it is given: a scalar that clamping changes would silently be another one."""
    for _ in range(100):
        blinded, unblinding = blinding._draw_x25519(little(9))
        with unblinding:
            scalar = bytes(unblinding.view)
        assert int.from_bytes(scalar, "little") % 8 == 0
        assert 1 << 254 <= int.from_bytes(scalar, "little") < 1 << 255
        private = x25519.X25519PrivateKey.from_private_bytes(scalar)
        assert private.exchange(x25519.X25519PublicKey.from_public_bytes(blinded)) == little(9)


def test_p256_scalars_are_in_range_and_drawn_again_when_not(monkeypatch: pytest.MonkeyPatch) -> None:
    draws = [bytes(32), P256_ORDER.to_bytes(32, "big"), b"\xff" * 32, (2).to_bytes(32, "big")]

    def fill(view: memoryview) -> None:
        view[:] = draws.pop(0)

    monkeypatch.setattr(blinding, "fill_random", fill)
    session = Blinding.draw(Curve.P256, GOOD)
    assert not draws
    doubled = sec1(ec.derive_private_key(14, ec.SECP256R1()).public_key())
    assert session.point[:33] == doubled[:33]
    session.close()
