"""The programs, measured against their peers: `scripts/bench`."""
