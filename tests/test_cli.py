"""What a careless user meets at the command line: one clear line, before the work where it can be known before."""

import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch

from pdiff_hf import (
    CollectConfig,
    EvaluateConfig,
    GenerateConfig,
    TrainConfig,
    WeightZoo,
    load_task,
    run_collect,
    run_train,
)
from pdiff_hf import cli as package_cli
from pdiff_hf.cli import main
from pdiff_hf.configs import PushConfig, QuickstartConfig
from pdiff_hf.errors import ConfigError, MissingExtraError, TrainingError, WriteError
from pdiff_hf.networks.trainer import NetworkTrainer
from pdiff_hf.text import load_yaml

from .conftest import ROOT, SMALL_TRAINING, random_network, run


def line_of(*args: str) -> str:
    """What a command that fails says."""
    with pytest.raises(SystemExit) as caught:
        main(args)
    return str(caught.value)


# ---- threads


@pytest.mark.parametrize(
    ("environment", "expected"),
    [({}, "50000"), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "active"}, None)],
)
def test_threads_spin_for_less_unless_the_user_says_how_they_wait(environment, expected):
    others = {name: value for name, value in os.environ.items() if name not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    code = (
        "import os, sys; from pdiff_hf.cli import main; assert 'torch' not in sys.modules; main(['--version']); "
        "print(os.environ.get('GOMP_SPINCOUNT'), 'torch' in sys.modules)"
    )
    said = subprocess.run(
        [sys.executable, "-c", code], env=others | environment, capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert said.stdout.split()[-2:] == [str(expected), "False"]


# ---- errors nobody thought of


def test_an_unexpected_error_is_our_bug_and_says_where_to_report_it(monkeypatch):
    monkeypatch.setitem(package_cli.STAGES, "push", ("fake:run", "PushConfig", "fails"))

    def run(config: PushConfig):
        raise KeyError("nobody thought of this")

    monkeypatch.setattr(package_cli, "stage_function", lambda stage: run)
    line = line_of("push", "--folder", "a", "--repo", "b")
    assert line.startswith(
        "pdiff-hf push: this is a bug of pdiff-hf: KeyError: 'nobody thought of this'. Please report"
    )
    assert "/issues with what" in line
    assert "\n" not in line
    with pytest.raises(KeyError, match="nobody thought of this"):
        main(["push", "--folder", "a", "--repo", "b", "--traceback"])


@pytest.mark.parametrize(
    "error",
    [MemoryError(), RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory: 9")],
)
def test_too_little_memory_is_said_in_one_line(monkeypatch, error):
    def run(config: PushConfig):
        raise error

    monkeypatch.setattr(package_cli, "stage_function", lambda stage: run)
    line = line_of("push", "--folder", "a", "--repo", "b")
    assert line.startswith("pdiff-hf push: there is not enough memory.")
    assert "bug" not in line


def test_what_strangers_wrote_reaches_a_terminal_spelt_out(monkeypatch):
    def run(config: PushConfig):
        raise ConfigError("task \x1b[2J\x1b]0;title\x07 \u202egnp.exe \ud800")

    monkeypatch.setattr(package_cli, "stage_function", lambda stage: run)
    line = line_of("push", "--folder", "a", "--repo", "b")
    assert line == "pdiff-hf push: task \\x1b[2J\\x1b]0;title\\x07 \\u202egnp.exe \\ud800"


def test_a_closed_pipe_ends_quietly():
    command = f"{sys.executable} -m pdiff_hf pull --help"
    code = "import sys; from pdiff_hf import cli; cli.stage_function = lambda stage: run\n"
    code += "import pdiff_hf.config as c; c.parse = lambda *a: None\ndef run(config): return 'text\\n' * 100000\n"
    code += "cli.main(['pull'])"
    done = subprocess.run(["bash", "-c", f"{sys.executable} -c \"$0\" | head -1; echo ${{PIPESTATUS[0]}}", code],
                          capture_output=True, text=True, cwd=ROOT)  # fmt: skip
    assert done.stdout.splitlines() == ["text", "141"], command
    assert done.stderr == ""


@pytest.mark.parametrize("command", ["--help", "collect --help"])
def test_help_into_a_closed_pipe_ends_quietly(command):
    done = subprocess.run(
        ["bash", "-c", f"{sys.executable} -m pdiff_hf {command} | (exec 0<&-; sleep 3)"],
        capture_output=True,
        text=True,
    )
    assert done.stderr == ""


LATER = [pytest.param(seconds, marks=pytest.mark.slow) for seconds in (0.1, 0.3, 0.9, 1.8, 2.5, 4)]


@pytest.mark.parametrize("seconds", [0.6, 1.2, *LATER])
def test_an_interrupt_during_the_start_leaves_no_traceback(tmp_path, seconds):
    command = [sys.executable, "-m", "pdiff_hf", "collect", "--output-dir", str(tmp_path / "zoo"), "--epochs", "500"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while not _is_python_running_ours(process.pid):
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.01)
    time.sleep(seconds)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    # Python ends itself by the signal where it came while a text was executed, as dataclasses do.
    assert process.returncode in (130, -signal.SIGINT), errors
    assert "Traceback" not in errors
    assert "interrupted. What was written is whole." in errors


def _is_python_running_ours(pid: int) -> bool:
    """Whether the interpreter has come as far as to run the package, which imports yaml first."""
    with open(f"/proc/{pid}/maps") as maps:
        return "yaml" in maps.read()


# ---- absurd arguments


@pytest.mark.parametrize("config", [CollectConfig, TrainConfig, GenerateConfig, EvaluateConfig, QuickstartConfig])
@pytest.mark.parametrize("seed", [-1, 2**62, 10**30])
def test_a_seed_out_of_range_is_refused(config, seed):
    with pytest.raises(ConfigError, match=r"seed has to be at least 0 and below 2\*\*62"):
        config(seed=seed)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"unet_learning_rate": float("nan")}, "unet_learning_rate has to be above 0, and is nan"),
        ({"unet_learning_rate": -1e-3}, "has to be above 0"),
        ({"autoencoder_learning_rate": float("inf")}, "has to be above 0, and is inf"),
        ({"ema_decay": 2.0}, "ema_decay has to be at least 0 and below 1, and is 2"),
        ({"ema_decay": float("nan")}, "ema_decay has to be"),
        ({"max_grad_norm": 0.0}, "max_grad_norm has to be above 0"),
        ({"batch_size": 10**12}, "batch_size has to be at most"),
        ({"report_to": "diary"}, "report_to is 'diary'; accelerate knows all, .*tensorboard"),
        ({"mixed_precision": "fp4"}, "mixed_precision is 'fp4'"),
    ],
)
def test_a_setting_that_makes_no_sense_is_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        TrainConfig(**changes)


def test_a_tracker_that_is_not_installed_is_named():
    with pytest.raises(MissingExtraError, match="The tracker comet_ml is not installed: pip install comet_ml"):
        TrainConfig(report_to="comet_ml")


def test_without_any_tracker_all_of_them_would_be_a_silent_loss(monkeypatch):
    monkeypatch.setattr("accelerate.tracking.get_available_trackers", list)
    with pytest.raises(MissingExtraError, match=r"No tracker is installed: pip install '.*\[trackers\]'"):
        TrainConfig(report_to="all")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"latent_channels": 10**9}, "takes at least .* GB, and this machine has|cannot be built"),
        ({"latent_length": 2**31, "latent_channels": 2**31}, "cannot be built|takes at least .* GB"),
        ({"block_out_channels": (8 * 10**6,)}, "takes at least .* GB, and this machine has"),
        ({"layers_per_block": 10**6}, "cannot be built: `layers_per_block`"),
        ({"latent_channels": 10**9, "autoencoder": "linear"}, "takes at least .* GB, and this machine has"),
    ],
)
def test_models_that_no_memory_holds_are_refused_before_anything_is_written(zoo, tmp_path, changes, message):
    with pytest.raises(ConfigError, match=message):
        run_train(TrainConfig(zoo=str(zoo.folder), output_dir=str(tmp_path / "pipeline"), **changes))
    assert not (tmp_path / "pipeline").exists()


def test_more_networks_than_the_disk_holds_are_refused_before_the_first(digits_pipeline, tmp_path):
    line = line_of(
        *("generate", "--pipeline", str(digits_pipeline), "--num-networks", "1000000000"),
        *("--output-dir", str(tmp_path / "generated")),
    )
    assert "would take 7,592.0 GB, and its disk has" in line
    assert not (tmp_path / "generated").exists()
    with pytest.raises(WriteError, match="would take"):
        run_collect(CollectConfig(num_networks=2 * 10**9, output_dir=str(tmp_path / "zoo"), protocol="independent"))
    assert not (tmp_path / "zoo").exists()


@pytest.mark.parametrize(
    ("stage", "first", "then"),
    [("collect", ["--task", "digits-mlp", "--epochs", "0"], []), ("generate", ["--num-inference-steps", "2"], [])],
)
def test_fewer_networks_than_there_are_is_an_error_and_changes_nothing(digits_pipeline, tmp_path, stage, first, then):
    arguments = [stage, "--output-dir", str(tmp_path / "zoo"), *first, *then]
    if stage == "generate":
        arguments += ["--pipeline", str(digits_pipeline)]
    main([*arguments, "--num-networks", "5"])
    before = (tmp_path / "zoo" / f"{stage}.yaml").read_bytes()
    assert "holds 5 networks, and num_networks is 2" in line_of(*arguments, "--num-networks", "2")
    assert (tmp_path / "zoo" / f"{stage}.yaml").read_bytes() == before
    main([*arguments, "--num-networks", "5"])
    main([*arguments, "--num-networks", "6"])
    assert len(WeightZoo(tmp_path / "zoo")) == 6


# ---- folders of another kind


@pytest.mark.parametrize("stage", ["collect", "generate", "train", "evaluate"])
def test_stages_refuse_folders_of_another_kind(digits_zoo, digits_pipeline, tmp_path, stage):
    report = tmp_path / "report"
    report.mkdir()
    (report / "report.json").write_text("{}")
    folders = {"a zoo": digits_zoo.folder, "a pipeline": digits_pipeline, "a report": report}
    own = {"collect": "a zoo", "generate": "a zoo", "train": "a pipeline", "evaluate": "a report"}[stage]
    inputs = {
        "generate": ["--pipeline", str(digits_pipeline)],
        "train": ["--zoo", str(digits_zoo.folder)],
        "evaluate": ["--trained", str(digits_zoo.folder), "--generated", str(digits_pipeline)],
    }
    for kind, folder in folders.items():
        before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
        if kind != own:
            line = line_of(stage, *inputs.get(stage, []), "--output-dir", str(folder))
            assert f"{folder} holds {kind}. Choose another --output-dir." in line
        assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


def test_a_finished_pipeline_is_not_trained_over(digits_zoo, digits_pipeline):
    with pytest.raises(TrainingError, match=r"holds a pipeline\. Choose another"):
        run_train(TrainConfig(zoo=str(digits_zoo.folder), output_dir=str(digits_pipeline), **SMALL_TRAINING))
    settings = {**SMALL_TRAINING, "resume_from_checkpoint": "latest"}
    with pytest.raises(TrainingError, match="whose training has ended, and no checkpoint to go on from"):
        run_train(TrainConfig(zoo=str(digits_zoo.folder), output_dir=str(digits_pipeline), **settings))


def test_too_few_rows_and_stored_nan_are_said_before_training(zoo, tmp_path):
    file = zoo.folder / "metadata.jsonl"
    file.write_bytes(b"".join(file.read_bytes().splitlines(keepends=True)[:7]))
    arguments = ("train", "--zoo", str(zoo.folder), "--output-dir", str(tmp_path / "pipeline"))
    assert "metadata.jsonl has 7 rows for 10 networks" in line_of(*arguments)
    assert not (tmp_path / "pipeline").exists()


# ---- environment of accelerate


@pytest.mark.parametrize(
    ("environment", "arguments", "expected"),
    [
        ({"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4"}, {}, (4, "no")),
        ({"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4"}, {"gradient_accumulation_steps": 2}, (2, "no")),
        ({"ACCELERATE_MIXED_PRECISION": "bf16"}, {}, (1, "bf16")),
        ({"ACCELERATE_MIXED_PRECISION": "bf16"}, {"mixed_precision": "no"}, (1, "no")),
        ({}, {}, (1, "no")),
    ],
)
def test_what_accelerate_was_told_is_done_and_recorded(zoo, tmp_path, monkeypatch, environment, arguments, expected):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    settings = {**SMALL_TRAINING, "unet_steps": 6, **arguments}
    run_train(TrainConfig(zoo=str(zoo.folder), output_dir=str(tmp_path / "pipeline"), **settings))
    recorded = load_yaml((tmp_path / "pipeline" / "train.yaml").read_text())
    assert (recorded["gradient_accumulation_steps"], recorded["mixed_precision"]) == expected
    # Every step is one of the optimizer: the weights are those of a run that says the same by arguments.
    for name in environment:
        monkeypatch.delenv(name)
    settings |= {"gradient_accumulation_steps": expected[0], "mixed_precision": expected[1]}
    run_train(TrainConfig(zoo=str(zoo.folder), output_dir=str(tmp_path / "same"), **settings))
    weights = "unet/diffusion_pytorch_model.safetensors"
    assert (tmp_path / "pipeline" / weights).read_bytes() == (tmp_path / "same" / weights).read_bytes()


@pytest.mark.parametrize("value", ["fp8", "many"])
def test_a_precision_that_is_not_ours_is_refused(zoo, tmp_path, monkeypatch, value):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", value)
    with pytest.raises(ConfigError, match=f"mixed_precision is '{value}'"):
        run_train(TrainConfig(zoo=str(zoo.folder), output_dir=str(tmp_path / "pipeline")))


@pytest.mark.slow
def test_a_full_disk_in_training_is_one_line(zoo, tmp_path):
    code = (
        "import resource, sys; from pdiff_hf import cli; resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000)); "
        "cli.main(sys.argv[1:])"
    )
    arguments = ["--zoo", str(zoo.folder), "--output-dir", str(tmp_path / "p"), "--unet-steps", "5"]
    done = run("-c", code, "train", *arguments, "--autoencoder-steps", "5")
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("pdiff-hf train: Cannot write")
    assert "Make room" in last or "make room" in last
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "p" / "model_index.json").exists()


def test_a_pipeline_of_other_weights_does_not_get_the_figures_of_a_zoo(digits_zoo, digits_pipeline, tmp_path):
    arguments = ["--pipeline", str(digits_pipeline), "--num-inference-steps", "2", "--num-networks", "3"]
    main(["generate", *arguments, "--output-dir", str(tmp_path / "generated")])
    other = tmp_path / "other"
    run_train(TrainConfig(zoo=str(digits_zoo.folder), output_dir=str(other), **{**SMALL_TRAINING, "seed": 5}))
    card = (other / "README.md").read_bytes()
    evaluation = [
        *("evaluate", "--trained", str(digits_zoo.folder), "--generated", str(tmp_path / "generated")),
        *("--pipeline", str(other), "--output-dir", str(tmp_path / "report")),
    ]
    line = line_of(*evaluation)
    assert "was not generated by" in line
    facts = tmp_path / "generated" / "generate.facts.json"
    told = facts.read_text()
    facts.write_text("[" * 100_000)
    assert "nothing is no folder here" in line_of(*evaluation, "--fresh", "nothing")
    facts.write_text(told)
    assert (other / "README.md").read_bytes() == card


@pytest.mark.parametrize("damage", [b"", b"no state", None])
def test_a_damaged_state_of_a_collection_is_named(tmp_path, damage):
    arguments = ["collect", "--task", "digits-mlp", "--epochs", "0", "--output-dir", str(tmp_path)]
    main([*arguments, "--num-networks", "2"])
    if damage is None:
        torch.save({"network": {}, "optimizer": {}, "step": 1}, tmp_path / "collect.state.pt")
    else:
        (tmp_path / "collect.state.pt").write_bytes(damage)
    line = line_of(*arguments, "--num-networks", "3")
    assert "collect.state.pt is damaged" in line
    assert "bug" not in line


@pytest.mark.parametrize(
    "damage", [b"\xff{", *(pytest.param(one, marks=pytest.mark.slow) for one in (b'{"step": 1}\n', b"7\n"))]
)
def test_a_damaged_log_of_losses_costs_its_picture_alone(digits_zoo, digits_pipeline, tmp_path, damage):
    shutil.copytree(digits_pipeline, tmp_path / "pipeline")
    (tmp_path / "pipeline" / "train.losses.jsonl").write_bytes(damage)
    main(
        [
            *("evaluate", "--trained", str(digits_zoo.folder), "--generated", str(tmp_path / "pipeline")),
            *("--output-dir", str(tmp_path / "report"), "--num-networks", "3", "--networks-per-point", "2"),
        ]
    )
    assert (tmp_path / "report" / "training.png").stat().st_size > 1000


def test_a_state_that_somebody_else_made_is_not_gone_on_from(tmp_path, monkeypatch):
    arguments = ["collect", "--task", "digits-mlp", "--epochs", "0", "--output-dir", str(tmp_path)]
    main([*arguments, "--num-networks", "2"])
    before = WeightZoo(tmp_path).vectors()
    trainer = NetworkTrainer(load_task("digits-mlp"), 0)
    trainer.save(tmp_path / "collect.state.pt")
    with monkeypatch.context() as elsewhere:
        elsewhere.setattr("pdiff_hf.networks.trainer.own_name", lambda *parts: "somebody else")
        trainer.save(tmp_path / "planted.pt")
    (tmp_path / "planted.pt").replace(tmp_path / "collect.state.pt")
    assert "was not made here, by this user" in line_of(*arguments, "--num-networks", "3")
    assert torch.equal(WeightZoo(tmp_path).vectors(), before)


def test_networks_of_other_frozen_tensors_are_not_scored_as_these(tmp_path):
    from pdiff_hf import ParameterLayout, ZooError, evaluate

    zoos = []
    for index in range(2):
        base = random_network(index).state_dict()
        zoos.append(WeightZoo.create(tmp_path / str(index), ParameterLayout.from_state_dict(base, ["2.*"])))
        with zoos[-1] as zoo:
            for seed in range(3):
                zoo.append(base | {"2.bias": torch.full((2,), float(seed))})
    with pytest.raises(ZooError, match=r"do not go together: `0\.weight` is not generated, and differs"):
        evaluate("digits-mlp", trained=zoos[0], generated=zoos[1])


assert os.name == "posix"  # signals, pipes and limits of files are those of POSIX
