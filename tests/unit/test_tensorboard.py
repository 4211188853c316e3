"""Tests of TensorBoard's event files beside the log: read by TensorBoard itself, also after an interruption."""

import sys

import numpy as np
import pytest
from graft_pack.trainers.errors import RunError, SettingsError
from graft_pack.trainers.runs import tensorboard
from graft_pack.trainers.runs.records import read_events

from tests.support.diffusers_host import make_host, run_session, same_tensors

FIELDS = {
    "steps": 4,
    "save_every": 2,
    "validation_fraction": 0.2,
    "validate_every": 2,
    "preview_prompts": ("a red picture",),
    "preview_every": 4,
    "preview_steps": 1,
}


class Cut(BaseException):
    """The sudden end of a process."""


def cut_at(step):
    def report(event, payload):
        if event == "step" and payload["step"] == step:
            raise Cut

    return report


def read_back(run):
    """Return TensorBoard's own view of a run's folder."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    return EventAccumulator(f"{run.folder}/tensorboard").Reload()


def test_they_hold_what_the_log_holds_of_each_step_once(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        # Killed: step 3 was reported, and is done again.
        patch.setattr("graft_pack.trainers.engine.checkpointer.Checkpointer.save_after_error", lambda *given: None)
        with pytest.raises(Cut):
            run_session(tmp_path, cut_at(3), tensorboard="on", **FIELDS)
    result = run_session(tmp_path, tensorboard="on", **FIELDS)
    assert result.resumed_from == 2
    shown = read_back(result.run)
    names = {"loss/training": "loss", "training/learning rate": "lr", "training/gradient norm": "grad_norm"}
    log = [event for event in read_events(result.run, 100) if event["event"] == "step"]
    for tag, name in names.items():
        found = [(one.step, one.value) for one in shown.Scalars(tag)]
        assert found == [(event["step"], pytest.approx(event[name], rel=1e-6)) for event in log], tag
    assert [one.step for one in shown.Scalars("loss/validation")] == [2, 4]
    assert [one.step for one in shown.Images("samples/1")] == [0, 4]
    without = run_session(tmp_path / "without", **FIELDS)
    assert same_tensors(result.adapter, without.adapter) and result.run.name == without.run.name
    assert not (tmp_path / "without" / "runs" / without.run.name / "tensorboard").exists()


def test_without_the_package_it_says_what_to_install_before_anything_is_encoded(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    monkeypatch.delitem(sys.modules, "torch.utils.tensorboard", raising=False)
    host = make_host()
    with pytest.raises(SettingsError, match="needs the package tensorboard, .*pip install tensorboard") as caught:
        run_session(tmp_path, host=host, tensorboard="on", **FIELDS)
    assert caught.value.input == "tensorboard"
    assert host.codec.calls == 0 and not [path for path in (tmp_path / "runs").iterdir() if path.is_dir()]


@pytest.mark.parametrize("when", ["opened", "written", "closed"])
def test_a_full_disk_ends_the_training_with_its_cure_and_loses_nothing(when, tmp_path, monkeypatch):
    class Full:
        def __init__(self, *args, **kwargs):
            self.fail("opened")

        def fail(self, where):
            if where == when:
                raise OSError("No space left on device")

        def add_scalar(self, tag, value, step):
            assert np.isfinite(value)
            if step == 2:
                self.fail("written")

        def close(self):
            self.fail("closed")

    monkeypatch.setattr(tensorboard, "load", lambda: Full)
    if when == "closed":
        # By then everything is trained and saved.
        assert run_session(tmp_path, steps=3, tensorboard="on").step == 3
        return
    with pytest.raises(RunError, match="event files cannot be written to .*No space left") as caught:
        run_session(tmp_path, steps=3, tensorboard="on")
    assert "set tensorboard in Graft Run Options to off" in caught.value.cure
    again = run_session(tmp_path, steps=3)
    assert again.resumed_from == (2 if when == "written" else 0)
    assert same_tensors(again.adapter, run_session(tmp_path / "straight", steps=3).adapter)
