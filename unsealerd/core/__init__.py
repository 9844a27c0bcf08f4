"""Pure: bytes and values in, values out. No I/O but secret memory, no clock."""
