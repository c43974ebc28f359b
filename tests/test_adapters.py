"""From a family of tasks to adapters for tasks that nobody trained, which PEFT loads."""

import json
from pathlib import Path

import peft
import pytest
import torch

from pdiff_hf import (
    EvaluateConfig,
    GenerateConfig,
    NeuronTrainConfig,
    ParameterLayout,
    TrainConfig,
    WeightZoo,
    evaluate,
    load_pipeline,
    run_collect,
    run_evaluate,
    run_generate,
    run_train,
)
from pdiff_hf.align import run_align
from pdiff_hf.configs import AlignConfig, CollectConfig
from pdiff_hf.errors import ZooError
from pdiff_hf.networks.gauge import Gauge

from . import families
from .conftest import SMALL_TRAINING


NAME = f"{families.__name__}:AdaptersOfSides"
FAMILY = families.AdaptersOfSides()
SMALL = {"hidden_size": 32, "num_layers": 2, "num_attention_heads": 2, "batch_size": 32}


@pytest.fixture(scope="module")
def zoo(tmp_path_factory) -> WeightZoo:
    return run_collect(CollectConfig(NAME, str(tmp_path_factory.mktemp("adapters") / "zoo"), networks_per_task=4))


@pytest.fixture(scope="module")
def aligned(zoo, tmp_path_factory) -> WeightZoo:
    folder = tmp_path_factory.mktemp("adapters") / "aligned"
    said = run_align(AlignConfig(str(zoo.folder), str(folder), task=NAME))
    assert "96 networks with 2 low-rank updates" in said
    assert f"Next: pdiff-hf train --family neuron --no-initial --task {NAME}" in said
    return WeightZoo(folder)


def learn(zoo: WeightZoo, folder: Path, told: bool) -> None:
    """Trains a generator that is, or is not, told each initialization."""
    run_train(
        NeuronTrainConfig(
            zoo=str(zoo.folder),
            output_dir=str(folder),
            task=NAME,
            condition=("direction",),
            transformer_steps=300,
            initial=told,
            **SMALL,
        )
    )


def test_what_is_collected_says_what_it_adapts(zoo):
    config = zoo.layout.config.adapter
    assert config["base_model_name_or_path"] == "me/base"
    assert config["target_modules"] == ["hidden", "out"]
    assert config["modules_to_save"] == ["head"]
    assert (config["r"], config["lora_alpha"]) == (2, 2)
    card = (zoo.folder / "README.md").read_text()
    assert "base_model: me/base" in card
    assert "LoRA adapters of `me/base`, of rank 2 and scale 1" in card


def test_an_aligned_zoo_is_in_canonical_form(zoo, aligned):
    gauge, vectors = Gauge(zoo.layout), zoo.vectors()
    canonical = gauge.canonical(vectors, gauge.reference(vectors))
    torch.testing.assert_close(aligned.vectors(), canonical, atol=1e-4, rtol=1e-4)
    assert [row["direction"] for row in aligned.rows()] == [row["direction"] for row in zoo.rows()]
    spread, before = ((v - v.mean(0)).norm(dim=1).mean() for v in (canonical, vectors))
    assert spread < 0.9 * before


@pytest.mark.parametrize("told", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_adapters_are_generated_for_tasks_that_nobody_trained(zoo, aligned, tmp_path, told):
    learn(zoo if told else aligned, tmp_path / "pipeline", told)
    asked = FAMILY.conditions("test")
    (tmp_path / "asked.jsonl").write_text("".join(json.dumps(one) + "\n" for one in asked))
    generated = run_generate(
        GenerateConfig(
            pipeline=str(tmp_path / "pipeline"),
            output_dir=str(tmp_path / "generated"),
            num_networks=len(asked),
            conditions=str(tmp_path / "asked.jsonl"),
            export=str(tmp_path / "exported"),
        )
    )
    accuracies = []
    for index, condition in enumerate(asked):
        task = FAMILY.task(condition)
        inputs, targets = task.data("test")
        network = task.build_network()
        network.load_state_dict(generated.state_dict(index))
        model = peft.PeftModel.from_pretrained(families.Base(), tmp_path / "exported" / f"{index:05d}")
        torch.testing.assert_close(model(inputs), network(inputs), atol=1e-5, rtol=1e-5)
        accuracies.append((model(inputs).argmax(1) == targets).float().mean())
    assert torch.stack(accuracies).mean() > 0.85
    card = (tmp_path / "pipeline" / "README.md").read_text()
    assert "- me/base" in card
    assert "- peft" in card
    layout = load_pipeline(tmp_path / "pipeline").layout
    assert layout.config.adapter["r"] == 2
    if told:
        # Training begins with the base network's own head.
        drawn = layout.draw_initial([torch.Generator().manual_seed(seed) for seed in range(2)])
        head = layout.slices["base_model.model.head.weight"]
        assert torch.equal(drawn[:, head], families.Base().head.weight.detach().flatten().expand(2, -1))


def test_adapters_of_another_base_model_are_not_compared(aligned, tmp_path):
    other = aligned.layout.config.adapter | {"base_model_name_or_path": "someone/else"}
    layout = ParameterLayout(tensors=aligned.layout.config.tensors, adapter=other)
    with WeightZoo.create(tmp_path / "zoo", layout) as zoo:
        zoo.append(aligned[0])
    with pytest.raises(ZooError, match="they hold adapters of 'me/base' and of 'someone/else'"):
        evaluate(families.AdapterOfSide(0.0), trained=aligned, generated=zoo)


def test_the_published_family_takes_adapters_too(aligned, tmp_path):
    run_train(
        TrainConfig(zoo=str(aligned.folder), output_dir=str(tmp_path / "p"), **SMALL_TRAINING | {"unet_steps": 5})
    )
    pipe = load_pipeline(tmp_path / "p")
    state_dict = pipe(num_networks=1, generator=torch.Generator().manual_seed(0), num_inference_steps=2).state_dicts[0]
    FAMILY.task(FAMILY.conditions("test")[0]).build_network().load_state_dict(state_dict)
    assert pipe.layout.config.adapter == aligned.layout.config.adapter


@pytest.mark.slow
def test_the_audit_of_a_condition_knows_adapters(aligned, tmp_path):
    learn(aligned, tmp_path / "pipeline", told=False)
    report = run_evaluate(
        EvaluateConfig(NAME, str(aligned.folder), str(tmp_path / "pipeline"), output_dir=str(tmp_path / "report"))
    )
    groups = {name: group["single"]["mean"] for name, group in report["groups"].items()}
    assert groups["mix of the nearest"] > 0.85
    assert groups["one network for all tasks"] < 0.75
    assert groups["generated"] > 0.85
    assert groups["shuffled condition"] < groups["generated"] - 0.2
    assert report["training"]["steps"] >= 1
