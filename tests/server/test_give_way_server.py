"""Tests of trainings that give way to other prompts of the real server's queue and return behind them by themselves."""

import random
import shutil
import time
import urllib.error

import pytest

from tests.support import graphs, runs
from tests.support.server import PromptError, PromptInterrupted
from tests.toy import world

STEPS = 40
EVERYTHING, SHORT = "to everything", "to short prompts"
# The log's words for a return without building the training again.
IN_ITS_TREE = "continues in the tree that was kept"


def add_pictures(server):
    """Add the folder of pictures that the tests here share; return its name."""
    folder = server.path("input", "give_way")
    if not folder.exists():
        shutil.copytree(world.CONCEPT_FOLDER / "toy", folder)
    return folder.name


def set_least(server, seconds):
    """Set the least training time between two pauses."""
    server.post("/settings/Graft.GiveWayAfter", seconds)


@pytest.fixture(scope="module")
def dataset(server):
    set_least(server, 0)
    yield add_pictures(server)
    set_least(server, 60)


@pytest.fixture(autouse=True)
def emptied(request):
    """Wait until the shared server has nothing left of the test."""
    yield
    if "dataset" in request.fixturenames:
        server = request.getfixturevalue("server")
        server.clear_queue()
        server.interrupt()
        server.poll(server.is_idle, 60, "the queue")


@pytest.fixture
def name(request):
    """Return the test's own name, for its run."""
    return "".join(letter for letter in request.node.name if letter.isalnum())


@pytest.fixture(scope="module")
def straight(server, tiny_base, dataset):
    """Return the run that trained all steps without a pause."""
    server.run(runs.graph_of(server, dataset, "straightway", STEPS))
    return runs.find_run(server, "straightway")


def picture(seed, steps=2):
    """Return a prompt without a training, which draws a picture."""
    graph = {"1": graphs.node("CheckpointLoaderSimple", ckpt_name=graphs.CHECKPOINT)}
    graphs.sampling(graph, "a large red circle", ["1", 0], ["1", 1], "other", seed=seed, steps=steps)
    return graph


def queue_training(server, events, graph):
    """Queue a graph and wait for the first step of its training; return the prompt's id."""
    prompt = server.queue(graph, client_id=events.client_id)
    events.wait_for("graft.progress", timeout=120, event="step", prompt_id=prompt)
    return prompt


def read_all(events):
    """Return the messages so far, including those on their way."""
    try:
        while True:
            events.next(timeout=0.5)
    except TimeoutError:
        return events.seen


def told(events, kind, prompt):
    """Return the training messages of a kind and a prompt that arrived so far."""
    found = [event.data for event in read_all(events) if event.type == "graft.progress"]
    return [data for data in found if (data["event"], data["prompt_id"]) == (kind, prompt)]


def pending(server):
    """Return the ids of the waiting prompts, in order."""
    return [item[1] for item in sorted(server.get("/queue")["queue_pending"], key=lambda item: item[0])]


def order(server, *prompts):
    """Wait for prompts and return them in the order in which they ended."""
    ends = {prompt: server.wait(prompt)["status"]["messages"][-1][1]["timestamp"] for prompt in prompts}
    return sorted(prompts, key=ends.get)


def assert_same(run, straight, steps=STEPS):
    """Check that a run ended with the bits of the uninterrupted one, and did each step once."""
    assert runs.same(runs.state_of(run, steps), runs.state_of(straight, steps))
    assert runs.steps_logged(run) == list(range(1, steps + 1))


@pytest.mark.soak
def test_others_run_first_and_the_run_ends_with_the_same_bits(server, straight, dataset, name, trials):
    """Each other prompt waits for one step. The training returns in the tree that was kept."""
    count, steps = trials(3, 5), trials(STEPS, 200)
    if steps != STEPS:
        server.run(runs.graph_of(server, dataset, f"straight{steps}", steps))
        straight = runs.find_run(server, f"straight{steps}")
    graph = runs.graph_of(server, dataset, name, steps, give_way=EVERYTHING)
    returned = server.read_log().count(IN_ITS_TREE)
    with server.listen() as events, server.listen() as other:
        prompt = queue_training(server, events, graph)
        for number in range(count):
            time.sleep(random.uniform(0, 0.3))
            drawn = server.queue(picture(number))
            (running,) = server.get("/graft/runs")["running"]
            waiting = events.wait_for("graft.progress", timeout=60, event="waiting").data
            # In the step of the prompt's arrival, or in the next one if that had already begun.
            assert waiting["prompt_id"] == prompt and waiting["step"] <= running["step"] + 2
            server.wait(drawn)
            # No program takes the pause for the training's end.
            assert prompt not in server.get("/history")
            events.wait_for("graft.progress", timeout=60, event="step")
        entry = server.wait(prompt)
        ends = [event.data for event in read_all(events) if event.type == "executing" and event.data["node"] is None]
        # A program that waits for the end of its prompt is told of one end.
        assert [end["prompt_id"] for end in ends] == [prompt]
        assert len(told(events, "waiting", prompt)) == count == len(told(other, "waiting", prompt))
    assert entry["status"]["status_str"] == "success" and f"{steps} steps" in entry["outputs"]["3"]["text"][0]
    assert_same(runs.find_run(server, name), straight, steps)
    assert server.read_log().count(IN_ITS_TREE) == returned + count


@pytest.mark.parametrize("option, setting", [("auto", "off"), ("off", EVERYTHING), ("auto", EVERYTHING)])
def test_the_option_decides_and_then_the_setting(server, straight, dataset, name, option, setting):
    server.post("/settings/Graft.GiveWay", setting)
    try:
        with server.listen() as events:
            graph = runs.graph_of(server, dataset, name, STEPS, give_way=option)
            prompt = queue_training(server, events, graph)
            drawn = server.queue(picture(10))
            gives_way = option == "auto" and setting == EVERYTHING
            assert order(server, prompt, drawn) == ([drawn, prompt] if gives_way else [prompt, drawn])
            assert bool(told(events, "waiting", prompt)) == gives_way
    finally:
        server.post("/settings/Graft.GiveWay", "off")


def test_it_trains_the_least_time_between_two_pauses(server, straight, dataset, name):
    set_least(server, 3600)
    try:
        with server.listen() as events:
            graph = runs.graph_of(server, dataset, name, STEPS, give_way=EVERYTHING)
            prompt = queue_training(server, events, graph)
            drawn = server.queue(picture(20))
            assert order(server, prompt, drawn) == [prompt, drawn]
    finally:
        set_least(server, 0)


def test_short_prompts_overtake_the_trainings_that_wait(server, straight, dataset, name):
    with server.listen() as events:
        first = queue_training(server, events, runs.graph_of(server, dataset, f"{name}1", STEPS, give_way=SHORT))
        second = server.queue(runs.graph_of(server, dataset, f"{name}2", 2))
        for _ in range(2):
            events.wait_for("graft.progress", timeout=60, event="step")
        assert "waiting" not in [event.data.get("event") for event in events.seen], "a training is not short"
        drawn = server.queue(picture(30))
        events.wait_for("graft.progress", timeout=60, event="waiting")
        server.poll(lambda: pending(server) == [first, second], 30, "the order of the queue")
        assert order(server, first, second, drawn) == [drawn, first, second]
    assert_same(runs.find_run(server, f"{name}1"), straight)


def test_two_trainings_do_not_stop_each_other_by_turns(server, straight, dataset, name):
    with server.listen() as events:
        first = queue_training(server, events, runs.graph_of(server, dataset, f"{name}1", STEPS, give_way=EVERYTHING))
        second = server.queue(runs.graph_of(server, dataset, f"{name}2", STEPS, give_way=EVERYTHING))
        assert order(server, first, second) == [second, first]
        assert [len(told(events, "waiting", prompt)) for prompt in (first, second)] == [1, 0]
    for number in (1, 2):
        assert_same(runs.find_run(server, f"{name}{number}"), straight)


@pytest.mark.parametrize("request_body", [lambda prompt: {"delete": [prompt]}, lambda prompt: {"clear": True}])
def test_removed_from_the_queue_it_stays_removed_and_resumable(server, straight, dataset, name, request_body):
    graph = runs.graph_of(server, dataset, name, STEPS, give_way=EVERYTHING)
    with server.listen() as events:
        prompt = queue_training(server, events, graph)
        drawn = server.queue(picture(40, steps=60))
        events.wait_for("graft.progress", timeout=60, event="waiting")
        server.poll(lambda: pending(server) == [prompt], 30, "the training's return to the queue")
        run = runs.find_run(server, name)
        assert server.get(f"/graft/runs/{run.name}")["status"] == "waiting"
        # Neither resumed twice nor deleted meanwhile.
        for wish in ("resume", "delete"):
            with pytest.raises(urllib.error.HTTPError) as caught:
                server.post(f"/graft/runs/{run.name}/{wish}", {})
            assert caught.value.code == 409
        server.post("/queue", request_body(prompt))
        server.wait(drawn)
        server.poll(server.is_idle, 30, "the queue")
    assert server.get(f"/graft/runs/{run.name}")["status"] == "paused"
    answer = server.post(f"/graft/runs/{run.name}/resume", {})
    assert answer["prompt"] == graph
    server.run(answer["prompt"])
    assert_same(run, straight)


def test_cancelled_while_it_saves_it_does_not_return(server, straight, dataset, name):
    for attempt in range(5):
        graph = runs.graph_of(server, dataset, f"{name}{attempt}", STEPS, give_way=EVERYTHING)
        with server.listen() as events:
            prompt = queue_training(server, events, graph)
            drawn = server.queue(picture(50 + attempt, steps=30))
            # The first message is late for most cancels; the other attempt cancels before or while it saves.
            events.wait_for("graft.progress", timeout=60, event="step" if attempt % 2 else "waiting")
            # Without effect if the prompt is back in the queue already.
            server.post("/interrupt", {"prompt_id": prompt})
            server.wait(drawn)
            try:
                server.wait(prompt)
            except PromptInterrupted:
                break
    with pytest.raises(PromptInterrupted):
        server.wait(prompt)
    assert server.is_idle()


def test_the_switch_changes_a_running_training_also_after_its_return(server, straight, dataset, name):
    with server.listen() as events, server.listen() as other:
        prompt = queue_training(server, events, runs.graph_of(server, dataset, name, STEPS))
        for body in ({"to": "nobody"}, {}):
            with pytest.raises(urllib.error.HTTPError) as caught:
                server.post("/graft/nodes/3/give_way", body)
            assert caught.value.code == 400
        assert server.post("/graft/nodes/3/give_way", {"to": SHORT})["to"] == SHORT
        for number in range(2):
            server.run(picture(60 + number))
        for client in (events, other):
            assert [data["to"] for data in told(client, "give way", prompt)] == [SHORT]
            assert len(told(client, "waiting", prompt)) == 2
        server.wait(prompt)
    with pytest.raises(urllib.error.HTTPError) as caught:
        server.post("/graft/nodes/3/give_way", {"to": SHORT})
    assert caught.value.code == 409


def test_the_queue_is_listed_with_its_trainings(server, straight, dataset, name):
    with server.listen() as events:
        first = queue_training(server, events, runs.graph_of(server, dataset, f"{name}1", 3000, give_way=SHORT))
        second = server.queue(runs.graph_of(server, dataset, f"{name}2", 7))
        drawn = server.queue(picture(70, steps=60))
        server.poll(lambda: pending(server) == [first, second], 30, "the order of the queue")
        listed = server.get("/graft/queue")["prompts"]
        assert [(row["prompt_id"], row["running"]) for row in listed] == [
            (drawn, True),
            (first, False),
            (second, False),
        ]
        (mine,), (theirs,) = listed[1]["trainings"], listed[2]["trainings"]
        assert listed[0]["trainings"] == [] and mine["run"] == runs.find_run(server, f"{name}1").name
        assert mine["gave_way"] and 0 < mine["step"] < mine["steps"] == 3000 and mine["seconds_left"] > 0
        expected = {"run": None, "name": f"{name}2", "step": 0, "steps": 7, "seconds_left": None, "gave_way": False}
        assert theirs == {"node": "3", **expected}


def test_queued_trainings_are_reordered_and_removed(server, straight, dataset, name):
    with server.listen() as events:
        running = queue_training(server, events, runs.graph_of(server, dataset, f"{name}0", 3000))
        first, second, third = (
            server.queue(runs.graph_of(server, dataset, f"{name}{number}", STEPS)) for number in (1, 2, 3)
        )
        server.post("/graft/queue/move", {"prompt_id": third, "before": first})
        assert pending(server) == [third, first, second]
        server.post("/graft/queue/move", {"prompt_id": first, "before": None})
        server.post("/graft/queue/remove", {"prompt_id": second})
        assert pending(server) == [third, first]
        for route, body in [
            ("move", {"prompt_id": running, "before": first}),
            ("move", {"prompt_id": first, "before": second}),
            ("remove", {"prompt_id": running}),
            ("remove", {"prompt_id": 3}),
            ("move", {"prompt_id": first, "before": 3}),
        ]:
            with pytest.raises(urllib.error.HTTPError) as caught:
                server.post(f"/graft/queue/{route}", body)
            assert caught.value.code == (400 if 3 in body.values() else 409)
        server.interrupt()
        assert order(server, first, third) == [third, first]
    assert runs.list_runs(server, f"{name}2") == []
    assert_same(runs.find_run(server, f"{name}1"), straight)


def test_outside_its_hours_a_training_waits_and_returns_to_the_same_bits(server, straight, dataset, name):
    """The hour is the next one on the server's clock, so it is at least a minute away."""
    with server.listen() as events:
        prompt = queue_training(server, events, runs.graph_of(server, dataset, name, STEPS))
        clock = server.get("/graft/queue")["clock"]
        later = f"{(int(clock[:2]) + 2) % 24:02d}:00"
        hours = server.post("/graft/queue/schedule", {"prompt_id": prompt, "not_before": later})
        assert (hours["not_before"], hours["starts"], hours["pause"]) == (later, later, ["", ""])
        waiting = events.wait_for("graft.progress", timeout=60, event="waiting").data
        assert waiting["starts"] == later
        server.poll(lambda: pending(server) == [prompt], 30, "the training's return to the queue")
        drawn = server.queue(picture(90))
        server.wait(drawn)
        (row,) = server.get("/graft/queue")["prompts"]
        assert not row["running"] and row["starts"] == later
        assert server.get(f"/graft/runs/{runs.find_run(server, name).name}")["status"] == "waiting"
        pauses = [{"pause": value} for value in (["08:00"], ["08:00", ""], ["", "18:00"], 3)]
        for body in ({"not_before": "25:00"}, {"not_before": 3}, {"prompt_id": 1}, *pauses):
            with pytest.raises(urllib.error.HTTPError) as caught:
                server.post("/graft/queue/schedule", {"prompt_id": prompt, **body})
            assert caught.value.code == 400
        server.post("/graft/queue/schedule", {"prompt_id": prompt})
        server.wait(prompt)
        with pytest.raises(urllib.error.HTTPError) as caught:
            server.post("/graft/queue/schedule", {"prompt_id": prompt})
        assert caught.value.code == 409
    assert_same(runs.find_run(server, name), straight)


def test_a_changed_folder_fails_at_the_return_instead_of_starting_over(server, dataset, name):
    folder = server.path("input", name)
    shutil.copytree(world.CONCEPT_FOLDER / "toy", folder)
    with server.listen() as events:
        prompt = queue_training(server, events, runs.graph_of(server, name, name, STEPS, give_way=EVERYTHING))
        drawn = server.queue(picture(80, steps=60))
        events.wait_for("graft.progress", timeout=60, event="waiting")
        server.poll(lambda: pending(server) == [prompt], 30, "the training's return to the queue")
        (run,) = runs.list_runs(server, name)
        assert server.get(f"/graft/dataset?folder={name}")["training"]
        first = sorted(folder.glob("*.png"))[0]
        first.with_suffix(".txt").write_text("another caption", encoding="utf-8")
        server.wait(drawn)
        with pytest.raises(PromptError, match=f"gave way in run {run.name}"):
            server.wait(prompt)
    assert not server.get(f"/graft/dataset?folder={name}")["training"]


def test_a_resumed_run_brings_its_own_workflow(server, dataset, name):
    graph, workflow = runs.graph_of(server, dataset, name, 1), {"id": name}
    server.wait(server.submit(graph, {"extra_pnginfo": {"workflow": workflow}})["prompt_id"])
    answer = server.post(f"/graft/runs/{runs.find_run(server, name).name}/resume", {})
    assert (answer["prompt"], answer["workflow"]) == (graph, workflow)


@pytest.mark.soak
def test_killed_at_any_moment_of_giving_way_nothing_is_lost(make_server, trials):
    """After kill -9 the run can be resumed without its page, and ends with the bits of an uninterrupted run."""
    server = make_server()
    dataset = add_pictures(server)
    moments = random.Random(1)
    with server:
        set_least(server, 0)
        server.run(runs.graph_of(server, dataset, "straightway", STEPS))
        straight = runs.find_run(server, "straightway")
        for number in range(trials(2, 20)):
            graph = runs.graph_of(server, dataset, f"kill{number}", STEPS, give_way=EVERYTHING, save_every=5)
            with server.listen() as events:
                queue_training(server, events, graph)
                for place in range(moments.randint(1, 3)):
                    server.queue(picture(100 * number + place, steps=moments.randint(1, 20)))
                    time.sleep(moments.uniform(0, 1.0))
                server.kill()
            assert runs.list_unreadable(server.path("output")) == []
            server.start()
            run = runs.find_run(server, f"kill{number}")
            status = server.get(f"/graft/runs/{run.name}")["status"]
            assert status in ("paused", "unfinished", "finished")
            prompt = server.post(f"/graft/runs/{run.name}/resume", {})["prompt"]
            assert prompt == graph
            server.run(prompt)
            assert_same(run, straight)
            print(f"kill {number}: {status}, then the same bits")
