"""unsealerd: HMAC keys that live only in RAM and survive reboots.

Folders are processes: ``daemon``, ``gateway``, ``operator``, ``client`` and ``cli``; ``core`` is pure, and
``tpm`` is the only importer of the TPM library. Nothing is imported here, so that a service that
imports ``unsealerd.client`` loads the standard library and no more.
"""

__version__ = "0.1.0"
