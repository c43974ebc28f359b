"""The published method's autoencoder, trained by the loop of the denoiser."""

import json
import os
from pathlib import Path

import pytest
import torch

from pdiff_hf import ParameterAutoencoderKL, TrainConfig, WeightZoo, load_pipeline, load_task, run_train
from pdiff_hf.errors import ConfigError, TaskError, TrainingError
from pdiff_hf.networks.behaviour import Behaviour
from pdiff_hf.train import latent_diffusion

from ..conftest import launch, run


SETTINGS = {
    "autoencoder": "kl",
    "autoencoder_steps": 80,
    "unet_steps": 60,
    "block_out_channels": (16, 16),
    "checkpointing_steps": 10**9,
}
ARGUMENTS = [
    *("--autoencoder-steps", "40", "--unet-steps", "40", "--block-out-channels", "16", "16"),
    *("--checkpointing-steps", "20"),
]


def config(zoo: WeightZoo, folder: Path, **changes) -> TrainConfig:
    return TrainConfig(**{"zoo": str(zoo.folder), "output_dir": str(folder), **SETTINGS, **changes})


def log(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "train.losses.jsonl").read_text().splitlines()]


@torch.no_grad()
def unexplained(pipe, zoo: WeightZoo) -> float:
    """The share of the variance that is lost when the networks are encoded and decoded."""
    normalized = pipe.layout.normalize(zoo.vectors())
    decoded = pipe.vae(normalized).sample
    return ((decoded - normalized).square().sum() / normalized.square().sum()).item()


@pytest.fixture(scope="module")
def trained(digits_zoo, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("kl") / "pipeline"
    run_train(config(digits_zoo, folder, autoencoder_steps=400))
    return folder


def test_both_parts_are_logged_by_their_names(trained):
    rows = log(trained)
    assert [row["step"] for row in rows] == list(range(1, 461))
    assert [row["objective"] for row in rows] == ["autoencoder"] * 400 + ["unet"] * 60
    losses = [row["loss"] for row in rows[:400]]
    assert sum(losses[-20:]) < 0.1 * sum(losses[:20])


def test_the_default_is_the_trained_one():
    assert TrainConfig().autoencoder == "kl"


def test_reconstructed_networks_are_as_good_as_the_stored_ones(trained, digits_zoo):
    pipe = load_pipeline(trained)
    assert isinstance(pipe.vae, ParameterAutoencoderKL)
    assert unexplained(pipe, digits_zoo) < 0.02
    task = load_task("digits-convnet")
    network, (inputs, targets) = task.build_network(), task.data("test")

    def accuracy(vectors: torch.Tensor) -> float:
        total = 0.0
        for state_dict in digits_zoo.layout.unflatten(vectors):
            network.load_state_dict(state_dict)
            total += task.correct(task.predict(network, inputs), targets).double().mean().item()
        return total / len(vectors)

    again = pipe.decode(pipe.encode(digits_zoo.vectors()))
    assert accuracy(again) == pytest.approx(accuracy(digits_zoo.vectors()), abs=0.003)


def test_latents_have_no_mean_and_unit_scale_over_the_zoo(trained, digits_zoo):
    latents = load_pipeline(trained).encode(digits_zoo.vectors()).flatten(1)
    torch.testing.assert_close(latents.mean(0), torch.zeros(64), atol=1e-3, rtol=0)
    assert latents.square().mean().item() == pytest.approx(1, abs=1e-3)


SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in ("checkpoint-20", "checkpoint-60")]


@pytest.mark.parametrize("checkpoint", ["checkpoint-40", *SLOW])
def test_a_training_resumes_in_either_part_and_between_them(digits_zoo, tmp_path, checkpoint):
    settings = {"autoencoder_steps": 40, "unet_steps": 40, "checkpointing_steps": 20}
    expected = run_train(config(digits_zoo, tmp_path, **settings))
    losses = [row["loss"] for row in log(tmp_path)]
    found = run_train(config(digits_zoo, tmp_path, **settings, resume_from_checkpoint=checkpoint))
    assert [row["loss"] for row in log(tmp_path)] == losses
    for name, value in expected.vae.state_dict().items():
        assert torch.equal(found.vae.state_dict()[name], value), name
    for name, value in expected.unet.state_dict().items():
        assert torch.equal(found.unet.state_dict()[name], value), name


class Code:
    def __reduce__(self):
        return os.mkdir, ("CANARY",)


def test_a_checkpoint_runs_no_code(digits_zoo, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    settings = {"autoencoder_steps": 20, "unet_steps": 20, "checkpointing_steps": 10}
    run_train(config(digits_zoo, tmp_path, **settings))
    planted = tmp_path / "checkpoint-30"
    resumed = config(digits_zoo, tmp_path, **settings, resume_from_checkpoint="checkpoint-30")
    for name in ("custom_checkpoint_0.pkl", "optimizer.bin"):
        torch.save(Code(), planted / name)
        with pytest.raises(TrainingError, match="checkpoint-30 cannot be resumed"):
            run_train(resumed)
    assert not (tmp_path / "CANARY").exists()


def test_random_states_of_a_checkpoint_run_no_code_and_decide_nothing(digits_zoo, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    settings = {"autoencoder_steps": 20, "unet_steps": 20, "checkpointing_steps": 10}
    run_train(config(digits_zoo, tmp_path, **settings))
    losses = [row["loss"] for row in log(tmp_path)]
    torch.save(Code(), tmp_path / "checkpoint-30" / "random_states_0.pkl")
    run_train(config(digits_zoo, tmp_path, **settings, resume_from_checkpoint="checkpoint-30"))
    assert [row["loss"] for row in log(tmp_path)] == losses
    assert not (tmp_path / "CANARY").exists()


@pytest.mark.slow
@pytest.mark.long
def test_two_processes_train_the_pipeline_of_one(digits_zoo, tmp_path):
    for processes in (1, 2):
        arguments = ["--zoo", str(digits_zoo.folder), "--output-dir", str(tmp_path / f"{processes}"), *ARGUMENTS]
        launch(processes, "-m", "pdiff_hf", "train", *arguments)
    one, two = ([row["loss"] for row in log(tmp_path / f"{processes}")] for processes in (1, 2))
    assert two[:30] == pytest.approx(one[:30], rel=1e-3)
    assert two == pytest.approx(one, rel=0.1)


@pytest.mark.slow
def test_networks_that_do_not_fit_memory_are_read_when_they_are_needed(digits_zoo, tmp_path, monkeypatch):
    run_train(config(digits_zoo, tmp_path / "held", checkpoint_averaging=3))
    monkeypatch.setattr(latent_diffusion, "MOST_HELD", 0)
    run_train(config(digits_zoo, tmp_path / "read", checkpoint_averaging=3))
    losses = [[row["loss"] for row in log(tmp_path / name)] for name in ("held", "read")]
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)


@pytest.mark.slow
def test_more_weight_on_the_divergence_makes_latents_noisier(digits_zoo, tmp_path):
    pipes = [run_train(config(digits_zoo, tmp_path / f"{w}", kl_weight=w)) for w in (0.0, 1.0)]
    normalized = pipes[0].layout.normalize(digits_zoo.vectors())
    with torch.no_grad():
        noise = [pipe.vae.encode(normalized).latent_dist.std.mean().item() for pipe in pipes]
    assert noise[1] > 3 * noise[0]
    assert unexplained(pipes[1], digits_zoo) > unexplained(pipes[0], digits_zoo)


def test_the_behaviour_loss_is_the_difference_of_outputs_relative_to_their_variance(digits_zoo):
    from pdiff_hf.networks.stacked import StackedNetwork

    task = load_task("digits-convnet")
    layout = digits_zoo.layout.fit(digits_zoo.batches())
    inputs = task.data("train")[0][:10]
    stored = layout.normalize(digits_zoo.vectors([0, 20]))
    behaviour = Behaviour(StackedNetwork(task.build_network().eval()), layout, inputs, stored)
    ours = (stored + 0.3 * torch.randn(stored.shape, generator=torch.Generator().manual_seed(0))).requires_grad_()
    indices = torch.arange(10)
    loss = behaviour(ours, stored, indices)
    network = task.build_network().eval()

    def outputs(normalized: torch.Tensor) -> torch.Tensor:
        found = []
        for state_dict in layout.unflatten(layout(normalized).vectors):
            network.load_state_dict(state_dict)
            found.append(network(inputs[indices]))
        return torch.stack(found)

    with torch.no_grad():
        expected = outputs(stored)
        value = (outputs(ours) - expected).square().mean() / expected.var(dim=1).mean()
    assert loss.item() == pytest.approx(value.item(), rel=1e-3)
    assert behaviour(stored, stored, indices).item() == 0
    loss.backward()
    assert ours.grad.abs().sum() > 0


def test_noise_and_behaviour_count_as_much_as_the_settings_say(digits_zoo, tmp_path, monkeypatch):
    made = []

    class Kept(latent_diffusion.AutoencoderObjective):
        def __init__(self, *arguments):
            super().__init__(*arguments)
            made.append(self)

    monkeypatch.setattr(latent_diffusion, "AutoencoderObjective", Kept)
    settings = {"input_noise": 0.3, "latent_noise": 0.2, "kl_weight": 0.1, "behaviour_weight": 3.0}
    run_train(config(digits_zoo, tmp_path, **settings, autoencoder_steps=1, unet_steps=1))
    (objective,) = made
    found = (objective.parameter_noise, objective.latent_noise, objective.kl_weight, objective.behaviour_weight)
    assert found == (0.3, 0.2, 0.1, 3.0)
    vectors = torch.randn(4, digits_zoo.vector_size, generator=torch.Generator().manual_seed(0))
    drawn = objective.draw(4, {"vectors": vectors}, torch.Generator().manual_seed(1))
    objective.behaviour = lambda decoded, stored, inputs: torch.tensor(2.0)

    @torch.no_grad()
    def loss(**changed: float) -> float:
        for name, value in ({"parameter_noise": 0.0, "latent_noise": 0.0, "behaviour_weight": 0.0} | changed).items():
            setattr(objective, name, value)
        return objective(vectors, **drawn).item()

    assert loss(behaviour_weight=3.0) - loss() == pytest.approx(6, abs=1e-4)
    assert loss(parameter_noise=0.3) != loss()
    assert loss(latent_noise=0.2) != loss()


@pytest.mark.slow
def test_behaviour_can_be_learned(digits_zoo, tmp_path):
    run_train(config(digits_zoo, tmp_path, behaviour_weight=1.0))
    losses = [row["loss"] for row in log(tmp_path) if row["objective"] == "autoencoder"]
    assert sum(losses[-10:]) < 0.5 * sum(losses[:10])


def test_what_cannot_be_trained_is_said(digits_zoo, zoo, tmp_path):
    with pytest.raises(ConfigError, match="behaviour_weight is for a trained autoencoder: pass --autoencoder kl"):
        config(digits_zoo, tmp_path, autoencoder="linear", behaviour_weight=1.0)
    with pytest.raises(ConfigError, match="kl_weight has to be at least 0, and is -1"):
        config(digits_zoo, tmp_path, kl_weight=-1.0)
    with pytest.raises(TaskError, match="are no networks of digits-mlp"):
        run_train(config(digits_zoo, tmp_path / "other", behaviour_weight=1.0, task="digits-mlp"))
    assert not (tmp_path / "other").exists()
    with pytest.raises(TrainingError, match=r"The autoencoder diverged.*Lower --autoencoder-learning-rate"):
        run_train(config(digits_zoo, tmp_path / "diverged", autoencoder_learning_rate=1e30))


@pytest.mark.slow
def test_the_command_takes_the_settings_of_both_parts(digits_zoo, tmp_path):
    done = run(
        *("-m", "pdiff_hf", "train", "--zoo", str(digits_zoo.folder), "--output-dir", str(tmp_path / "pipeline")),
        *ARGUMENTS,
        *("--kl-weight", "0.1", "--latent-noise", "0.2", "--input-noise", "0.1", "--mixed-precision", "bf16"),
    )
    assert done.returncode == 0, done.stderr
    assert load_pipeline(tmp_path / "pipeline").vae.dtype == torch.float32
