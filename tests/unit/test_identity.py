"""Identities of runs that earlier versions made, written down from those versions: they must never change."""

from dataclasses import replace

import pytest
from graft_pack.trainers.engine.resolve import Options, RecipeInputs, resolve
from graft_pack.trainers.families import family_of
from graft_pack.trainers.recipe.recipe import EmbeddingSpec

from tests.unit.test_resolve import BESIDE, SET

WORD = EmbeddingSpec("my-dog", "dog", 2, templates="style")
# Recipes by name: family, method, embedding, widgets, and options by node.
RECIPES = {
    "SD1 LoRA": ("SD1", "LoRA", None, {}, {}),
    "SDXL LoRA with a trigger": ("SDXL", "LoRA", None, {"rank": 16, "trigger": "sks", "seed": 7}, {}),
    "Flux LoRA at 1024": ("Flux", "LoRA", None, {"resolution": 1024, "learning_rate": 2e-4, "batch_size": 2}, {}),
    "general LoKr, patterns": (
        "general",
        "LoRA",
        None,
        {"rank": 8},
        {
            "adapter": {
                "type": "LoKr",
                "alpha": 2.0,
                "target_patterns": "attn1\nattn2",
                "block_ranks": "middle_block=2 out=0",
                "block_learning_rates": "middle_block=1e-5",
            }
        },
    ),
    "SD1 text encoder, LoRA+": (
        "SD1",
        "LoRA",
        None,
        {},
        {"adapter": {"text_encoder": "on", "text_encoder_rank": 2, "lora_plus_ratio": 16.0, "dropout": 0.1}},
    ),
    "SDXL text encoder by default": ("SDXL", "LoRA", None, {"rank": 32}, {"adapter": {"text_encoder": "on"}}),
    "SD1 all weights": ("SD1", "all weights", None, {"rank": 16}, {}),
    "SDXL all weights in bf16": (
        "SDXL",
        "all weights",
        None,
        {},
        {"adapter": {"weight_dtype": "bf16", "targets": "attention"}, "optimizer": {"accumulation": 4}},
    ),
    "SD1 embedding": ("SD1", "embedding", WORD, {"rank": 0}, {}),
    "SD1 embedding by Prodigy": ("SD1", "embedding", WORD, {"rank": 0}, {"optimizer": {"optimizer": "Prodigy"}}),
    "SDXL pivotal": (
        "SDXL",
        "LoRA",
        None,
        {},
        {"pivotal": {"name": "w", "init_text": " a dog "}, "optimizer": {"optimizer": "Lion"}},
    ),
    "SD1 schedule-free": ("SD1", "LoRA", None, {}, {"optimizer": {"optimizer": "AdamWScheduleFree"}}),
    "SD1 Adafactor, restarts": (
        "SD1",
        "LoRA",
        None,
        {"batch_size": 3},
        {
            "optimizer": {
                "optimizer": "Adafactor",
                "schedule": "cosine with restarts",
                "num_cycles": 3,
                "warmup_steps": 10,
                "ema_decay": 0.999,
                "max_grad_norm": 0.0,
                "weight_decay": 0.0,
            },
            "run": {"validation_fraction": 0.1, "name": " a run "},
        },
    ),
    "Flux objective": (
        "Flux",
        "LoRA",
        None,
        {},
        {
            "objective": {
                "timesteps": "shifted",
                "timestep_shift": 3.0,
                "loss": "Huber",
                "huber_schedule": "constant",
                "noise_offset": 0.05,
                "min_timestep": 100,
            }
        },
    ),
    "SD1, all that decides nothing": (
        "SD1",
        "LoRA",
        None,
        {"steps": 99},
        {
            "memory": SET["memory"] | {"shard": "on", "offload": "off", "base_dtype": "as it is", "preset": "auto"},
            "preview": SET["preview"],
            "run": {
                name: value
                for name, value in SET["run"].items()
                if name not in ("validation_fraction", "prompt_node", "communication", "first_frame_probability")
            },
            "adapter": {"start_from": "a.safetensors"},
        },
    ),
}
WIDGETS = {"steps": 10, "learning_rate": 0.0, "rank": 4, "batch_size": 1, "seed": 0, "resolution": 0, "trigger": ""}


def chain(nodes):
    options = Options()
    for kind, values in nodes.items():
        options = options.adding(kind, values)
    return options


def build(family, method, word, widgets, nodes):
    return resolve(chain(nodes), family_of(family), RecipeInputs(method, **{**WIDGETS, **widgets}, embedding_spec=word))


def recipe_with(kind, name):
    """Build a recipe with one option set, and the options that it needs."""
    other, needed = BESIDE.get(name, (kind, {"name": "w"} if kind == "pivotal" else {}))
    method = "all weights" if name == "weight_dtype" else "LoRA"
    optimizer = {"optimizer": "CAME"} if name == "optimizer" else {}
    nodes = {other: needed}
    nodes[kind] = {**nodes.get(kind, {}), name: SET[kind][name], **optimizer}
    # One picture cannot be stratified.
    return build("SD1", method, None, {"batch_size": 2} if name == "stratified" else {}, nodes)


# Identities of these recipes for the dataset `d` and the base `b`.
IDENTITIES = {
    "SD1 LoRA": "45051b1be5a096ba30ca2ce6d9560ff4ea45014124abf0e74612040080c2d4e4",
    "SDXL LoRA with a trigger": "44cd5d0f6caf72cbf4f8ea88bd7f1afdc5db4d26f10aa639eaa8135f64f87a5f",
    "Flux LoRA at 1024": "110f649be3211b39fd372fcc827b13f64295beb591293fc6e98038f73e7e28c2",
    "general LoKr, patterns": "c26dc95bd813471c7d252d57c70e22c3518d350929c1af04414852e9f5af4e03",
    "SD1 text encoder, LoRA+": "315e184d31e0f79428d9e2f87ce8e625e20c9ad9c4f23ee68e55b477d4a8f38a",
    "SDXL text encoder by default": "038828703e7f0ee420825e4464ec538d486f6cc9f49a2b2b57cf90ac668cc508",
    "SD1 all weights": "83766566bbaad51d7f3909099596c2f4de9bce1355a293c7641c64bc972504e8",
    "SDXL all weights in bf16": "dfe7836bca5f9f93024ddf8c21a2616441e067c3be35e225599aa012c54474fb",
    "SD1 embedding": "e2c12e7c65181bbf250f80e17d5e4d9e6127639785d98941c8c7edca0f3ea46f",
    "SD1 embedding by Prodigy": "ab8ce03a005389e0f29c84ba72d86686431e0abbdc70a1b3c81400d3596b74d7",
    "SDXL pivotal": "a36ba9a4e1f165db6fc63177fe22aef4d617872bf1ea79ee1414c65a1d02d58f",
    "SD1 schedule-free": "a6fe3beb301a065911a6b906cf71b2fe7739a0be6ff12e873ebc7c304de38bcc",
    "SD1 Adafactor, restarts": "05b4f54c16d025159226b088c442a5cf6a0b0adeb4315d4a4f56ba103f1e199d",
    "Flux objective": "dbb9418b6a1fad78e8ac5d130468c15f3a727595248166fc15f585af9c4c1a72",
    "SD1, all that decides nothing": "45051b1be5a096ba30ca2ce6d9560ff4ea45014124abf0e74612040080c2d4e4",
}

FIRST = IDENTITIES["SD1 LoRA"]

# Identities of the recipes that have one option set; options that are missing here leave the first identity.
SINGLE = {
    "run.validation_fraction": "9775f21408e97ebec5b4d79f13a398187f6930c4c0b1b464d0ad4d18686f8e93",
    "run.prompt_node": "a7e93612d3a86225582c750ac49c73927092f0fae19b88eba4bef983d83d3415",
    "run.communication": "2feb8312d06ac06210247f489ef2aa64903d015107e3cd8b89190ba2fc2485c6",
    "run.first_frame_probability": "cc220ed58224cc5acba529192a50829def1dc876618f1e49077221c323c79db8",
    "optimizer.optimizer": "b1b401187aa16bd4dd5c0f454a08d6ba3440b64bca51335edd9601d378925272",
    "optimizer.weight_decay": "1f762f19a67b2654009193d186db432fa9826f43971704395dc446b50d42f158",
    "optimizer.schedule": "42cceca6576361f88bea787411d3d8d51bb800981b863fd959d14bba3a197f8b",
    "optimizer.warmup_steps": "772aed510d71d04e95fbc49359c916901a93ff4321031b0feb6e0860841a87a5",
    "optimizer.accumulation": "09b8e464969f86551a293c07a59e0a181143f9485ec2ea8cd2f240ebccbec864",
    "optimizer.max_grad_norm": "1cddecde63fc1b2f387c29b68076537021cfcaf7397ed3c5b15a4b7d0c89c660",
    "optimizer.ema_decay": "6d4f0842c6dcd4ed7e2baed72a643ab5a9c6fa6d7c99ccdb07a6ba2e8659ff3f",
    "optimizer.beta1": "9df79ce40db4272a17c6ee24fffdb2c6d145e0e2ba39b0d9e00440b9a7479fad",
    "optimizer.beta2": "14f3b30be8ead69ca196ee33db9eba121e52717b64db602598850b10162146eb",
    "optimizer.num_cycles": "a15e82ecb97abf452030727f99f75b53c5c0f88b6dcdc981f0673b28f2ffccf7",
    "optimizer.power": "34629e500984821bf1d1912cd34a73578c36d4cddd83a18c5b860c212d8bbe38",
    "optimizer.loss_spike_factor": "164d4468d3ca2f56f65db8cb31fa8b5e758f081941a09a97bf20b729ac5e3c49",
    "optimizer.warmup_ratio": "a2e26b8ccce87c4a065ea106d6bb5331fac80465c3906f4e9b031e6844b375f8",
    "optimizer.min_lr_ratio": "23a9f46ba19fb9167931b475539b6c2096ed5e5e03b1baa0fcb678d2b11e58fa",
    "optimizer.decay_ratio": "123790c76fa2155bc644482c091704bf377ce2ee7f4ba7ee0f8da60116461543",
    "optimizer.optimizer_args": "ea5c1265971976e1f7af61adf9505366c706efb25cbca991629b5fe32cd9efdb",
    "optimizer.schedule_points": "0407974d419ed08a3653197ca7fd282a82385c95d0d70ceb22108fc4a03a2912",
    "pivotal.name": "88c839798cd556c5cb9d686b41afc269fec0c9f395b591a801aca9b83bb892a9",
    "pivotal.init_text": "f68c64d86cb9c513ec85f084c140dd5b4a6ed4c02c17ae26642a09ce222f7d74",
    "pivotal.vectors": "ada6485e0e10a94d59b10d8411cc6def5bc2577259e3f5fc0baa3392ba4306f7",
    "pivotal.learning_rate": "d81db76e1c5aeb6f438f4e2d300fc263e93abe6ce5a950d5b53de7bedc17967e",
    "pivotal.stop_fraction": "8d4034a0fb57b17a83ce4dce515a0433682166986a384926cba655470c3aae22",
    "objective.timesteps": "95b9ad17c7f42253c64ec35ce566ed3beea7e9b044b282efd44c15136747df65",
    "objective.min_timestep": "58d63329bed05d47bdbeb4aa3c2f703772ffead8e8e2008a1e3b556aa7d79055",
    "objective.max_timestep": "ac8afd770f11f996a5e7e7eee30fe3d17b0e84f608fc1ee912d8b414a33ed10a",
    "objective.weighting": "2fbaea8b12f8bd37831d97196722c9010631c8b9fac95031fc8887bbdde25f75",
    "objective.min_snr_gamma": "c551a0a93b327aeed9b50fea54341a48e055b4515f3e7cbd8d21a3a1b2d912bb",
    "objective.loss": "d26262ee15cb5a877362836dc78bab7721afe7d9d4ca4a6f3f52be798de0e1db",
    "objective.noise_offset": "1ec9752fefc95da8d1922e84b0556f7c9a2a32fbf7b6b2dc96d92016031b1d84",
    "objective.input_perturbation": "12f1cdc4c8bc8a580ef06201bee64ac114a5261f26471ef6f10c839edd9c21a6",
    "objective.pyramid_discount": "77f03f97e6127943264f760bf36fd3b84859e17407ac40169173ecd3710ee2cd",
    "objective.timestep_mean": "feb7b5d3ee09c47fad897df362b972914049e9c23e4e5050d683e6ddb0a16bfd",
    "objective.timestep_std": "5da1ec14c8bf094178836f727fc79f310d3f86b3297e4fb4f05ede130d8e67f4",
    "objective.timestep_shift": "391c462daef1e827db4845ca6131bc51daad04b556601d7e9677362feb88a897",
    "objective.huber_c": "f0bf4b0aee56b7a2f0f497ba05c327ed548a755ed5b958769321307616cbb79a",
    "objective.huber_schedule": "39d0d2aa374fc514a0f814739a78a4df6f168a894a2fecfed55fcc7ecdad1a57",
    "objective.timestep_mode_scale": "6c1f76a53cf163e702f1d7724627e3ccfcf47afcc8125fe57e2595e4724d901b",
    "objective.timestep_alpha": "cecd49883eaf80484de6c3c0eb7806dba87259cac9abbcc26c5d649bdc51ff1c",
    "objective.timestep_beta": "d87e47d2bf6e1474de6da2fbacb002bafddc3da4c456b61712c119e951c71be5",
    "objective.stratified": "4821f2b2934db9c01a6de19880f80feddc6bed51da9af43042ec1688808e05a2",
    "objective.p2_gamma": "529a34d5d0940659f947a4300a82e2980979762cb801bb1162ff5d9ab5bf8f7d",
    "objective.l1_fraction": "221c6682034ba1068c69e108b91df6e64de97f859cc4b4496ee77fb68a332a32",
    "objective.noise_offset_random_strength": "2f50e2451e0236a377e6eea4eba4aadf58aaa658af9aca8013271b8e39adc958",
    "objective.adaptive_noise_scale": "484b60f7aa6ebf54b5c3afdd3f8a50c3cc730329b4bd3d405425225700d089b6",
    "objective.masked_prior_weight": "2486d165be211fb519721cfb4c332a37aab083d61b8944f286979303e4ba8559",
    "adapter.type": "eba0ad97de6b576ae85b0af69c0371d7fc7efde7253a80755a463f2c6264bbb9",
    "adapter.alpha": "350325ddc529d1543e0e07656922ea333bc6609020fc50a7f39aa757218ff5bf",
    "adapter.targets": "fc372de353ac01087a259d24fe7d68e754445fc3cb85074208e6733fc28a0f4c",
    "adapter.dropout": "3f521e901da60935f3b7b13c4cbc337f0e5e349fade93c6291a6118798752d9f",
    "adapter.text_encoder": "893cde6dcfb8ed82900cb1c55a3418e75c2c882e7f65ef9745bcbd2d824d0866",
    "adapter.text_encoder_rank": "a9755b8b3519085c11114502661dc140feb233c9cf28602eccbd63de844eec2f",
    "adapter.text_encoder_learning_rate": "c4db1a83db0b9c68c8e5485aba5776db4be2f4e67cb84068ba349480c00c36ef",
    "adapter.target_patterns": "b5275da68e2b0a6c0ade5024a00afea6cc632746325bc6948c46589f202b7088",
    "adapter.block_ranks": "912990571ceafcc38211288aede73cebc42a18c4d4d4707aaa12b434b125c3cb",
    "adapter.block_learning_rates": "f9a470a00fd6e9b97e9d442d94d6455fa34b4f51a215c330a08f4e2331ba527a",
    "adapter.lora_plus_ratio": "1280b4c3069d7c66e333f1182f6eee8662e5e86287a60869b038f76e1af2c742",
    "adapter.adapter_args": "a9e102671b39659748e039fd2a010c23eed94d90d31a2eb7c25161f2b5f6f77c",
    "adapter.preset": "b3aac5edd99e73ae5825bb72cfdb443ef7fd64402af125c4ad90e534f986f0eb",
    "memory.base_dtype": "88ff04c6c18d1924b2834dbd114bdaab72f3081fac7e0ae38919585a4b0427bd",
    "adapter.weight_dtype": "016daffd5014ffde094a6b496ed4eb1d3073a0442fd8b6ef6bcf7a9957207aa1",
}


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_keep_their_identity(name):
    assert build(*RECIPES[name]).identity("d", "b") == IDENTITIES[name]


@pytest.mark.parametrize("kind, name", [(kind, name) for kind in SET for name in SET[kind]])
def test_every_option_keeps_the_identity_it_gives(kind, name):
    # One preset, on several nodes.
    node = "adapter" if name == "preset" else kind
    assert recipe_with(kind, name).identity("d", "b") == SINGLE.get(f"{node}.{name}", FIRST)


def test_alpha_is_a_float_in_an_identity():
    whole, real = (build("SD1", "LoRA", None, {}, {"adapter": {"alpha": alpha}}) for alpha in (2, 2.0))
    assert whole.identity("d", "b") == real.identity("d", "b")


def test_fields_that_decide_nothing_may_change():
    recipe = build(*RECIPES["SD1 LoRA"])
    changed = replace(
        recipe, steps=99, name="x", micro_batch=2, processes=4, recompute="all but attention", compile="on"
    )
    assert changed.identity("d", "b") == FIRST
