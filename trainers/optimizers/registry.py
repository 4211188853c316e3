"""The optimizers: one small class for each, and their registry. Their libraries are imported on demand."""

from ..errors import SettingsError
from .libraries import PACKAGE, ByName, LibraryOptimizer, of_pytorch_optimizer, refuse
from .optimizer import Optimizer, ScheduleFreeAverage, needs


class AdamW(Optimizer):
    """AdamW (Loshchilov & Hutter 2019), from torch."""

    slots = 2
    elementwise = True

    def load(self, recipe):
        import torch

        return torch.optim.AdamW

    def make(self, groups, recipe):
        values = {"betas": (recipe.beta1, recipe.beta2), "weight_decay": recipe.weight_decay}
        try:
            # One kernel for all parameters instead of a dozen for each.
            return self.build(groups, recipe, **values, fused=True)
        except RuntimeError:
            # Some devices and versions of torch have no fused kernel.
            return self.build(groups, recipe, **values)


class AdamW8bit(Optimizer):
    """AdamW with moments in eight bits (Dettmers et al. 2022), from bitsandbytes."""

    def load(self, recipe):
        with needs("bitsandbytes"):
            from bitsandbytes.optim import AdamW8bit
        return AdamW8bit


class PagedAdamW8bit(Optimizer):
    """AdamW8bit with moments that leave the GPU when its memory runs short."""

    def load(self, recipe):
        with needs("bitsandbytes"):
            from bitsandbytes.optim import PagedAdamW8bit
        return PagedAdamW8bit


class Adafactor(Optimizer):
    """Adafactor: moments by rows and columns (Shazeer & Stern 2018), from transformers, with the recipe's rate."""

    weight_decay = 0.0
    beta1 = 0.0
    beta2 = 0.0

    def load(self, recipe):
        with needs("transformers"):
            from transformers.optimization import Adafactor
        return Adafactor

    def make(self, groups, recipe):
        return self.build(
            groups,
            recipe,
            beta1=recipe.beta1 or None,
            relative_step=False,
            scale_parameter=False,
            warmup_init=False,
        )

    def check(self, recipe):
        if recipe.beta2:
            raise SettingsError(
                "beta2 is set, but Adafactor has none: its second moment's decay follows the step.",
                "In Graft Optimizer Options leave beta2 unset, or choose another optimizer.",
                "beta2",
            )


class FindsRate(Optimizer):
    """An optimizer that finds the learning rate itself. The recipe's rate is a factor on it."""

    learning_rate = 1.0
    # It finds one rate for all parameters.
    per_parameter = False
    # The range of factors that users set, with a margin.
    least, most = 0.1, 10.0

    def check(self, recipe):
        others = {recipe.embedding_learning_rate, recipe.text_encoder_learning_rate} - {0.0, recipe.learning_rate}
        if recipe.lora_plus_ratio != 1 or recipe.block_learning_rates or others:
            raise SettingsError(
                f"{recipe.optimizer} finds one learning rate for all parameters, but here some have their own learning "
                "rates.",
                "Leave the other learning rates unset, or choose another optimizer.",
                "optimizer",
            )

    def mistaken_rate(self, rate):
        if self.least <= rate <= self.most:
            return ""
        return (
            f"learning_rate is {rate:g}, but {type(self).__name__} finds the rate itself and multiplies it by this "
            "value. Set learning_rate to 1, or to 0 for the default."
        )

    def effective_rate(self, optimizer, rate):
        return rate * float(optimizer.param_groups[0]["d"])


class Prodigy(FindsRate):
    """Prodigy (Mishchenko & Defazio 2023), from prodigyopt."""

    def load(self, recipe):
        with needs("prodigyopt"):
            from prodigyopt import Prodigy
        return Prodigy

    def make(self, groups, recipe):
        # Its authors recommend these for diffusion models. The groups hold the weight decay.
        return self.build(
            groups, recipe, betas=(recipe.beta1, recipe.beta2), use_bias_correction=True, safeguard_warmup=True
        )


class DAdaptAdam(FindsRate):
    """Adam with D-Adaptation (Defazio & Mishchenko 2023), from dadaptation. Its weight decay is not decoupled."""

    weight_decay = 0.0

    def load(self, recipe):
        with needs("dadaptation"):
            import dadaptation
        return getattr(dadaptation, type(self).__name__)


class DAdaptLion(DAdaptAdam):
    """Lion with D-Adaptation, from dadaptation."""

    beta2 = 0.99


class Muon(LibraryOptimizer):
    """Muon: orthogonal updates of matrices (Jordan 2024), scaled to those of AdamW (Liu et al. 2025)."""

    def __init__(self):
        super().__init__(PACKAGE, "pytorch_optimizer", "Muon", betas=(), per_parameter=False)

    def make(self, groups, recipe):
        for group in groups:
            sizes = {min(parameter.dim(), 2) for parameter in group["params"]}
            if sizes == {1, 2}:
                raise SettingsError(
                    "Muon updates matrices, but this training also has vectors with the same learning rate.",
                    "Choose another optimizer in Graft Optimizer Options, such as AdamW, or the type LoRA.",
                    "optimizer",
                )
            group["use_muon"] = sizes == {2}
        return self.build(groups, recipe, use_adjusted_lr=True)


class Lion(Optimizer):
    """Lion: the sign of a momentum (Chen et al. 2023), from lion-pytorch.

    Its steps are larger than AdamW's. The defaults are a third of the rate and three times the decay, the mild end of
    the authors' advice.
    """

    rate_factor = 1 / 3
    weight_decay = 0.03
    beta2 = 0.99
    elementwise = True

    def load(self, recipe):
        with needs("lion-pytorch"):
            from lion_pytorch import Lion
        return Lion


class CAME(Optimizer):
    """CAME: Adafactor with a confidence in its steps (Luo et al. 2023), from came-pytorch."""

    weight_decay = 0.0

    def load(self, recipe):
        with needs("came-pytorch"):
            from came_pytorch import CAME
        return CAME

    def make(self, groups, recipe):
        # The third beta belongs to the confidence. The value is the authors'.
        return self.build(groups, recipe, betas=(recipe.beta1, recipe.beta2, 0.9999))


class AdamWScheduleFree(Optimizer):
    """AdamW that averages the weights instead of lowering the rate (Defazio et al. 2024), from schedulefree."""

    # `average` reads the state of one optimizer for all parameters.
    per_parameter = False
    averages = True

    def load(self, recipe):
        with needs("schedulefree"):
            from schedulefree import AdamWScheduleFree
        return AdamWScheduleFree

    def make(self, groups, recipe):
        optimizer = super().make(groups, recipe)
        optimizer.train()
        return optimizer

    def check(self, recipe):
        name = f"{recipe.optimizer} averages the weights instead of lowering the learning rate"
        if recipe.schedule != "constant":
            raise SettingsError(
                f"{name}; the schedule '{recipe.schedule}' would undo this.",
                "In Graft Optimizer Options set schedule to constant; warmup_steps may stay.",
                "schedule",
            )
        if recipe.ema_decay:
            raise SettingsError(
                f"{name}; ema_decay would average a second time.",
                "In Graft Optimizer Options set ema_decay to 0.",
                "ema_decay",
            )
        if recipe.embedding_name:
            raise SettingsError(
                f"{name}. Graft keeps the length of an embedding's vectors, so an average would be another vector.",
                "Choose another optimizer in Graft Optimizer Options, such as AdamW.",
                "optimizer",
            )
        if not recipe.beta1:
            raise SettingsError(
                f"{recipe.optimizer} needs a beta1 above 0.", "In Graft Optimizer Options leave beta1 unset.", "beta1"
            )

    def average(self, optimizer, parameters):
        return ScheduleFreeAverage(optimizer, parameters)


class RAdamScheduleFree(AdamWScheduleFree):
    """RAdam that averages the weights instead of lowering the rate, without a warm-up, from schedulefree."""

    def load(self, recipe):
        with needs("schedulefree"):
            from schedulefree import RAdamScheduleFree
        return RAdamScheduleFree


class SGDScheduleFree(AdamWScheduleFree):
    """SGD that averages the weights instead of lowering the rate, from schedulefree. beta1 is its momentum."""

    rate_factor = 1000.0
    weight_decay = 0.0
    beta2 = 0.0

    def load(self, recipe):
        with needs("schedulefree"):
            from schedulefree import SGDScheduleFree
        return SGDScheduleFree

    def build(self, groups, recipe, betas, **values):
        return super().build(groups, recipe, momentum=betas[0], **values)

    def check(self, recipe):
        super().check(recipe)
        refuse(recipe, "beta2")


class ProdigyPlusScheduleFree(FindsRate, AdamWScheduleFree):
    """Prodigy with a schedule-free average and a factored second moment, from prodigy-plus-schedule-free."""

    weight_decay = 0.0
    beta2 = 0.99

    def load(self, recipe):
        with needs("prodigy-plus-schedule-free"):
            from prodigyplus.prodigy_plus_schedulefree import ProdigyPlusScheduleFree
        return ProdigyPlusScheduleFree

    def check(self, recipe):
        super().check(recipe)
        arguments = self.arguments(recipe)
        if arguments.get("use_schedulefree", True):
            AdamWScheduleFree.check(self, recipe)
        if arguments.get("fused_back_pass"):
            raise SettingsError("fused_back_pass updates no weight in Graft.", "Remove it.", "optimizer_args")


OPTIMIZERS: dict[str, Optimizer] = {
    "AdamW": AdamW(),
    "AdamW8bit": AdamW8bit(),
    "PagedAdamW8bit": PagedAdamW8bit(),
    "Adafactor": Adafactor(),
    "Prodigy": Prodigy(),
    "Lion": Lion(),
    "CAME": CAME(),
    "AdamWScheduleFree": AdamWScheduleFree(),
    "RAdamScheduleFree": RAdamScheduleFree(),
    "RAdam": LibraryOptimizer("torch", "torch.optim", "RAdam", elementwise=True),
    "SGD": LibraryOptimizer("torch", "torch.optim", "SGD", betas=(), rate_factor=1000.0, elementwise=True),
    "Lion8bit": LibraryOptimizer(
        "bitsandbytes", "bitsandbytes.optim", "Lion8bit", betas=(0.9, 0.99), rate_factor=1 / 3
    ),
    "AdEMAMix8bit": LibraryOptimizer("bitsandbytes", "bitsandbytes.optim", "AdEMAMix8bit", betas=(0.9, 0.999, 0.9999)),
    "ADOPT": of_pytorch_optimizer("ADOPT", betas=(0.9, 0.9999)),
    "AdEMAMix": of_pytorch_optimizer("AdEMAMix", betas=(0.9, 0.999, 0.9999)),
    "Adan": of_pytorch_optimizer("Adan", betas=(0.98, 0.92, 0.99)),
    "Lamb": of_pytorch_optimizer("Lamb", rate_factor=10.0),
    "Tiger": of_pytorch_optimizer("Tiger", betas=(), rate_factor=1 / 3),
    "pytorch-optimizer": ByName(),
    "SOAP": of_pytorch_optimizer("SOAP", betas=(0.95, 0.95)),
    "Muon": Muon(),
    "DAdaptAdam": DAdaptAdam(),
    "DAdaptLion": DAdaptLion(),
    "ProdigyPlusScheduleFree": ProdigyPlusScheduleFree(),
    "SGDScheduleFree": SGDScheduleFree(),
}


def default_learning_rate(name: str, usual: float) -> float:
    """Return an optimizer's default learning rate.

    Args:
        usual: the default of family and method for AdamW.
    """
    optimizer = OPTIMIZERS.get(name, OPTIMIZERS["AdamW"])
    return optimizer.learning_rate or usual * optimizer.rate_factor


def finds_its_rate(name: str) -> bool:
    """Return True if an optimizer finds its learning rate itself and takes the recipe's as a factor (Prodigy)."""
    return name in OPTIMIZERS and OPTIMIZERS[name].learning_rate is not None
