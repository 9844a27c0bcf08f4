"""unsealctl: the command for administrators, on the server, and for operators, anywhere.

One file for each noun, imported when its command is used. Data goes to stdout, messages to stderr,
questions to the terminal.
"""
