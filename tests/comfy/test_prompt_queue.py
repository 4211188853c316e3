"""Tests of the return of a training's prompt, with ComfyUI's own queue."""

from types import SimpleNamespace

import pytest

SHORT = {"1": {"class_type": "EmptyLatentImage", "inputs": {}}}
TRAINING = {"3": {"class_type": "GraftTrainLoRA", "inputs": {}}}
INTERRUPTED = [("execution_start", {}), ("execution_interrupted", {})]


class Queue:
    """A real queue without its server, and the trainings that give way in it."""

    def __init__(self, monkeypatch):
        from execution import PromptQueue
        from graft_pack.nodes.host.server import prompt_queue

        self.status = PromptQueue.ExecutionStatus
        self.module = prompt_queue
        self.queue = PromptQueue(SimpleNamespace(queue_updated=lambda: None, client_id=None))
        self.returning = prompt_queue.ReturningPrompts()
        server = SimpleNamespace(prompt_queue=self.queue)
        monkeypatch.setattr(prompt_queue, "prompt_server", lambda: server)

    def put(self, number, prompt, nodes=SHORT):
        """Queue a prompt."""
        self.queue.put((number, prompt, nodes, {}, [], {}))

    def give_way(self, way="to short prompts", messages=INTERRUPTED, queued=()):
        """Start the first prompt; its training gives way to the queued ones and ends with the messages."""
        item, item_id = self.queue.get()
        for number, prompt in queued:
            self.put(number, prompt)
        self.returning.leave(self.module.Returning(item[1], "3", way, "run", 5, 10, 1.0))
        self.queue.task_done(item_id, {}, self.status("error", False, messages), process_item=lambda item: item[:5])

    def drain(self):
        """Return the ids of the waiting prompts in the order in which ComfyUI takes them."""
        return [self.queue.get()[0][1] for _ in range(len(self.queue.queue))]


@pytest.fixture
def queue(comfy, monkeypatch):
    return Queue(monkeypatch)


@pytest.mark.parametrize("number", [4, -3.0, 1e18, 1e308, float("inf"), -float("inf"), float("nan")])
def test_a_prompt_returns_behind_those_of_any_number(queue, number):
    queue.put(0, "a training", TRAINING)
    queue.give_way(queued=[(number, "z"), (number, "y"), (number, "x")])
    assert queue.drain()[-1] == "a training" and not queue.queue.history


def test_after_an_unexpected_error_it_keeps_its_number(queue, monkeypatch, caplog):
    queue.put(0, "a training", TRAINING)
    monkeypatch.setattr(queue.returning, "goes_first", lambda *given: 1 // 0)
    queue.give_way(queued=[(1, "x")])
    assert queue.drain() == ["a training", "x"] and "ZeroDivisionError" in caplog.text


def test_others_keep_their_order_and_later_ones_come_last(queue):
    queue.put(0, "first", TRAINING)
    queue.put(1, "second", TRAINING)
    queue.put(2, "third", TRAINING)
    queue.give_way(queued=[(3, "x")])
    queue.put(4, "later", TRAINING)
    assert queue.drain() == ["x", "first", "second", "third", "later"]


ORDERS = [("c", "a", "cab"), ("c", "b", "acb"), ("a", "c", "bac"), ("a", None, "bca"), ("c", None, "abc")]


@pytest.mark.parametrize("numbers", [(0, 1, 2), (0, 0, 0), (-2, 5, 1e308), (3, float("inf"), float("inf"))])
@pytest.mark.parametrize("prompt, before, order", ORDERS)
def test_a_prompt_moves_and_later_ones_come_last(queue, numbers, prompt, before, order):
    for number, name in zip(numbers, "abc", strict=True):
        queue.put(number, name)
    assert queue.module.move_prompt(prompt, before)
    if max(numbers) < 1e300:
        queue.put(6, "later")
        order = (*order, "later")
    assert queue.drain() == list(order)


def test_a_prompt_that_does_not_wait_cannot_be_moved(queue):
    queue.put(0, "a")
    for prompt, before in (("b", None), ("b", "a"), ("a", "b"), ("a", "a")):
        assert not queue.module.move_prompt(prompt, before)
    assert queue.drain() == ["a"]


def test_removed_while_it_ends_to_give_way_it_does_not_return(queue):
    queue.put(0, "a training", TRAINING)
    remove = queue.returning.remove
    _, item_id = queue.queue.get()
    queue.put(1, "x")
    queue.returning.leave(queue.module.Returning("a training", "3", "to everything", "run", 5, 10, 1.0))
    assert remove("a training")
    queue.queue.task_done(item_id, {}, queue.status("error", False, INTERRUPTED), process_item=lambda item: item[:5])
    assert not remove("a training") and remove("x") and not remove("x")
    assert queue.drain() == [] and list(queue.queue.history) == ["a training"]


@pytest.mark.parametrize("messages", [[("execution_start", {}), ("execution_error", {})], []])
def test_a_prompt_that_ended_otherwise_does_not_return(queue, messages):
    queue.put(0, "a training", TRAINING)
    queue.give_way(messages=messages, queued=[(1, "x")])
    assert queue.drain() == ["x"] and list(queue.queue.history) == ["a training"]


def test_a_run_that_returned_is_known_until_its_training_ends(queue):
    queue.put(0, "a training", TRAINING)
    queue.give_way()
    assert queue.returning.of_run("run") and not queue.returning.of_run("other")
    queue.queue.get()
    assert queue.returning.of_run("run")
    queue.returning.end(queue.returning.find("a training"))
    assert queue.returning.of_run("run") is None
