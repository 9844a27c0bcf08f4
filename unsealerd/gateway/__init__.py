"""The gateway: the process that the network reaches. It has no key, no TPM and no backup."""
