import json
import random
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from torch.optim.optimizer import register_optimizer_step_post_hook

from pdiff_hf import (
    NeuralNetworkDiffusionPipeline,
    ParameterLayout,
    TrainConfig,
    WeightZoo,
    ZooError,
    load_pipeline,
    run_train,
)
from pdiff_hf.errors import ConfigError
from pdiff_hf.train import TrainingError

from ..conftest import ROOT, SMALL_TRAINING, kill_one_process, launch, random_network, run


ARGUMENTS = [
    *("--autoencoder", "linear", "--unet-steps", "120", "--block-out-channels", "16", "16"),
    *("--checkpointing-steps", "20"),
]


def losses(folder) -> list[float]:
    return [json.loads(line)["loss"] for line in Path(folder, "train.losses.jsonl").read_text().splitlines()]


def small_config(zoo, folder, **changes) -> TrainConfig:
    return TrainConfig(**{"zoo": str(zoo.folder), "output_dir": str(folder), **SMALL_TRAINING, **changes})


@pytest.fixture(scope="session")
def uninterrupted(digits_zoo, tmp_path_factory) -> list[float]:
    """The losses of a training that nothing interrupts, in a process of its own."""
    folder = tmp_path_factory.mktemp("train") / "pipeline"
    done = run("-m", "pdiff_hf", "train", "--zoo", str(digits_zoo.folder), "--output-dir", str(folder), *ARGUMENTS)
    assert done.returncode == 0, done.stderr
    return losses(folder)


def test_the_loss_falls_and_a_working_pipeline_is_saved(digits_zoo, digits_pipeline):
    log = [json.loads(line) for line in (digits_pipeline / "train.losses.jsonl").read_text().splitlines()]
    assert [row["step"] for row in log] == list(range(1, 121))
    values = [row["loss"] for row in log]
    assert sum(values[-10:]) < 0.8 * sum(values[:10])
    pipe = load_pipeline(digits_pipeline)
    vectors = pipe(num_networks=3, num_inference_steps=5, output_type="pt").state_dicts
    assert vectors.shape == (3, digits_zoo.vector_size)
    assert torch.isfinite(vectors).all()


def test_latents_of_the_zoo_have_unit_scale_and_no_mean(digits_zoo, digits_pipeline):
    pipe = load_pipeline(digits_pipeline)
    with torch.no_grad():
        latents = pipe.vae.encode(pipe.layout.normalize(digits_zoo.vectors())).latent_dist.mean
    assert latents.shape == (40, 8, 8)
    latents = latents.flatten(1)
    torch.testing.assert_close(latents.mean(0), torch.zeros(64), atol=1e-3, rtol=0)
    assert latents[:, :39].square().mean().item() == pytest.approx(1, abs=1e-3)
    assert not latents[:, 39:].any()  # 40 networks span 39 directions


def test_the_card_and_the_facts_stand_beside_the_pipeline(digits_pipeline):
    card = (digits_pipeline / "README.md").read_text()
    assert "library_name: diffusers" in card
    assert "`digits-convnet`" in card
    assert "| unet_steps | 120 |" in card
    facts = json.loads((digits_pipeline / "train.facts.json").read_text())
    assert facts["networks"] == 40
    assert torch.__version__.startswith(facts["versions"]["torch"].partition("+")[0])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "checkpoint"),
    [pytest.param(signal.SIGKILL, "checkpoint-80", marks=pytest.mark.long), (signal.SIGINT, "checkpoint-20")],
)
def test_an_interrupted_training_resumes_with_the_losses_of_an_uninterrupted_one(
    digits_zoo, uninterrupted, tmp_path, number, checkpoint
):
    folder = tmp_path / "pipeline"
    command = ["-m", "pdiff_hf", "train", "--zoo", str(digits_zoo.folder), "--output-dir", str(folder), *ARGUMENTS]
    process = subprocess.Popen(
        [sys.executable, *command],
        cwd=ROOT,
        stderr=subprocess.PIPE,
    )
    while not (folder / checkpoint).exists():
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.005)
    process.send_signal(number)
    _, errors = process.communicate()
    assert process.returncode == (130 if number == signal.SIGINT else -signal.SIGKILL)
    assert number == signal.SIGKILL or b"interrupted" in errors

    done = run(*command, "--resume-from-checkpoint", "latest")
    assert done.returncode == 0, done.stderr
    assert losses(folder) == uninterrupted
    assert load_pipeline(folder)(num_inference_steps=2).state_dicts[0]


@pytest.mark.slow
def test_a_full_disk_ends_in_one_line_and_leaves_whole_checkpoints(digits_zoo, tmp_path):
    script = textwrap.dedent("""
        import resource, sys
        from pdiff_hf import cli
        from pdiff_hf.train.loop import TrainingLoop
        save = TrainingLoop._save_checkpoint
        def save_with_less_and_less_room(training, ema):
            if training.step == 40:
                resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))
            save(training, ema)
        TrainingLoop._save_checkpoint = save_with_less_and_less_room
        cli.main(["train", *sys.argv[1:]])
    """)
    done = run("-c", script, "--zoo", str(digits_zoo.folder), "--output-dir", str(tmp_path), *ARGUMENTS)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert f"pdiff-hf train: Cannot write {tmp_path}/checkpoint-40" in done.stderr
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-20"]


def test_only_the_latest_checkpoints_are_kept(digits_zoo, tmp_path):
    run_train(small_config(digits_zoo, tmp_path, checkpointing_steps=20, checkpoints_total_limit=2))
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == ["checkpoint-100", "checkpoint-80"]


def test_a_training_is_not_mixed_with_another(digits_zoo, tmp_path):
    run_train(small_config(digits_zoo, tmp_path, checkpointing_steps=50))
    with pytest.raises(
        TrainingError, match=r"holds checkpoint-100 of an earlier training.*--resume-from-checkpoint latest"
    ):
        run_train(small_config(digits_zoo, tmp_path))
    with pytest.raises(
        TrainingError, match=r"no checkpoint checkpoint-7 in .*\. Present: checkpoint-50, checkpoint-100"
    ):
        run_train(small_config(digits_zoo, tmp_path, resume_from_checkpoint="checkpoint-7"))
    with pytest.raises(ConfigError, match="holds a run with seed 0, not 1"):
        run_train(small_config(digits_zoo, tmp_path, resume_from_checkpoint="latest", checkpointing_steps=50, seed=1))


@pytest.mark.slow
def test_going_on_from_an_earlier_checkpoint_replaces_the_later_ones(digits_zoo, uninterrupted, tmp_path):
    run_train(small_config(digits_zoo, tmp_path, checkpointing_steps=20))
    before = (tmp_path / "checkpoint-60").stat().st_mtime_ns
    run_train(small_config(digits_zoo, tmp_path, checkpointing_steps=20, resume_from_checkpoint="checkpoint-40"))
    assert losses(tmp_path) == uninterrupted
    assert (tmp_path / "checkpoint-60").stat().st_mtime_ns > before
    assert sorted(int(path.name[11:]) for path in tmp_path.glob("checkpoint-*")) == [20, 40, 60, 80, 100]


def test_accumulated_gradients_count_as_one_step(digits_zoo, tmp_path):
    steps = []
    hook = register_optimizer_step_post_hook(lambda *_: steps.append(1))
    try:
        run_train(small_config(digits_zoo, tmp_path, batch_size=16, gradient_accumulation_steps=4, unet_steps=20))
    finally:
        hook.remove()
    assert len(losses(tmp_path)) == len(steps) == 20


def test_the_average_of_the_weights_is_saved(digits_zoo, tmp_path):
    pipes = [
        run_train(small_config(digits_zoo, tmp_path / str(decay), unet_steps=5, ema_decay=decay))
        for decay in (0.0, 0.5)
    ]
    assert losses(tmp_path / "0.0") == losses(tmp_path / "0.5")
    last, average = (torch.cat([one.flatten() for one in pipe.unet.parameters()]) for pipe in pipes)
    assert not torch.equal(last, average)


def test_training_in_bfloat16_gives_a_float32_pipeline(digits_zoo, tmp_path):
    pipe = run_train(small_config(digits_zoo, tmp_path, mixed_precision="bf16"))
    assert pipe.unet.dtype == pipe.vae.dtype == torch.float32
    values = losses(tmp_path)
    assert sum(values[-10:]) < 0.8 * sum(values[:10])


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_other_prediction_types_train_and_sample(digits_zoo, tmp_path, prediction_type):
    pipe = run_train(small_config(digits_zoo, tmp_path, prediction_type=prediction_type))
    assert pipe.scheduler.config.prediction_type == prediction_type
    assert torch.isfinite(pipe(num_networks=2, num_inference_steps=10, output_type="latent").state_dicts).all()


@pytest.mark.slow
@pytest.mark.long
def test_two_processes_train_the_pipeline_of_one(digits_zoo, tmp_path):
    for processes in (1, 2):
        arguments = ["--zoo", str(digits_zoo.folder), "--output-dir", str(tmp_path / f"{processes}"), *ARGUMENTS]
        launch(processes, "-m", "pdiff_hf", "train", *arguments)
    assert json.loads((tmp_path / "2" / "train.facts.json").read_text())["processes"] == 2
    one, two = (losses(tmp_path / f"{processes}") for processes in (1, 2))
    assert len(two) == 120
    # Rounding differs, and the difference grows with the steps.
    assert two[:30] == pytest.approx(one[:30], rel=1e-3)
    assert two == pytest.approx(one, rel=0.1)
    assert isinstance(load_pipeline(tmp_path / "2"), NeuralNetworkDiffusionPipeline)


@pytest.mark.slow
@pytest.mark.long
def test_a_killed_process_of_a_training_costs_the_steps_since_the_checkpoint(digits_zoo, tmp_path):
    arguments = ["-m", "pdiff_hf", "train", "--zoo", str(digits_zoo.folder), *ARGUMENTS, "--output-dir"]
    launch(2, *arguments, str(tmp_path / "whole"))
    folder = tmp_path / "killed"
    kill_one_process([*arguments, str(folder)], lambda: (folder / "checkpoint-60").exists())
    assert not (folder / "model_index.json").exists()
    launch(2, *arguments, str(folder), "--resume-from-checkpoint", "latest")
    assert losses(folder) == pytest.approx(losses(tmp_path / "whole"), rel=1e-6)
    assert load_pipeline(folder)(num_inference_steps=2).state_dicts[0]


def test_what_cannot_be_trained_is_said_before_anything_is_written(digits_zoo, tmp_path):
    for changes, message in (
        ({"batch_size": 0}, "batch_size has to be at least 1, and is 0"),
        ({"unet_steps": 0}, "unet_steps has to be at least 1"),
        ({"checkpointing_steps": 0}, "checkpointing_steps has to be at least 1"),
        ({"checkpoints_total_limit": 0}, "checkpoints_total_limit has to be at least 1"),
        ({"block_out_channels": (30, 60)}, "have to be multiples of 8"),
        ({"block_out_channels": ()}, "have to be multiples of 8"),
        ({"output_dir": str(digits_zoo.folder)}, "holds a zoo"),
    ):
        with pytest.raises(ConfigError, match=message):
            run_train(small_config(digits_zoo, tmp_path / "pipeline", **changes))
    assert not (tmp_path / "pipeline").exists()


def test_losses_are_not_written_through_a_link(digits_zoo, tmp_path):
    folder, elsewhere = tmp_path / "folder", tmp_path / "elsewhere"
    folder.mkdir()
    elsewhere.write_text("mine")
    (folder / "train.losses.jsonl").symlink_to(elsewhere)
    with pytest.raises(TrainingError, match=r"train\.losses\.jsonl is a link, through which no losses are written"):
        run_train(small_config(digits_zoo, folder))
    assert elsewhere.read_text() == "mine"


def test_identical_networks_have_no_distribution(tmp_path):
    network = torch.nn.Linear(2, 2).state_dict()
    with WeightZoo.create(tmp_path / "zoo", ParameterLayout.from_state_dict(network)) as zoo:
        for _ in range(3):
            zoo.append(network)
    with pytest.raises(ZooError, match=r"The 3 networks of .* are identical"):
        run_train(small_config(zoo, tmp_path / "pipeline"))


def test_processes_that_accelerate_does_not_see_are_refused(digits_zoo, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="2 processes were started, and accelerate sees 1"):
        run_train(small_config(digits_zoo, tmp_path / "pipeline"))


def test_a_folder_with_something_else_is_no_place_for_a_pipeline(digits_zoo, tmp_path):
    (tmp_path / "evaluation").mkdir()
    (tmp_path / "evaluation" / "results.csv").write_text("mine")
    with pytest.raises(ConfigError, match="holds evaluation, which is none of a pipeline"):
        run_train(small_config(digits_zoo, tmp_path))
    assert [path.name for path in tmp_path.rglob("*")] == ["evaluation", "results.csv"]


def test_a_component_is_not_saved_over_what_is_none(digits_pipeline, tmp_path):
    (tmp_path / "unet").mkdir()
    (tmp_path / "unet" / "net.py").write_text("mine")
    load_pipeline(digits_pipeline).save_pretrained(tmp_path)
    assert (tmp_path / "unet" / "net.py").read_text() == "mine"
    load_pipeline(tmp_path)


def test_another_zoo_of_as_many_networks_does_not_resume(layout, tmp_path):
    def made(seeds: range) -> WeightZoo:
        shutil.rmtree(tmp_path / "zoo", ignore_errors=True)
        with WeightZoo.create(tmp_path / "zoo", layout) as zoo:
            for seed in seeds:
                zoo.append(random_network(seed).state_dict())
        return zoo

    run_train(small_config(made(range(6)), tmp_path / "pipeline", checkpointing_steps=60))
    zoo = made(range(6, 12))
    again = small_config(zoo, tmp_path / "pipeline", checkpointing_steps=60, resume_from_checkpoint="latest")
    with pytest.raises(ConfigError, match=r"The zoo of the run in .* changed meanwhile: it cannot be resumed"):
        run_train(again)


def test_a_zoo_that_grew_does_not_resume(digits_zoo, tmp_path):
    digits_zoo.save_pretrained(tmp_path / "zoo")
    zoo = WeightZoo(tmp_path / "zoo")
    run_train(small_config(zoo, tmp_path / "pipeline", checkpointing_steps=50))
    with zoo:
        zoo.append(zoo[0])
    log = (tmp_path / "pipeline" / "train.losses.jsonl").read_text()
    again = small_config(zoo, tmp_path / "pipeline", checkpointing_steps=50, resume_from_checkpoint="checkpoint-50")
    with pytest.raises(ConfigError, match="holds a run with 40 networks, not 41"):
        run_train(again)
    assert (tmp_path / "pipeline" / "train.losses.jsonl").read_text() == log


@pytest.mark.skipif(torch.cuda.is_available() or torch.backends.mps.is_available(), reason="there is an accelerator")
def test_fp16_without_an_accelerator_is_refused(digits_zoo, tmp_path):
    with pytest.raises(ConfigError, match="fp16 needs an accelerator, and here is none: take bf16"):
        run_train(small_config(digits_zoo, tmp_path / "pipeline", mixed_precision="fp16"))


def test_randomness_of_the_caller_stays(digits_zoo, tmp_path):
    def states() -> list:
        return [torch.get_rng_state().tolist(), random.getstate(), np.random.get_state()[1].tolist()]

    settings = {"unet_steps": 10, "checkpointing_steps": 5}
    before = states()
    run_train(small_config(digits_zoo, tmp_path, **settings))
    assert states() == before
    for _ in range(2):
        torch.rand(()), random.random(), np.random.rand()
    before = states()
    run_train(small_config(digits_zoo, tmp_path, **settings, resume_from_checkpoint="checkpoint-5"))
    assert states() == before


def test_losses_go_to_a_tracker(digits_zoo, tmp_path):
    pytest.importorskip("tensorboard")
    run_train(small_config(digits_zoo, tmp_path, unet_steps=10, report_to="tensorboard"))
    assert list(tmp_path.rglob("events.out.tfevents.*"))


def test_a_training_that_could_not_start_leaves_no_precision_behind(digits_zoo, tmp_path, monkeypatch):
    def failing(*_: object) -> None:
        raise OSError("no such tracker")

    with monkeypatch.context() as changed:
        changed.setattr(Accelerator, "init_trackers", failing)
        with pytest.raises(TrainingError, match="cannot start: no such tracker"):
            run_train(small_config(digits_zoo, tmp_path / "first", unet_steps=2, mixed_precision="bf16"))
    run_train(small_config(digits_zoo, tmp_path / "second", unet_steps=2, mixed_precision="no"))


def test_channels_that_normalization_leaves_nothing_of_are_refused():
    with pytest.raises(ConfigError, match=r"halving leaves one of 8 latents"):
        TrainConfig(block_out_channels=(16, 16, 16, 8))
    with pytest.raises(ConfigError, match=r"halving leaves one of 8 latents"):
        TrainConfig(block_out_channels=(8, 8, 8, 16))  # whose last level begins with 8
    TrainConfig(block_out_channels=(8, 8, 16, 16))


def test_a_zoo_of_one_network_is_refused(tmp_path):
    network = torch.nn.Linear(2, 2).state_dict()
    with WeightZoo.create(tmp_path / "zoo", ParameterLayout.from_state_dict(network)) as zoo:
        zoo.append(network)
    with pytest.raises(ZooError, match="has 1 network: a distribution needs at least two"):
        run_train(small_config(zoo, tmp_path / "pipeline"))


def test_a_diverged_training_says_which_rate_to_lower(digits_zoo, tmp_path):
    with pytest.raises(TrainingError, match=r"The unet diverged.*Lower --unet-learning-rate"):
        run_train(small_config(digits_zoo, tmp_path, unet_learning_rate=1e30))


def test_averages_of_consecutive_networks_are_learned(digits_zoo, tmp_path):
    pipe = run_train(small_config(digits_zoo, tmp_path / "averages", checkpoint_averaging=10)).to("cpu")
    normalized = pipe.layout.normalize(digits_zoo.vectors())
    averages = torch.stack([normalized[start : start + 10].mean(0) for start in range(31)])
    with torch.no_grad():
        latents = pipe.vae.encode(averages).latent_dist.mean
        # The directions are those of the averages, whose latents have unit scale; single networks lie outside.
        torch.testing.assert_close(pipe.vae.decode(latents).sample, averages, atol=1e-2, rtol=1e-2)
        again = pipe.vae.decode(pipe.vae.encode(normalized).latent_dist.mean).sample
    used = latents.flatten(1)[:, :30]
    assert used.square().mean().sqrt().item() == pytest.approx(1, rel=0.05)
    assert (again - normalized).square().mean() > 100 * (pipe.vae.decode(latents).sample - averages).square().mean()
    with pytest.raises(ConfigError, match="checkpoint_averaging 40 leaves fewer than two of 40 networks"):
        run_train(small_config(digits_zoo, tmp_path / "too-many", checkpoint_averaging=40))


def test_directions_are_fitted_to_evenly_picked_networks_of_a_large_zoo(digits_zoo, tmp_path, monkeypatch):
    monkeypatch.setattr("pdiff_hf.train.latent_diffusion.MOST_FITTED", 20)
    pipe = run_train(small_config(digits_zoo, tmp_path / "picked")).to("cpu")
    normalized = pipe.layout.normalize(digits_zoo.vectors())
    with torch.no_grad():
        again = pipe.vae.decode(pipe.vae.encode(normalized).latent_dist.mean).sample
    errors = (again - normalized).square().mean(1)
    assert errors[::2].max() < 1e-5 < errors[1::2].min()
