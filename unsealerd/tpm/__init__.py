"""The TPM: the only package that loads tpm2-pytss.

`pin` and `sealed` are the two files on disk and need no TPM and no library; `device.Tpm` loads the library when
it is opened.
"""
