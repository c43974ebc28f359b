# Over 400 lines: the tests of one recipe share its zoo and its pipeline.
"""Networks of independent seeds, learned without an autoencoder: their hidden units are tokens."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler
from torch import nn

from pdiff_hf import (
    CollectConfig,
    GenerateConfig,
    NeuralNetworkDiffusionPipeline,
    NeuronTrainConfig,
    NeuronTransformerModel,
    ParameterLayout,
    TrainConfig,
    WeightZoo,
    evaluate,
    load_pipeline,
    load_task,
    run_collect,
    run_generate,
    run_train,
)
from pdiff_hf.align import run_align
from pdiff_hf.config import parse
from pdiff_hf.configs import AlignConfig
from pdiff_hf.errors import ConfigError, PipelineError, TaskError, TrainingError, ZooError
from pdiff_hf.evaluation import equal_time, study
from pdiff_hf.evaluation.equal_time import from_the_same
from pdiff_hf.networks.symmetry import Symmetry
from pdiff_hf.networks.trainer import NetworkTrainer
from pdiff_hf.tasks.digits import DigitsMLP
from pdiff_hf.train.neuron_diffusion import initial_vectors, share_statistics
from pdiff_hf.train.objectives import FlowMatchingObjective

from .. import families
from ..conftest import launch, site_without_this_package


SETTINGS = {"hidden_size": 16, "num_layers": 2, "num_attention_heads": 2, "batch_size": 16, "transformer_steps": 30}
ARGUMENTS = [
    *("--family", "neuron", "--hidden-size", "16", "--num-layers", "2", "--num-attention-heads", "2"),
    *("--batch-size", "16", "--transformer-steps", "30", "--checkpointing-steps", "10"),
]


class TwoHidden(DigitsMLP):
    """Two hidden layers, between which are weights of pairs."""

    def build_network(self):
        return nn.Sequential(nn.Flatten(), nn.Linear(64, 6), nn.ReLU(), nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 10))


class Branching(DigitsMLP):
    """No chain: what a softmax does to its units is not known."""

    def build_network(self):
        return nn.Sequential(nn.Flatten(), nn.Linear(64, 6), nn.Softmax(1), nn.Linear(6, 10))


class Normed(DigitsMLP):
    """With layer norm, of which there is no stacked form."""

    def build_network(self):
        return nn.Sequential(nn.Flatten(), nn.Linear(64, 6), nn.LayerNorm(6), nn.ReLU(), nn.Linear(6, 10))


class Watched(DigitsMLP):
    """With a hook that reads numbers, which many networks at once do not have."""

    def build_network(self):
        network = nn.Sequential(nn.Flatten(), nn.Linear(64, 6), nn.ReLU(), nn.Linear(6, 10))
        network[1].register_forward_hook(lambda module, inputs, outputs: outputs if outputs.sum().item() else None)
        return network


class Placed(DigitsMLP):
    """With a hook that tells units apart."""

    def build_network(self):
        network = super().build_network()
        network[1].register_forward_hook(lambda module, inputs, outputs: outputs * torch.arange(len(outputs.T)))
        return network


class Worded(DigitsMLP):
    """Whose networks return a dict."""

    def build_network(self):
        network = super().build_network()
        network.register_forward_hook(lambda module, inputs, outputs: {"logits": outputs})
        return network

    def probabilities(self, outputs):
        return outputs["logits"].softmax(-1)


def name_of(task: type) -> str:
    return f"{__name__}:{task.__name__}"


def collected(folder: Path, task: str, count: int = 40) -> WeightZoo:
    return run_collect(CollectConfig(task, str(folder), num_networks=count, protocol="independent", epochs=15))


@pytest.fixture(scope="module")
def zoo(tmp_path_factory) -> WeightZoo:
    return collected(tmp_path_factory.mktemp("neuron") / "zoo", name_of(TwoHidden))


def with_rows(zoo: WeightZoo, folder: Path, **row) -> WeightZoo:
    """The same networks, each with this row."""
    with WeightZoo.create(folder, zoo.layout, task=zoo.task) as other:
        for vector in zoo.vectors():
            other.append(vector, **row)
    return other


def config(zoo: WeightZoo, folder: Path, **changes) -> NeuronTrainConfig:
    places = {"zoo": str(zoo.folder), "output_dir": str(folder), "task": zoo.task}
    return NeuronTrainConfig(**(places | SETTINGS | changes))


def losses(folder: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (folder / "train.losses.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def trained(zoo, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("neuron") / "pipeline"
    run_train(config(zoo, folder, transformer_steps=300))
    return folder


@pytest.mark.slow
def test_the_main_process_draws_alone(zoo, trained, tmp_path, monkeypatch):
    """Others wait for it elsewhere, so that it may ask them for nothing."""
    drawn = []

    def draw(self, *arguments):
        with monkeypatch.context() as alone:
            alone.setattr(study, "from_main", lambda _: pytest.fail("The others do not take part."))
            drawn.extend(drawing(self, *arguments))
        return drawn

    drawing = study.Study.draw
    monkeypatch.setattr(study.Study, "draw", draw)
    monkeypatch.setattr(NeuralNetworkDiffusionPipeline, "default_chunk_size", 3)
    denoisings = []
    denoising = study.Study.denoising
    monkeypatch.setattr(study.Study, "denoising", lambda self: denoisings.append(denoising(self)) or denoisings[-1])
    pipeline = load_pipeline(trained)
    evaluate(
        zoo.task, trained=zoo, generated=pipeline, pipeline=pipeline, num_networks=4, networks_per_point=4,
        output_dir=tmp_path,
    )  # fmt: skip
    assert {"plane.png", "training.png", "denoising.png"} <= {file.name for file in drawn}
    # Of chunks, one after the other, each step is of all networks.
    ((steps, accuracies),) = denoisings
    assert steps == sorted(set(steps))
    assert {len(one) for one in accuracies} == {4}


def test_the_last_step_leads_from_the_noise_that_was_asked_for(zoo, tmp_path):
    scheduler = run_train(config(zoo, tmp_path, transformer_steps=2, last_sigma=0.5)).scheduler
    scheduler.set_timesteps(4)
    assert scheduler.sigmas[-2:].tolist() == pytest.approx([0.5, 0.0])


def test_the_least_noise_of_the_training_is_what_was_asked_for(trained):
    denoiser = load_pipeline(trained).transformer
    data = {"networks": torch.zeros(1, 1, denoiser.config.num_parameters)}

    def draw(**least) -> dict:
        objective = FlowMatchingObjective(denoiser, FlowMatchEulerDiscreteScheduler(), **least)
        return objective.draw(1000, data, torch.Generator().manual_seed(0))

    everywhere, above = draw(), draw(min_sigma=0.9)
    assert everywhere["sigmas"].aminmax().min < 0.01
    torch.testing.assert_close(above["sigmas"], 0.9 + 0.1 * everywhere["sigmas"])
    torch.testing.assert_close(above["noise"], everywhere["noise"])


def test_the_least_noise_that_was_asked_for_is_trained_with(zoo, tmp_path):
    for least in (0.0, 0.2):
        run_train(config(zoo, tmp_path / str(least), transformer_steps=2, min_sigma=least))
    assert losses(tmp_path / "0.0") != losses(tmp_path / "0.2")


def sample(pipe, count: int = 3, **arguments) -> torch.Tensor:
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    arguments = {"num_inference_steps": 5, "generator": generator, "output_type": "pt", **arguments}
    return pipe(count, **arguments).state_dicts


def accuracy(zoo: WeightZoo, vectors: torch.Tensor) -> float:
    task = TwoHidden()
    network, (inputs, targets) = task.build_network(), task.data("test")
    total = 0.0
    for state_dict in zoo.layout.unflatten(vectors):
        network.load_state_dict(state_dict)
        total += task.correct(task.predict(network, inputs), targets).double().mean().item()
    return total / len(vectors)


def test_the_loss_falls_and_networks_come_of_the_pipeline(trained, zoo):
    found = losses(trained)
    assert len(found) == 300
    assert sum(found[-20:]) < 0.5 * sum(found[:20])
    pipe = load_pipeline(trained)
    assert isinstance(pipe.transformer, NeuronTransformerModel)
    assert isinstance(pipe.scheduler, FlowMatchEulerDiscreteScheduler)
    assert pipe.vae is pipe.unet is None
    initial = initial_vectors(TwoHidden(), zoo)
    # Far from trained yet, and no longer what it began with.
    assert accuracy(zoo, sample(pipe, 20)) > accuracy(zoo, initial[:20]) + 0.1
    assert accuracy(zoo, sample(pipe, 20, initial=initial[:20])) > accuracy(zoo, initial[:20]) + 0.1


@pytest.mark.slow
def test_the_folder_serves_without_the_package(trained, tmp_path):
    program = """
import sys, torch
from diffusers import DiffusionPipeline
pipe = DiffusionPipeline.from_pretrained(sys.argv[1], trust_remote_code=True)
networks = pipe(2, num_inference_steps=5, generator=torch.Generator().manual_seed(0), output_type="pt").state_dicts
assert "pdiff_hf" not in sys.modules
torch.save(networks, sys.argv[2])
"""
    finished = subprocess.run(
        [sys.executable, "-S", "-c", program, str(trained), str(tmp_path / "networks.pt")],
        capture_output=True, text=True, env={**os.environ, "PYTHONPATH": site_without_this_package(tmp_path)},
        cwd=tmp_path, check=False,
    )  # fmt: skip
    assert finished.returncode == 0, finished.stderr
    torch.testing.assert_close(torch.load(tmp_path / "networks.pt"), sample(load_pipeline(trained), 2))
    again = DiffusionPipeline.from_pretrained(trained, trust_remote_code=True)
    again.save_pretrained(tmp_path / "again")
    torch.testing.assert_close(sample(load_pipeline(tmp_path / "again"), 2), sample(again, 2))


def test_an_interrupted_training_resumes_with_the_losses_of_an_uninterrupted_one(zoo, tmp_path):
    run_train(config(zoo, tmp_path / "whole", checkpointing_steps=10))
    expected = losses(tmp_path / "whole")
    run_train(config(zoo, tmp_path / "part", checkpointing_steps=10, checkpoints_total_limit=None))
    for name in ("model_index.json", "checkpoint-20"):
        path = tmp_path / "part" / name
        path.unlink() if path.is_file() else path.rename(tmp_path / "gone")
    run_train(config(zoo, tmp_path / "part", checkpointing_steps=10, resume_from_checkpoint="latest"))
    assert losses(tmp_path / "part") == pytest.approx(expected, rel=1e-5)


def test_a_training_of_adapters_alone_goes_on(tmp_path):
    """No number of such a network is outside of its updates: one token of the transformer is empty."""
    task = f"{families.__name__}:UpdatesOfSides"
    folder = str(tmp_path / "zoo")
    run_collect(CollectConfig(task, folder, networks_per_task=1, epochs=1))
    settings = {**SETTINGS, "zoo": folder, "output_dir": str(tmp_path / "pipeline"), "task": task}
    settings |= {"checkpointing_steps": 3, "transformer_steps": 9}
    run_train(NeuronTrainConfig(**settings))
    expected = losses(tmp_path / "pipeline")
    run_train(NeuronTrainConfig(**settings, resume_from_checkpoint="checkpoint-3"))
    assert losses(tmp_path / "pipeline") == pytest.approx(expected, rel=1e-5)


def test_a_training_that_goes_on_from_an_earlier_checkpoint_has_no_later_ones(zoo, tmp_path, monkeypatch):
    settings = {"checkpointing_steps": 10, "transformer_steps": 30}
    run_train(config(zoo, tmp_path, **settings))
    again = config(zoo, tmp_path, **settings, resume_from_checkpoint="checkpoint-10")
    with monkeypatch.context() as patch:
        patch.setattr(FlowMatchingObjective, "draw", interrupt)
        with pytest.raises(KeyboardInterrupt):
            run_train(again)
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-10"]
    run_train(replace(again, resume_from_checkpoint="latest"))
    assert len(losses(tmp_path)) == 30


def interrupt(*_) -> None:
    raise KeyboardInterrupt


def test_a_training_does_not_go_on_with_another_task(tmp_path):
    file = tmp_path / "task.py"
    file.write_text(
        "from tests.train.test_neuron import TwoHidden\nclass Mine(TwoHidden):\n    scale = 1\n"
        "    def data(self, split):\n        x, y = super().data(split)\n        return self.scale * x, y\n"
    )
    zoo = collected(tmp_path / "zoo", f"{file}:Mine", 8)
    settings = {"checkpointing_steps": 10, "batch_size": 4}
    run_train(config(zoo, tmp_path / "pipeline", **settings))
    file.write_text(file.read_text().replace("scale = 1", "scale = 100"))
    with pytest.raises(ConfigError, match=r"The task of the run in .* changed meanwhile: it cannot be resumed"):
        run_train(config(zoo, tmp_path / "pipeline", **settings, resume_from_checkpoint="checkpoint-20"))


def test_telling_predictions_takes_no_gradients_away_in_half_precision(trained):
    """Casts of weights are kept, and those that were made without gradients have none."""
    denoiser = load_pipeline(trained).transformer.train()
    objective = FlowMatchingObjective(denoiser, FlowMatchEulerDiscreteScheduler(stochastic_sampling=True))
    networks, noise, initial = (torch.randn(2, 1, denoiser.config.num_parameters) for _ in range(3))
    with torch.autocast("cpu", torch.bfloat16):
        loss = objective(networks, noise, torch.rand(2), torch.ones(2, dtype=torch.bool), initial=initial)
    loss.backward()
    assert all(weight.grad is not None for weight in denoiser.parameters())


@pytest.mark.slow
def test_two_processes_train_the_pipeline_of_one(zoo, tmp_path):
    arguments = ["train", *ARGUMENTS, "--zoo", str(zoo.folder), "--task", zoo.task]
    for processes, name in ((1, "one"), (2, "two")):
        launch(processes, "-m", "pdiff_hf", *arguments, "--output-dir", str(tmp_path / name))
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-3)


def test_the_card_says_what_the_networks_are(trained):
    card = (trained / "README.md").read_text()
    assert "pipe(initial=state_dicts)" in card
    assert "independent seeds" in card
    assert "consecutive checkpoints" not in card
    assert "| family | neuron |" in card


# ---- what it is told


def test_initializations_are_built_again_from_their_seeds(zoo):
    torch.manual_seed(3)
    expected = zoo.layout.flatten(TwoHidden().build_network().state_dict())
    assert torch.equal(initial_vectors(TwoHidden(), zoo)[3], expected)
    assert zoo.metadata[3]["initial_norm"] == pytest.approx(expected.norm().item())


def test_a_zoo_without_recorded_initializations_is_refused_and_learned_without(zoo, tmp_path):
    other = with_rows(zoo, tmp_path / "zoo", seed=1)
    with pytest.raises(ZooError, match=r"does not record how its networks were initialized.*--no-initial"):
        run_train(config(other, tmp_path / "told"))
    run_train(config(other, tmp_path / "not", initial=False))
    pipe = load_pipeline(tmp_path / "not")
    assert not pipe.takes_initial
    assert sample(pipe).isfinite().all()


class OtherHidden(TwoHidden):
    def build_network(self):
        network = super().build_network()
        nn.init.normal_(network[1].weight)
        return network


def test_a_task_that_builds_something_else_is_refused(zoo, tmp_path):
    with pytest.raises(ZooError, match=r"does not build what network 0 of .* was trained from"):
        run_train(config(zoo, tmp_path / "pipeline", task=name_of(OtherHidden)))


@pytest.mark.parametrize("row", [{"seed": -1}, {"seed": 2**64}, {"seed": True}, {"initial_norm": "1"}])
def test_rows_that_are_no_record_are_refused(zoo, tmp_path, row):
    other = with_rows(zoo, tmp_path / "zoo", **({"seed": 1, "initial_norm": 1.0} | row))
    with pytest.raises(ZooError, match="does not record"):
        run_train(config(other, tmp_path / "told"))


class Orthogonal(TwoHidden):
    def build_network(self):
        network = super().build_network()
        nn.init.orthogonal_(network[3].weight)
        return network


def test_what_cannot_be_drawn_is_said_in_training_and_has_to_be_passed(tmp_path, capsys):
    zoo = collected(tmp_path / "zoo", name_of(Orthogonal))
    run_train(config(zoo, tmp_path / "pipeline", transformer_steps=5))
    assert "3.weight: no independent draws" in capsys.readouterr().err
    with pytest.raises(PipelineError, match=r"pass `initial`.*call the pipeline from Python"):
        run_generate(GenerateConfig(pipeline=str(tmp_path / "pipeline"), output_dir=str(tmp_path / "generated")))
    assert not (tmp_path / "generated" / "zoo.json").exists()
    pipe = load_pipeline(tmp_path / "pipeline")
    with pytest.raises(ValueError, match="pass `initial`"):
        sample(pipe)
    initial = initial_vectors(Orthogonal(), zoo)[:3]
    made = sample(pipe, initial=initial)
    assert made.isfinite().all()
    settings = {"networks_per_point": 2, "output_dir": tmp_path}
    report = evaluate(Orthogonal(), trained=zoo, generated=pipe.layout.unflatten(made), pipeline=pipe, **settings)
    assert report["training"] is None
    assert not (tmp_path / "denoising.png").exists()
    with pytest.raises(PipelineError, match=r"cannot sample by itself: .*pass `initial`"):
        evaluate(Orthogonal(), trained=zoo, generated=pipe)


def test_aligned_networks_have_lost_their_initialization(zoo, tmp_path):
    run_align(AlignConfig(str(zoo.folder), str(tmp_path), zoo.task))
    assert "initial_norm" not in WeightZoo(tmp_path).metadata[0]


def test_units_in_an_order_are_those_of_the_canonical_form(zoo, tmp_path):
    run_train(config(zoo, tmp_path / "pipeline", ordered=True, initial=False))
    pipe = load_pipeline(tmp_path / "pipeline")
    assert pipe.transformer.config.ordered
    run_align(AlignConfig(str(zoo.folder), str(tmp_path / "aligned"), zoo.task))
    aligned = WeightZoo(tmp_path / "aligned").vectors()
    torch.testing.assert_close(pipe.layout.mean, aligned.mean(0), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(pipe.layout.std, aligned.std(0, correction=0), rtol=1e-3, atol=1e-4)
    assert (pipe.layout.mean - zoo.vectors().mean(0)).norm() > 0.5 * aligned.mean(0).norm()
    assert sample(pipe).isfinite().all()


def test_one_step_is_too_few(trained, tmp_path):
    with pytest.raises(ValueError, match="1 denoising steps are too few for this scheduler: take 2 or more"):
        sample(load_pipeline(trained), num_inference_steps=1)
    settings = {"output_dir": str(tmp_path), "num_networks": 2, "num_inference_steps": 1}
    with pytest.raises(PipelineError, match="are too few"):
        run_generate(GenerateConfig(pipeline=str(trained), **settings))


def test_an_evaluation_trains_as_long_from_the_same_initializations(trained, zoo, tmp_path):
    report = evaluate(TwoHidden(), trained=zoo, generated=trained, num_networks=10, networks_per_point=5)
    training = report["training"]
    assert training["steps"] >= 1
    assert training["seconds"] > 0
    assert training["accuracy"]["min"] <= training["accuracy"]["mean"] <= 1
    assert "reconstructed" not in report["groups"]
    pipe = load_pipeline(trained)
    initial = pipe.layout.draw_initial([torch.Generator().manual_seed(seed) for seed in range(50)])
    facts, vectors = from_the_same(TwoHidden(), pipe, 2, bf16=True)
    alone = NetworkTrainer(TwoHidden(), 0, epochs=1)
    alone.network.load_state_dict(pipe.layout.unflatten(initial[:1])[0])
    for _ in range(facts["steps"]):
        alone.train_step()
    found = zoo.layout.flatten(alone.network.state_dict()).cpu()
    torch.testing.assert_close(vectors[0], found, atol=1e-3, rtol=1e-2)


def test_as_long_is_as_many_steps_as_fit_the_time(trained, monkeypatch):
    # 100 steps take a second, beside half a second around them, and generating 50 networks takes two.
    monkeypatch.setattr(
        equal_time, "_seconds", lambda work, *given: 0.5 + (given[0] - 2) / 100 if len(given) == 2 else 2.0
    )
    facts, _ = from_the_same(TwoHidden(), load_pipeline(trained), 2, bf16=True)
    assert facts["steps"] == 200
    assert facts["seconds"] == pytest.approx(2.0 / equal_time.NETWORKS)


# ---- what cannot be learned


@pytest.mark.parametrize(
    ("task", "changes", "message"),
    [
        (Branching, {}, "cannot be tokens: Softmax"),
        (Watched, {}, "behaviour loss needs networks that run side by side"),
        (Worded, {}, "behaviour loss needs networks that run side by side"),
        (TwoHidden, {"hidden_size": 2**20}, "memory|takes at least .* GB"),
        (TwoHidden, {"batch_size": 10**8}, "takes at least .* GB, .* smaller --batch-size"),
        (TwoHidden, {"task": "digits-mlp"}, "are no networks of digits-mlp"),
        (TwoHidden, {}, "does not record how its networks were initialized"),
        (Placed, {"ordered": True, "initial": False}, "units of Sequential cannot be put into an order: exchanging"),
    ],
)
def test_what_cannot_be_learned_is_said_before_anything_is_written(task, changes, message, tmp_path):
    layout = ParameterLayout.from_state_dict(task().build_network().state_dict())
    with WeightZoo.create(tmp_path / "zoo", layout, task=name_of(task)) as zoo:
        for seed in range(3):
            zoo.append(torch.randn(layout.vector_size, generator=torch.Generator().manual_seed(seed)))
    with pytest.raises((TaskError, ConfigError, ZooError), match=message):
        run_train(config(zoo, tmp_path / "pipeline", **changes))
    assert not (tmp_path / "pipeline" / "train.yaml").exists()


def test_without_a_behaviour_loss_networks_need_no_stacked_form(tmp_path):
    zoo = collected(tmp_path / "zoo", name_of(Watched), 8)
    run_train(config(zoo, tmp_path / "pipeline", behaviour_weight=0.0, transformer_steps=5, batch_size=4))
    assert sample(load_pipeline(tmp_path / "pipeline"), 2).isfinite().all()


def test_layers_without_a_stacked_form_have_a_behaviour_loss(tmp_path):
    zoo = collected(tmp_path / "zoo", name_of(Normed), 8)
    run_train(config(zoo, tmp_path / "pipeline", transformer_steps=5, batch_size=4))
    assert sample(load_pipeline(tmp_path / "pipeline"), 2).isfinite().all()


def test_a_zoo_whose_task_is_foreign_code_needs_its_name(zoo, tmp_path):
    with pytest.raises(TaskError, match="pass --task"):
        run_train(replace(config(zoo, tmp_path), task=None))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": 18, "num_attention_heads": 4}, "even multiple of num_attention_heads"),
        ({"transformer_steps": 0}, "steps has to be at least 1"),
        ({"behaviour_weight": -1.0}, "behaviour_weight has to be at least 0"),
        ({"transformer_learning_rate": 0.0}, "learning_rate has to be above 0"),
        ({"mixed_precision": "fp16"}, "this family has two: take bf16"),
        ({"last_sigma": 1.0}, "last_sigma has to be above 0 and below 1, and is 1.0"),
        ({"min_sigma": 0.3}, r"min_sigma has to be from 0 to last_sigma, 0\.2, and is 0\.3"),
        ({"min_sigma": -0.1}, "min_sigma has to be from 0 to last_sigma"),
        ({"ordered": True}, "ordered needs --no-initial"),
    ],
)
def test_settings_out_of_range_are_refused(zoo, tmp_path, changes, message):
    with pytest.raises(ConfigError, match=message):
        config(zoo, tmp_path, **changes)


def test_a_diverged_training_says_which_rate_to_lower(zoo, tmp_path):
    with pytest.raises(TrainingError, match=r"transformer diverged.*--transformer-learning-rate"):
        run_train(config(zoo, tmp_path, transformer_learning_rate=1e30))


# ---- families


def test_the_family_chooses_the_settings(tmp_path):
    union = TrainConfig | NeuronTrainConfig
    assert parse(union, "train", []) == TrainConfig()
    assert parse(union, "train", ["--family", "neuron", "--transformer-steps", "7"]) == NeuronTrainConfig(
        transformer_steps=7
    )
    assert parse(union, "train", ["--family=latent"]) == TrainConfig()
    file = tmp_path / "train.yaml"
    file.write_text("family: neuron\ntransformer_steps: 8\n")
    assert parse(union, "train", ["--config", str(file), "--seed", "3"]) == NeuronTrainConfig(
        transformer_steps=8, seed=3
    )
    with pytest.raises(ConfigError, match="no family 'gan': latent, neuron"):
        parse(union, "train", ["--family", "gan"])
    file.write_text("unet_steps: 8\n")
    with pytest.raises(ConfigError, match="unet_steps unknown"):
        parse(union, "train", ["--config", str(file), "--family", "neuron"])


def test_a_run_can_be_made_again_from_its_file(trained):
    again = parse(TrainConfig | NeuronTrainConfig, "train", ["--config", str(trained / "train.yaml"), "--task", "x"])
    assert isinstance(again, NeuronTrainConfig)
    assert again.steps == 300


# ---- statistics


def test_exchangeable_units_share_their_statistics():
    network = load_task("digits-convnet").build_network()
    layout = ParameterLayout.from_state_dict(network.state_dict())
    vectors = torch.randn(50, layout.vector_size, generator=torch.Generator().manual_seed(0))
    vectors = vectors * torch.rand(layout.vector_size) + torch.rand(layout.vector_size)
    symmetry = Symmetry(network, layout, torch.zeros(1, 1, 8, 8))
    share_statistics(layout.fit([vectors]), symmetry)
    generator = torch.Generator().manual_seed(1)
    expected = layout.normalize(vectors)
    for group in symmetry.groups:
        order = torch.randperm(group.units, generator=generator)
        moved = layout.normalize(symmetry.permute(vectors, group, order))
        torch.testing.assert_close(moved, symmetry.permute(expected, group, order))
    assert expected.square().mean().item() == pytest.approx(1, abs=0.05)
    # Over all exchangeable values of all networks, mean 0 and standard deviation 1.
    weight = expected[:, layout.slices["0.weight"]].view(50, *network[0].weight.shape)
    torch.testing.assert_close(weight.mean((0, 1)), torch.zeros(weight.shape[2:]), atol=1e-5, rtol=0)
    torch.testing.assert_close(weight.std((0, 1), correction=0), torch.ones(weight.shape[2:]), atol=1e-4, rtol=0)


def test_logarithms_are_shared_too():
    network = nn.Sequential(nn.Linear(5, 7, bias=False), nn.BatchNorm1d(7), nn.ReLU(), nn.Linear(7, 3)).eval()
    layout = ParameterLayout.from_state_dict(network.state_dict())
    vectors = torch.randn(20, layout.vector_size)
    place = layout.slices["1.running_var"]
    vectors[:, place] = vectors[:, place].exp()
    vectors[:, place.start] = 2.0  # one unit's is the same in all networks
    share_statistics(layout.fit([vectors]), Symmetry(network, layout, torch.zeros(2, 5)))
    torch.testing.assert_close(layout(layout.normalize(vectors)).vectors, vectors, atol=1e-4, rtol=1e-4)
    assert layout.log[place].all()
