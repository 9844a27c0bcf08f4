"""Test rigs: real parts without the hardware. Nothing here is imported by the package."""
