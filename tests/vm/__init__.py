"""The machine test: a virtual machine with a software TPM, whose reboots, crashes and power cuts are real."""
