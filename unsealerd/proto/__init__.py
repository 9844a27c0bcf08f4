"""Generated from proto/ by scripts/gen-proto; only the gateway and the operator's client import it."""
