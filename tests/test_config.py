"""The configuration: the example of the documents is read as it says, and every mistake is one clear error."""

import contextlib
import json
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from hypothesis import example, given
from hypothesis import strategies as st

from unsealerd.config import MAX_KEYS, MAX_OPERATORS, Config, load, parse, parse_duration
from unsealerd.core.age import P256Identity, X25519Identity
from unsealerd.core.draft import Draft
from unsealerd.core.keyring import parse as parse_keyring
from unsealerd.core.secret import SecretBuffer
from unsealerd.errors import ConfigInvalid
from unsealerd.model import Operation, SealKind
from unsealerd.tomlfile import MAX_FILE_BYTES

EXAMPLE = """\
[daemon]
state_dir   = "/var/lib/unsealerd"
runtime_dir = "/run/unsealerd"

[tpm]
tcti = "device:/dev/tpmrm0"        # or "swtpm:path=/…", or "none"
pcrs = [7]

[seal]
on = ["reboot", "kexec"]
extra_resets = 0

[unlock]
threshold = 1

[[operator]]
name = "alice"
recipient = "RECIPIENT"                # or "age1tag1…" (P-256)

[key.web-sessions]
owner   = "team-web@example.com"
purpose = "session cookies"
size    = 32
rotate_every = "30d"
overlap      = "7d"
[[key.web-sessions.allow]]
unit = "web.service"               # or user = "…", or group = "…"
operations = ["read", "sign", "verify"]
"""

KEY = '[key.web]\nowner = "o"\npurpose = "p"\n'
RULE = '[[key.web.allow]]\nunit = "web.service"\noperations = ["read"]\n'
OPERATOR = '[[operator]]\nname = "alice"\nrecipient = "age1alice"\n'


def recipients() -> list[str]:
    return [
        str(X25519Identity.generate().recipient),
        str(P256Identity(ec.generate_private_key(ec.SECP256R1())).recipient),
    ]


@pytest.mark.parametrize("recipient", recipients(), ids=["x25519", "p256"])
def test_the_example_is_read_as_it_says(recipient: str) -> None:
    config = parse(EXAMPLE.replace("RECIPIENT", recipient).encode())
    assert config.daemon.state_dir == Path("/var/lib/unsealerd")
    assert config.daemon.runtime_dir == Path("/run/unsealerd")
    assert (config.tpm.tcti, config.tpm.pcrs) == ("device:/dev/tpmrm0", (7,))
    assert (config.seal.on, config.seal.extra_resets) == ((SealKind.REBOOT, SealKind.KEXEC), 0)
    assert config.unlock.threshold == 1
    assert [(o.name, o.recipient) for o in config.operators] == [("alice", recipient)]
    key = config.keys["web-sessions"]
    assert (key.owner, key.purpose, key.size) == ("team-web@example.com", "session cookies", 32)
    assert (key.rotate_every, key.overlap) == (30 * 86400, 7 * 86400)
    (rule,) = key.allow
    assert (rule.unit, rule.user, rule.group) == ("web.service", None, None)
    assert set(rule.operations) == set(Operation)


def test_the_example_says_the_defaults() -> None:
    shown = parse(EXAMPLE.encode().replace(b"RECIPIENT", b"age1x"))
    silent = parse(b"")
    assert (shown.daemon, shown.tpm, shown.seal, shown.unlock) == (
        silent.daemon,
        silent.tpm,
        silent.seal,
        silent.unlock,
    )
    assert (silent.operators, silent.keys) == ((), {})
    key = parse(KEY.encode()).keys["web"]
    assert (key.size, key.rotate_every, key.overlap, key.allow) == (32, None, 0, ())


def test_several_operators_are_needed() -> None:
    config = parse(
        b"""
        [unlock]
        threshold = 2
        require = ["security", "carol"]
        window = "10m"
        [[operator]]
        name = "alice"
        recipient = "age1alice"
        groups = ["security", "night"]
        [[operator]]
        name = "carol"
        recipient = "age1carol"
        passphrase = "argon2id$v=19$m=65536,t=2,p=1$AAAAAAAAAAAAAAAAAAAAAA"
        """
    )
    assert (config.unlock.threshold, config.unlock.require, config.unlock.window) == (
        2,
        ("security", "carol"),
        600,
    )
    assert [operator.groups for operator in config.operators] == [("security", "night"), ()]
    assert [operator.passphrase is None for operator in config.operators] == [True, False]


def test_a_threshold_may_be_set_before_the_operators_are_there() -> None:
    assert parse(b"[unlock]\nthreshold = 3").unlock.threshold == 3


def test_who_is_told_and_where_the_figures_go() -> None:
    config = parse(
        b'[notify]\ncommand = ["/usr/bin/true", "x"]\nwebhook = "https://a.example/b"\n[metrics]\ntextfile = "/a/b.prom"'
    )
    assert config.notify.command == ("/usr/bin/true", "x")
    assert config.notify.webhook == "https://a.example/b"
    assert config.metrics.textfile == Path("/a/b.prom")


@pytest.mark.parametrize("tcti", ["device:/dev/tpmrm0", "swtpm:path=/run/tpm/sock"])
def test_the_places_of_a_tpm(tcti: str) -> None:
    assert parse(f'[tpm]\ntcti = "{tcti}"'.encode()).tpm.tcti == tcti


def test_a_host_without_a_tpm_says_none() -> None:
    assert parse(b'[tpm]\ntcti = "none"').tpm.tcti is None


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("1s", 1),
        ("90s", 90),
        ("15m", 900),
        ("12h", 43200),
        ("30d", 2592000),
        ("2w", 1209600),
        ("36500d", 3153600000),
    ],
)
def test_durations(text: str, seconds: int) -> None:
    assert parse_duration(text) == seconds


NO_DURATIONS = [
    *[
        "0s",
        "00s",
        "01s",
        "1",
        "s",
        "-1s",
        "+1s",
        "1.5h",
        "1H",
        "1y",
        "1h30m",
        "1e3s",
        "36501d",
        "9999999999w",
        "1_000s",
    ],
    *["", "1 h", " 1h", "1h ", "1\u0661h", "1h\n", "9" * 5000 + "s"],
]


@pytest.mark.parametrize("text", NO_DURATIONS)
def test_what_is_no_duration(text: str) -> None:
    with pytest.raises(ValueError, match=r"a duration such as|longer than 100 years"):
        parse_duration(text)
    with pytest.raises(ConfigInvalid) as caught:
        parse(f"{KEY}rotate_every = {json.dumps(text)}".encode())
    assert caught.value.detail.startswith("key.web.rotate_every: ")


# --- each mistake is one line that says where, and what


MISTAKES = [
    ("state_dir = '/'", ["state_dir"]),
    ("daemon = 1", ["daemon"]),
    ("[deamon]", ["deamon"]),
    ("[daemon]\nstate = '/x'", ["daemon", "state"]),
    ("[daemon]\nstate_dir = 1", ["daemon.state_dir"]),
    ("[daemon]\nstate_dir = ''", ["daemon.state_dir"]),
    ('[daemon]\nstate_dir = "/a\\u0000b"', ["daemon.state_dir"]),
    ("[daemon]\nstate_dir = 'var/lib'", ["daemon.state_dir", "var/lib", "absolute"]),
    ("[daemon]\nruntime_dir = './run'", ["daemon.runtime_dir", "absolute"]),
    ("[tpm]\ntcti = 7", ["tpm.tcti"]),
    ("[tpm]\ntcti = ''", ["tpm.tcti"]),
    ("[tpm]\ntcti = 'None'", ["tpm.tcti", "None"]),
    ("[tpm]\ntcti = 'tabrmd:'", ["tpm.tcti", "tabrmd:"]),
    ("[tpm]\npcrs = []", ["tpm.pcrs", "empty"]),
    ("[tpm]\npcrs = 7", ["tpm.pcrs"]),
    ("[tpm]\npcrs = [7, 7]", ["tpm.pcrs", "[7, 7]"]),
    ("[tpm]\npcrs = [24]", ["tpm.pcrs", "24"]),
    ("[tpm]\npcrs = [-1]", ["tpm.pcrs", "-1"]),
    ("[tpm]\npcrs = [7, true]", ["tpm.pcrs[1]"]),
    ("[tpm]\npcrs = [7.0]", ["tpm.pcrs[0]"]),
    ("[tpm]\npcrs = [123456789012345678901234567890]", ["tpm.pcrs"]),
    ("[seal]\non = ['poweroff']", ["seal.on[0]", "poweroff"]),
    ("[seal]\nextra_resets = -1", ["seal.extra_resets"]),
    ("[seal]\nextra_resets = 4", ["seal.extra_resets"]),
    ("[seal]\nextra_resets = 1.0", ["seal.extra_resets"]),
    ("[gateway]", ["gateway: ", "gateway.toml"]),
    ("[gateway]\nlisten = ['[::]:8750']", ["gateway: ", "gateway.toml", "[gateway] goes there"]),
    ("gateway.listen = ['[::]:8750']\n[[odd]]", ["gateway: ", "gateway.toml"]),
    ("[unlock]\nthreshold = 0", ["unlock.threshold"]),
    ("[unlock]\nthreshold = 2\n" + OPERATOR, ["unlock.threshold", "2 of 1 operators"]),
    ("[unlock]\nthreshold = '2'", ["unlock.threshold"]),
    ("[unlock]\nrequire = 'alice'\n" + OPERATOR, ["unlock.require"]),
    ("[unlock]\nrequire = ['security']\n" + OPERATOR, ["unlock.require", "security"]),
    ("[unlock]\nrequire = ['Alice']\n" + OPERATOR, ["unlock.require", "Alice"]),
    ("[unlock]\nrequire = ['alice', 'alice']\n" + OPERATOR, ["unlock.require", "twice"]),
    ("[unlock]\nwindow = 1800", ["unlock.window", "30d"]),
    ("[unlock]\nwindow = '0s'", ["unlock.window"]),
    ("[unlock]\nwindow = '2d'", ["unlock.window", "24 hours"]),
    (OPERATOR + "groups = ['a b']", ["operator alice", "a b"]),
    (OPERATOR + "groups = ['alice']", ["operator alice", "not the name of a group"]),
    (OPERATOR + "groups = ['ops', 'ops']", ["operator alice", "twice"]),
    (OPERATOR + "groups = 'ops'", ["operator[0].groups"]),
    (OPERATOR + "passphrase = 7", ["operator[0].passphrase"]),
    ("[notify]\ncommand = ['true']", ["notify.command", "absolute"]),
    ("[notify]\nwebhook = 'http://a.example'", ["notify.webhook", "https"]),
    ("[metrics]\ntextfile = 'a.prom'", ["metrics.textfile", "absolute"]),
    ("operator = 'alice'", ["operator"]),
    ("[operator]\nname = 'alice'", ["operator"]),
    ("[[operator]]\nname = 'alice'", ["operator[0]", "recipient"]),
    (OPERATOR + "[[operator]]\nrecipient = 'age1bob'", ["operator[1]", "name"]),
    (OPERATOR + "[[operator]]\nname = 'bob'\nrecipient = 7", ["operator[1].recipient"]),
    (OPERATOR + "card = 1", ["operator[0]", "card"]),
    ("[[operator]]\nname = 'a b'\nrecipient = 'age1x'", ["operator", "a b"]),
    ("[[operator]]\nname = ''\nrecipient = 'age1x'", ["operator"]),
    ("[[operator]]\nname = 'bob'\nrecipient = 'ssh-ed25519 AAAA'", ["operator bob", "age1"]),
    (OPERATOR + "[[operator]]\nname = 'alice'\nrecipient = 'age1bob'", ["operator", "same name"]),
    (OPERATOR + "[[operator]]\nname = 'ALICE'\nrecipient = 'age1bob'", ["operator", "same name"]),
    (OPERATOR + "[[operator]]\nname = 'bob'\nrecipient = 'AGE1ALICE'", ["operator", "same recipient"]),
    ("key = 'web'", ["key"]),
    ("[key]\nweb = 'o'", ["key.web"]),
    ("[key.web]\npurpose = 'p'", ["key.web", "owner"]),
    ("[key.web]\nowner = 'o'", ["key.web", "purpose"]),
    ("[key.web]\nowner = ' '\npurpose = 'p'", ["key.web.owner"]),
    ('[key.web]\nowner = "o\\u001b"\npurpose = "p"', ["key.web.owner"]),
    (f"[key.web]\nowner = 'o'\npurpose = '{'p' * 201}'", ["key.web.purpose"]),
    ("[key.web]\nowner = 1\npurpose = 'p'", ["key.web.owner"]),
    (KEY + "sise = 32", ["key.web", "sise"]),
    (KEY + "[key.mail]\nowner = 'o'\npurpose = 'p'\nsize = 15", ["key.mail.size", "16"]),
    (KEY + "size = 1025", ["key.web.size", "1024"]),
    (KEY + "size = '32'", ["key.web.size"]),
    (KEY + "size = 32.0", ["key.web.size"]),
    (KEY + "size = true", ["key.web.size"]),
    (KEY + "size = 123456789012345678901234567890", ["key.web.size"]),
    (KEY + "rotate_every = 30", ["key.web.rotate_every", '"30d"']),
    (KEY + "overlap = 1979-05-27", ["key.web.overlap"]),
    (KEY + "overlap = '0s'", ["key.web.overlap", "0s"]),
    (KEY + "rotate_every = '1d'\noverlap = '2d'", ["key.web.overlap", "rotate_every"]),
    *(
        (f"[key.'{bad}']\nowner = 'o'\npurpose = 'p'", [f"key.'{bad}'", "a-z"])
        for bad in ("", "Web", ".x", "a/b", "é")
    ),
    (f"[key.{'w' * 65}]\nowner = 'o'\npurpose = 'p'", ["key.", "64"]),
    (f"[key.'{'W' * 99999}']\nowner = 1", ["key.", "owner"]),
    (KEY + "allow = 'all'", ["key.web.allow"]),
    (KEY + "[key.web.allow]\nunit = 'web.service'", ["key.web.allow"]),
    (KEY + "allow = ['all']", ["key.web.allow[0]"]),
    (KEY + RULE + "[[key.web.allow]]\nunit = 'web.service'", ["key.web.allow[1]", "operations"]),
    (KEY + RULE + RULE.replace("read", "write"), ["key.web.allow[1].operations[0]", "write"]),
    (KEY + RULE.replace('["read"]', '["read", "read"]'), ["key.web.allow[0]", "operations"]),
    (KEY + RULE.replace('["read"]', "[]"), ["key.web.allow[0]", "operations"]),
    (KEY + RULE.replace('["read"]', '"read"'), ["key.web.allow[0].operations"]),
    (KEY + RULE + "who = 1", ["key.web.allow[0]", "who"]),
    (KEY + "[[key.web.allow]]\noperations = ['read']", ["key.web.allow[0]", "exactly one"]),
    (KEY + RULE + "user = 'www'", ["key.web.allow[0]", "exactly one"]),
    (KEY + RULE + "group = 'www'", ["key.web.allow[0]", "exactly one"]),
    (KEY + "[[key.web.allow]]\nuser = ''\noperations = ['read']", ["key.web.allow[0]", "exactly one"]),
    (
        KEY + '[[key.web.allow]]\nuser = "a\\u0000"\noperations = ["read"]',
        ["key.web.allow[0]", "user or group"],
    ),
    (KEY + '[[key.web.allow]]\ngroup = "a\\n"\noperations = ["read"]', ["key.web.allow[0]", "user or group"]),
    *(
        (KEY + RULE.replace("web.service", bad), ["key.web.allow[0]", bad])
        for bad in ("web", "web.timer", "web service.service", "a/b.service", ".service ")
    ),
]


@pytest.mark.promise(10)
@pytest.mark.parametrize(("text", "said"), MISTAKES, ids=range(len(MISTAKES)))
def test_a_mistake_is_one_line_with_the_place(text: str, said: list[str]) -> None:
    with pytest.raises(ConfigInvalid) as caught:
        parse(text.encode())
    detail = caught.value.detail
    for words in said:
        assert words in detail
    assert "\n" not in detail
    assert "$" not in detail
    assert "..." not in detail
    assert len(detail) < 400


def test_too_many_keys_or_operators() -> None:
    text = "".join(f'[key.k{n}]\nowner="o"\npurpose="p"\n' for n in range(MAX_KEYS + 1))
    with pytest.raises(ConfigInvalid, match=f"key: more than {MAX_KEYS}"):
        parse(text.encode())
    text = "".join(f'[[operator]]\nname="o{n}"\nrecipient="age1{n}"\n' for n in range(MAX_OPERATORS + 1))
    with pytest.raises(ConfigInvalid, match=f"operator: more than {MAX_OPERATORS}"):
        parse(text.encode())


@pytest.mark.parametrize(
    "data", [b"[", b"a = ", b"a = 1\na = 2", b"\xff", b"\0", b"a = " + b"[" * 50000, b"a=" + b"9" * 9999]
)
def test_what_is_not_toml(data: bytes) -> None:
    # How many digits a number may have is a setting of the interpreter: then it is TOML, and still no configuration.
    with pytest.raises(ConfigInvalid, match=r"not TOML|unknown"):
        parse(data)


# --- the file


def test_a_file_is_read_and_its_name_is_in_the_error(tmp_path: Path) -> None:
    path = tmp_path / "unsealerd.toml"
    path.write_text(KEY)
    assert load(path).keys.keys() == {"web"}
    path.write_text(KEY + "size = 1")
    with pytest.raises(ConfigInvalid) as caught:
        load(path)
    assert caught.value.detail.startswith(f"{path}: key.web.size: ")


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    for path in (tmp_path / "missing.toml", tmp_path):
        with pytest.raises(ConfigInvalid) as caught:
            load(path)
        assert str(path) in caught.value.detail


def test_a_file_without_end(tmp_path: Path) -> None:
    path = tmp_path / "unsealerd.toml"
    path.write_bytes(b"#" * (MAX_FILE_BYTES + 1))
    with pytest.raises(ConfigInvalid, match="larger than"):
        load(path)
    path.write_bytes(b"#" * MAX_FILE_BYTES)
    assert load(path) == Config()


# --- anything


def answered(data: bytes) -> None:
    """A configuration, or the one error."""
    with contextlib.suppress(ConfigInvalid):
        assert isinstance(parse(data), Config)


LINES = sorted(
    {line for text, _ in MISTAKES for line in text.splitlines()} | set(EXAMPLE.splitlines()), key=hash
)


@pytest.mark.promise(10)
@given(st.binary(max_size=200))
@example(b"\xef\xbb\xbf[daemon]")
@example(b"[key.web.allow.x]")
def test_any_bytes(data: bytes) -> None:
    answered(data)
    answered(KEY.encode() + data)


@pytest.mark.promise(10)
@given(st.lists(st.sampled_from(LINES), max_size=12))
def test_any_order_of_lines(lines: list[str]) -> None:
    answered("\n".join(lines).encode())


names = st.sampled_from(
    [
        "daemon",
        "tpm",
        "seal",
        "gateway",
        "unlock",
        "operator",
        "key",
        "web",
        "allow",
        "state_dir",
        "tcti",
        "pcrs",
        "on",
        "extra_resets",
        "listen",
        "threshold",
        "require",
        "window",
        "groups",
        "passphrase",
        "notify",
        "command",
        "webhook",
        "metrics",
        "textfile",
        "audit",
        "max_size",
        "keep",
        "name",
        "recipient",
        "owner",
        "purpose",
        "size",
        "rotate_every",
        "overlap",
        "unit",
        "user",
        "group",
        "operations",
        "x",
    ]
)
scalars = st.sampled_from(
    [
        "1",
        "-1",
        "32",
        "true",
        "1.5",
        "nan",
        "inf",
        '""',
        '"age1x"',
        '"web.service"',
        '"none"',
        '"7d"',
        '"/a"',
        '"read"',
        "1979-05-27",
        "1979-05-27T07:32:00Z",
        "07:32:00",
        "[]",
        "{}",
        '"\\u0000"',
        "99999999999999999999",
    ]
)
values = st.recursive(
    scalars,
    lambda inner: (
        st.lists(inner, max_size=3).map(lambda items: "[" + ", ".join(items) + "]")
        | st.dictionaries(names, inner, max_size=3).map(
            lambda table: "{" + ", ".join(f"{name} = {value}" for name, value in table.items()) + "}"
        )
    ),
    max_leaves=8,
)


@pytest.mark.promise(10)
@given(st.dictionaries(names, values, max_size=4), st.dictionaries(names, values, max_size=4))
def test_any_value_under_any_name(top: dict[str, str], inside: dict[str, str]) -> None:
    answered("\n".join(f"{name} = {value}" for name, value in top.items()).encode())
    body = "\n".join(
        f"{name} = {value}" for name, value in inside.items() if name not in ("owner", "purpose")
    )
    for head in (
        KEY,
        KEY + "[[key.web.allow]]\n",
        "[[operator]]\n",
        "[daemon]\n",
        "[tpm]\n",
        "[unlock]\n",
        "[notify]\n",
        "[audit]\n",
    ):
        answered((head + body).encode())


@given(st.from_regex(r"\A[a-z0-9][a-z0-9._-]{0,63}\Z").filter(lambda name: "\n" not in name))
def test_every_key_that_can_be_declared_can_be_kept(name: str) -> None:
    config = parse(f'[key."{name}"]\nowner = "o"\npurpose = "p"'.encode())
    key = config.keys[name]
    draft = Draft(None).create(name, owner=key.owner, purpose=key.purpose, size=key.size, now=1)
    built = draft.build(generation=1, counter=None, now=1)
    again = parse_keyring(SecretBuffer.copy_of(built.buffer.view))
    assert again.key(name).owner == "o"
    again.close()
    built.close()
