"""The errors of the package: each names the thing, the reason and the way out."""

from __future__ import annotations


class PersampleError(Exception):
    """Base class of everything that this package raises on purpose."""


class UnknownBackendError(PersampleError, ValueError):
    """The backend name is not registered."""


class MissingPackageError(PersampleError, ImportError):
    """The package that a backend, a command or a data set needs is not installed."""


class UnsupportedModelError(PersampleError, RuntimeError):
    """A part of the model has no per-sample gradient, with this backend or at all."""


class LossError(PersampleError, ValueError):
    """The loss is not a finite vector with one entry per sample."""


class NonFiniteLossError(LossError):
    """The loss of at least one sample is infinite or not a number."""


class BatchError(PersampleError, ValueError):
    """Inputs and targets are not a mini-batch: empty, of different lengths, or of the wrong type."""


class DisagreementError(PersampleError, RuntimeError):
    """A self-check found that a backend's numbers are not the gradients of the single samples."""


class ContractError(DisagreementError):
    """A backend's result breaks the contract of `PerSampleGradSource`."""


class OptionError(PersampleError, ValueError):
    """An option has a value, or a name, that is not allowed."""


class QuantityError(PersampleError, RuntimeError):
    """The code of a quantity failed, or did not return what the protocol of quantities asks for."""


class UsageError(PersampleError, RuntimeError):
    """A call came at the wrong moment (for example `step()` before `observe()`)."""


class DataError(PersampleError, RuntimeError):
    """A data set is missing, damaged, or cannot be downloaded."""


#: The classes of the errors that PyTorch raises. Subclasses are somebody's own.
RAW_ERRORS = (
    RuntimeError,
    NotImplementedError,
    AssertionError,
    TypeError,
    ValueError,
    IndexError,
    KeyError,
    AttributeError,
)
