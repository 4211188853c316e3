"""Tests of trainings outside the graph: as a job for accelerate, and as worker processes that the graph waits for."""

import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import numpy as np
import psutil
import pytest
from PIL import Image

from tests.support import graphs, runs
from tests.support.host import ROOT
from tests.support.server import STYLES, ComfyServer, PromptError, PromptInterrupted, find_free_port, link
from tests.toy import world

STEPS = 3
LONG = 100_000


# A common kind of node pack: it puts its own folder first in the server's search path.
PUSHY = """
import os, sys
sys.path.insert(0, os.path.dirname(__file__))
NODE_CLASS_MAPPINGS = {}
"""


def installed(folder, style, tiny_base):
    """Return a separate, stopped ComfyUI with the pack, the tiny base and a pack that hides ComfyUI's modules."""
    server = ComfyServer(folder, style=style)
    link(tiny_base, server.path("models", "checkpoints", tiny_base.name))
    pushy = server.path("custom_nodes", "pushy")
    for name, text in {"__init__.py": PUSHY, "utils/__init__.py": "", "folder_paths.py": "", "job.py": ""}.items():
        (pushy / name).parent.mkdir(parents=True, exist_ok=True)
        (pushy / name).write_text(text)
    shutil.copytree(world.CONCEPT_FOLDER / "toy", server.path("input", "jobs"))
    return server


@pytest.fixture(scope="module")
def server(tiny_base, tmp_path_factory):
    """Start the server that the tests here share, from outside ComfyUI's folder."""
    with installed(tmp_path_factory.mktemp("plain") / "ComfyUI", "relative", tiny_base) as server:
        yield server


@pytest.fixture(scope="module")
def dataset(server):
    """Return the name of a folder of pictures below input/ that the tests here share."""
    return "jobs"


def graph_of(server, dataset, name, steps, kind="GraftTrainLoRA", more=None, **options):
    """Return a training with three pictures per step, so that two processes get unequal numbers.

    Args:
        more: further option nodes: fields to set, by class.
    """
    graph = runs.graph_of(server, dataset, name, steps, more=more, **options)
    graph["3"]["class_type"] = kind
    graph["3"]["inputs"]["batch_size"] = 3
    return graph


@pytest.fixture(scope="module")
def alone(server, dataset):
    """Return the adapter that one process trains in the graph, after STEPS."""
    server.run(graph_of(server, dataset, "alone", STEPS))
    return runs.adapter_of(server, runs.find_run(server, "alone"), STEPS)


def alone_run(server):
    return runs.find_run(server, "alone")


def distance(a, b):
    """Return the median relative difference over two adapters' tensors, relative to the second.

    Not the norm of the whole: one cross-attention of the small base has gradients of 1e-7 beside 1e-2 of others.
    Rounding decides their sign, and AdamW moves by the sign at any size. The loss hardly depends on such a tensor.
    """
    assert a.keys() == b.keys()
    names = [name for name in b if not name.endswith(".alpha")]
    return np.median([np.linalg.norm(a[name] - b[name]) / np.linalg.norm(b[name]) for name in names])


def exported(server, graph):
    entry = server.run(graph)
    return Path(entry["outputs"]["3"]["text"][0].removeprefix("Job: "))


def documented(page):
    """Return the commands on a page that run a job, exactly as written."""
    return re.findall(
        r"^ *((?:accelerate launch|python) .*job\.py .*)$", (ROOT / page).read_text(encoding="utf-8"), re.M
    )


GUIDE = documented("docs/multi-gpu.md")
HELP = documented("web/docs/GraftExportJob.md")


def start(server, job, command, *more):
    """Start a documented command in ComfyUI's folder, in a shell whose environment has little but Python's path."""
    folder = str(job.relative_to(server.comfy))
    line = " ".join([re.sub(r"FOLDER|output/graft/jobs/\S+", folder, command), *more])
    environment = {"PATH": f"{Path(sys.executable).parent}:/usr/bin:/bin", "HOME": str(server.path("temp"))}
    environment["OMP_NUM_THREADS"] = "1"
    # PYTHONPATH may hold packages that this ComfyUI needs.
    environment |= {name: os.environ[name] for name in ("PYTHONPATH",) if name in os.environ}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(["sh", "-c", f"exec {line}"], env=environment, cwd=server.comfy, **pipes)


def finished(process):
    """Wait for the end of a started command and return its result."""
    output, errors = process.communicate(timeout=600)
    return subprocess.CompletedProcess(process.args, process.returncode, output, errors)


def launch(server, job, command, *more):
    return finished(start(server, job, command, *more))


def test_guide_and_help_give_the_same_commands():
    (gpus,) = GUIDE
    shown = [re.sub(r"output/graft/jobs/\S+", "FOLDER", gpus), "python custom_nodes/graft/job.py FOLDER"]
    assert shown == HELP
    for page in ("docs/multi-gpu.md", "web/docs/GraftExportJob.md"):
        # Two processes on the CPU, as the tests here run them.
        assert f"`{HELP[0]} --cpu`" in (ROOT / page).read_text(encoding="utf-8")


def events_of(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_documented_job_command_trains_what_the_graph_would(server, dataset, alone):
    job = exported(server, graph_of(server, dataset, "spread", STEPS, kind="GraftExportJob"))
    assert sorted(os.listdir(job)) == ["README.md", "cache", "job.json"]
    assert runs.list_runs(server, "spread") == []
    done = launch(server, job, GUIDE[0], "--cpu")
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"done after step {STEPS}" in done.stdout + done.stderr
    run = runs.find_run(server, "spread")
    assert run.name == job.name
    assert [line["step"] for line in events_of(run) if line["event"] == "step"] == [1, 2, 3]
    assert json.loads((run / "recipe.json").read_text())["processes"] == 2
    with urllib.request.urlopen(f"{server.url}/graft/runs") as answer:
        (row,) = [row for row in json.load(answer)["runs"] if row["name"] == run.name]
    assert row["status"] == "finished"
    adapter = runs.adapter_of(server, run, STEPS)
    assert distance(adapter, alone) <= 1e-4
    losses = [[line["loss"] for line in events_of(one) if line["event"] == "step"] for one in (run, alone_run(server))]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    applied_in_the_graph(server, dataset, run)


def commands_of(job):
    """Return the commands in a job's README, by the program that they start."""
    lines = re.findall(r"^    ((\w+) .*)$", (job / "README.md").read_text(encoding="utf-8"), re.M)
    return {"check" if "--check" in line else program: line for line, program in reversed(lines)}


def test_a_jobs_readme_starts_it_and_its_check_names_what_is_missing(server, dataset, alone, tiny_base):
    job = exported(server, graph_of(server, dataset, "told", STEPS, kind="GraftExportJob"))
    commands = commands_of(job)
    assert commands.keys() == {"check", "python", "accelerate", "torchrun", "sbatch"}
    assert str(job.relative_to(server.comfy)) in commands["torchrun"]
    done = launch(server, job, commands["check"], "--cpu")
    assert done.returncode == 0 and "nothing is missing" in done.stderr, done.stdout + done.stderr
    # A folder that a run makes later.
    later = server.path("later", "output")
    done = launch(server, job, commands["check"], "--cpu", "--output-directory", str(later))
    assert done.returncode == 0 and not later.parent.exists(), done.stdout + done.stderr
    done = launch(server, job, commands["torchrun"], "--cpu")
    assert done.returncode == 0, done.stdout + done.stderr
    run = runs.find_run(server, "told")
    assert json.loads((run / "recipe.json").read_text())["processes"] == 2
    assert distance(runs.adapter_of(server, run, STEPS), alone) <= 1e-4
    # All that is missing is named, and nothing is repaired or removed.
    first, *others = sorted((job / "cache").rglob("*.safetensors"))
    first.unlink()
    for other in others[:1]:
        data = bytearray(other.read_bytes())
        data[-1] ^= 1
        other.write_bytes(data)
    model = server.path("models", "checkpoints", tiny_base.name)
    model.rename(model.with_suffix(".away"))
    try:
        done = launch(server, job, commands["check"], "--cpu")
    finally:
        model.with_suffix(".away").rename(model)
    assert done.returncode == 1
    missing = [line for line in done.stderr.splitlines() if line.startswith("MISSING")]
    for name in (tiny_base.name, first.name, *(other.name for other in others[:1])):
        assert sum(name in line for line in missing) == 1, done.stderr
    assert len(missing) == 2 + len(others[:1]) and all(other.exists() for other in others)


def step_reached(process, log, step):
    """Wait until a started job has logged a step after `step`."""
    deadline = time.monotonic() + 400
    while not (log.exists() and any(line.get("step", 0) > step for line in events_of(log.parent))):
        assert process.poll() is None and time.monotonic() < deadline, finished(process)
        time.sleep(0.1)


def workers_of(process):
    """Return the processes of a started job, by their RANK."""
    children = psutil.Process(process.pid).children(recursive=True)
    return {child.environ()["RANK"]: child for child in children if "RANK" in child.environ()}


def test_torchrun_starts_the_others_again_when_a_process_is_lost(server, dataset):
    steps, saved = 12, 4
    job = exported(server, graph_of(server, dataset, "lost", steps, kind="GraftExportJob", save_every=saved))
    log = server.path("output", "graft", job.name, "metrics.jsonl")
    process = start(server, job, commands_of(job)["torchrun"], "--cpu")
    try:
        step_reached(process, log, saved)
        workers_of(process)["1"].kill()
        done = finished(process)
    finally:
        process.kill()
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"from step {saved}" in done.stderr or f"from step {saved + 1}" in done.stderr, done.stderr
    assert [line["step"] for line in events_of(log.parent) if line["event"] == "step"][-1] == steps


def listens(process, port):
    """Report whether a started command itself waits for connections at a port."""
    connections = psutil.Process(process.pid).net_connections("tcp")
    return any(one.laddr.port == port and one.status == psutil.CONN_LISTEN for one in connections)


def lose(machine):
    """Kill a launcher, which would start its processes again, and then its processes."""
    if psutil.pid_exists(machine.pid):
        processes = [psutil.Process(machine.pid), *psutil.Process(machine.pid).children(recursive=True)]
        for process in processes:
            process.kill()


@pytest.mark.soak
@pytest.mark.parametrize("has_main", [False, True], ids=["other", "main"])
def test_a_machine_is_lost_and_the_other_goes_on_alone(has_main, server, dataset, trials):
    """Two launchers stand for two machines. The one without the meeting point is lost, with the main process or not."""
    if trials(True, False):
        pytest.skip("the launchers notice it after a minute; `make soak` waits")
    steps, saved, port = 40, 4, find_free_port()
    name = "main machine" if has_main else "machine"
    job = exported(server, graph_of(server, dataset, name, steps, kind="GraftExportJob", save_every=saved))
    log = server.path("output", "graft", job.name, "metrics.jsonl")
    line = next(line for line in (job / "README.md").read_text(encoding="utf-8").splitlines() if "--nnodes 1:2" in line)
    line = line.strip().replace("HOST:29500", f"127.0.0.1:{port}").replace("--nproc_per_node 4", "--nproc_per_node 1")
    machines = []
    try:
        # torchrun numbers the machines of one address by process id. The first to listen holds the meeting point.
        machines.append(start(server, job, line, "--cpu"))
        if has_main:
            machines[0].send_signal(signal.SIGSTOP)
            machines.append(start(server, job, line, "--cpu"))
        stays = machines[-1]
        while not listens(stays, port):
            assert stays.poll() is None, finished(stays)
            time.sleep(0.1)
        if has_main:
            machines[0].send_signal(signal.SIGCONT)
        else:
            machines.append(start(server, job, line, "--cpu"))
        lost = machines[0] if has_main else machines[1]
        step_reached(stays, log, saved)
        assert json.loads((log.parent / "recipe.json").read_text())["processes"] == 2
        assert list(workers_of(lost)) == ["0" if has_main else "1"]
        lose(lost)
        done = finished(stays)
    finally:
        for machine in machines:
            lose(machine)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Graft: 1 processes" in done.stderr, done.stderr
    logged = [line["step"] for line in events_of(log.parent) if line["event"] == "step"]
    assert logged == list(range(1, steps + 1))


SHARED = {"GraftMemoryOptions": {"shard": "on"}, "GraftPreviewOptions": {"prompts": "a toy", "steps": 1, "every": 2}}


def test_with_weights_in_shares_a_job_and_the_graph_train_the_same(server, dataset, alone):
    """Two runs of the real host in two processes each; previews are drawn on the way, by one process alone."""
    job = exported(server, graph_of(server, dataset, "shares", STEPS, kind="GraftExportJob", more=SHARED))
    done = launch(server, job, HELP[0], "--cpu")
    assert done.returncode == 0, done.stdout + done.stderr
    sharded = r"sharded the frozen weights of \d+ blocks \([\d.]+ MB\) over 2 processes"
    assert re.search(sharded, done.stdout + done.stderr)
    entry = server.run(graph_of(server, dataset, "in both", STEPS, processes=2, more=SHARED))
    assert f"{STEPS} steps trained" in entry["outputs"]["3"]["text"][0]
    for name in ("shares", "in-both"):
        run = runs.find_run(server, name)
        assert distance(runs.adapter_of(server, run, STEPS), alone) <= 1e-4
        drawn = [line["step"] for line in events_of(run) if line["event"] == "sample"]
        assert drawn == [0, 2, 3]


def test_jobs_and_processes_draw_on_the_model_of_the_preview_options(server, dataset):
    """Its nodes run again there, with their values. The first picture shows that model alone."""

    def graph(name, source="8", **more):
        previews = {"prompts": "a toy --w 64 --h 64", "steps": 2, "cfg": 7.0, "every": 2, "model": [source, 0]}
        found = graph_of(server, dataset, name, 1, more={"GraftPreviewOptions": previews}, **more)
        found["8"] = graphs.node("RescaleCFG", model=["1", 0], multiplier=0.9)
        return found

    job = exported(server, graph("preview job", kind="GraftExportJob"))
    done = launch(server, job, HELP[1], "--cpu")
    assert done.returncode == 0, done.stdout + done.stderr
    for name, more in {"preview here": {}, "preview both": {"processes": 2}, "preview plain": {"source": "1"}}.items():
        server.run(graph(name, **more))
    names = ("preview-job", "preview-here", "preview-both", "preview-plain")
    drawn = [runs.find_run(server, name) / "samples" / "step-00000000-1.png" for name in names]
    job, here, both, plain = [np.asarray(Image.open(path)).astype(int) for path in drawn]
    # Processes have other numbers of threads, and so other roundings.
    assert max(abs(job - here).max(), abs(both - here).max()) <= 1
    assert abs(plain - here).max() > 5
    refused = graph("preview refused", "9", kind="GraftExportJob")
    saved = f"{runs.find_run(server, names[1]).name}/step-00000001.safetensors"
    refused["7"] = graphs.node("GraftLoadAdapter", adapter_name=saved)
    refused["9"] = graphs.node(
        "GraftApplyAdapter", model=["1", 0], adapter=["7", 0], strength_model=1.0, strength_clip=1
    )
    with pytest.raises(PromptError, match="The preview model comes through a GraftApplyAdapter .node 9"):
        server.run(refused)


def applied_in_the_graph(server, dataset, run):
    """Check that the trainer's graph finds the finished run, and that ComfyUI's own loader draws the same from it."""
    graph = graph_of(server, dataset, "spread", STEPS)
    picked = server.post(f"/graft/runs/{run.name}/pick", {"step": STEPS})["adapter"]
    lora = {"lora_name": picked, "strength_model": 1.0, "strength_clip": 1.0}
    graph["8"] = graphs.node("LoraLoader", model=["1", 0], clip=["1", 1], **lora)
    drawn = {}
    for place, (name, source) in enumerate({"trained": "3", "loaded": "8", "base": "1"}.items()):
        ids = (graph, "a large sks toy", [source, 0], [source, 1], name)
        drawn[name] = graphs.sampling(*ids, steps=2, start=100 + 10 * place)
    entry = server.run(graph)
    assert "returned without training" in entry["outputs"]["3"]["text"][0]
    found = {name: io.BytesIO(server.download(entry, node=number)[0]) for name, number in drawn.items()}
    pictures = {name: np.asarray(Image.open(file)) for name, file in found.items()}
    assert np.array_equal(pictures["trained"], pictures["loaded"])
    assert not np.array_equal(pictures["trained"], pictures["base"])


def test_other_weights_and_other_nodes_are_refused_by_name(server, dataset, alone):
    (run,) = runs.list_runs(server, "alone")
    file = f"{run.name}/step-{STEPS:08d}.safetensors"
    graph = graph_of(server, dataset, "refused", STEPS, kind="GraftExportJob")
    graph["8"] = graphs.node("GraftLoadAdapter", adapter_name=file)
    graph["9"] = graphs.node("GraftApplyAdapter", model=["1", 0], adapter=["8", 0], strength_model=1.0, strength_clip=1)
    graph["3"]["inputs"]["model"] = ["9", 0]
    with pytest.raises(PromptError, match="comes through a GraftApplyAdapter .node 9.*CheckpointSave"):
        server.run(graph)
    # The host's own loader lists the picked save.
    picked = server.post(f"/graft/runs/{run.name}/pick", {"step": STEPS})["adapter"]
    lora = {"lora_name": picked, "strength_model": 0.7, "strength_clip": 0.0}
    graph["9"] = graphs.node("LoraLoader", model=["1", 0], clip=["1", 1], **lora)
    job = exported(server, graph)
    value = json.loads((job / "job.json").read_text())
    del value["checksum"]
    assert sorted(value["base"]["nodes"]) == ["1", "9"]
    assert sorted((row["list"], row["name"]) for row in value["base"]["files"]) == [
        ("checkpoints", graphs.CHECKPOINT),
        ("loras", picked),
    ]
    for row in value["base"]["files"]:
        row["sha256"] = row["sha256"][::-1]
    (job / "job.json").write_text(json.dumps(value))
    done = launch(server, job, HELP[1], "--cpu")
    assert done.returncode != 0
    assert "differs from the one that the job was made with" in done.stdout + done.stderr
    assert runs.list_runs(server, "refused") == []


def children_of(server):
    """Return the running child processes of a server, without Python's own resource tracker."""
    children = psutil.Process(server.process.pid).children(recursive=True)
    return [one for one in children if not any("resource_tracker" in word for word in one.cmdline())]


def trained_until(server, graph, step, act):
    """Queue a graph, act after so many more steps, and wait for its end; return (error, seconds since the act)."""
    with server.listen() as events:
        prompt = server.queue(graph, client_id=events.client_id)
        start = events.wait_for("graft.progress", timeout=300, event="run").data["step"]
        while events.wait_for("graft.progress", timeout=300, event="step").data["step"] < start + step:
            pass
        acted = time.monotonic()
        act()
        with pytest.raises(PromptError) as caught:
            server.wait(prompt)
    return caught.value, time.monotonic() - acted


@pytest.mark.soak
@pytest.mark.parametrize("style", STYLES)
def test_two_processes_train_however_the_server_is_started(style, tiny_base, tmp_path, trials):
    if trials(True, False):
        pytest.skip("the server that the other tests share is started in one of these ways; `make soak` tries all")
    with installed(tmp_path / "ComfyUI", style, tiny_base) as server:
        entry = server.run(graph_of(server, "jobs", style, 1, processes=2))
    assert "1 steps trained" in entry["outputs"]["3"]["text"][0]


@pytest.mark.soak
def test_the_graph_trains_by_two_processes_and_cancel_ends_both(server, dataset, alone, trials):
    graph = graph_of(server, dataset, "both", LONG, processes=2)
    left = []

    def cancel():
        # Files that would stay if the server were killed now; the host itself clears its temp folder.
        left.extend(server.path("output", "graft", "jobs").glob(".*"))
        server.interrupt()

    error, seconds = trained_until(server, graph, 2, cancel)
    assert left == []
    assert isinstance(error, PromptInterrupted)
    assert children_of(server) == []
    # On an overloaded machine a second of work takes several.
    assert seconds <= 5.0 * max(1.0, os.getloadavg()[0] / (2 * os.cpu_count()))
    run = runs.find_run(server, "both")
    reached = max(runs.states_of(run))
    assert reached >= 2
    assert list(server.path("temp").glob("graft-*")) == []
    if trials(0, 1):
        lost = graph_of(server, dataset, "both", LONG, processes=2)
        error, _ = trained_until(server, lost, 1, lambda: kill_one(server))
        assert re.search("Process [01] of the training was lost .exit code -9", str(error))
        assert children_of(server) == []
        assert max(runs.states_of(run)) > reached
        reached = max(runs.states_of(run))
    entry = server.run(graph_of(server, dataset, "both", reached + 1, processes=2))
    assert f"{reached + 1} steps trained" in entry["outputs"]["3"]["text"][0]
    assert runs.steps_logged(run) == list(range(1, reached + 2))
    losses, expected = (
        [line["loss"] for line in events_of(one) if line["event"] == "step"] for one in (run, alone_run(server))
    )
    assert losses[:2] == pytest.approx(expected[:2], rel=1e-5)


def kill_one(server):
    os.kill(children_of(server)[-1].pid, signal.SIGKILL)
