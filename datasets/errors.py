"""What raylift refuses and why: every error names the thing, the value and the remedy."""


class RayliftError(Exception):
    """The root of every error raylift raises on purpose. Each child is also the built-in it resembles."""


class RefusedFile(RayliftError, ValueError):
    """A source file that cannot become a sample: not a CT, incomplete, too large, not in HU."""


class ArchiveError(RayliftError, OSError):
    """An archive that is absent, unreadable or written by something else."""


class NoArchive(ArchiveError, FileNotFoundError):
    """A place where no archive was published."""


class CorruptSample(ArchiveError):
    """A stored array that is missing or does not match the digest in the manifest."""


class StoreUnreachable(RayliftError, ConnectionError):
    """An object store that does not answer, or not to these credentials."""


class ConfigError(RayliftError, ValueError):
    """A configuration that cannot work, found before anything was started."""
