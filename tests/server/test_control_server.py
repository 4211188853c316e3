"""Tests of stop and keep, save now, and pause, sent to the real server while it trains."""

import http.client
import json
import shutil
import time
import urllib.error
import urllib.request

import pytest

from tests.support import graphs, runs
from tests.support.server import PromptInterrupted
from tests.toy import world

LONG = 2000
SHORT = 12


@pytest.fixture(scope="module")
def dataset(server):
    """Return the name of a folder of pictures below input/ that the tests here share."""
    folder = server.path("input", "control")
    shutil.copytree(world.CONCEPT_FOLDER / "toy", folder)
    return folder.name


@pytest.fixture
def name(request):
    """Return the test's own name, for its run."""
    return "".join(letter for letter in request.node.name if letter.isalnum())


@pytest.fixture(scope="module")
def straight(server, tiny_base, dataset):
    """Return straight(step): the adapter after so many steps of an uninterrupted run."""
    entry = server.run(runs.graph_of(server, dataset, "straight", SHORT, save_every=1, keep_last=SHORT))
    assert f"{SHORT} steps trained;" in entry["outputs"]["3"]["text"][0]
    run = runs.find_run(server, "straight")
    return lambda step: runs.adapter_of(server, run, step)


def ask(server, run, wish):
    return server.post(f"/graft/runs/{run}/{wish}", {})


class Asked:
    """A queued graph, and the effect of a command sent to its training after a step."""

    def __init__(self, server, graph, wish, step, interrupted=False):
        with server.listen() as events:
            self.prompt = server.queue(graph, client_id=events.client_id)
            opened = events.wait_for("graft.progress", timeout=120, event="run").data
            self.name = opened["name"]
            self.run = server.path("output", "graft", self.name)
            while events.wait_for("graft.progress", timeout=120, event="step").data["step"] < opened["step"] + step:
                pass
            self.asked_at = time.monotonic()
            self.answer = ask(server, self.name, wish)
            if interrupted:
                with pytest.raises(PromptInterrupted):
                    server.wait(self.prompt)
            else:
                self.entry = server.wait(self.prompt)
            self.took = time.monotonic() - self.asked_at
            self.after = {event.data["event"]: event.data for event in read_all(events)}


def read_all(events):
    """Return the training's messages so far, including those on their way."""
    try:
        while True:
            events.next(timeout=0.5)
    except TimeoutError:
        return [event for event in events.seen if event.type == "graft.progress"]


def test_stop_keeps_what_was_reached_and_the_graph_goes_on(server, straight, dataset, name):
    graph = runs.graph_of(server, dataset, name, LONG)
    picture = graphs.sampling(graph, "a large sks toy", ["3", 0], ["3", 1], "stopped", steps=2)
    asked = Asked(server, graph, "stop", 3)
    assert (asked.answer["asked"], asked.answer["node"], asked.answer["prompt_id"]) == ("stop", "3", asked.prompt)
    step = asked.after["stopped"]["step"]
    # In the step of the command, or in the next one if that had already begun.
    assert asked.answer["step"] <= step <= asked.answer["step"] + 1
    done = asked.after["done"]
    assert (done["step"], done["steps"], done["cached"]) == (step, LONG, False)
    assert f"{step} steps trained, stopped before {LONG}" in asked.entry["outputs"]["3"]["text"][0]
    assert len(server.download(asked.entry, picture)) == 1
    assert runs.same(runs.adapter_of(server, asked.run, step), straight(step))


def test_a_stopped_run_is_returned_until_it_is_told_to_go_on(server, straight, dataset, name):
    graph = runs.graph_of(server, dataset, name, SHORT)
    asked = Asked(server, graph, "stop", 2)
    run, step = asked.run, asked.after["stopped"]["step"]
    assert step < SHORT
    # The host's own cache answers.
    entry = server.run(graph)
    assert "3" in dict(entry["status"]["messages"])["execution_cached"]["nodes"]
    # A changed input that does not affect the result: the trainer executes and returns the kept result.
    entry = server.run(runs.graph_of(server, dataset, name, SHORT, save_every=400))
    assert f"{step} steps returned without training, stopped before {SHORT}" in entry["outputs"]["3"]["text"][0]
    entry = server.run(graph)
    assert server.get(f"/graft/runs/{run.name}")["status"] == "stopped"
    # After a resume command, the same graph trains on despite the host's cache.
    assert server.post(f"/graft/runs/{run.name}/resume", {})["prompt"] == graph
    assert server.get(f"/graft/runs/{run.name}")["status"] == "unfinished"
    entry = server.run(graph)
    assert f"{SHORT} steps trained;" in entry["outputs"]["3"]["text"][0]
    assert runs.steps_logged(run) == list(range(1, SHORT + 1))
    assert runs.same(runs.adapter_of(server, run, SHORT), straight(SHORT))
    assert server.get(f"/graft/runs/{run.name}")["status"] == "finished"


def test_other_steps_go_on_with_a_stopped_run(server, straight, dataset, name):
    asked = Asked(server, runs.graph_of(server, dataset, name, LONG), "stop", 2)
    step = asked.after["stopped"]["step"] + 2
    entry = server.run(runs.graph_of(server, dataset, name, step))
    assert f"{step} steps trained;" in entry["outputs"]["3"]["text"][0]
    assert runs.same(runs.adapter_of(server, asked.run, step), straight(step))


def test_save_now_writes_and_goes_on(server, straight, dataset, name):
    asked = Asked(server, runs.graph_of(server, dataset, name, SHORT, keep_last=3), "save", 3)
    first, last = sorted(path.name for path in (asked.run / "adapters").iterdir())
    step = int(first[len("step-") : -len(".safetensors")])
    assert asked.answer["step"] <= step <= asked.answer["step"] + 1
    assert runs.same(runs.adapter_of(server, asked.run, step), straight(step))
    assert runs.same(runs.adapter_of(server, asked.run, SHORT), straight(SHORT))


def test_pause_lets_others_run_and_goes_on_to_the_same_bits(server, straight, dataset, name):
    graph = runs.graph_of(server, dataset, name, SHORT)
    asked = Asked(server, graph, "pause", 3, interrupted=True)
    other = {"1": graphs.node("CheckpointLoaderSimple", ckpt_name=graphs.CHECKPOINT)}
    picture = graphs.sampling(other, "a large red circle", ["1", 0], ["1", 1], "other", steps=2)
    assert len(server.download(server.run(other), picture)) == 1
    paused = asked.after["paused"]
    assert paused["run"] == asked.name and asked.answer["step"] <= paused["step"] <= asked.answer["step"] + 1
    assert "cannot save the progress" not in server.read_log()
    shown = server.get(f"/graft/runs/{asked.name}")
    assert (shown["status"], shown["step"], shown["steps"]) == ("paused", paused["step"], SHORT)
    answer = server.post(f"/graft/runs/{asked.name}/resume", {})
    assert answer["prompt"] == graph and answer["prompt_id"] == asked.prompt
    server.run(answer["prompt"])
    assert runs.steps_logged(asked.run) == list(range(1, SHORT + 1))
    assert runs.same(runs.adapter_of(server, asked.run, SHORT), straight(SHORT))


@pytest.mark.parametrize("on_existing", ["start over", "new"])
def test_a_paused_run_goes_on_whatever_is_done_with_finished_ones(server, straight, dataset, name, on_existing):
    graph = runs.graph_of(server, dataset, name, LONG, on_existing=on_existing)
    paused = Asked(server, graph, "pause", 2, interrupted=True)
    again = Asked(server, graph, "stop", 1)
    assert again.name == paused.name
    assert again.after["run"]["step"] == paused.after["paused"]["step"]
    step = again.after["stopped"]["step"]
    assert runs.same(runs.adapter_of(server, again.run, step), straight(step))


@pytest.mark.parametrize("wish", ["pause", "stop"])
def test_asked_while_caching(server, straight, dataset, name, wish):
    """A pause ends the prompt. So does a stop, because there is no training to keep. Encoded pictures stay cached."""
    folder = server.path("input", name)
    folder.mkdir()
    for path in sorted((world.CONCEPT_FOLDER / "toy").glob("0[0-3].*")):
        shutil.copy(path, folder)
    for path in folder.glob("*.txt"):
        path.write_text(f"{path.read_text()} {name}")
    graph = runs.graph_of(server, name, name, 1)
    with server.listen() as events:
        queued = server.queue(graph, client_id=events.client_id)
        events.wait_for("graft.progress", timeout=120, event="cache")
        # Sent by node id, which a page knows before there is a run.
        server.post(f"/graft/nodes/3/{wish}", {})
        with pytest.raises(PromptInterrupted):
            server.wait(queued)
        ended = events.wait_for("graft.progress", event="paused" if wish == "pause" else "cancelled").data
    assert ended["step"] == 0
    assert not list(server.path("output", "graft").glob(f"{name}-*/adapters/*"))
    assert "1 steps trained;" in server.run(graph)["outputs"]["3"]["text"][0]


def test_stop_does_not_wait_for_a_preview(server, straight, dataset, name):
    previews = {"prompts": "a large red circle\na small blue square", "every": 2, "steps": 12}
    graph = runs.graph_of(server, dataset, name, LONG, previews)
    began = time.monotonic()
    asked = Asked(server, graph, "stop", 2)
    drawn = asked.asked_at - began
    stopped = asked.after["stopped"]["step"]
    # The page does not receive every quick step: the command goes out at the second step, or at the next received one.
    assert 2 <= stopped <= 4
    # `drawn` is the time of the pictures before the first step, with no other slow work in it.
    assert asked.took < 0.5 * drawn, (asked.took, drawn)
    drawn_before = [f"step-{step:08}-{number}.png" for step in range(0, stopped, 2) for number in (1, 2)]
    assert [path.name for path in sorted(asked.run.glob("samples/*"))] == drawn_before


def refusal(server, path, body=b"{}", method="POST", **headers):
    """Return (status, message) of a refused request."""
    request = urllib.request.Request(server.url + path, body if method == "POST" else None, headers, method=method)
    with pytest.raises(urllib.error.HTTPError) as caught:
        urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=30)
    text = caught.value.read()
    try:
        return caught.value.code, json.loads(text)["error"]
    except ValueError:
        return caught.value.code, text.decode(errors="replace")


JSON = {"Content-Type": "application/json"}


@pytest.fixture(scope="module")
def finished(server, tiny_base, dataset):
    """Return the name of a finished run."""
    server.run(runs.graph_of(server, dataset, "finished", 3))
    return runs.find_run(server, "finished").name


def told(server, graph):
    """Queue a graph and return the last messages of its trainer: {event: message}, in order."""
    workflow = f"workflow-{time.monotonic_ns()}"
    queued = server.queue(graph, {"extra_pnginfo": {"workflow": {"id": workflow}}})
    server.poll(lambda: server.get(f"/history/{queued}"), 120, "the prompt")
    messages = [one for one in server.get("/graft/runs")["told"] if one["workflow"] == workflow]
    assert {(one["node"], one["prompt_id"]) for one in messages} == {("3", queued)}
    return {one["event"]: one for one in messages}


def test_a_page_that_comes_later_is_told_what_happened(server, tiny_base, dataset, name):
    previews = {"prompts": "a large red circle", "every": 2, "steps": 1}
    messages = told(server, runs.graph_of(server, dataset, name, 2, previews, save_every=1))
    told_besides = {"cache", "warnings", "phase"}
    assert [name for name in messages if name not in told_besides] == [
        "begin",
        "run",
        "step",
        "sample",
        "saved",
        "done",
    ]
    assert messages["phase"]["name"] == "training"
    (sample,) = messages["sample"]["samples"]
    assert sample == {
        "filename": "step-00000002-1.png",
        "subfolder": f"graft/{messages['run']['name']}/samples",
        "type": "output",
    }
    assert server.view(**sample)
    # Returned unchanged: of the earlier messages only the run is sent, and the page reads the rest from it.
    again = told(server, runs.graph_of(server, dataset, name, 2, previews, save_every=2))
    assert list(again) == ["begin", "run", "done"] and again["done"]["cached"]


def test_an_error_is_told_with_its_cure(server, tiny_base, dataset, name):
    graph = runs.graph_of(server, dataset, name, 2)
    defaults = graphs.defaults_of(server.object_info("GraftObjectiveOptions")["GraftObjectiveOptions"])
    graph["9"] = graphs.options("GraftObjectiveOptions", defaults, "50", min_timestep=900, max_timestep=100)
    graph["3"]["inputs"]["options"] = ["9", 0]
    failed = told(server, graph)["failed"]
    assert failed["message"] == "min_timestep 900 is not below max_timestep 100." and failed["input"] == "min_timestep"
    assert failed["cure"] and (failed["step"], failed["saved"]) == (0, 0)


def test_only_this_servers_pages_and_programs_may_ask(server, finished):
    path = f"/graft/runs/{finished}/stop"
    for headers, status in [
        ({"Content-Type": "text/plain"}, 415),
        ({"Content-Type": "application/x-www-form-urlencoded"}, 415),
        ({**JSON, "Origin": "http://evil.example"}, 403),
        ({**JSON, "Origin": "null"}, 403),
        ({**JSON, "Host": "evil.example:8188", "Origin": "http://evil.example:8188"}, 403),
        ({**JSON, "Host": "evil.example", "Origin": "http://evil.example", "Sec-Fetch-Site": "same-origin"}, 403),
        ({**JSON, "Sec-Fetch-Site": "cross-site"}, 403),
        ({**JSON, "Sec-Fetch-Site": "same-site", "Origin": server.url}, 403),
        ({**JSON, "Sec-Fetch-Site": "none"}, 403),
        # An allowed request learns that the run is over.
        (JSON, 409),
        ({**JSON, "Origin": server.url}, 409),
        ({**JSON, "Sec-Fetch-Site": "same-origin", "Origin": server.url}, 409),
    ]:
        assert refusal(server, path, **headers)[0] == status, headers
    for body in (b"[]", b"{", b"\xff", b"1", b"[" * 4000):
        assert refusal(server, path, body, **JSON)[0] == 400, body
    assert refusal(server, path, b"{" + b" " * 17000 + b"}", **JSON)[0] == 413
    assert refusal(server, path, method="GET")[0] in (404, 405)


def post_in_parts(server, path, parts, chunked):
    """POST a body whose parts arrive some time apart, with its length in the headers or not; return the status."""
    connection = http.client.HTTPConnection(server.url.removeprefix("http://"), timeout=30)
    connection.putrequest("POST", path)
    connection.putheader("Content-Type", "application/json")
    length = ("Transfer-Encoding", "chunked") if chunked else ("Content-Length", str(sum(map(len, parts))))
    connection.putheader(*length)
    connection.endheaders()
    for part in parts:
        connection.send(b"%x\r\n%s\r\n" % (len(part), part) if chunked else part)
        time.sleep(0.05)
    if chunked:
        connection.send(b"0\r\n\r\n")
    with connection.getresponse() as answer:
        return answer.status, answer.read()


@pytest.mark.parametrize("chunked", [False, True])
def test_a_body_that_arrives_in_parts_is_read_whole(server, finished, chunked):
    note = "n" * 1500
    body = json.dumps({"note": note}).encode()
    path = f"/graft/runs/{finished}/describe"
    status, answer = post_in_parts(server, path, [body[:700], body[700:1400], body[1400:]], chunked)
    assert status == 200 and json.loads(answer)["note"] == note
    assert post_in_parts(server, path, [b"{" + b" " * 9000, b" " * 9000 + b"}"], chunked)[0] == 413


@pytest.mark.parametrize(
    "name",
    [
        "..",
        "%2e%2e",
        "..%2f..%2fsecret-12345678",
        "..%5c..%5csecret-12345678",
        "cache",
        "class_images",
        "nosuch-12345678",
        "linked-12345678",
        "con.txt-12345678",
        "C:-12345678",
        "toy-12345678.",
        "toy-12345678%00",
        "toy-12345678::$DATA",
        "<img src=x>-12345678".replace(" ", "%20"),
        "a" * 300 + "-12345678",
    ],
)
def test_nothing_but_runs_is_reached(server, name):
    outside = server.path("output", "secret-12345678")
    outside.mkdir(parents=True, exist_ok=True)
    (outside / "recipe.json").write_text('{"recipe": {"steps": 1}}')
    runs = server.path("output", "graft")
    runs.mkdir(parents=True, exist_ok=True)
    link = runs / "linked-12345678"
    if not link.is_symlink():
        link.symlink_to(outside)
    status, message = refusal(server, f"/graft/runs/{name}", method="GET")
    assert status == 404 and "recipe" not in message, message
    assert refusal(server, f"/graft/runs/{name}/workflow", method="GET")[0] == 404
    for wish in ("stop", "resume", "delete"):
        # A path that leads elsewhere may match no POST route at all.
        assert refusal(server, f"/graft/runs/{name}/{wish}", **JSON)[0] in (404, 405)
    assert (outside / "recipe.json").exists() and link.is_symlink()
    assert "linked-12345678" not in [run["name"] for run in server.get("/graft/runs")["runs"]]


def test_what_is_shown_of_a_run(server, finished):
    name = finished
    listed = [run for run in server.get("/graft/runs")["runs"] if run["name"] == name]
    assert [(run["step"], run["steps"], run["status"]) for run in listed] == [(3, 3, "finished")]
    shown = server.get(f"/graft/runs/{name}?events=2")
    assert shown["recipe"]["recipe"]["steps"] == 3 and shown["running"] is None
    assert [event["step"] for event in shown["events"]] == [2, 3]
    # A log with foreign text, and a number that JSON does not have.
    log = server.path("output", "graft", name, "metrics.jsonl")
    whole = log.read_text()
    with open(log, "a") as file:
        file.write('{"event": "step", "step": 4, "loss": NaN}\n[1]\nno json\n{"event": "<b>"}\n{"step"')
    events = server.get(f"/graft/runs/{name}?events=5000")["events"]
    assert [event.get("step") for event in events] == [1, 2, 3, 4, None]
    assert events[3]["loss"] is None and events[4] == {"event": "<b>"}
    assert refusal(server, f"/graft/runs/{name}?events=-1", method="GET")[0] == 400
    answer = urllib.request.build_opener(urllib.request.ProxyHandler({})).open(server.url + f"/graft/runs/{name}")
    assert answer.headers["Content-Type"].startswith("application/json")
    assert answer.headers["X-Content-Type-Options"] == "nosniff"
    assert b"NaN" not in answer.read()
    # Other tests read this server's whole output.
    log.write_text(whole)
    (server.path("output", "graft", name) / "recipe.json").write_text("[]")
    assert name not in [run["name"] for run in server.get("/graft/runs")["runs"]]
