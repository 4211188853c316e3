"""Runs what Graft Export Job wrote, without a graph, on as many processes and machines as accelerate starts.

    accelerate launch [its options] <this file> <job folder> [ComfyUI's options, such as --cpu]

ComfyUI is the one that this pack lies in, or the one that COMFYUI_PATH names. Started again, with more processes or
fewer, it goes on where it was.
"""

import contextlib
import importlib
import importlib.util
import logging
import os
import sys

HERE = os.path.dirname(os.path.abspath(__file__))

# So the graph starts it for processes of its own, with a seat for each.
SEATED = "graft_job"


def find_comfyui():
    """The folder of ComfyUI's main.py; ends the program where there is none."""
    found = os.environ.get("COMFYUI_PATH") or os.path.dirname(os.path.dirname(HERE))
    if not os.path.isfile(os.path.join(found, "main.py")) or not os.path.isdir(os.path.join(found, "comfy")):
        sys.exit(f"There is no ComfyUI in '{found}'. Set COMFYUI_PATH to the folder that holds its main.py.")
    return os.path.abspath(found)


def search_path(folder, entries):
    """Put ComfyUI's folder in front of the entries of a search path, and what node packs have added behind them.

    A process that the graph starts inherits the server's path. ComfyUI and node packs put folders in front of it while
    they load: `utils.py` in ComfyUI's `comfy` would hide ComfyUI's `utils`, and this pack's `nodes` ComfyUI's `nodes`.
    """
    left_out = {os.path.realpath(path) for path in (HERE, folder, os.path.join(folder, "comfy"))}
    packs = tuple(
        os.path.realpath(path) + os.sep for path in (os.path.join(folder, "custom_nodes"), os.path.dirname(HERE))
    )
    real = {entry: os.path.realpath(entry or ".") for entry in entries}
    kept = [entry for entry in real if real[entry] not in left_out]
    # Sorting keeps the order of entries that are alike.
    return [folder, *sorted(kept, key=lambda entry: real[entry].startswith(packs))]


def enter_comfyui(folder, arguments):
    """Makes ComfyUI importable, and has it read its options from the arguments."""
    sys.path[:] = search_path(folder, sys.path)
    sys.argv = [os.path.join(folder, "main.py"), *arguments]
    importlib.import_module("comfy.options").enable_args_parsing()
    # As main.py does, before ComfyUI's `nodes` puts `comfy` in front of the search path.
    importlib.import_module("utils.extra_config")


def load_pack():
    """The pack as ComfyUI imports it, whatever its folder is called; the name to import its modules by."""
    name = HERE.replace(".", "_x_")
    spec = importlib.util.spec_from_file_location(name, os.path.join(HERE, "__init__.py"))
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return name


def options_of_accelerate(arguments):
    """List ComfyUI's options that `accelerate launch` got as its own. Warn where it started one process for several."""
    if os.environ.get("ACCELERATE_USE_CPU", "").lower() not in ("1", "true"):
        return []
    # accelerate gives each of several processes a rank. With --cpu it gives an address only, and starts one process.
    if "MASTER_ADDR" in os.environ and "RANK" not in os.environ:
        logging.warning(
            "Graft: `accelerate launch --cpu` starts one process, whatever --num_processes says. For several put --cpu "
            "behind the job's folder: accelerate launch --multi_gpu --num_processes 2 job.py FOLDER --cpu"
        )
    return [] if "--cpu" in arguments else ["--cpu"]


@contextlib.contextmanager
def telling(seat):
    """Within it what fails is told to the graph, which would only see that this process is gone."""
    try:
        yield
    except Exception as error:
        if seat is not None:
            seat["pipe"].send(("failed", "", f"{type(error).__name__}: {error}", "", ""))
        raise


def main(seat=None):
    """The exit status: 0 when the job is done, 1 for an error, 130 when it was interrupted."""
    if seat is not None:
        os.environ.update(seat["environment"])
        folder, arguments, comfyui = seat["folder"], sys.argv[1:], seat["comfyui"]
    elif len(sys.argv) < 2 or sys.argv[1].startswith("-"):
        sys.exit(__doc__)
    else:
        folder, comfyui = os.path.abspath(sys.argv[1]), find_comfyui()
        arguments = [*sys.argv[2:], *options_of_accelerate(sys.argv[2:])]
    with telling(seat):
        enter_comfyui(comfyui, arguments)
        name = load_pack()
        # Before ComfyUI looks for its device: it takes the one that is this process's.
        group = importlib.import_module(f"{name}.trainers.distributed.accelerate_group").AccelerateGroup(
            "--cpu" in arguments
        )
        headless = importlib.import_module(f"{name}.nodes.host.jobs.worker")
    return headless.main(folder, group, seat)


if __name__ == "__main__":
    sys.exit(main())
elif __name__ == SEATED:
    sys.exit(main(globals()["GRAFT_SEAT"]))
