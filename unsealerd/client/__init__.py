"""What a service imports: read keys, sign and verify. Standard library only.

    from unsealerd.client import Client

    client = Client()
    key = client.read("web-sessions")                  # the raw bytes; waits while the host is locked
    mac = client.sign("web-sessions", message).mac     # or let the daemon compute
    if client.verify("web-sessions", message, mac):
        ...

Every error is a class of `unsealerd.errors`.
"""

from unsealerd.client.client import Client, Event, Key, Keys, KeyVersion, Signature, Verification

__all__ = ["Client", "Event", "Key", "KeyVersion", "Keys", "Signature", "Verification"]
