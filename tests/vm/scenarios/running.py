"""The first boot, and what happens to a daemon while its machine stays up."""

from vm.server import Server, check, wait_for
from vm.table import Scenario


def _first_boot(server: Server) -> str:
    server.machine.start()
    text = server.state_text()
    check("first_boot" in text, f"before init it should say first_boot, and says: {text}")
    # libtpms counts every unorderly reset of a machine that uses TPM objects of its own.
    server.run("tpm2_dictionarylockout --tcti device:/dev/tpmrm0 -s -n 32 -t 600 -l 600")
    server.run(
        "sed 's/@RECIPIENT@/" + server.recipient + "/' /opt/vm/unsealerd.toml >/etc/unsealerd/unsealerd.toml"
        " && systemctl reload unsealerd"
    )
    made = server.ctl("init")
    check(sorted(made["keys"]) == ["tokens", "web-sessions"], f"init should make two keys, and says {made}")
    server.run("systemctl start unsealerd-gateway && systemctl restart --no-block web")
    server.enrol()
    server.web_has(server.keys())
    wait_for(
        lambda: server.unit("ordered.service", "ActiveState") == "active",
        "ordered.service starts after the unlock",
    )
    kind = server.status()["secret_memory"]
    return f"first_boot, then unlocked; a waiting service started; keys in {kind}"


def _drill(server: Server) -> str:
    before = server.status()["generation"]
    server.operator("drill", "machine", "-i", str(server.identity))
    check(server.status()["generation"] == before, "a drill changed the backup")
    return f"opened, generation {before} as before"


def _killed(server: Server) -> str:
    keys, web = server.keys(), server.unit("web.service", "MainPID")
    pid = server.unit("unsealerd.service", "MainPID")
    server.run("systemctl kill -s KILL unsealerd.service")
    wait_for(
        lambda: server.unit("unsealerd.service", "MainPID") not in ("0", pid), "the daemon is started again"
    )
    server.expect_unlocked()
    server.expect_keys(keys)
    check(server.unit("web.service", "MainPID") == web, "web.service was restarted")
    return "unlocked, same keys; the service using them was not touched"


def _restarted(server: Server) -> str:
    keys, web = server.keys(), server.unit("web.service", "MainPID")
    server.run("systemctl restart unsealerd.service")
    server.expect_unlocked()
    server.expect_keys(keys)
    server.expect_no_sealed_copy()
    check(server.unit("web.service", "MainPID") == web, "web.service was restarted")
    return f"unlocked, same keys, no sealed copy; ready after {server.exec_to_ready():.1f} s"


def _upgraded(server: Server) -> str:
    keys, pid = server.keys(), server.unit("unsealerd.service", "MainPID")
    server.machine.run("dpkg --force-unsafe-io -i /opt/vm/unsealerd.deb", seconds=400)
    check(server.unit("unsealerd.service", "MainPID") != pid, "the daemon still runs the old program")
    server.expect_unlocked()
    server.expect_keys(keys)
    server.expect_no_sealed_copy()
    return "unlocked, same keys, no sealed copy"


def _denied(server: Server) -> str:
    server.run("systemctl start --no-block intruder.service")
    wait_for(
        lambda: "intruder.service" in server.run("unsealctl --json audit | grep -i deni", ok=False),
        "the denial is in the audit log",
    )
    check(
        server.unit("intruder.service", "ActiveState") == "activating",
        "intruder.service should wait for ever",
    )
    check(server.run("ls /run/intruder-was-here", ok=False) == "", "intruder.service was started")
    server.run("systemctl stop intruder.service")
    return "it waits, the denial is in the audit log"


def _by_unit(server: Server) -> str:
    """Who asks is told by the control group that the kernel reports; root is nobody special."""
    before = int(server.ctl("audit")["count"])
    said = {}
    for unit in ("signer", "stranger"):
        server.run(f"systemctl start {unit}.service")
        said[unit] = server.run(f"cat /run/{unit}.out").strip()
    # The agent's own shell, and one in a unit that is made for it: both are root.
    said["agent"] = server.run("/opt/unsealerd/bin/python3 /opt/vm/mac.py").strip()
    said["shell"] = server.run(
        "systemd-run --quiet --wait --pipe --unit=shell.service /opt/unsealerd/bin/python3 /opt/vm/mac.py"
    ).strip()
    check(said["signer"] == "version 1, right, not right", f"signer.service should sign and verify: {said}")
    for unit in ("stranger", "agent", "shell"):
        check(said[unit] == "denied", f"{unit}.service should be denied: {said}")
    told = [
        (record["event"], record["caller"]["unit"], record["caller"]["uid"] == 0)
        for record in server.ctl("audit")["records"][before:]
        if record.get("key") == "tokens" and record["event"] != "key_used"
    ]
    expected = [
        ("key_sign", "signer.service", False),
        ("key_verify", "signer.service", False),
        ("denied", "stranger.service", False),
        ("denied", "agent.service", True),
        ("denied", "shell.service", True),
    ]
    check(told == expected, f"the audit log should name each unit: {told}")
    return (
        "signed and verified as signer.service; denied as stranger.service, and to root in two other units; all of it is"
        " in the audit log"
    )


FIRST = [
    Scenario(
        "first boot, `init`, an operator adds the host",
        "first_boot, then unlocked; waiting services start",
        _first_boot,
    ),
    Scenario(
        "`unsealctl drill` from outside", "the operator's key opens the backup, nothing changes", _drill
    ),
]

SCENARIOS = [
    Scenario("SIGKILL to the daemon", "unlocked again, same keys", _killed),
    Scenario("`systemctl restart unsealerd`", "unlocked again, same keys, no sealed copy", _restarted),
    Scenario(
        "package installed again over the running one", "unlocked again, same keys, no sealed copy", _upgraded
    ),
    Scenario(
        "a service asks for a key that no policy grants it",
        "never starts, with an empty key least of all",
        _denied,
    ),
    Scenario(
        "a key that the policy grants to one unit, used by it, by another, and by root",
        "the unit signs and verifies; the others are denied; the audit log names each unit",
        _by_unit,
    ),
]
