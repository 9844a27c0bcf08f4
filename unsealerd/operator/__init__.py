"""The operator's side: identities, known hosts, verification of evidence, the unlock client."""
