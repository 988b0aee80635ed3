"""The one exception family of the package."""


class Error(Exception):
    """A fault that the caller can mend; its message names the thing, the expected and the found.

    The command line prints the message as one line and exits with status 2. Any other exception is
    a bug and keeps its traceback (DESIGN.md section 5).
    """


class ConfigError(Error):
    """A setting is unknown, of the wrong type, or out of its range."""


class InputError(Error):
    """A video, mask, image or prompt is unusable."""


class CheckpointError(Error):
    """A checkpoint is incomplete, holds unexpected entries, or is damaged."""


class SamplingError(Error):
    """Sampling produced no video, for instance latents that are not finite."""


class HostError(Error):
    """The work failed on another of several hosts, which is named; no host has its result."""


class LostHostError(HostError):
    """A host ended, or failed where the others cannot come out: their run cannot go on."""
