"""Smart cards: the reader, the exchange of APDUs, the rules for PINs, attestation. One file imports pyscard: `pcsc`."""
