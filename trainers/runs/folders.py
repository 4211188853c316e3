"""Folders that runs are kept in, and the values that a run's files hold."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ..formats.adapter import Adapter, LazyAdapter
    from ..formats.embedding import Embedding


@dataclass(frozen=True)
class Folders:
    """Folders that training writes to.

    Attributes:
        runs: contains one folder per run.
        cache: latents and conditionings, shared by all runs.
        adapters: the host's adapter folder; a run's save is copied there when the user picks it.
        embeddings: the host's embedding folder.
        cache_limit: bytes; if the cache grows beyond this, entries of earlier runs are removed.
        adapter_of: returns the path of an adapter by its name in the host's list.
    """

    runs: str
    cache: str
    adapters: str
    embeddings: str
    cache_limit: int = 50 * 1024**3
    adapter_of: Callable[[str], str] = str


@dataclass(frozen=True)
class Products:
    """Trained files of a run at one step.

    Attributes:
        adapter: adapter with the host's names; None if the run trains nothing of the model.
        embedding: None if the run trains no embedding.
    """

    adapter: Adapter | LazyAdapter | None = None
    embedding: Embedding | None = None


@dataclass(frozen=True)
class Halt:
    """Record that the user ended a run before its last step.

    Attributes:
        how: STOPPED or PAUSED.
        step: last step that was done.
        steps: number of steps that the run was to have.
    """

    how: str
    step: int
    steps: int
