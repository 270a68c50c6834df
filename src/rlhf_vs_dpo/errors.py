"""The errors a user can cause, each with the place and the fix in its message."""


class UserError(Exception):
    """Base of all errors that a stage prints without a traceback before it exits with status 1."""


class ParamsError(UserError):
    """A key of params.yaml is unknown, missing or out of range."""


class DataError(UserError):
    """A table, a file or a remote data set does not hold what its contract says."""


class ModelError(UserError):
    """A model folder cannot be loaded, or does not fit the data."""


class JudgeError(UserError):
    """A judge cannot be asked."""


class OutOfMemory(UserError):
    """What is computed at once does not fit on the device."""


class DiskError(UserError):
    """What is to be written does not fit on its disk."""


class TrainingError(UserError):
    """A run broke an invariant or produced a loss that is not finite."""
