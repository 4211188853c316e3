"""Errors for the user, each with the problem, the input or file, and the cure; recognition of a lack of memory."""

from collections.abc import Iterator
from contextlib import contextmanager


class GraftError(ValueError):
    """Error that the user can fix.

    Args:
        message: the problem, with the file's name if there is one.
        cure: the fix, in a full sentence.
        input: name of the node input to blame; empty for none.
    """

    def __init__(self, message: str, cure: str = "", input: str = ""):
        self.message = message
        self.cure = cure
        self.input = input
        super().__init__(f"{message} {cure}".strip())


class DatasetError(GraftError):
    """Unusable folder, image or caption."""


class SettingsError(GraftError):
    """Settings out of range, or contradictory settings."""


class ModelError(GraftError):
    """Model that cannot be trained, or adapter that does not fit the model."""


class NumbersError(GraftError):
    """Loss or gradient that is not finite."""


class OutOfMemory(GraftError):
    """Lack of memory that no fallback can cure."""


class RunError(GraftError):
    """Run folder or file that cannot be read or written."""


class RunHeldError(RunError):
    """Run that another process has locked, to train or to delete it."""


@contextmanager
def needing(package: str, what: str, otherwise: str, input: str) -> Iterator[None]:
    """Turn an ImportError in the block into a SettingsError that names the missing package.

    Args:
        package: name of the package on PyPI.
        what: the feature that needs the package; subject of the message.
        otherwise: what the user can do instead of installing it; end of the message.
        input: name of the node input that selects the feature.

    Raises:
        SettingsError: the block raised ImportError.
    """
    try:
        yield
    except ImportError as error:
        raise SettingsError(
            f"{what} needs the package {package}, which cannot be imported ({error}).",
            f"Install it into ComfyUI's own Python (python -m pip install {package}) and restart ComfyUI, {otherwise}.",
            input,
        ) from error


class PeerLostError(GraftError):
    """End of another process in the process group, which ends training in this process too."""

    def __init__(self):
        super().__init__(
            "Another process of this training has ended.",
            "Graft has kept the saves: start the training again, with any number of processes, to resume.",
        )


# Parts of messages from hosts and drivers that have no exception type of their own for it.
_SAID = ("out of memory", "not enough memory", "allocate memory", "could not allocate", "alloc_failed", "alloc failed")


def is_out_of_memory(error: BaseException) -> bool:
    """Report whether an exception of torch, Python or a device driver says that memory ran out."""
    import torch

    if isinstance(error, (torch.cuda.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(part in str(error).lower() for part in _SAID)


def in_one_line(error: BaseException) -> str:
    """Return the first line of an exception's message (at most 200 characters), or the name of its type."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
