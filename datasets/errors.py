"""The exceptions of raylift. Every message names the object, the value and the remedy."""


class RayliftError(Exception):
    """Base class of all errors raised by raylift. Each subclass also derives from the built-in that it resembles."""


class FileError(RayliftError, ValueError):
    """A source file that cannot become a sample: unsupported, incomplete, too large or not in HU."""


class InputCheckError(FileError):
    """Radiographs with a warning, where only those without one are accepted."""


class SegmentationMaskError(FileError):
    """A volume of labels, such as folders of scans have many of."""


class ArchiveError(RayliftError, OSError):
    """An archive that is missing, unreadable or not written by raylift."""


class ArchiveNotFoundError(ArchiveError, FileNotFoundError):
    """A URL without a published archive."""


class CorruptSampleError(ArchiveError):
    """A stored array that is missing or does not match the digest in the archive's index."""


class AlteredFileError(RayliftError, ValueError):
    """A JSON file of a model, a checkpoint, a run or a search that is not what was written."""


class StoreError(RayliftError, ConnectionError):
    """An object store that does not respond, or denies access."""


class ConfigError(RayliftError, ValueError):
    """An invalid configuration, detected before anything is started."""


class WorkersLostError(RayliftError, RuntimeError):
    """Processes or actors that did a part of the work ended."""
