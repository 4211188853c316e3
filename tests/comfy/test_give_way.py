"""Tests of a training that gives way or is paused: when it does, and what its run says afterwards."""

import pytest
from graft_pack.trainers.errors import RunError
from graft_pack.trainers.runs.run import PAUSED, STOPPED, Run

STEPS = 5


@pytest.fixture
def control(comfy, monkeypatch):
    from graft_pack.nodes.host.server import control

    monkeypatch.setattr(control, "must_give_way", lambda way: way != "off")
    monkeypatch.setattr(control.settings, "give_way_after", lambda: 0.0)
    return control


@pytest.fixture
def left(control, monkeypatch):
    """Return the list of the trainings whose prompts return."""
    trainings = []
    monkeypatch.setattr(control.RETURNING, "leave", trainings.append)
    return trainings


@pytest.fixture
def run(tmp_path):
    return Run(*(str(tmp_path / name) for name in ("run", "loras", "embeddings")))


def step(training, run, number, saved=0):
    """Record a training's steps up to a number."""
    training.opened(run, 0, STEPS)
    training.note_step(number, 0.1)
    training.saved = saved


@pytest.fixture
def interruption(comfy):
    from comfy.model_management import InterruptProcessingException

    return InterruptProcessingException


def test_it_gives_way_after_the_sample_pictures_of_a_step(control, run, interruption):
    training = control.Training("3", "", give_way="to everything")
    assert training.next_command() is None, "no step is done"
    step(training, run, 2)
    # Sampling checks for the interruption too, and an early stop asks for no command.
    training.check_interrupt()
    assert training.end is None
    with pytest.raises(interruption):
        training.next_command()
    assert training.gives_way
    last = control.Training("3", "", give_way="to everything")
    step(last, run, STEPS)
    assert last.next_command() is None


@pytest.mark.parametrize("halt", [STOPPED, PAUSED])
def test_a_pause_keeps_the_note_of_an_early_stop(control, run, interruption, halt):
    def work(training):
        step(training, run, 2, saved=2)
        if halt == STOPPED:
            with run.held():
                run.note_halt(STOPPED, 2, STEPS)
        training.submit(control.UserCommand.PAUSE)
        training.check_interrupt()

    with pytest.raises(interruption):
        control.run_controlled("3", "off", work)
    assert run.halt().how == halt


@pytest.mark.parametrize("saved", [1, 2])
def test_it_gives_way_only_if_its_step_is_saved(control, run, interruption, left, saved):
    def work(training):
        step(training, run, 2, saved)
        training.next_command()

    with pytest.raises(interruption if saved == 2 else RunError) as caught:
        control.run_controlled("3", "to everything", work)
    assert len(left) == saved - 1
    assert saved == 2 or "step 2" in caught.value.message and "step 1" in caught.value.cure


def test_a_command_while_it_saves_for_others_comes_too_late(control, run, interruption):
    training = control.Training("3", "", give_way="to everything")
    step(training, run, 2)
    with pytest.raises(interruption):
        training.next_command()
    assert not training.submit(control.UserCommand.STOP) and training.gives_way
    # The user may still keep it from returning.
    assert training.submit(control.UserCommand.PAUSE) and not training.gives_way


def test_it_does_not_continue_in_another_run(control, run):
    from graft_pack.nodes.host.server.prompt_queue import Returning

    for name in ("", "run", "earlier"):
        training = control.Training("3", "p", returning=Returning("p", "3", "off", name, 2, STEPS, None))
        if name != "earlier":
            training.opened(run, 2, STEPS)
    with pytest.raises(RunError, match="run earlier.*now run"):
        training.opened(run, 0, STEPS)


def test_outside_its_hours_it_pauses_at_once_whatever_waits(control, run, interruption, monkeypatch):
    monkeypatch.setattr(control.settings, "give_way_after", lambda: 3600.0)
    for is_held in (False, True):
        monkeypatch.setattr(control.RETURNING, "is_held", lambda prompt, held=is_held: held and prompt == "p")
        training = control.Training("3", "p")
        step(training, run, 2)
        if not is_held:
            assert training.next_command() is None
    with pytest.raises(interruption):
        training.next_command()
    assert training.gives_way
