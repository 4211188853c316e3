"""Tests of schedules and optimizers: equal to diffusers and their own libraries, converging, saved and resumed."""

import json
import sys

import pytest
import torch
from graft_pack.trainers.engine.checkpointer import Checkpointer
from graft_pack.trainers.engine.resolve import Options, RecipeInputs, resolve
from graft_pack.trainers.engine.validation import check_recipe
from graft_pack.trainers.errors import SettingsError
from graft_pack.trainers.families import family_of
from graft_pack.trainers.optimizers import (
    OPTIMIZERS,
    SCHEDULES,
    Group,
    ScheduleShape,
    default_learning_rate,
    finds_its_rate,
    lr_factor,
    parameter_groups,
    restore_optimizer,
    state_of,
)
from graft_pack.trainers.optimizers.ema import MovingAverage
from graft_pack.trainers.optimizers.libraries import PYTORCH_OPTIMIZER
from graft_pack.trainers.recipe.options import FALLING
from graft_pack.trainers.recipe.parsing import parse_arguments, parse_points

from tests.support import models
from tests.support.diffusers_host import make_host, run_session, same_state, same_tensors
from tests.support.diffusers_host import state_of as kept_state

# diffusers' names of the schedules that come from it.
OF_DIFFUSERS = {
    "constant": "constant_with_warmup",
    "linear": "linear",
    "cosine": "cosine",
    "cosine with restarts": "cosine_with_restarts",
    "polynomial": "polynomial",
}


def factor_of(schedule, warmup_steps, steps, **shape):
    """Return the factor of a schedule with a shape of its own."""
    return lr_factor(schedule, ScheduleShape(warmup_steps, steps, **shape))


def test_every_schedule_is_tried_here():
    assert set(SCHEDULES) == {*OF_DIFFUSERS, "REX", "warmup-stable-decay", "inverse square root", "points"}
    assert set(FALLING) == SCHEDULES.keys() - {"constant", "points"}


@pytest.mark.parametrize("more", [{}, {"num_cycles": 3, "power": 2.0}], ids=["plain", "more"])
@pytest.mark.parametrize("warmup", [0, 5])
@pytest.mark.parametrize("schedule", OF_DIFFUSERS)
def test_schedules_are_those_of_diffusers(schedule, warmup, more):
    from diffusers.optimization import get_scheduler

    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=0.3)
    reference = get_scheduler(OF_DIFFUSERS[schedule], optimizer, num_warmup_steps=warmup, num_training_steps=30, **more)
    factor = factor_of(schedule, warmup, 30, **more)
    for step in range(30):
        assert 0.3 * factor(step) == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-6, abs=1e-7)
        optimizer.step()
        reference.step()


@pytest.mark.parametrize("more", [{}, {"num_cycles": 3, "power": 1.3}], ids=["plain", "more"])
@pytest.mark.parametrize("warmup, steps", [(0, 1), (0, 300), (7, 300), (40, 30)])
@pytest.mark.parametrize("schedule", OF_DIFFUSERS)
def test_schedules_equal_diffusers_to_the_last_bit(schedule, warmup, steps, more):
    """A resumed run has the rates of a run of earlier versions, which took their schedules from diffusers."""
    from diffusers.optimization import get_scheduler

    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    reference = get_scheduler(
        OF_DIFFUSERS[schedule], optimizer, num_warmup_steps=warmup, num_training_steps=steps, **more
    )
    factor = factor_of(schedule, warmup, steps, **more)
    assert [factor(step) for step in range(steps)] == [reference.lr_lambdas[0](step) for step in range(steps)]


@pytest.mark.parametrize("warmup", [0, 5])
def test_rex_is_the_one_of_its_paper(warmup):
    """The formula is (1 - p) / (1/2 + (1 - p) / 2) at progress p after the warm-up."""
    factor = factor_of("REX", warmup, 45)
    assert [factor(step) for step in range(warmup)] == [step / 5 for step in range(warmup)]
    for step in range(warmup, 45):
        left = 1 - (step - warmup) / (45 - warmup)
        assert factor(step) == pytest.approx(left / (0.5 + 0.5 * left))
    assert factor(warmup) == 1.0


@pytest.mark.parametrize("warmup, steps, ratio, least", [(0, 100, 0.2, 0.0), (7, 90, 0.5, 0.1), (10, 40, 1.0, 0.0)])
def test_warmup_stable_decay_is_that_of_transformers(warmup, steps, ratio, least):
    from transformers.optimization import get_wsd_schedule

    decay = min(round(ratio * steps), steps - warmup)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    stable = {"num_stable_steps": steps - warmup - decay, "min_lr_ratio": least}
    reference = get_wsd_schedule(optimizer, warmup, decay, **stable).lr_lambdas[0]
    factor = factor_of("warmup-stable-decay", warmup, steps, decay_ratio=decay / steps, min_lr_ratio=least)
    for step in range(steps):
        # transformers rises from the minimum, as none of its other schedules does.
        expected = step / warmup if step < warmup else reference(step)
        assert factor(step) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("warmup", [0, 5, 300])
def test_inverse_square_root_is_that_of_transformers(warmup):
    from transformers.optimization import get_inverse_sqrt_schedule

    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    reference = get_inverse_sqrt_schedule(optimizer, warmup).lr_lambdas[0]
    factor = factor_of("inverse square root", warmup, 400)
    assert [factor(step) for step in range(400)] == [reference(step) for step in range(400)]


@pytest.mark.parametrize("schedule", FALLING)
def test_a_schedule_ends_at_its_minimum(schedule):
    """The fall from 1 to 0 becomes the same fall from 1 to the minimum."""
    plain, raised = factor_of(schedule, 5, 100), factor_of(schedule, 5, 100, min_lr_ratio=0.25)
    assert [raised(step) for step in range(5)] == [plain(step) for step in range(5)]
    for step in range(5, 100):
        assert raised(step) == pytest.approx(0.25 + 0.75 * plain(step))


def test_points_are_joined_by_lines():
    points = parse_points("500:0.5, 0:1,\n1000:0.1")
    assert points == ((0, 1.0), (500, 0.5), (1000, 0.1))
    factor = factor_of("points", 0, 2000, points=points)
    found = [factor(step) for step in (0, 250, 500, 750, 1000, 1999)]
    assert found == pytest.approx([1.0, 0.75, 0.5, 0.3, 0.1, 0.1])
    late = factor_of("points", 10, 200, points=((50, 0.5), (100, 1.0)))
    assert [late(step) for step in (5, 10, 50, 75, 199)] == pytest.approx([0.5, 0.5, 0.5, 0.75, 1.0])
    assert factor_of("points", 0, 10, points=((3, 0.2),))(7) == 0.2


@pytest.mark.parametrize("text", ["1", "a:1", "1:", "1:x", "-1:1", "1.5:1", "1:-1", "1:nan", "1:1, 1:2", "0:1e9"])
def test_a_text_that_is_no_list_of_points_is_refused(text):
    with pytest.raises(SettingsError, match="point"):
        parse_points(text)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_past_its_end_a_schedule_stays_where_it_was(schedule):
    factor = factor_of(schedule, 2, 10, points=((0, 1.0), (20, 0.0)))
    assert factor(10) == factor(9) == factor(10_000)


def test_warm_up_rises_from_zero_and_constant_stays():
    factor = factor_of("constant", 4, 10)
    assert [factor(step) for step in range(6)] == [0.0, 0.25, 0.5, 0.75, 1.0, 1.0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("decay", [0.3, 0.999])
def test_the_moving_average_equals_diffusers_to_the_last_bit(decay, dtype):
    """A resumed run has the average of a run of earlier versions, which took it from diffusers."""
    from diffusers.training_utils import EMAModel

    source = torch.Generator().manual_seed(0)
    parameters = [torch.nn.Parameter(torch.randn(501, generator=source).to(dtype)) for _ in range(2)]
    average = MovingAverage(decay)
    average.start(parameters)
    reference = EMAModel([parameter.float() for parameter in parameters], decay=decay)
    for step in range(30):
        # An embedding that has reached its last step is frozen.
        parameters[1].requires_grad_(step < 20)
        for parameter in parameters:
            parameter.data += torch.randn(501, generator=source).to(dtype) / 100
        average.step(parameters)
        reference.step(parameters)
        assert all(map(torch.equal, average.shadow_params, reference.shadow_params))
    assert average.updates == 30


def recipe_of(name, **fields):
    """Return a recipe for an optimizer as `resolve` makes it."""
    kind = OPTIMIZERS[name]
    values = {
        "learning_rate": default_learning_rate(name, 1e-2),
        "weight_decay": kind.weight_decay,
        "beta1": kind.beta1,
        "beta2": kind.beta2,
        "optimizer_args": (("name", "Yogi"),) if name == "pytorch-optimizer" else (),
    }
    return models.recipe("SD1", optimizer=name, **{**values, **fields})


def made(name, parameters, **fields):
    """Return an optimizer on parameters, made as the loop makes it."""
    recipe = recipe_of(name, **fields)
    trainables = {str(place): parameter for place, parameter in enumerate(parameters)}
    groups = parameter_groups([Group(tuple(trainables), recipe.learning_rate)], trainables, recipe)
    return OPTIMIZERS[name].make(groups, recipe)


def test_adamw_is_the_one_of_torch():
    ours, theirs = (torch.nn.Parameter(torch.ones(5)) for _ in range(2))
    fields = {"learning_rate": 0.1, "weight_decay": 0.3, "beta1": 0.7, "beta2": 0.95}
    reference = torch.optim.AdamW([theirs], lr=0.1, weight_decay=0.3, betas=(0.7, 0.95))
    pair = [made("AdamW", [ours], **fields), reference]
    for step in range(4):
        for parameter, optimizer in zip((ours, theirs), pair, strict=True):
            parameter.grad = torch.linspace(-1, 1, 5) * (step + 1)
            optimizer.step()
    assert torch.equal(ours, theirs)


def references(parameter):
    """Return each optimizer as its library's documentation makes it, with the settings of `test_each_is...`."""
    import pytorch_optimizer
    from bitsandbytes.optim import AdamW8bit, AdEMAMix8bit, Lion8bit, PagedAdamW8bit
    from came_pytorch import CAME
    from dadaptation import DAdaptAdam, DAdaptLion
    from lion_pytorch import Lion
    from prodigyopt import Prodigy
    from prodigyplus.prodigy_plus_schedulefree import ProdigyPlusScheduleFree
    from schedulefree import AdamWScheduleFree, RAdamScheduleFree, SGDScheduleFree
    from transformers.optimization import Adafactor

    common = {"lr": 0.02, "weight_decay": 0.1}
    betas = (0.8, 0.95)
    switches = {"relative_step": False, "scale_parameter": False, "warmup_init": False}
    corrected = {"use_bias_correction": True, "safeguard_warmup": True}
    return {
        "AdamW": lambda: torch.optim.AdamW([parameter], betas=betas, fused=True, **common),
        "AdamW8bit": lambda: AdamW8bit([parameter], betas=betas, **common),
        "PagedAdamW8bit": lambda: PagedAdamW8bit([parameter], betas=betas, **common),
        "Adafactor": lambda: Adafactor([parameter], beta1=0.8, **switches, **common),
        "Prodigy": lambda: Prodigy([parameter], betas=betas, **corrected, **common),
        "Lion": lambda: Lion([parameter], betas=betas, **common),
        "CAME": lambda: CAME([parameter], betas=(*betas, 0.9999), **common),
        "AdamWScheduleFree": lambda: AdamWScheduleFree([parameter], betas=betas, **common),
        "RAdamScheduleFree": lambda: RAdamScheduleFree([parameter], betas=betas, **common),
        "SGDScheduleFree": lambda: SGDScheduleFree([parameter], momentum=0.8, **common),
        "RAdam": lambda: torch.optim.RAdam([parameter], betas=betas, **common),
        "SGD": lambda: torch.optim.SGD([parameter], **common),
        "Lion8bit": lambda: Lion8bit([parameter], betas=betas, **common),
        "AdEMAMix8bit": lambda: AdEMAMix8bit([parameter], betas=(*betas, 0.9999), **common),
        "ADOPT": lambda: pytorch_optimizer.ADOPT([parameter], betas=betas, **common),
        "AdEMAMix": lambda: pytorch_optimizer.AdEMAMix([parameter], betas=(*betas, 0.9999), **common),
        "Adan": lambda: pytorch_optimizer.Adan([parameter], betas=(*betas, 0.99), **common),
        "Lamb": lambda: pytorch_optimizer.Lamb([parameter], betas=betas, **common),
        "Tiger": lambda: pytorch_optimizer.Tiger([parameter], **common),
        "SOAP": lambda: pytorch_optimizer.SOAP([parameter], betas=betas, **common),
        "Muon": lambda: pytorch_optimizer.Muon(
            [{"params": [parameter], "use_muon": True}], use_adjusted_lr=True, **common
        ),
        "DAdaptAdam": lambda: DAdaptAdam([parameter], betas=betas, **common),
        "DAdaptLion": lambda: DAdaptLion([parameter], betas=betas, **common),
        "ProdigyPlusScheduleFree": lambda: ProdigyPlusScheduleFree([parameter], betas=betas, **common),
        "pytorch-optimizer": lambda: pytorch_optimizer.Yogi([parameter], **common),
    }


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_each_is_the_one_of_its_library(name):
    """The recipe's rate, decay and betas arrive: the bits equal those of the library used directly."""
    start = torch.randn(64, 80, generator=torch.Generator().manual_seed(1))
    ours, theirs = (torch.nn.Parameter(start.clone()) for _ in range(2))
    beta1 = 0.8 if OPTIMIZERS[name].beta1 or name == "Adafactor" else 0.0
    beta2 = 0.95 if OPTIMIZERS[name].beta2 else 0.0
    optimizer = made(name, [ours], learning_rate=0.02, weight_decay=0.1, beta1=beta1, beta2=beta2)
    reference = references(theirs)[name]()
    if OPTIMIZERS[name].averages:
        reference.train()
    for step in range(5):
        gradient = torch.randn(start.shape, generator=torch.Generator().manual_seed(10 + step))
        for parameter, one in ((ours, optimizer), (theirs, reference)):
            parameter.grad = gradient.clone()
            one.step()
    assert torch.equal(ours, theirs)
    assert not torch.equal(ours, start)


def test_arguments_of_the_user_reach_the_optimizer():
    arguments = (("d_coef", 2.0), ("use_bias_correction", False), ("betas", (0.5, 0.6)))
    optimizer = made("Prodigy", [torch.nn.Parameter(torch.zeros(3))], optimizer_args=arguments)
    group = optimizer.param_groups[0]
    assert (group["d_coef"], group["use_bias_correction"], group["betas"]) == (2.0, False, (0.5, 0.6))
    assert group["safeguard_warmup"] is True


@pytest.mark.parametrize(
    "text, parsed",
    [
        ("", ()),
        ("d_coef=2 betas=0.9,0.99", (("betas", (0.9, 0.99)), ("d_coef", 2))),
        (
            "a=(1,2.5)\nb=True c=none d=text e=1e-3",
            (("a", (1, 2.5)), ("b", True), ("c", None), ("d", "text"), ("e", 1e-3)),
        ),
    ],
)
def test_arguments_are_parsed(text, parsed):
    assert parse_arguments(text) == parsed


@pytest.mark.parametrize("text", ["d_coef", "=2", "a=", "a=1 a=2", "a-b=1", "a=" + "x" * 300, "__import__('os')"])
def test_a_text_that_is_no_list_of_arguments_is_refused(text):
    with pytest.raises(SettingsError, match="argument"):
        parse_arguments(text)


@pytest.mark.soak
@pytest.mark.parametrize("name", PYTORCH_OPTIMIZER)
def test_each_of_pytorch_optimizer_continues_from_its_state(name):
    """Six steps, or three, a new optimizer with the state of the first, and three more: the same bits."""
    start = [torch.randn(shape, generator=torch.Generator().manual_seed(1)) for shape in ((64, 80), (8, 4, 3, 3), (5,))]
    ends = []
    for is_resumed in (False, True):
        torch.manual_seed(0)
        parameters = [torch.nn.Parameter(value.clone()) for value in start]
        arguments = {"learning_rate": 1e-3, "optimizer_args": (("name", name),)}
        optimizer = made("pytorch-optimizer", parameters, **arguments)
        for step in range(6):
            if is_resumed and step == 3:
                kept = state_of(optimizer)
                optimizer = made("pytorch-optimizer", parameters, **arguments)
                restore_optimizer(optimizer, *kept)
            torch.manual_seed(step)
            for parameter in parameters:
                parameter.grad = torch.randn_like(parameter) * 0.1
            optimizer.step()
        ends.append(parameters)
    assert all(torch.equal(*pair) for pair in zip(*ends, strict=True))
    assert not all(torch.equal(*pair) for pair in zip(ends[0], start, strict=True))


# Learning rates for convergence in the steps below; Prodigy finds its own.
RATES = {"Lion": 8e-3, "Prodigy": 1.0, "DAdaptAdam": 1.0, "DAdaptLion": 1.0, "AdamWScheduleFree": 5e-2}
RATES |= {"ProdigyPlusScheduleFree": 1.0, "SGDScheduleFree": 0.2}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_each_reaches_the_minimum_of_a_quadratic(name):
    """The loss is the distance to a matrix, steeper along some entries; the matrix is large enough for 8-bit state."""
    source = torch.Generator().manual_seed(0)
    wanted = torch.randn(64, 80, generator=source)
    steepness = 0.3 + torch.rand(64, 80, generator=source)
    parameter = torch.nn.Parameter(torch.zeros(64, 80))
    optimizer = made(name, [parameter], learning_rate=RATES.get(name, 2e-2), weight_decay=0.0)
    average = OPTIMIZERS[name].average(optimizer, [parameter])
    factor = factor_of("constant" if average else "cosine", 0, 1500)
    rate = optimizer.param_groups[0]["lr"]
    for step in range(1500):
        optimizer.param_groups[0]["lr"] = rate * factor(step)
        parameter.grad = steepness * (parameter.detach() - wanted)
        optimizer.step()
    found = average.shadow_params[0] if average else parameter.detach()
    assert models.distance(found, wanted) <= 0.02


# Every kind of state: accumulation, a warm-up, a save in between, validation and previews, which use the average.
RESUMED = {
    "steps": 6,
    "batch_size": 2,
    "accumulation": 2,
    "warmup_steps": 2,
    "validation_fraction": 0.2,
    "validate_every": 2,
    "save_every": 2,
}


def fields_of(name, **more):
    # An optimizer's estimate of the rate changes within these few steps only if they are large.
    recipe = recipe_of(name, learning_rate=30.0) if finds_its_rate(name) else recipe_of(name)
    same = ("optimizer", "learning_rate", "weight_decay", "beta1", "beta2", "optimizer_args")
    # Large enough for matrices that bitsandbytes keeps in eight bits.
    rank = 128 if name.endswith("8bit") else 4
    return {**RESUMED, "rank": rank, **{field: getattr(recipe, field) for field in same}, **more}


class Killed(BaseException):
    """A power cut: nothing catches it in time to save."""


def kill_after(step):
    def report(event, payload):
        if event == "step" and payload["step"] == step:
            raise Killed

    return report


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_killed_and_resumed_it_gives_the_same_bits(name, tmp_path, monkeypatch):
    straight = run_session(tmp_path / "straight", **fields_of(name))
    assert len(set(straight.losses)) == 6
    with monkeypatch.context() as patch:
        patch.setattr(Checkpointer, "save_after_error", lambda *given: None)
        with pytest.raises(Killed):
            run_session(tmp_path / "cut", kill_after(5), **fields_of(name))
    resumed = run_session(tmp_path / "cut", **fields_of(name))
    assert resumed.resumed_from == 4
    assert same_state(kept_state(resumed), kept_state(straight))
    assert same_tensors(resumed.adapter, straight.adapter)
    assert resumed.losses == straight.losses
    if name.endswith("8bit"):
        assert any(slots["state1"].dtype == torch.uint8 for slots in kept_state(straight).optimizer.values())


@pytest.mark.parametrize("method, arguments", [("OFT", ()), ("LoKr", (("dora_wd", True),))], ids=["OFT", "LoKr wd"])
def test_preconditioners_that_lie_transposed_resume_to_the_same_bits(method, arguments, tmp_path):
    """A file keeps values alone; the order of the axes in memory decides a product's last bits."""
    fields = {
        "optimizer": "SOAP",
        "method": method,
        "steps": 4,
        "batch_size": 1,
        "save_every": 2,
        "learning_rate": 1e-3,
    }
    fields |= {"rank": 2, "alpha": 2.0, "adapter_args": arguments}
    straight = run_session(tmp_path / "straight", **fields)
    run_session(tmp_path / "cut", **{**fields, "steps": 2})
    resumed = run_session(tmp_path / "cut", **fields)
    assert resumed.resumed_from == 2
    assert same_state(kept_state(resumed), kept_state(straight))
    assert resumed.losses == straight.losses


@pytest.mark.parametrize(
    "name, kept",
    [("Prodigy", {"d", "d_max", "d_numerator", "k"}), ("AdamWScheduleFree", {"k", "weight_sum", "lr_max"})],
)
def test_what_resuming_needs_beyond_the_parameters_own_state(name, kept, tmp_path):
    """This state is in the file; values from the schedule and the recipe are not."""
    state = kept_state(run_session(tmp_path, **fields_of(name, steps=4)))
    assert kept <= set(state.groups[0])
    assert not {"lr", "params", "weight_decay", "betas"} & set(state.groups[0])


def test_muon_refuses_vectors_among_matrices_and_updates_them_alone_as_adamw():
    matrix, vector = torch.nn.Parameter(torch.ones(4, 4)), torch.nn.Parameter(torch.ones(4))
    with pytest.raises(SettingsError, match="Muon updates matrices"):
        made("Muon", [matrix, vector])
    assert not made("Muon", [vector]).param_groups[0]["use_muon"]


@pytest.mark.parametrize("name", ["SOAP", "Muon", "DAdaptAdam", "DAdaptLion", "ProdigyPlusScheduleFree"])
def test_what_needs_all_parameters_refuses_bf16(name):
    recipe = recipe_of(name, method="all weights", rank=0, alpha=0.0, targets="all weights", weight_dtype="bf16")
    with pytest.raises(SettingsError, match=f"{name} needs all of them at once"):
        check_recipe(recipe)


def test_prodigy_plus_refuses_the_argument_with_which_it_updates_nothing():
    check_recipe(recipe_of("ProdigyPlusScheduleFree", optimizer_args=(("fused_back_pass", False),)))
    # Without its average it takes a schedule and another average.
    alone = {"optimizer_args": (("use_schedulefree", False),), "schedule": "cosine", "ema_decay": 0.9}
    check_recipe(recipe_of("ProdigyPlusScheduleFree", **alone))
    with pytest.raises(SettingsError, match="fused_back_pass updates no weight"):
        check_recipe(recipe_of("ProdigyPlusScheduleFree", optimizer_args=(("fused_back_pass", True),)))


def test_adamw_keeps_nothing_of_its_groups():
    parameter = torch.nn.Parameter(torch.ones(3))
    optimizer = made("AdamW", [parameter])
    parameter.grad = torch.ones(3)
    optimizer.param_groups[0]["lr"] = 0.5
    optimizer.step()
    slots, groups = state_of(optimizer)
    assert groups == [{}]
    assert set(slots[0]) == {"step", "exp_avg", "exp_avg_sq"}


def test_states_from_before_some_of_it_was_kept_load(tmp_path):
    import json

    from graft_pack.trainers.formats import files

    first = run_session(tmp_path, steps=2)
    path = first.run.state_path(2)
    tensors, metadata = files.read_tensors(path)
    plain = json.loads(metadata["state"])
    for later in ("groups", "frozen", "levels", "pictures"):
        del plain[later]
    files.write_tensors(path, tensors, {"state": json.dumps(plain)})
    resumed = run_session(tmp_path, steps=4)
    assert resumed.resumed_from == 2
    assert [any(counts) for counts in resumed.loss_by_timestep.counts] == [False, False, True, True]
    assert same_tensors(resumed.adapter, run_session(tmp_path / "straight", steps=4).adapter)


def test_looking_at_a_schedule_free_training_does_not_change_it(tmp_path):
    """Validated, drawn and saved at every step, or never: the training weights return bit-identical."""
    looks = {"validate_every": 1, "save_every": 1, "keep_last": 2}
    pictures = {"preview_prompts": ("a",), "preview_every": 1, "preview_steps": 1}
    often = run_session(tmp_path / "often", **fields_of("AdamWScheduleFree", **looks, **pictures))
    seldom = run_session(tmp_path / "seldom", **fields_of("AdamWScheduleFree", validate_every=100, save_every=100))
    assert same_tensors(often.adapter, seldom.adapter)
    assert same_tensors(kept_state(often).trainables, kept_state(seldom).trainables)


def test_what_schedule_free_hands_on_is_the_librarys_average():
    """The bits equal those of its eval(), and the call works when nothing is trained any more."""
    parameters = [
        torch.nn.Parameter(torch.randn(4, 5)),
        torch.nn.Parameter(torch.randn(3)),
        torch.nn.Parameter(torch.ones(2)),
    ]
    optimizer = made("AdamWScheduleFree", parameters, beta1=0.8)
    for _ in range(4):
        for parameter in parameters[:2]:
            parameter.grad = torch.randn_like(parameter)
        optimizer.step()
    y = [parameter.detach().clone() for parameter in parameters]
    average = OPTIMIZERS["AdamWScheduleFree"].average(optimizer, parameters)
    x = average.shadow_params
    average.store(parameters)
    average.copy_to(parameters)
    assert all(torch.equal(*pair) for pair in zip(parameters, x, strict=True))
    average.restore(parameters)
    assert all(torch.equal(*pair) for pair in zip(parameters, y, strict=True))
    optimizer.eval()
    assert all(torch.equal(*pair) for pair in zip(parameters, x, strict=True))
    assert not torch.equal(x[0], y[0])


def test_a_schedule_free_run_validates_and_exports_its_average(tmp_path):
    result = run_session(tmp_path, **fields_of("AdamWScheduleFree"))
    state = kept_state(result)
    exported = models.joined(value for _, value in sorted(result.adapter.items()) if value.ndim)
    assert models.distance(exported.sort()[0], models.joined(state.ema.values()).sort()[0]) == 0
    assert not same_tensors(state.ema, state.trainables)


@pytest.mark.parametrize(
    "name, module, package",
    [
        ("AdamW8bit", "bitsandbytes", "bitsandbytes"),
        ("PagedAdamW8bit", "bitsandbytes", "bitsandbytes"),
        ("Adafactor", "transformers", "transformers"),
        ("Prodigy", "prodigyopt", "prodigyopt"),
        ("Lion", "lion_pytorch", "lion-pytorch"),
        ("CAME", "came_pytorch", "came-pytorch"),
        ("AdamWScheduleFree", "schedulefree", "schedulefree"),
        ("RAdamScheduleFree", "schedulefree", "schedulefree"),
        ("Lion8bit", "bitsandbytes", "bitsandbytes"),
        ("ADOPT", "pytorch_optimizer", "pytorch-optimizer"),
        ("pytorch-optimizer", "pytorch_optimizer", "pytorch-optimizer"),
    ],
)
def test_one_that_is_not_installed_says_what_to_install(name, module, package, tmp_path, monkeypatch):
    """The error comes before any picture is encoded."""
    host = make_host()
    # None stands for a module that cannot be imported.
    for known in [*(known for known in sys.modules if known.split(".")[0] == module), module]:
        monkeypatch.setitem(sys.modules, known, None)
    with pytest.raises(SettingsError, match=f"needs the package {package}, .*pip install {package}\\)") as caught:
        run_session(tmp_path, host=host, **fields_of(name))
    monkeypatch.undo()
    assert caught.value.input == "optimizer"
    assert host.codec.calls == 0
    assert not [path for path in (tmp_path / "runs").iterdir() if path.is_dir()], "no run has begun"


@pytest.mark.parametrize(
    "kind, fields",
    [
        ("adapter", {"lora_plus_ratio": 4.0}),
        ("adapter", {"block_learning_rates": "attn1=0.5"}),
        ("pivotal", {"name": "w", "init_text": "dog", "learning_rate": 0.5}),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else value,
)
def test_prodigy_refuses_rates_of_its_own_for_parts(kind, fields):
    """The error comes before anything is encoded."""
    options = Options().adding("optimizer", {"optimizer": "Prodigy"}).adding(kind, fields)
    with pytest.raises(SettingsError, match="Prodigy finds one learning rate") as caught:
        resolve(options, family_of("SD1"), RecipeInputs("LoRA", 10, 0.0, 4, 1, 0, 64, ""))
    assert caught.value.input == "optimizer"


def rates_logged(folder):
    (log,) = folder.glob("*/*/metrics.jsonl")
    events = map(json.loads, log.read_text().splitlines())
    return [event["lr"] for event in events if event["event"] == "step"]


def test_prodigy_logs_the_rate_it_found_times_its_factor(tmp_path):
    fields = fields_of("Prodigy", schedule="linear", warmup_steps=0)
    before = kept_state(run_session(tmp_path, **{**fields, "steps": 4})).groups[0]["d"]
    run_session(tmp_path, **{**fields, "steps": 6})
    rates = rates_logged(tmp_path)
    assert rates[0] == pytest.approx(fields["learning_rate"] * 1e-6)
    assert before > 1e-5
    # The schedule's factor at step 5 of 6.
    assert rates[4] == pytest.approx(fields["learning_rate"] * before / 3)


@pytest.mark.parametrize("name", [name for name in OPTIMIZERS if not finds_its_rate(name)])
def test_other_optimizers_move_at_the_rate_they_are_given(name):
    optimizer = made(name, [torch.nn.Parameter(torch.ones(64, 80))])
    assert OPTIMIZERS[name].effective_rate(optimizer, 0.25) == 0.25


@pytest.mark.parametrize("rate, warned", [(1e-4, True), (0.05, True), (0.5, False), (1.0, False), (100.0, True)])
def test_prodigy_warns_of_a_rate_far_from_one(rate, warned, tmp_path, caplog):
    told = []
    fields = fields_of("Prodigy", learning_rate=rate, steps=1)
    run_session(tmp_path, lambda event, payload: told.append(payload) if event == "rate" else None, **fields)
    assert [(one["optimizer"], one["learning_rate"]) for one in told] == [("Prodigy", rate)] * warned
    assert ("Set learning_rate to 1" in caplog.text) == warned


def test_adamw_takes_a_small_rate_without_a_warning():
    assert OPTIMIZERS["AdamW"].mistaken_rate(1e-4) == ""


def test_prodigy_finds_a_rate_and_prints_nothing(capsys):
    parameter = torch.nn.Parameter(torch.zeros(10))
    optimizer = made("Prodigy", [parameter])
    for _ in range(200):
        parameter.grad = parameter.detach() - 1
        optimizer.step()
    assert 0.01 < optimizer.param_groups[0]["d"] < 1.0
    assert torch.allclose(parameter, torch.ones(10), atol=0.01)
    assert capsys.readouterr().out == ""
