"""The one exception family of the package."""


class Error(Exception):
    """Something the caller can mend: the message names the thing, the expected and the found.

    The command line prints it as one line and exits with status 2; every other exception is a bug
    and keeps its traceback (DESIGN.md section 5).
    """


class ConfigError(Error):
    """A setting is unknown, of the wrong type, or out of its range."""


class InputError(Error):
    """A video, mask, image or prompt cannot be used as given."""


class CheckpointError(Error):
    """A checkpoint is missing something, holds something unexpected, or is damaged."""


class SamplingError(Error):
    """Sampling produced something that is not a video, such as latents that are not finite."""


class HostError(Error):
    """The work failed on another of several hosts, which is named; no host has its result."""


class LostHostError(HostError):
    """A host ended, or failed where the others cannot come out: their run cannot go on."""
