"""Tests that the readers' own libraries apply saved adapters as trained, and that docs/formats.md says so."""

import pytest
import torch
from graft_pack.trainers.formats.adapter import Adapter

from docs.build import make_formats
from docs.build.make_formats import BAR, COLUMNS, FAMILIES, NO, OTHER_FORMULA, TYPES, measure
from tests.support.combinations import each_value

pytestmark = [pytest.mark.usefixtures("comfy")]

CELLS = [(kind, format, reader) for kind in TYPES for format, readers in COLUMNS.items() for reader in readers]
OWN = {"diffusers": "diffusers", "peft": "peft", "LyCORIS": "LyCORIS", "kohya": "LyCORIS"}
# One family of each kind of network; `make soak` measures all.
PART = ("SD1",)


@pytest.mark.parametrize("kind", TYPES)
def test_no_reader_applies_another_effect(kind, trials):
    """A reader applies what was trained, or does not read the file. Graft names the readers of another formula."""
    for format, readers in COLUMNS.items():
        for reader in readers:
            for family in trials(PART, FAMILIES):
                cell = measure(family, kind, format, reader)
                if (kind, format, reader) in OTHER_FORMULA:
                    assert cell.error is None or cell.error > BAR, "the page sends users elsewhere without need"
                else:
                    assert cell.error is None or cell.error <= BAR, (family, format, reader, cell)


@pytest.mark.parametrize("kind", TYPES)
def test_the_page_says_what_is_measured(kind, trials):
    """If it fails, run python -m docs.build.make_formats."""
    for (named, format, reader), text in make_formats.read_table().items():
        if named != kind or (kind, format, reader) in OTHER_FORMULA:
            continue
        bound, _, families = text.partition(" (")
        listed = families.rstrip(")").split(", ") if families else FAMILIES if text != NO else ()
        for family in trials(PART, FAMILIES):
            cell = measure(family, kind, format, reader)
            assert (cell.error is not None) == (family in listed), (family, format, reader, cell)
            assert cell.error is None or cell.error <= float(bound), (family, format, reader, cell)


def test_the_table_has_every_cell():
    assert list(make_formats.read_table()) == CELLS


@pytest.mark.parametrize("family", FAMILIES)
def test_what_kohya_holds_reaches_diffusers_and_peft_from_the_file(family, tmp_path):
    """The commonest conversion: a kohya file is read and saved for the other libraries."""
    from graft_pack.trainers.formats.adapter import load_adapter

    from tests.interop import makers

    trained = makers.train(family, "LoRA")
    adapter = load_adapter(str(makers.save(trained.adapter, tmp_path, "kohya")))
    for number, format in enumerate(("diffusers", "peft", "LyCORIS", "kohya")):
        path = makers.save(adapter, tmp_path / str(number), format)
        readers = {"diffusers": ["diffusers"], "peft": ["peft"], "LyCORIS": ["LyCORIS"]}
        for reader in [*readers.get(format, ["sd-scripts", "ComfyUI", "LyCORIS"]), "Graft"]:
            assert trained.error(makers.READERS[reader](family, path)) <= BAR / 5, (format, reader)
        adapter = load_adapter(str(path))


@pytest.mark.parametrize("kind, formats", [("DoRA", ("LyCORIS", "diffusers", "peft")), ("IA3", ("LyCORIS",))])
def test_a_loaded_dora_is_saved_for_others_with_its_model(kind, formats, tmp_path):
    """Its magnitudes are corrected for ComfyUI's formula, and the true ones depend on the weights."""
    from graft_pack.nodes.host.actions.adapter_tools import restore_magnitudes
    from graft_pack.trainers.errors import ModelError
    from graft_pack.trainers.formats.adapter import load_adapter

    from tests.interop import makers

    trained = makers.train("SD1", kind)
    adapter = load_adapter(str(makers.save(trained.adapter, tmp_path, "kohya")))
    for format in formats:
        with pytest.raises(ModelError, match=f"'{format}'.*Connect the model"):
            makers.save(adapter, tmp_path / "refused", format)
        restored = restore_magnitudes(adapter, makers.FAMILIES["SD1"].model(), format)
        path = makers.save(restored, tmp_path / "restored", format)
        assert trained.error(makers.READERS[OWN[format]]("SD1", path)) <= BAR / 5, format
    with pytest.raises(ModelError, match="has no layer lora_unet_"):
        restore_magnitudes(adapter, makers.FAMILIES["Flux"].model(), format)


@pytest.mark.parametrize("source, family", each_value(["diffusers", "peft"], FAMILIES))
def test_a_dora_of_diffusers_and_peft_is_saved_for_lycoris(source, family, tmp_path):
    from graft_pack.trainers.formats.adapter import load_adapter

    from tests.interop import makers

    trained = makers.train(family, "DoRA")
    adapter = load_adapter(str(makers.save(trained.adapter, tmp_path, source)))
    path = makers.save(adapter, tmp_path / "back", "LyCORIS")
    assert trained.error(makers.READERS["LyCORIS"](family, path)) <= BAR / 5


@pytest.mark.parametrize("source, family", each_value(["diffusers", "peft"], FAMILIES))
def test_a_dora_of_diffusers_and_peft_is_saved_for_comfyui_with_its_model(source, family, tmp_path):
    from graft_pack.nodes.host.actions.adapter_tools import restore_magnitudes
    from graft_pack.trainers.errors import ModelError
    from graft_pack.trainers.formats.adapter import load_adapter

    from tests.interop import makers

    trained = makers.train(family, "DoRA")
    adapter = load_adapter(str(makers.save(trained.adapter, tmp_path, source)))
    with pytest.raises(ModelError, match="'kohya'.*Connect the model"):
        makers.save(adapter, tmp_path / "refused", "kohya")
    path = makers.save(
        restore_magnitudes(adapter, makers.FAMILIES[family].model(), "kohya"), tmp_path / "back", "kohya"
    )
    for reader in ("ComfyUI", "Graft"):
        assert trained.error(makers.READERS[reader](family, path)) <= BAR / 5, reader


# (LyCORIS' algorithm, options, formats that have no such form).
LYCORIS = {
    "LoRA": ("lora", {}, ()),
    "LoCon": ("lora", {"with_convolutions": True}, ()),
    "LoCon, tucker": ("lora", {"with_convolutions": True, "use_tucker": True}, ()),
    "rsLoRA": ("lora", {"rs_lora": True}, ()),
    "DoRA": ("lora", {"weight_decompose": True}, ()),
    "LoHa": ("loha", {}, ("diffusers",)),
    "LoHa, tucker": ("loha", {"with_convolutions": True, "use_tucker": True}, ("diffusers", "peft")),
    "LoKr": ("lokr", {}, ("diffusers",)),
    "LoKr, factor": ("lokr", {"factor": 8}, ("diffusers",)),
    "LoKr, full": ("lokr", {"full_matrix": True}, ("diffusers",)),
    "LoKr, both": ("lokr", {"decompose_both": True, "factor": 2}, ("diffusers",)),
}


def assert_converts(made, refused, tmp_path):
    """Read a file, save it in each format, and compare what the format's own library makes of it."""
    from graft_pack.trainers.errors import ModelError
    from graft_pack.trainers.formats.adapter import load_adapter

    from tests.interop import makers

    for format, reader in OWN.items():
        adapter = load_adapter(str(made.path))
        if format in refused:
            with pytest.raises(ModelError, match=f"'{format}'|diffusers' loader does not know"):
                makers.save(adapter, tmp_path, format)
            continue
        output = makers.READERS[reader](made.family, makers.save(adapter, tmp_path, format))
        assert made.error(output) <= BAR / 5, format


@pytest.mark.parametrize("kind", LYCORIS)
def test_files_of_lycoris_convert_or_are_refused(kind, tmp_path):
    from tests.interop import makers

    algorithm, options, refused = LYCORIS[kind]
    made = makers.make_by_lycoris("SD1", algorithm, tmp_path, **options)
    assert float((made.output - made.base).norm() / made.base.norm()) >= 1e-2
    assert_converts(made, refused, tmp_path)


def test_a_dora_of_inputs_stays_as_it_is(tmp_path):
    """peft's magnitudes are of outputs, and LyCORIS 4.1 cannot load its own file."""
    from graft_pack.trainers.errors import ModelError
    from graft_pack.trainers.formats.adapter import load_adapter
    from safetensors.torch import load_file

    from tests.interop import makers

    made = makers.make_by_lycoris("SD1", "lora", tmp_path, weight_decompose=True, wd_on_out=False)
    adapter = load_adapter(str(made.path))
    for format in ("diffusers", "peft"):
        with pytest.raises(ModelError, match=f"'{format}'.*magnitudes of its inputs"):
            makers.save(adapter, tmp_path, format)
    expected = load_file(str(made.path))
    for format in ("kohya", "LyCORIS"):
        tensors = load_file(str(makers.save(adapter, tmp_path, format)))
        assert tensors.keys() == expected.keys()
        assert all((tensors[name] == value).all() for name, value in expected.items())


@pytest.mark.parametrize("kind, family", each_value(["LoRA", "DoRA"], ["SDXL", "SD3", "Flux"]))
def test_files_of_lycoris_convert_on_every_family(kind, family, tmp_path):
    from tests.interop import makers

    algorithm, options, refused = LYCORIS[kind]
    assert_converts(makers.make_by_lycoris(family, algorithm, tmp_path, **options), refused, tmp_path)


@pytest.mark.parametrize("family, with_metadata", each_value(FAMILIES, [True, False]))
def test_files_of_diffusers_convert(family, with_metadata, tmp_path):
    """Its query, key and value have an A each, which kohya's layers hold side by side."""
    from tests.interop import makers

    assert_converts(makers.make_by_diffusers(family, tmp_path, with_metadata), (), tmp_path)


@pytest.mark.parametrize("kind, family", each_value(["LoRA", "rsLoRA", "LoHa", "LoKr"], FAMILIES))
def test_folders_of_peft_convert(kind, family, tmp_path):
    import peft

    from tests.interop import makers

    configs = {
        "LoRA": peft.LoraConfig(r=4, lora_alpha=2),
        "rsLoRA": peft.LoraConfig(r=4, lora_alpha=2, use_rslora=True),
        "LoHa": peft.LoHaConfig(r=4, alpha=2),
        "LoKr": peft.LoKrConfig(r=4, alpha=2),
    }
    made = makers.make_by_peft(family, configs[kind], tmp_path)
    refused = ("diffusers",) if kind in ("LoHa", "LoKr") else ()
    assert_converts(made, refused, tmp_path)


@pytest.mark.parametrize("kind", [dict, Adapter])
@pytest.mark.parametrize("steps", [(), (5,)], ids=["OFT", "BOFT"])
def test_the_limit_of_comfyuis_own_rotations_is_kept_for_each_reader(steps, kind, tmp_path):
    """ComfyUI limits rotations to alpha, LyCORIS to alpha times the number of outputs."""
    from graft_pack.nodes.host.model.lora import apply_adapter
    from graft_pack.trainers.formats.adapter import load_adapter

    from tests.interop import makers

    name, known = "diffusion_model.input_blocks.4.1.transformer_blocks.0.attn1.to_q", makers.FAMILIES["SDXL"]
    count = known.model().model.state_dict()[f"{name}.weight"].shape[0] // 4
    blocks = torch.randn((*steps, count, 4, 4), generator=torch.Generator().manual_seed(4))
    file = {f"{name}.oft_blocks": blocks, f"{name}.alpha": torch.tensor(1.0)}
    base = known.predict(known.model())
    applied = known.predict(apply_adapter(known.model(), None, kind(file), 1.0, 0.0)[0])
    assert (applied - base).norm() > 1e-2 * base.norm()
    for format, reader in (("LyCORIS", "LyCORIS"), ("kohya", "ComfyUI"), ("LyCORIS", "Graft"), ("kohya", "Graft")):
        path = makers.save(kind(file), tmp_path / reader, format)
        assert (makers.READERS[reader]("SDXL", path) - applied).norm() <= BAR / 5 * (applied - base).norm(), reader
    assert load_adapter(str(path)).keys() == file.keys()


@pytest.mark.parametrize("family", ["Flux as in diffusers", "QwenImage"])
def test_attention_alone_gets_the_names_of_kohya_with_the_model(family, tmp_path):
    """The file does not tell Flux, Qwen-Image and others apart."""
    from graft_pack.nodes.host.actions.adapter_tools import with_family
    from graft_pack.trainers.formats import files
    from graft_pack.trainers.formats.adapter import load_adapter

    from tests.interop import makers
    from tests.interop.test_reading import assert_added, differences_of
    from tests.support.adapters import make_model

    model = make_model(family)
    source = torch.Generator().manual_seed(4)
    weights = model.model.state_dict().items()
    width = next(len(value) for name, value in weights if name.endswith(("attn.to_q.weight", "img_attn.proj.weight")))
    tensors = {}
    for end in ("to_q", "to_v", "to_out.0"):
        for factor, shape in (("A", (2, width)), ("B", (width, 2))):
            name = f"transformer.transformer_blocks.0.attn.{end}.lora_{factor}.weight"
            tensors[name] = torch.randn(shape, generator=source)
    files.write_tensors(str(tmp_path / "made.safetensors"), tensors, {})
    adapter = load_adapter(str(tmp_path / "made.safetensors"))
    saved = load_adapter(str(makers.save(with_family(adapter, model), tmp_path / "named", "kohya")))
    blocks = "double_blocks" if family != "QwenImage" else "transformer_blocks"
    assert all(name.startswith(f"lora_unet_{blocks}_0_") for name in saved)
    assert_added(differences_of(model, saved), differences_of(model, adapter))
    back = load_adapter(str(makers.save(saved, tmp_path / "back", "diffusers")))
    assert_added(differences_of(model, back), differences_of(model, adapter))
