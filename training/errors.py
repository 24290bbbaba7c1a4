"""The errors of training that a person can mend; the command line prints their message and nothing else."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pydantic import ValidationError


class TrainingError(Exception):
    """A recipe, data set or run that cannot go on; the message says what to do."""


def complaints(error: ValidationError) -> str:
    """What is wrong with a document, field by field, on one line."""
    said = ((".".join(map(str, each["loc"])), each["msg"].removeprefix("Value error, ")) for each in error.errors())
    return "; ".join(f"{field}: {message}" if field else message for field, message in said)


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Have what cannot be written to ``path`` within the context, a full disk for instance, said of it.

    Raises ``TrainingError``.
    """
    try:
        yield
    except OSError as error:
        raise TrainingError(f"{path}: cannot be written: {error}") from error
