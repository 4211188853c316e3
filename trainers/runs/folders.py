"""Folders that runs are kept in, and the values that a run's files hold."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ..data.examples import Example
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
        picture_of: returns the path of a picture in the host's input folders by its name.
        pictures: pictures that a job brings along encoded, by their names in prompts.
    """

    runs: str
    cache: str
    adapters: str
    embeddings: str
    cache_limit: int = 50 * 1024**3
    adapter_of: Callable[[str], str] = str
    picture_of: Callable[[str], str] = str
    pictures: Mapping[str, Example] = field(default_factory=dict)


@dataclass(frozen=True)
class Products:
    """Trained files of a run at one step.

    Attributes:
        adapter: adapter with the host's names; None if the run trains nothing of the model.
        embedding: None if the run trains no embedding.
    """

    adapter: Adapter | LazyAdapter | None = None
    embedding: Embedding | None = None

    def write(self, adapters: str, embeddings: str, stem: str, title: str) -> list[str]:
        """Write the files, named after `stem`, into their folders. Return their paths."""
        from ..formats.adapter import save_adapter
        from ..formats.embedding import save_embedding

        paths = []
        for folder, product, save in (
            (adapters, self.adapter, save_adapter),
            (embeddings, self.embedding, save_embedding),
        ):
            if product is not None:
                paths.append(os.path.join(folder, f"{stem}.safetensors"))
                save(paths[-1], product, title)
        return paths


@dataclass(frozen=True)
class Halt:
    """Record that the user ended a run before its last step.

    Attributes:
        how: STOPPED or PAUSED.
    """

    how: str
    step: int
    steps: int
