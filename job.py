"""Run a job folder written by Graft Export Job, without a graph, on all processes that accelerate starts.

    accelerate launch [its options] <this file> <job folder> [ComfyUI's options, such as --cpu]
    python <this file> --check <job folder> [ComfyUI's options]

The second command prints what this machine lacks for the job, and starts nothing. The job uses the ComfyUI folder that
contains this pack; COMFYUI_PATH can name another one. Start the job again to resume it, also with more or fewer
processes.
"""

import contextlib
import importlib
import importlib.util
import logging
import multiprocessing
import os
import sys
import threading

HERE = os.path.dirname(os.path.abspath(__file__))

# Module name of this file in a process that the graph starts. GRAFT_WORKER then holds its folder, environment and pipe.
WORKER = "graft_job"


def find_comfyui():
    """Return the folder of ComfyUI's main.py. End the program if there is none."""
    folder = os.environ.get("COMFYUI_PATH") or os.path.dirname(os.path.dirname(HERE))
    if not os.path.isfile(os.path.join(folder, "main.py")) or not os.path.isdir(os.path.join(folder, "comfy")):
        sys.exit(f"There is no ComfyUI in '{folder}'. Set COMFYUI_PATH to the folder that contains its main.py.")
    return os.path.abspath(folder)


def search_path(folder, entries):
    """Return a search path with ComfyUI's folder first and the entries of node packs last.

    A process that the graph starts inherits the server's path. ComfyUI and node packs put folders in front of it while
    they load. Then `utils.py` in ComfyUI's `comfy` would hide ComfyUI's `utils`, and this pack's `nodes` would hide
    ComfyUI's `nodes`.
    """
    left_out = {os.path.realpath(path) for path in (HERE, folder, os.path.join(folder, "comfy"))}
    packs = tuple(
        os.path.realpath(path) + os.sep for path in (os.path.join(folder, "custom_nodes"), os.path.dirname(HERE))
    )
    real = {entry: os.path.realpath(entry or ".") for entry in entries}
    kept = [entry for entry in real if real[entry] not in left_out]
    # The sort is stable: within each group, entries keep their order.
    return [folder, *sorted(kept, key=lambda entry: real[entry].startswith(packs))]


def enter_comfyui(folder, arguments):
    """Make ComfyUI importable, and let it parse its options from the arguments."""
    sys.path[:] = search_path(folder, sys.path)
    sys.argv = [os.path.join(folder, "main.py"), *arguments]
    importlib.import_module("comfy.options").enable_args_parsing()
    # Import it early, as main.py does: later ComfyUI's `nodes` puts `comfy` in front of the search path.
    importlib.import_module("utils.extra_config")


def load_pack():
    """Import the pack as ComfyUI does, whatever its folder's name. Return the module name of the pack."""
    name = HERE.replace(".", "_x_")
    spec = importlib.util.spec_from_file_location(name, os.path.join(HERE, "__init__.py"))
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return name


def options_of_accelerate(arguments):
    """Return ComfyUI options that `accelerate launch` took as its own. Warn if it starts one process for several."""
    if os.environ.get("ACCELERATE_USE_CPU", "").lower() not in ("1", "true"):
        return []
    # With several processes, accelerate sets RANK in each. With --cpu it sets only an address, and starts one process.
    if "MASTER_ADDR" in os.environ and "RANK" not in os.environ:
        logging.warning(
            "Graft: `accelerate launch --cpu` starts one process, whatever --num_processes says. For several processes "
            "put --cpu after the job's folder: accelerate launch --multi_gpu --num_processes 2 job.py FOLDER --cpu"
        )
    return [] if "--cpu" in arguments else ["--cpu"]


def end_with_parent():
    """Wait for the end of the graph's server, then end this process: it would wait for the others without end."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


@contextlib.contextmanager
def reporting(given):
    """Send an error in the block to the graph, which would otherwise only see that this process has ended."""
    try:
        yield
    except Exception as error:
        if given is not None:
            given["pipe"].send(("failed", "", f"{type(error).__name__}: {error}", "", ""))
        raise


def check(folder, arguments):
    """Print what this machine lacks to run the job. Return the exit status: 0 if it lacks nothing, else 1."""
    enter_comfyui(find_comfyui(), arguments)
    return importlib.import_module(f"{load_pack()}.nodes.host.jobs.check").main(folder)


def main(given=None):
    """Run the job. Return the exit status: 0 if the job is done, 1 for an error, 130 if it was interrupted."""
    if given is not None:
        threading.Thread(target=end_with_parent, daemon=True).start()
        os.environ.update(given["environment"])
        folder, arguments, comfyui = given["folder"], sys.argv[1:], given["comfyui"]
    elif sys.argv[1:2] == ["--check"] and len(sys.argv) > 2:
        return check(os.path.abspath(sys.argv[2]), sys.argv[3:])
    elif len(sys.argv) < 2 or sys.argv[1].startswith("-"):
        sys.exit(__doc__)
    else:
        folder, comfyui = os.path.abspath(sys.argv[1]), find_comfyui()
        arguments = [*sys.argv[2:], *options_of_accelerate(sys.argv[2:])]
    with reporting(given):
        enter_comfyui(comfyui, arguments)
        name = load_pack()
        # Create the group before ComfyUI chooses its device: ComfyUI then takes this process's device.
        group = importlib.import_module(f"{name}.trainers.distributed.accelerate_group").AccelerateGroup(
            "--cpu" in arguments
        )
        worker = importlib.import_module(f"{name}.nodes.host.jobs.worker")
    return worker.main(folder, group, given)


if __name__ == "__main__":
    sys.exit(main())
elif __name__ == WORKER:
    sys.exit(main(globals()["GRAFT_WORKER"]))
