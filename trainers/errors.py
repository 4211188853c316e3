"""The errors a user meets: each says what is wrong, with which input or file, and the cure."""

from collections.abc import Iterator
from contextlib import contextmanager


class GraftError(ValueError):
    """Something the user can put right.

    Args:
        message: what is wrong, naming the file where there is one.
        cure: what to do about it, a full sentence.
        input: name of the node input it concerns, empty when none.
    """

    def __init__(self, message: str, cure: str = "", input: str = ""):
        self.message = message
        self.cure = cure
        self.input = input
        super().__init__(f"{message} {cure}".strip())


class DatasetError(GraftError):
    """A folder, image or caption cannot be used."""


class SettingsError(GraftError):
    """Settings that are out of range or contradict each other."""


class ModelError(GraftError):
    """The connected model cannot be trained, or an adapter does not fit it."""


class NumbersError(GraftError):
    """A loss or a gradient is not finite."""


class OutOfMemory(GraftError):
    """Memory ran out, and nothing is left that would save some."""


class RunError(GraftError):
    """A run folder cannot be read or written."""


class RunHeldError(RunError):
    """Another process holds the run: it trains or deletes it."""


@contextmanager
def needing(package: str, what: str, otherwise: str, input: str) -> Iterator[None]:
    """Says which package an import inside the block is missing.

    Args:
        what: needs it.
        otherwise: what can be done in place of installing it.
        input: name of the node input that asked for it.

    Raises:
        SettingsError: in place of ImportError.
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
    """One of the processes that train together has ended, and with it the attempt."""

    def __init__(self):
        super().__init__(
            "Another process of this training has ended.",
            "What was saved stays: start it again, with as many processes as there are, to go on.",
        )
