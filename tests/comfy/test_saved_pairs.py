"""Tests that files of sliders and preferences act as in training, in every format, for every type of adapter."""

from contextlib import nullcontext

import pytest
import torch
from graft_pack.trainers.errors import ModelError
from graft_pack.trainers.formats.adapter import FORMATS, load_adapter, save_adapter
from graft_pack.trainers.methods import ADAPTERS

from tests.comfy.test_preference import with_pairs
from tests.comfy.test_slider import training as slider
from tests.support import models

pytestmark = pytest.mark.usefixtures("comfy")

EVERYTHING = "all weights"
LINEAR = [kind for kind, method in ADAPTERS.items() if method.is_linear]
# Formats with no place for a type.
REFUSED = dict.fromkeys(("LoHa", "LoKr", "OFT", "BOFT"), ("diffusers",))
REFUSED |= {
    "IA3": ("LyCORIS", "diffusers"),
    "GLoRA": ("diffusers", "peft"),
    EVERYTHING: ("LyCORIS", "diffusers", "peft"),
}


def point():
    x = torch.randn(1, *models.SIZES["SD1"].latent, generator=torch.Generator().manual_seed(9))
    return x, 2.0, models.conditioning("SD1", 9)


def fields_of(kind):
    if kind == EVERYTHING:
        return {"steps": 4, "learning_rate": 2e-3, "method": kind, "rank": 0, "alpha": 0.0, "targets": kind}
    targets = ADAPTERS[kind].default_targets
    return {"steps": 4, "learning_rate": 2e-2, "method": kind, "targets": targets, "alpha": 2.0}


def preference(kind, model, folder):
    """Return (adapter, outputs by strength) of a preference."""
    with models.in_training(model, "SD1", preference_beta=1e3, **fields_of(kind)) as training:
        state = models.train(with_pairs(training), folder)
        output = models.trained_denoised(training, *point())
        return models.exported(training, state.trainables), {1.0: output}


def trained_slider(has_pictures, kind, model, folder):
    """Return (adapter, outputs by strength) of a slider."""
    with slider("SD1", torch.float32, has_pictures, **fields_of(kind)) as training:
        state = models.train(training, folder)
        outputs = {}
        for strength in (-2.0, 1.0):
            with training.plan.scaled(strength):
                outputs[strength] = models.trained_denoised(training, *point())
        return models.exported(training, state.trainables), outputs


TRAINERS = {
    "slider": (lambda *args: trained_slider(False, *args), LINEAR),
    "slider of pictures": (lambda *args: trained_slider(True, *args), LINEAR),
    "preference": (preference, [*ADAPTERS, EVERYTHING]),
}


@pytest.mark.parametrize(("trainer", "kind"), [(name, kind) for name, (_, rows) in TRAINERS.items() for kind in rows])
def test_a_file_of_every_format_acts_as_in_training(trainer, kind, tmp_path):
    from graft_pack.nodes.host.model.lora import apply_adapter, unread_keys

    with torch.inference_mode():
        model = models.patcher("SD1")
    base = models.denoised(model, *point())
    adapter, outputs = TRAINERS[trainer][0](kind, model, tmp_path)
    assert all((output - base).norm() >= 1e-3 * base.norm() for output in outputs.values())
    for format in FORMATS:
        path = str(tmp_path / format / "adapter_model.safetensors")
        is_refused = format in REFUSED.get(kind, ())
        with pytest.raises(ModelError) if is_refused else nullcontext():
            save_adapter(path, adapter, "pairs", format)
        if is_refused:
            continue
        back = load_adapter(path)
        assert unread_keys(model, None, back) == []
        for strength, output in outputs.items():
            applied = models.denoised(apply_adapter(model, None, back, strength, strength)[0], *point())
            assert (applied - output).norm() <= 1e-3 * (output - base).norm(), (format, strength)
