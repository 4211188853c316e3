"""Paths of the pack's output, of adapters and of embeddings, all below ComfyUI's own folders."""

import os
import re
from collections.abc import Callable

import folder_paths

from ...trainers.errors import ModelError, RunError, SettingsError
from ...trainers.formats.adapter import Adapter, load_adapter
from ...trainers.formats.atomic import refuse_links
from ...trainers.formats.embedding import Embedding, file_tensors, load_embedding, save_embedding
from ...trainers.formats.files import read_metadata, read_tensors
from ...trainers.formats.metadata import IDENTITY
from ...trainers.formats.peft_format import WEIGHTS
from ...trainers.methods.textual_inversion import check_name, is_addressable
from ...trainers.runs.folders import Folders
from ...trainers.runs.records import MOST_RUNS, find_run, list_records
from ...trainers.runs.run import Run
from ...trainers.text import check_file_name, is_below
from . import settings
from .dataset_folders import is_possible, picture_path, printable

_EMBEDDINGS = "embeddings"
_USUAL_PREFIX = "adapter"

_SAVE = re.compile(r"(?:step-\d{8}|best)\.safetensors")
_SAVE_NAME = re.compile(rf"([^/\\]+)[/\\]({_SAVE.pattern})")


def register() -> None:
    """Add output/embeddings to ComfyUI's embedding folders as soon as the pack loads."""
    folder_paths.add_model_folder_path(_EMBEDDINGS, os.path.join(folder_paths.get_output_directory(), _EMBEDDINGS))


def folders() -> Folders:
    """Return the folders of runs, caches, adapters and embeddings."""
    output = folder_paths.get_output_directory()
    graft = os.path.join(output, "graft")
    return Folders(
        graft,
        os.path.join(graft, "cache"),
        os.path.join(output, "loras"),
        os.path.join(output, _EMBEDDINGS),
        settings.cache_limit(),
        adapter_path,
        picture_path,
    )


def index_folder() -> str:
    """Return the folder of the index over the files of datasets. Raises RunError if it is a link."""
    folder = os.path.join(folders().cache, "index")
    refuse_links(folders().runs, folder)
    return folder


def jobs_folder() -> str:
    """Return the folder of jobs for other machines."""
    return os.path.join(folders().runs, "jobs")


def class_images_folder() -> str:
    """Return the folder of class images. It is not in the cache: drawing is slow, and users may look at the images."""
    return os.path.join(folders().runs, "class_images")


def ui_image(path: str) -> dict[str, str]:
    """Return the description with which a node shows a picture below the output folder in the browser."""
    folder, filename = os.path.split(os.path.relpath(path, folder_paths.get_output_directory()))
    return {"filename": filename, "subfolder": folder.replace(os.sep, "/"), "type": "output"}


def adapter_choices() -> list[str]:
    """Return ComfyUI's list of LoRA files."""
    return folder_paths.get_filename_list("loras")


def adapter_path(name: str) -> str:
    """Return the absolute path of a file in ComfyUI's LoRA list, or of a run's save, RUN/step-00001000.safetensors.

    Raises ModelError as `_listed` does.
    """
    return _save_path(name) or _listed("loras", name, "adapter", "adapter_name")


def save_choices() -> list[str]:
    """Return the saves of all runs, named as `adapter_path` takes them. ComfyUI's list does not hold these files."""
    places = folders()
    saves = []
    for record in list_records(places, MOST_RUNS):
        run = Run.named(places, record.name)
        if os.path.isdir(run.adapters):
            saves += [f"{run.name}/{name}" for name in sorted(os.listdir(run.adapters)) if _SAVE.fullmatch(name)]
    return saves


def _save_path(name: str) -> str | None:
    """Return the path of a run's save, or None if the name is not a save's or ComfyUI lists a file of that name."""
    match = _SAVE_NAME.fullmatch(name) if is_possible(name) else None
    if match is None or folder_paths.get_full_path("loras", name) is not None:
        return None
    try:
        run = find_run(folders(), match.group(1))
    except RunError:
        return None
    path = os.path.join(run.adapters, match.group(2))
    return path if os.path.isfile(path) and is_below(path, run.folder) else None


def embedding_path(name: str) -> str:
    """Return the absolute path of a file in ComfyUI's embedding list. Raises ModelError as `_listed` does."""
    return _listed(_EMBEDDINGS, name, "embedding", "embedding_name")


def _listed(kind: str, name: str, what: str, input: str) -> str:
    """Return the absolute path of a file in one of ComfyUI's lists.

    Raises:
        ModelError: the list has no such name, or the file's format is not supported.
    """
    path = folder_paths.get_full_path(kind, name) if is_possible(name) else None
    if path is None:
        raise ModelError(
            f"There is no {what} '{printable(name)}' in ComfyUI's {kind} folders.",
            "Choose one from the list. Press R to refresh it.",
            input,
        )
    if not path.lower().endswith(".safetensors"):
        raise ModelError(
            f"The {what} '{name}' is not a .safetensors file.",
            "Convert it. Graft reads no other format, because others can hide programs.",
            input,
        )
    return path


def file_state(name: str, find: Callable[[str], str]) -> str | float:
    """Return a value that changes with a listed file. It is NaN, never equal to itself, while the name is unknown.

    Args:
        find: returns the path of a name, as `adapter_path` and `embedding_path` do.
    """
    if not isinstance(name, str):
        return float("nan")
    status = os.stat(find(name))
    return f"{status.st_size}-{status.st_mtime_ns}"


def named_run(name: str) -> Run:
    """Return the run with a name. Raise RunError if there is none."""
    try:
        return find_run(folders(), name.strip())
    except RunError as error:
        raise RunError(
            f"There is no run '{printable(name)}' in output/graft.",
            "Write the name of the run's folder, as the history of runs shows it.",
            "run",
        ) from error


def load_named_adapter(name: str) -> Adapter:
    """Return the adapter of a LoRA file in ComfyUI's list.

    Raises:
        ModelError: the list has no such name, or the file cannot be read.
    """
    try:
        return load_adapter(adapter_path(name))
    except RunError as error:
        raise ModelError(error.message, error.cure, "adapter_name") from error


def embedding_choices() -> list[str]:
    """Return ComfyUI's list of embedding files."""
    return folder_paths.get_filename_list(_EMBEDDINGS)


def load_named_embedding(name: str) -> Embedding:
    """Return the embedding of a file in ComfyUI's list, under the name that prompts use for it.

    Raises:
        ModelError: the list has no such name, or the file cannot be read.
    """
    called = os.path.splitext(name)[0].replace("\\", "/")
    path = embedding_path(name)
    if not is_addressable(called):
        raise ModelError(
            f"No prompt can call the embedding '{name}': ComfyUI reads embedding:NAME up to the next space, and "
            "brackets, colons, backslashes and a comma at the end have another meaning there.",
            "Rename the file: use letters, digits, '-', '_' and '.' only, such as "
            f"'{re.sub('[^A-Za-z0-9_.-]+', '-', os.path.basename(called)).strip('-.') or 'word'}.safetensors', and "
            "choose it again.",
            "embedding_name",
        )
    try:
        return load_embedding(path, called)
    except RunError as error:
        raise ModelError(error.message, error.cure, "embedding_name") from error


def save_named_embedding(embedding: Embedding, name: str) -> str:
    """Write an embedding below output/embeddings, where prompts find it by its name, and return its path.

    The same run, trained further, replaces its earlier file. Nothing else is overwritten. A name that another embedding
    folder holds is refused, because ComfyUI would take either file.

    Raises:
        SettingsError: prompts cannot use the name, or it is taken.
    """
    name = name.strip() or embedding.name
    check_name(name)
    path = os.path.join(folders().embeddings, f"{name}.safetensors")
    for folder in folder_paths.get_folder_paths(_EMBEDDINGS):
        for taken in _files_called(folder, name):
            if os.path.realpath(taken) == os.path.realpath(path) and _same_run(taken, embedding):
                continue
            raise SettingsError(
                f"An embedding '{name}' exists already: {taken}.",
                "Choose another name, or move that file away.",
                "name",
            )
    save_embedding(path, embedding, name)
    return path


def _files_called(folder: str, name: str) -> list[str]:
    names = {f"{name}{ending}".lower() for ending in (".safetensors", ".pt", ".bin")}
    paths = []
    for directory, _, files in os.walk(folder):
        paths += [os.path.join(directory, file) for file in files if file.lower() in names]
    return paths


def _same_run(path: str, embedding: Embedding) -> bool:
    """Report whether a file was written by the run that made an embedding, or holds the same vectors."""
    try:
        known = read_metadata(path).get(IDENTITY)
        if known is not None and known == embedding.metadata.get(IDENTITY):
            return True
        tensors, _ = read_tensors(path)
    except RunError:
        return False
    ours = file_tensors(embedding)
    return tensors.keys() == ours.keys() and all(tensors[key].equal(ours[key]) for key in ours)


def check_prefix(prefix: str) -> None:
    """Raise SettingsError unless a prefix is a file name, with or without subfolders, that every system accepts."""
    check_file_name(prefix.strip() or _USUAL_PREFIX, "filename_prefix")


def new_adapter_path(prefix: str, format: str) -> str:
    """Return a free path below output/loras for a prefix, numbered as ComfyUI's Save nodes number theirs.

    Args:
        format: "peft" puts the weights into a folder of that name.

    Raises:
        SettingsError: the prefix leads out of output/loras, or is not a valid name.
    """
    root = folders().adapters
    check_prefix(prefix)
    wanted = prefix.strip() or _USUAL_PREFIX
    # Check before the call below, in which ComfyUI creates the folder.
    if not is_below(os.path.join(root, os.path.dirname(wanted)), root):
        raise SettingsError(
            f"The file name '{prefix}' leads out of {root}.", "Use a folder that is not a link.", "filename_prefix"
        )
    try:
        folder, filename, counter, _, _ = folder_paths.get_save_image_path(wanted, root)
    except Exception as error:
        raise SettingsError(
            f"Cannot use the file name '{prefix}' ({error}).",
            "Use a name, or subfolder/name, below ComfyUI's output/loras.",
            "filename_prefix",
        ) from error
    place = os.path.join(folder, f"{filename}_{counter:05}_")
    return os.path.join(place, WEIGHTS) if format == "peft" else f"{place}.safetensors"


def title_of(path: str) -> str:
    """Return the title of a saved adapter: its file name, or its folder's name if the file has peft's name."""
    parent, name = os.path.split(path)
    return os.path.splitext(os.path.basename(parent) if name == WEIGHTS else name)[0].rstrip("_")
