"""unsealerd-watch: tells people and services what happens to the keys. Has no key, no network and no state of its own."""
