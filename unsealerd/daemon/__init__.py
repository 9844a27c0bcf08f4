"""The daemon: keys, TPM, backup, policy, audit, local sockets. It never opens a network socket."""
