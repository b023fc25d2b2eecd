"""What can go wrong, as sentences a user can act on.

Every message says what was wrong, gives the value, and says what to do. The command line and the worker print the
message alone; a traceback means a defect of FreqSeg.
"""

from __future__ import annotations


class FreqSegError(Exception):
    """Base of every error FreqSeg raises on purpose. ``code`` is stable and meant for programs."""

    code = "error"


class InputError(FreqSegError):
    """A file or volume that cannot be used as it is."""

    code = "input"


class NotRegisteredError(InputError):
    """Two volumes that do not lie on each other; registering them may help."""

    code = "not_registered"


class SettingsError(FreqSegError):
    """A setting, prompt or preset that does not exist or is out of range."""

    code = "settings"


class VocabularyError(SettingsError):
    """A prompt outside the meanings a preset was trained on."""

    code = "vocabulary"


class WeightsError(FreqSegError):
    """Weights that are missing, damaged or belong to another architecture."""

    code = "weights"


class OutputError(FreqSegError):
    """A result that cannot be written where it was asked for."""

    code = "output"


class DeviceError(FreqSegError):
    """A device that is absent, or memory that does not suffice."""

    code = "device"


class Cancelled(FreqSegError):
    """The user stopped the run; nothing was written."""

    code = "cancelled"
