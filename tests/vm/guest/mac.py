"""A service that has MACs computed: signs and verifies, as whatever user and unit it runs in. Prints what came of it."""

from unsealerd.client import Client
from unsealerd.errors import AccessDenied

MESSAGE = b"session 4711"

with Client() as client:
    try:
        made = client.sign("tokens", MESSAGE)
        right, wrong = client.verify("tokens", MESSAGE, made.mac), client.verify("tokens", b"x", made.mac)
        print(
            f"version {made.version}, {'right' if right else 'not right'}, {'right' if wrong else 'not right'}"
        )
    except AccessDenied:
        print("denied")
