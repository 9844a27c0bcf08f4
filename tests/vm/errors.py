"""What can go wrong with the machine, as opposed to with what it runs."""


class RigError(Exception):
    """The rig does not work: a program is missing, or does not start."""


class NotInMirror(RigError):
    """The package mirror of this machine does not have that release."""


class GuestSilent(RigError):
    """The guest does not answer in time, or is gone."""


class GuestFailed(RigError):
    """A command in the guest failed that should not."""


class Broken(AssertionError):
    """Something was seen that should not be."""


class NotHere(Exception):
    """The release under test does not have what the scenario is about."""
