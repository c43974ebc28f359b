# Over 400 lines: each format of the libraries, and each way in which an adapter does not belong, on one base network.
"""LoRA adapters in and out, as the libraries that made them read and write them."""

import json
import re
import shutil

import peft
import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.utils import convert_state_dict_to_diffusers
from huggingface_hub import DatasetCard, ModelCard
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from pdiff_hf import ParameterLayout, WeightZoo
from pdiff_hf.cli import main
from pdiff_hf.configs import ImportConfig, InfoConfig
from pdiff_hf.errors import ConfigError, TaskError, ZooError
from pdiff_hf.info import run_info
from pdiff_hf.networks.adapted import AdaptedNetwork
from pdiff_hf.zoo import adapters


class Base(nn.Module):
    def __init__(self, seed: int = 0):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.query = nn.Linear(6, 8)
            self.value = nn.Linear(8, 5)
            self.head = nn.Linear(5, 3)

    def forward(self, inputs):
        return self.head(self.value(self.query(inputs).tanh()).tanh())


INPUTS = torch.randn(9, 6, generator=torch.Generator().manual_seed(0))
SETTINGS = {"r": 2, "lora_alpha": 8, "target_modules": ["query", "value"], "modules_to_save": ["head"]}


def save_adapter(folder, seed: int = 0, **settings) -> torch.Tensor:
    """A folder of PEFT with random values; the outputs of the base network with it."""
    model = peft.get_peft_model(Base(), peft.LoraConfig(**{**SETTINGS, **settings}))
    model.peft_config["default"].base_model_name_or_path = "me/base"
    generator = torch.Generator().manual_seed(seed)
    state_dict = {
        name: 0.3 * torch.randn(value.shape, generator=generator)
        for name, value in peft.get_peft_model_state_dict(model).items()
    }
    peft.set_peft_model_state_dict(model, state_dict)
    model.save_pretrained(folder)
    return model(INPUTS).detach()


def change_config(folder, **changes) -> None:
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def outputs(state_dict) -> torch.Tensor:
    return AdaptedNetwork(Base(), state_dict)(INPUTS).detach()


@pytest.mark.parametrize(
    "settings",
    [{}, {"use_rslora": True}, {"alpha_pattern": {"query": 3}}, {"rank_pattern": {"value": 3}}, {"r": 1}],
    ids=str,
)
def test_scales_go_into_the_factors(tmp_path, settings):
    expected = [save_adapter(tmp_path / "in" / f"run-{seed}", seed, **settings) for seed in range(3)]
    zoo = WeightZoo.from_adapters(tmp_path / "zoo", tmp_path / "in")
    assert [row["source"] for row in zoo.metadata] == ["run-0", "run-1", "run-2"]
    for index, one in enumerate(expected):
        torch.testing.assert_close(outputs(zoo.state_dict(index)), one, atol=1e-5, rtol=1e-5)
    config = zoo.layout.config.adapter
    assert config["base_model_name_or_path"] == "me/base"
    assert config["lora_alpha"] == config["r"]
    assert not config["use_rslora"]


def test_adapters_of_other_scales_are_comparable(tmp_path):
    save_adapter(tmp_path / "in" / "0")
    shutil.copytree(tmp_path / "in" / "0", tmp_path / "in" / "1")
    change_config(tmp_path / "in" / "1", lora_alpha=2)
    file = tmp_path / "in" / "1" / "adapter_model.safetensors"
    save_file({name: value * (4 if "lora_B" in name else 1) for name, value in load_file(file).items()}, file)
    zoo = WeightZoo.from_adapters(tmp_path / "zoo", tmp_path / "in")
    torch.testing.assert_close(zoo[0], zoo[1], atol=1e-6, rtol=1e-5)


def test_what_is_exported_is_loaded_by_peft(tmp_path):
    expected = [save_adapter(tmp_path / "in" / str(seed), seed, rank_pattern={"value": 3}) for seed in range(2)]
    zoo = WeightZoo.from_adapters(tmp_path / "zoo", tmp_path / "in")
    zoo.export(tmp_path / "out")
    model = peft.PeftModel.from_pretrained(Base(), tmp_path / "out" / "00000")
    torch.testing.assert_close(model(INPUTS), expected[0], atol=1e-5, rtol=1e-5)
    model.load_adapter(tmp_path / "out" / "00001", "other")
    model.set_adapter("other")
    torch.testing.assert_close(model(INPUTS), expected[1], atol=1e-5, rtol=1e-5)
    merged = model.merge_and_unload()
    torch.testing.assert_close(merged(INPUTS), expected[1], atol=1e-5, rtol=1e-5)
    zoo.export(tmp_path / "out")
    (tmp_path / "out" / "notes.txt").touch()
    with pytest.raises(ZooError, match="is not empty"):
        zoo.export(tmp_path / "out")


class Deep(nn.Module):
    """Two blocks, one of which PEFT would adapt by its rules, and a layer that it does not know."""

    def __init__(self):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.layers = nn.ModuleList([nn.ModuleDict({"query": nn.Linear(6, 6)}) for _ in range(2)])
            self.other = nn.ModuleDict({"query": nn.LayerNorm(6)})

    def forward(self, inputs):
        for layer in self.layers:
            inputs = layer["query"](inputs).tanh()
        return self.other["query"](inputs)


def test_what_is_exported_adapts_the_layers_that_rules_had_chosen(tmp_path):
    rules = {"layers_to_transform": [1], "layers_pattern": "layers", "exclude_modules": ["other.query"]}
    model = peft.get_peft_model(
        Deep(), peft.LoraConfig(r=2, target_modules=["query"], init_lora_weights=False, **rules)
    )
    model.save_pretrained(tmp_path / "in" / "0")
    WeightZoo.from_adapters(tmp_path / "zoo", tmp_path / "in").export(tmp_path / "out")
    found = peft.PeftModel.from_pretrained(Deep(), tmp_path / "out" / "00000")
    assert not any("lora" in name for name, _ in found.base_model.model.layers[0].named_parameters())
    torch.testing.assert_close(found(INPUTS), model(INPUTS), atol=1e-5, rtol=1e-5)


def test_biases_of_adapted_layers_belong_to_the_adapter(tmp_path):
    expected = save_adapter(tmp_path / "in" / "0", bias="lora_only")
    zoo = WeightZoo.from_adapters(tmp_path / "zoo", tmp_path / "in")
    assert "base_model.model.query.base_layer.bias" in zoo.state_dict(0)
    torch.testing.assert_close(outputs(zoo.state_dict(0)), expected, atol=1e-5, rtol=1e-5)
    network = AdaptedNetwork(Base(), zoo.state_dict(0))
    assert network.adapter_config["bias"] == "lora_only"
    assert network.adapter_config["modules_to_save"] == ["head"]
    zoo.export(tmp_path / "out")
    model = peft.PeftModel.from_pretrained(Base(), tmp_path / "out" / "00000")
    torch.testing.assert_close(model(INPUTS), expected, atol=1e-5, rtol=1e-5)


def test_exported_folders_say_what_they_adapt(tmp_path):
    save_adapter(tmp_path / "in" / "0")
    zoo = WeightZoo.from_adapters(tmp_path / "zoo", tmp_path / "in")
    zoo.export(tmp_path / "out")
    card = ModelCard.load(tmp_path / "out" / "00000" / "README.md")
    assert card.data.library_name == "peft"
    assert card.data.base_model == "me/base"
    assert {"lora", "peft", "base_model:adapter:me/base"} <= set(card.data.tags)
    assert "of `me/base`, of rank 2" in card.text
    assert "library_name: peft" in (tmp_path / "zoo" / "README.md").read_text()


@pytest.mark.parametrize(
    ("name", "named"),
    [
        ("gpt2", "gpt2"),
        ("me/base", "me/base"),
        ("./base", None),
        ("../x/y", None),
        ("b" * 300 + "/c", None),
        (None, None),
    ],
)
def test_cards_name_a_base_model_that_can_be_on_the_hub(tmp_path, name, named):
    save_adapter(tmp_path / "in" / "0")
    change_config(tmp_path / "in" / "0", base_model_name_or_path=name)
    zoo = WeightZoo.from_adapters(tmp_path / "zoo", tmp_path / "in")
    assert DatasetCard.load(zoo.folder / "README.md").data.to_dict().get("base_model") == named
    said = run_info(InfoConfig(str(zoo.folder)))
    assert f"adapters of {name or 'a model that their files do not name'}." in said


def test_hotswap_takes_what_is_exported(tmp_path):
    settings = {"modules_to_save": None}
    expected = [save_adapter(tmp_path / "in" / str(seed), seed, **settings) for seed in range(2)]
    WeightZoo.from_adapters(tmp_path / "zoo", tmp_path / "in").export(tmp_path / "out")
    hotswap = pytest.importorskip("peft.utils.hotswap")
    model = peft.PeftModel.from_pretrained(Base(), tmp_path / "out" / "00000")
    hotswap.hotswap_adapter(model, str(tmp_path / "out" / "00001"), adapter_name="default")
    torch.testing.assert_close(model(INPUTS), expected[1], atol=1e-5, rtol=1e-5)


def test_dora_keeps_its_magnitudes(tmp_path):
    expected = [save_adapter(tmp_path / "in" / str(seed), seed, use_dora=True) for seed in range(2)]
    zoo = WeightZoo.from_adapters(tmp_path / "zoo", tmp_path / "in")
    zoo.export(tmp_path / "out")
    with pytest.raises(TaskError, match="DoRA is imported and exported, and cannot be run here"):
        AdaptedNetwork(Base(), zoo.state_dict(0))
    model = peft.PeftModel.from_pretrained(Base(), tmp_path / "out" / "00001")
    torch.testing.assert_close(model(INPUTS), expected[1], atol=1e-4, rtol=1e-4)


def test_rows_say_what_adapters_are_for(tmp_path):
    for name in ("0", "1"):
        save_adapter(tmp_path / "in" / name)
    rows = [{"source": name, "topic": topic, "index": 7} for name, topic in (("1", "cats"), ("0", "dogs"))]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    arguments = ["--adapters", str(tmp_path / "in"), "--metadata", str(tmp_path / "rows.jsonl")]
    main(["import", *arguments, "--output-dir", str(tmp_path / "zoo")])
    found = [(row["index"], row["source"], row["topic"]) for row in WeightZoo(tmp_path / "zoo").metadata]
    assert found == [(0, "0", "dogs"), (1, "1", "cats")]
    with pytest.raises(ZooError, match="no row whose source is '1'"):
        WeightZoo.from_adapters(tmp_path / "other", tmp_path / "in", metadata=rows[1:])
    with pytest.raises(ZooError, match="metadata have several rows whose source is '1'"):
        WeightZoo.from_adapters(tmp_path / "other", tmp_path / "in", metadata=[*rows, {"source": "1", "topic": "a"}])
    assert not (tmp_path / "other").exists()
    save_adapter(tmp_path / "elsewhere" / "0")
    both = [tmp_path / "in" / "0", tmp_path / "elsewhere" / "0"]
    with pytest.raises(ZooError, match="Several adapters are called '0', and metadata tell them by their names"):
        WeightZoo.from_adapters(tmp_path / "other", both, metadata=rows)


def test_a_pattern_from_the_start_is_of_the_whole_name():
    assert adapters._of_pattern({"^fc": 32}, "base_model.model.block.fc", 8) == 8
    assert adapters._of_pattern({"^block.fc": 32}, "base_model.model.block.fc", 8) == 32
    assert adapters._of_pattern({"fc": 32}, "base_model.model.block.fc", 8) == 32


def test_columns_of_rows_may_have_any_name_and_text(tmp_path):
    save_adapter(tmp_path / "in" / "0")
    row = {"source": "0", "network": "unet", "self": 1, "prompt": "one\u2028two\x85three"}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row, ensure_ascii=False), encoding="utf-8")
    arguments = ["--adapters", str(tmp_path / "in"), "--metadata", str(tmp_path / "rows.jsonl")]
    main(["import", *arguments, "--output-dir", str(tmp_path / "zoo")])
    assert WeightZoo(tmp_path / "zoo").metadata == [{"index": 0, **row}]
    with pytest.raises(ZooError, match=r"metadata have the source \['0'\], which is no name"):
        WeightZoo.from_adapters(tmp_path / "other", tmp_path / "in", metadata=[{"source": ["0"]}])


# ---- what does not belong together


def rename(folder, old, new):
    file = folder / "adapter_model.safetensors"
    save_file({name.replace(old, new): value for name, value in load_file(file).items()}, file)


def drop(folder, part):
    file = folder / "adapter_model.safetensors"
    save_file({name: value for name, value in load_file(file).items() if part not in name}, file)


def change_values(folder, change):
    file = folder / "adapter_model.safetensors"
    save_file({name: change(value).contiguous() for name, value in load_file(file).items()}, file)


REFUSED = {
    "base": (lambda f: change_config(f, base_model_name_or_path="me/other"), "different base models: 'me/other' and"),
    "revision": (lambda f: change_config(f, revision="v2"), "different revisions of the base model: 'v2' and None"),
    "rank": (lambda f: save_again(f, r=3), r"different ranks: `.*lora_A.*` is \[3, 6\] and \[2, 6\]"),
    "targets": (lambda f: save_again(f, target_modules=["query"]), "adapt different modules: a alone has `.*value"),
    "rank_pattern": (lambda f: save_again(f, rank_pattern={"value": 3}), "different rank_pattern"),
    "alpha_pattern": (lambda f: save_again(f, alpha_pattern={"value": 3}), "different alpha_pattern"),
    "dora": (lambda f: save_again(f, use_dora=True), "b has magnitude vectors of DoRA, and a has none"),
    "paths": (lambda f: rename(f, "query", "q_proj"), "same shapes at different paths.*versions of transformers"),
    "other kind": (lambda f: change_config(f, peft_type="IA3"), "b: it is an adapter of type 'IA3'"),
    "damaged": (lambda f: (f / "adapter_config.json").write_text("{"), "b: its adapter_config.json is damaged"),
    "list": (lambda f: (f / "adapter_config.json").write_text("[]"), "b: its adapter_config.json is damaged"),
    "wrong rank": (lambda f: change_config(f, r=3), "says rank 3, and `.*lora_A.*` has 2"),
    "no weights": (lambda f: (f / "adapter_model.safetensors").unlink(), "and no adapter_model.safetensors"),
    "half": (lambda f: rename(f, "query.lora_B", "query.bias"), "and no `.*lora_B"),
    "other factors": (
        lambda f: rename(f, "query.lora_B.weight", "query.lora_B.bias"),
        "no part of a LoRA that is known",
    ),
    "biases of updates": (
        lambda f: save_again(f, lora_bias=True),
        "has lora_bias, by which its tensors mean something",
    ),
    "changed base": (lambda f: change_config(f, init_lora_weights="pissa_niter_4"), "which changes the base model"),
    "other base": (lambda f: change_config(f, init_lora_weights="lora_ga"), "which changes the base model"),
    "tokens": (lambda f: change_config(f, trainable_token_indices={"query": [1]}), "has trainable_token_indices, by"),
    "ties": (lambda f: change_config(f, ensure_weight_tying=True), "has ensure_weight_tying, by which"),
    "alone": (lambda f: drop(f, "query.lora_A"), r"b: it has `.*lora_B\.weight` and no `.*lora_A\.weight`"),
    "a number": (
        lambda f: change_values(f, lambda v: v[0, 0] if v.shape == (2, 6) else v),
        r"A\.weight` is \[\], which",
    ),
    "a row": (
        lambda f: change_values(f, lambda v: v[:, 0] if v.shape == (2, 6) else v),
        r"A\.weight` is \[2\], which",
    ),
    "no number": (lambda f: change_values(f, lambda v: v * torch.nan), "^b: .* holds NaN or infinite values"),
    "groups": (lambda f: change_values(f, lambda v: v[:, :1] if len(v) == 8 else v), "is no factor of a LoRA"),
    "nonsense": (lambda f: change_config(f, lora_alpha="8"), "has lora_alpha = '8'"),
    "infinite": (lambda f: change_config(f, lora_alpha=float("inf")), "has lora_alpha = inf"),
    "huge": (lambda f: change_config(f, lora_alpha=10**400), "has lora_alpha = 1000"),
    "pattern": (lambda f: change_config(f, alpha_pattern={"(a+)+$": 3}), "has alpha_pattern = "),
    "text": (lambda f: change_config(f, base_model_name_or_path="\x1b[31m"), "has base_model_name_or_path = "),
}


def save_again(folder, **settings):
    shutil.rmtree(folder)
    save_adapter(folder, **settings)


@pytest.mark.parametrize("name", REFUSED)
def test_adapters_that_do_not_belong_together_are_refused(tmp_path, name):
    for folder in ("a", "b"):
        save_adapter(tmp_path / "in" / folder)
    change, message = REFUSED[name]
    change(tmp_path / "in" / "b")
    with pytest.raises(ZooError, match=message):
        WeightZoo.from_adapters(tmp_path / "zoo", tmp_path / "in")
    assert not (tmp_path / "zoo").exists()


def test_what_is_no_adapter_is_named(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ZooError, match="empty holds no adapters"):
        WeightZoo.from_adapters(tmp_path / "zoo", tmp_path / "empty")
    with pytest.raises(ZooError, match="no folder or file here, and no name"):
        WeightZoo.from_adapters(tmp_path / "zoo", "nothing at all")
    with pytest.raises(ZooError, match="No adapters were given"):
        WeightZoo.from_adapters(tmp_path / "zoo", [])
    with pytest.raises(ConfigError, match="--checkpoints, --repositories or --adapters"):
        ImportConfig(str(tmp_path / "zoo"))
    for settings in ({"checkpoints": ("a.pt",), "metadata": "rows.jsonl"}, {"adapters": ("a",), "patterns": ("b",)}):
        with pytest.raises(ConfigError, match=r"is for adapters|are for checkpoints"):
            ImportConfig(str(tmp_path / "zoo"), **settings)


def test_a_zoo_that_claims_an_unusual_configuration_is_damaged(tmp_path):
    save_adapter(tmp_path / "in" / "a")
    WeightZoo.from_adapters(tmp_path / "zoo", tmp_path / "in")
    file = tmp_path / "zoo" / "zoo.json"
    content = json.loads(file.read_text())
    content["layout"]["adapter"]["auto_mapping"] = {"parent_library": "somewhere"}
    file.write_text(json.dumps(content))
    with pytest.raises(ZooError, match="the entry 'auto_mapping', which"):
        WeightZoo(tmp_path / "zoo")


# ---- diffusers and kohya


def unet() -> UNet2DConditionModel:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return UNet2DConditionModel(
            sample_size=8, in_channels=4, out_channels=4, block_out_channels=(8, 16), layers_per_block=1,
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), cross_attention_dim=8, attention_head_dim=4,
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"), norm_num_groups=4,
        ).eval()  # fmt: skip


NOISE = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
TEXT = torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(1))


def of_unet(model: UNet2DConditionModel) -> torch.Tensor:
    return model(NOISE, 5, TEXT).sample.detach()


def adapted_unet(seed: int, **settings) -> tuple[UNet2DConditionModel, dict[str, torch.Tensor]]:
    model = unet()
    model.add_adapter(peft.LoraConfig(r=2, lora_alpha=8, target_modules=["to_q", "to_v"], **settings))
    generator = torch.Generator().manual_seed(seed)
    state_dict = {
        name: 0.5 * torch.randn(value.shape, generator=generator)
        for name, value in peft.get_peft_model_state_dict(model).items()
    }
    peft.set_peft_model_state_dict(model, state_dict)
    return model, state_dict


def save_with_metadata(folder, model, state_dict):
    config = model.peft_config["default"].to_dict()
    StableDiffusionPipeline.save_lora_weights(folder, unet_lora_layers=state_dict, unet_lora_adapter_metadata=config)


def save_old(folder, model, state_dict):
    scaled = {name: value * (4 if "lora_B" in name else 1) for name, value in state_dict.items()}
    StableDiffusionPipeline.save_lora_weights(folder, unet_lora_layers=convert_state_dict_to_diffusers(scaled))


def save_kohya(folder, model, state_dict):
    folder.mkdir(parents=True)
    named = {}
    for name, value in state_dict.items():
        module, _, factor = name.partition(".lora_")
        key = "lora_unet_" + module.replace(".", "_")
        named[f"{key}.lora_{'down' if factor.startswith('A') else 'up'}.weight"] = value.contiguous()
        named[f"{key}.alpha"] = torch.tensor(8.0)
    save_file(named, folder / "style.safetensors")


@pytest.mark.parametrize("save", [save_with_metadata, save_old, save_kohya])
def test_loras_of_diffusers_and_kohya_are_converted_by_diffusers(tmp_path, save):
    expected = []
    for seed in range(2):
        model, state_dict = adapted_unet(seed)
        expected.append(of_unet(model))
        save(tmp_path / "in" / str(seed), model, state_dict)
    zoo = WeightZoo.from_adapters(tmp_path / "zoo", tmp_path / "in")
    assert zoo.layout.config.adapter == {}
    zoo.export(tmp_path / "out")
    plain = of_unet(unet())
    for index, one in enumerate(expected):
        model = unet()
        file = tmp_path / "out" / f"{index:05d}" / "pytorch_lora_weights.safetensors"
        model.load_lora_adapter(load_file(file), prefix="unet")
        torch.testing.assert_close(of_unet(model), one, atol=1e-4, rtol=1e-4)
        assert (one - plain).abs().max() > 1e-2


def test_notes_of_kohya_tell_base_models_apart(tmp_path):
    for seed, noted in enumerate(({"ss_new_sd_model_hash": "a" * 64}, {}, {"ss_new_sd_model_hash": "b" * 64})):
        model, state_dict = adapted_unet(seed)
        save_kohya(tmp_path / "in" / str(seed), model, state_dict)
        file = tmp_path / "in" / str(seed) / "style.safetensors"
        save_file(load_file(file), file, noted)
    WeightZoo.from_adapters(tmp_path / "zoo", [tmp_path / "in" / "0", tmp_path / "in" / "1"]).export(tmp_path / "out")
    assert "library_name: diffusers" in (tmp_path / "out" / "00000" / "README.md").read_text()
    for others in ("0", "2"), ("1", "0", "2"):  # the first one may lack what others have
        with pytest.raises(
            ZooError, match=r"style\.safetensors and others have different base models: 'bbb.*' and 'aaa"
        ):
            WeightZoo.from_adapters(tmp_path / "other", [tmp_path / "in" / one for one in others])


def test_patterns_of_diffusers_name_modules_from_the_start(tmp_path):
    module = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
    model, state_dict = adapted_unet(0, alpha_pattern={f"^{module}": 1})
    save_with_metadata(tmp_path / "in" / "0", model, state_dict)
    found = WeightZoo.from_adapters(tmp_path / "zoo", tmp_path / "in").state_dict(0)
    for name, scale in ((module, 1 / 2), (module.replace("to_q", "to_v"), 8 / 2)):
        b, a = (f"{name}.lora_{factor}.weight" for factor in "BA")
        torch.testing.assert_close(found[f"unet.{b}"] @ found[f"unet.{a}"], scale * state_dict[b] @ state_dict[a])


@pytest.mark.parametrize("ranks", [{}, {"attn1.to_v": 3}])
def test_a_pipeline_loads_what_is_exported(tmp_path, ranks):
    model, state_dict = adapted_unet(3, rank_pattern=ranks)
    save_with_metadata(tmp_path / "in" / "0", model, state_dict)
    WeightZoo.from_adapters(tmp_path / "zoo", tmp_path / "in").export(tmp_path / "out")
    with safe_open(tmp_path / "out" / "00000" / "pytorch_lora_weights.safetensors", "pt") as file:
        said = json.loads(file.metadata()["lora_adapter_metadata"])
    assert said["unet.r"] == said["unet.lora_alpha"] == 2
    assert said["unet.alpha_pattern"] == said["unet.rank_pattern"]
    assert {*said["unet.rank_pattern"].values()} == {*ranks.values()}
    again = WeightZoo.from_adapters(tmp_path / "again", tmp_path / "out")
    factors, before = again.state_dict(0), WeightZoo(tmp_path / "zoo").state_dict(0)
    for a in [name for name in factors if "lora_A" in name]:
        b = a.replace("lora_A", "lora_B")
        torch.testing.assert_close(factors[b] @ factors[a], before[b] @ before[a], atol=1e-4, rtol=1e-4)
    vae = AutoencoderKL(block_out_channels=(4,), norm_num_groups=2, latent_channels=4)
    pipe = StableDiffusionPipeline(vae, None, None, unet(), DDIMScheduler(), None, None, requires_safety_checker=False)
    pipe.load_lora_weights(tmp_path / "out" / "00000", adapter_name="generated")
    pipe.set_adapters("generated")
    torch.testing.assert_close(of_unet(pipe.unet), of_unet(model), atol=1e-4, rtol=1e-4)


def test_blocks_that_kohya_numbers_are_found(tmp_path):
    key = "lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q"
    tensors = {f"{key}.lora_down.weight": torch.ones(2, 8), f"{key}.lora_up.weight": torch.ones(8, 2)}
    save_file(tensors | {f"{key}.alpha": torch.tensor(4.0)}, tmp_path / "xl.safetensors")
    state_dict = WeightZoo.from_adapters(tmp_path / "zoo", tmp_path / "xl.safetensors").state_dict(0)
    module = "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"
    assert state_dict.keys() == {f"{module}.lora_A.weight", f"{module}.lora_B.weight"}
    product = state_dict[f"{module}.lora_B.weight"] @ state_dict[f"{module}.lora_A.weight"]
    torch.testing.assert_close(product, torch.full((8, 8), 2 * 4.0 / 2))
    save_file(tensors | {f"{key}.dora_scale": torch.ones(8, 1)}, tmp_path / "xl.safetensors")
    with pytest.raises(ZooError, match="scales of DoRA, which diffusers leaves out"):
        WeightZoo.from_adapters(tmp_path / "other", tmp_path / "xl.safetensors")


def test_names_that_kohya_has_for_other_models_are_refused(tmp_path):
    key = "lora_unet_double_blocks_0_img_attn_proj"
    tensors = {f"{key}.lora_down.weight": torch.ones(2, 8), f"{key}.lora_up.weight": torch.ones(8, 2)}
    save_file(tensors | {f"{key}.alpha": torch.tensor(4.0)}, tmp_path / "flux.safetensors")
    with pytest.raises(
        ZooError, match=r"flux\.safetensors: .*`unet\.double.*`, which no U-Net of Stable Diffusion has"
    ):
        WeightZoo.from_adapters(tmp_path / "zoo", tmp_path / "flux.safetensors")


def test_a_file_of_peft_has_its_scale_beside_it(tmp_path):
    save_adapter(tmp_path / "in" / "a", lora_alpha=16)
    file = tmp_path / "in" / "a" / "adapter_model.safetensors"
    whole = WeightZoo.from_adapters(tmp_path / "zoo", tmp_path / "in" / "a")
    assert torch.equal(WeightZoo.from_adapters(tmp_path / "same", [file])[0], whole[0])
    (tmp_path / "alone").mkdir()
    for place in (shutil.copy(file, tmp_path / "alone"), tmp_path / "alone"):
        with pytest.raises(
            ZooError, match=r"is one of PEFT, and has no adapter_config\.json, without which its scale"
        ):
            WeightZoo.from_adapters(tmp_path / "other", place)


def test_a_file_that_is_damaged_or_of_another_kind_is_said(tmp_path):
    (tmp_path / "pointer.safetensors").write_text("version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(ZooError, match=r"^pointer\.safetensors: .* cannot be read as safetensors"):
        WeightZoo.from_adapters(tmp_path / "zoo", tmp_path / "pointer.safetensors")
    save_adapter(tmp_path / "a")
    torch.save({"w": torch.ones(2)}, tmp_path / "a" / "adapter_model.safetensors")
    with pytest.raises(ZooError, match=r"^a: .* cannot be read as safetensors"):
        WeightZoo.from_adapters(tmp_path / "zoo", tmp_path / "a")


def test_a_file_of_another_format_says_what_to_do(tmp_path):
    save_file({"blocks.0.weight": torch.ones(2, 2)}, tmp_path / "other.safetensors")
    with pytest.raises(ZooError, match=r"other\.safetensors: .* save it with `save_lora_weights\(.*keeps its scale"):
        WeightZoo.from_adapters(tmp_path / "zoo", tmp_path / "other.safetensors")


def test_the_command_says_what_is_there(tmp_path, capsys):
    save_adapter(tmp_path / "in" / "a")
    main(["import", "--adapters", str(tmp_path / "in"), "--output-dir", str(tmp_path / "zoo")])
    said = capsys.readouterr().out
    assert re.match(r"1 networks of \d+ parameters are in \S+ \(\d\.\d s\)\. Next: pdiff-hf train --zoo \S+\n", said)


# ---- of other zoos


def test_networks_of_other_zoos_become_files_of_safetensors(tmp_path):
    network = Base()
    zoo = WeightZoo.create(tmp_path / "zoo", ParameterLayout.from_state_dict(network.state_dict(), ("head.*",)))
    with zoo:
        zoo.append(Base().state_dict())
    zoo.export(tmp_path / "out")
    found = load_file(tmp_path / "out" / "00000" / "model.safetensors")
    assert found.keys() == network.state_dict().keys()
    network.load_state_dict(found, strict=True)
