# Over 400 lines: all arguments of all stages, and what each means.
"""What each stage can be told: one frozen dataclass each, without an import that takes long."""

import os
from dataclasses import dataclass, fields
from itertools import pairwise
from typing import Annotated, Any, Literal

import tyro

from .config import ZooDtype, check_above_zero, check_not_negative, check_positive, check_seed, check_tracker
from .errors import ConfigError


def _of_file(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return tuple(map(_of_file, value))
    if isinstance(value, os.PathLike):
        value = os.fspath(value)
    return os.path.expanduser(value) if isinstance(value, str) and value.startswith("~/") else value


@dataclass(frozen=True)
class StageConfig:
    """Settings of a stage, as a file holds them: paths are text, without ~, and lists are tuples."""

    def __post_init__(self) -> None:
        for field in fields(self):
            object.__setattr__(self, field.name, _of_file(getattr(self, field.name)))


@dataclass(frozen=True)
class CollectConfig(StageConfig):
    """Trains networks of a task and keeps their checkpoints."""

    task: str = "digits-convnet"
    """A built-in task or family of tasks, or a class of your own: path/to/file.py:MyTask."""
    output_dir: str = "runs/zoo"
    """Folder of the zoo. Where it holds an unfinished one of the same configuration, collection goes on."""
    num_networks: int = 200
    """Networks in the zoo: checkpoints of one run, of which 200 are enough, or one network a seed, of which thousands
    are better. Not for families of tasks."""
    networks_per_task: int = 6
    """Of a family of tasks: independent networks of each of its tasks, instead of num_networks."""
    split: Literal["train", "validation", "test"] = "train"
    """Of a family of tasks: which of its conditions."""
    protocol: Literal["trajectory", "independent"] = "trajectory"
    """Consecutive checkpoints of one run (as in the paper), or one network a seed. Of a family of tasks always the
    latter."""
    save_every: int = 1
    """Optimizer steps from one kept checkpoint of a trajectory to the next."""
    epochs: int | None = None
    """Passes over the training data: of a trajectory before its first checkpoint is kept, of independent networks in
    all. By default the task's own number."""
    patterns: tuple[str, ...] | None = None
    """Names of the tensors to generate, as shell-style patterns such as '*.weight'; a ! before one excludes. The
    others are stored once, for all networks. By default the task's own."""
    may_differ: tuple[str, ...] = ()
    """Tensors that are not generated have to be the same in all networks. Those of these patterns may differ; the zoo
    has the first network's."""
    seed: int = 0
    """Of initialization, data order and dropout; an independent zoo counts up from it."""
    dtype: ZooDtype = "float32"
    """How networks are stored; bfloat16 halves the files and keeps three digits."""
    push_to_hub: str | None = None
    """Name of the dataset repository that the zoo is pushed to in the end."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(self, "num_networks", "networks_per_task", "save_every")
        if self.split not in ("train", "validation", "test"):
            raise ConfigError(f"The split is {self.split!r}; expected 'train', 'validation' or 'test'.")
        if self.epochs is not None:
            check_not_negative(self, "epochs")
        if self.protocol not in ("trajectory", "independent"):
            raise ConfigError(f"The protocol is {self.protocol!r}; expected 'trajectory' or 'independent'.")
        check_seed(self)


@dataclass(frozen=True)
class AlignConfig(StageConfig):
    """Permutes and scales the hidden units of a zoo's networks, or rotates the ranks of its adapters, so that they lie
    near to each other."""

    zoo: str = "runs/zoo"
    """Folder of the zoo, or its name on the Hub."""
    output_dir: str = "runs/aligned"
    """Folder of the aligned zoo."""
    task: str | None = None
    """What the networks do: a built-in task, or path/to/file.py:MyTask. The zoo's own by default, if it is
    a built-in one."""
    tolerance: float = 1e-3
    """Aligning must not change what networks predict: more than this share of the largest prediction is an error."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_above_zero(self, "tolerance")


@dataclass(frozen=True)
class LoopConfig(StageConfig):
    """What any training of a pipeline has in common."""

    zoo: str = "runs/zoo"
    """Folder of the zoo to learn from, or its name on the Hub."""
    output_dir: str = "runs/pipeline"
    """Folder of the pipeline; checkpoints of the training go there too."""
    seed: int = 0
    """Of initialization, batches and noise."""
    condition: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    """A column of the zoo's rows (`pdiff-hf info ZOO` lists them) that networks can be asked for: numbers, lists of
    numbers of one length, or words. Again for each further column."""
    batch_size: int = 64
    """Networks drawn for each forward pass, by all processes together."""
    gradient_accumulation_steps: int | None = None
    """Forward passes an optimizer step; accelerate's setting by default, and 1 where there is none."""
    mixed_precision: Literal["no", "fp16", "bf16"] | None = None
    """Precision of the forward passes; accelerate's setting by default, and no where there is none."""
    max_grad_norm: float = 1.0
    """Gradients are clipped to this norm."""
    ema_decay: float = 0.995
    """Decay of the average of the trained weights that goes into the pipeline."""

    checkpointing_steps: int = 500
    """Optimizer steps from one checkpoint to the next."""
    checkpoints_total_limit: int | None = None
    """How many checkpoints are kept; the oldest go first."""
    resume_from_checkpoint: str | None = None
    """'latest', or the path of a checkpoint of this output_dir."""
    push_to_hub: str | None = None
    """Name of the model repository that the pipeline is pushed to in the end."""
    report_to: str | None = None
    """A tracker of accelerate: tensorboard, wandb, all, ..."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(self, "batch_size", "checkpointing_steps")
        for name in ("gradient_accumulation_steps", "checkpoints_total_limit"):
            if getattr(self, name) is not None:
                check_positive(self, name)
        check_above_zero(self, "max_grad_norm")
        check_seed(self)
        if not 0 <= self.ema_decay < 1:
            raise ConfigError(f"ema_decay has to be at least 0 and below 1, and is {self.ema_decay}.")
        if self.mixed_precision not in (None, "no", "fp16", "bf16"):
            raise ConfigError(f"mixed_precision is {self.mixed_precision!r}; expected no, fp16 or bf16.")
        check_tracker(self.report_to)


@dataclass(frozen=True)
class TrainConfig(LoopConfig):
    """Fits the parameter autoencoder, trains the denoiser of its latents, and saves a pipeline."""

    family: Literal["latent"] = "latent"
    """The published method, for checkpoints of one run; `--family neuron --help` shows the settings of the other."""
    checkpoint_averaging: int = 1
    """Consecutive networks of a trajectory whose averages are learned instead of single ones, for better accuracy."""
    autoencoder: Literal["kl", "linear"] = "kl"
    """The published method's convolutional VAE, which is trained, or principal components in closed form: as good on
    consecutive checkpoints, faster, and with less memory where networks have a million parameters or more."""
    latent_channels: int = 8
    """Channels of the latents."""
    latent_length: int = 8
    """Length of the latents: a network becomes latent_channels x latent_length numbers. More of them take more
    memory."""
    autoencoder_steps: int = 400
    """Optimizer steps of a trained autoencoder."""
    autoencoder_learning_rate: float = 4e-3
    """Peak of the one-cycle learning rate of a trained autoencoder."""
    input_noise: float = 0.05
    """Noise on parameters while the autoencoder is trained, in units of each one's standard deviation over the zoo."""
    latent_noise: float = 0.1
    """Noise on latents while the autoencoder is trained."""
    kl_weight: float = 1e-2
    """Weight, in the loss of the autoencoder, of the KL divergence of its latents from a normal distribution; more of
    it makes smoother latents and less exact networks."""
    behaviour_weight: float = 0.0
    """Weight, in the loss of the autoencoder, of the difference of reconstructed networks' outputs from the stored
    ones', on the task's training inputs; 0 is off."""
    task: str | None = None
    """What the networks do, where behaviour counts. The zoo's own by default, if it is a built-in one."""

    block_out_channels: tuple[int, ...] = (64, 64)
    """Channels of the denoiser, a level each."""
    layers_per_block: int = 1
    """Residual blocks of the denoiser a level."""
    unet_steps: int = 1500
    """Optimizer steps of the denoiser."""
    unet_learning_rate: float = 1e-3
    """Peak of the one-cycle learning rate of the denoiser."""
    prediction_type: Literal["epsilon", "sample", "v_prediction"] = "sample"
    """What the denoiser predicts. With epsilon, as in the paper, few-step solvers leave outliers."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(self, "checkpoint_averaging", "latent_channels", "latent_length", "layers_per_block")
        check_positive(self, "autoencoder_steps", "unet_steps")
        check_not_negative(self, "input_noise", "latent_noise", "kl_weight", "behaviour_weight")
        check_above_zero(self, "autoencoder_learning_rate", "unet_learning_rate")
        widths = self.block_out_channels
        if not widths or any(width < 8 or width % 8 for width in widths):
            raise ConfigError(f"block_out_channels have to be multiples of 8, and are {widths}.")
        if any(8 in pair and 2**level >= self.latent_length for level, pair in enumerate(pairwise((64, *widths)))):
            raise ConfigError(
                f"block_out_channels are {widths}: where halving leaves one of {self.latent_length} latents, 8 "
                "channels are normalized to nothing. Take more of them there, or fewer levels."
            )
        if self.behaviour_weight and self.autoencoder == "linear":
            raise ConfigError("behaviour_weight is for a trained autoencoder: pass --autoencoder kl.")

    @property
    def steps(self) -> int:
        """Optimizer steps of all objectives."""
        return self.unet_steps + (self.autoencoder_steps if self.autoencoder == "kl" else 0)


@dataclass(frozen=True)
class NeuronTrainConfig(LoopConfig):
    """Learns networks of independent seeds: trains a transformer over their hidden units, and saves a pipeline."""

    family: Literal["neuron"] = "neuron"
    """A transformer over hidden units, for independently trained networks."""
    batch_size: int = 128
    """Networks drawn for each forward pass, by all processes together."""
    ema_decay: float = 0.998
    """Decay of the average of the trained weights that goes into the pipeline."""
    task: str | None = None
    """What the networks do: its training inputs are needed, not their targets. The zoo's own by default, if it is a
    built-in one."""
    initial: bool = True
    """Tell the transformer each network's initialization, which `collect --protocol independent` records; zoos that
    were imported or aligned need --no-initial."""
    ordered: bool = False
    """Bring the networks into canonical form, in which hidden units have an order, and tell the transformer their
    places; by default they are exchangeable. Needs --no-initial, since an initialization has another order, and the
    extra report. Of use with a condition, beside --last-sigma .9 and --min-sigma .9."""
    behaviour_weight: float = 1.0
    """Weight, in the loss, of the difference of the predicted networks' outputs from the stored ones', on the task's
    training inputs; 0 is off. With a condition, far more of it, such as 256, makes better networks for tasks that no
    network was trained for."""
    behaviour_inputs: int = 64
    """Training inputs of a step on which outputs are compared."""

    last_sigma: float = 0.2
    """The noise, 0 to 1, from which the last step of the sampling leads to the network. More of it, .5 to .9, is
    better where the transformer is far from having learned the details: try, and compare accuracies on validation
    data."""
    min_sigma: float = 0.0
    """The least noise that the transformer is trained with. As much as the last sigma, so that it is trained only
    where sampling goes, helps where outputs count far more than parameters do, and harms where they do not."""
    hidden_size: int = 128
    """Width of a token."""
    num_layers: int = 4
    """Blocks of the transformer."""
    num_attention_heads: int = 4
    """Heads of its attention."""
    pair_channels: int = 32
    """Features of a pair of hidden units with a weight between them."""
    transformer_steps: int = 2500
    """Optimizer steps of the transformer."""
    transformer_learning_rate: float = 2e-3
    """Peak of the one-cycle learning rate of the transformer."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(self, "behaviour_inputs", "hidden_size", "num_layers", "num_attention_heads", "pair_channels")
        check_positive(self, "transformer_steps")
        check_not_negative(self, "behaviour_weight")
        check_above_zero(self, "transformer_learning_rate")
        if self.mixed_precision == "fp16":
            raise ConfigError("fp16 scales gradients for one optimizer, and this family has two: take bf16.")
        if not 0 < self.last_sigma < 1:
            raise ConfigError(f"last_sigma has to be above 0 and below 1, and is {self.last_sigma}.")
        if not 0 <= self.min_sigma <= self.last_sigma:
            raise ConfigError(
                f"min_sigma has to be from 0 to last_sigma, {self.last_sigma}, and is {self.min_sigma}: sampling goes "
                "down to the last sigma."
            )
        if self.ordered and self.initial:
            raise ConfigError("Units in an order are not those of an initialization: ordered needs --no-initial.")
        if self.hidden_size % (2 * self.num_attention_heads):
            width, heads = self.hidden_size, self.num_attention_heads
            raise ConfigError(
                f"hidden_size has to be an even multiple of num_attention_heads, and is {width} for {heads}."
            )

    @property
    def steps(self) -> int:
        """Optimizer steps in all."""
        return self.transformer_steps


AnyTrainConfig = TrainConfig | NeuronTrainConfig


@dataclass(frozen=True)
class GenerateConfig(StageConfig):
    """Samples networks from a pipeline into a zoo."""

    pipeline: str = "runs/pipeline"
    """Folder of the pipeline, or its name on the Hub."""
    revision: str | None = None
    """Branch, tag or commit of the pipeline on the Hub."""
    output_dir: str = "runs/generated"
    """Folder of the zoo. Where it holds an unfinished one of the same configuration, sampling goes on."""
    num_networks: int = 100
    """Networks to sample."""
    num_inference_steps: int | None = None
    """Denoising steps; by default 50, and 20 with flow matching."""
    scheduler: str | None = None
    """A scheduler class of diffusers, such as DPMSolverMultistepScheduler, instead of the pipeline's own."""
    condition: str | None = None
    """What to ask for: a JSON object with the columns of the training's --condition, '{"classes": [0, 1, 1]}'.
    `pdiff-hf info PIPELINE` says what can be asked."""
    conditions: str | None = None
    """A file with such an object a line, for a network each; after the last line it starts again."""
    guidance_scale: float = 1.0
    """How strictly the condition is followed (classifier-free guidance): 1 as it was learned, more is stricter, 0
    ignores it. Audits choose among 1, 1.5 and 2."""
    parameter_noise: float = 0.0
    """Noise on each parameter, in units of its standard deviation over the zoo: more novel, less accurate networks."""
    batch_size: int | None = None
    """Networks sampled at a time by a process; by default 100, and fewer where they are large."""
    seed: int = 0
    """Of the first network; the others count up from it, so that each can be made again alone."""
    task: str | None = None
    """What the networks do, for the zoo's description."""
    dtype: ZooDtype = "float32"
    """How networks are stored; bfloat16 halves the files and keeps three digits."""
    mixed_precision: Literal["no", "bf16"] = "no"
    """Of the pipeline: bf16 takes half of the time where the processor multiplies in it."""
    export: str | None = None
    """Folder that gets a folder a network, as other libraries load it: PEFT, diffusers, or a safetensors file."""
    push_to_hub: str | None = None
    """Name of the dataset repository that the zoo is pushed to in the end."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(self, "num_networks")
        for name in ("num_inference_steps", "batch_size"):
            if getattr(self, name) is not None:
                check_positive(self, name)
        check_not_negative(self, "parameter_noise", "guidance_scale")
        if self.mixed_precision not in ("no", "bf16"):
            raise ConfigError(f"mixed_precision is {self.mixed_precision!r}; expected no or bf16.")
        check_seed(self)
        if self.condition is not None and self.conditions is not None:
            raise ConfigError("condition and conditions both say what is asked for: pass one of them.")
        if self.guidance_scale != 1 and self.condition is None and self.conditions is None:
            raise ConfigError(f"guidance_scale is {self.guidance_scale}, and nothing is asked for: pass --condition.")


@dataclass(frozen=True)
class EvaluateConfig(StageConfig):
    """Scores trained and generated networks and all trivial baselines, audits memorization, and gives a verdict."""

    task: str | None = None
    """A built-in task or family of tasks, or a class of your own: path/to/file.py:MyTask. The trained zoo's own by
    default, if it is a built-in one. Of a family of tasks, the pipeline is asked for conditions that no training
    network had."""
    trained: str = "runs/zoo"
    """The zoo that was learned from, a folder or its name on the Hub; or checkpoints of any other origin, a folder or
    a pattern such as 'theirs/*.pt'."""
    generated: str = "runs/generated"
    """The generated zoo or checkpoints, as above, or the pipeline to sample from; of a family of tasks, a
    pipeline."""
    fresh: str | None = None
    """Networks that were trained from new seeds, the gold standard: a zoo or checkpoints, as above; of a family of
    tasks a zoo that was collected with --split test."""
    output_dir: str = "runs/report"
    """Folder of the report: report.json, report.md, report.html and pictures."""
    pipeline: str | None = None
    """The pipeline that generated, where `generated` is a zoo: adds its denoising and training to the report. The card
    of a folder gets figures and pictures. Not for families of tasks."""
    num_networks: int = 100
    """Networks to sample where `generated` is a pipeline; of a family of tasks, 16 of each condition."""
    seed: int = 0
    """Of the networks to sample."""
    networks_per_point: int = 50
    """Networks of each baseline at each strength; fewer are faster, and say less. Not for families of tasks."""
    push_to_hub: str | None = None
    """Name of the model repository that the pipeline, with its card, is pushed to in the end."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(self, "num_networks", "networks_per_point")
        if self.networks_per_point > 100_000:
            raise ConfigError("networks_per_point has to be at most 100,000.")
        check_seed(self)


@dataclass(frozen=True)
class QuickstartConfig(StageConfig):
    """Trains networks on digits, learns their distribution, samples new ones, compares."""

    story: Literal["checkpoints", "subsets"] = "checkpoints"
    """Checkpoints of one ConvNet, as the published method learns them, or networks for tasks that nobody trained:
    which of the ten digits count, in some 7 minutes."""
    output_dir: str = "runs/quickstart"
    """Where zoo/, fresh/ (held-out tasks), pipeline/, generated/ and report/ go; what an earlier quickstart left in
    them is removed."""
    task: str | None = None
    """A built-in task, or a class of your own: path/to/file.py:MyTask, whose learning rate does not end at 0; of the
    other story a family. By default digits-convnet or digits-subsets."""
    seed: int = 0
    """Of everything."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_seed(self)
        if self.story not in ("checkpoints", "subsets"):
            raise ConfigError(f"The story is {self.story!r}; expected 'checkpoints' or 'subsets'.")


@dataclass(frozen=True)
class PlayConfig(StageConfig):
    """Serves a page on this machine where networks of a pipeline are asked for, tried out and looked at."""

    pipeline: str = "runs/pipeline"
    """Folder of the pipeline, or its name on the Hub, whose code is not run."""
    task: str | None = None
    """What the networks do: a built-in task or family, or path/to/file.py:MyTask. By default what the pipeline's card
    names, if it is a built-in one."""
    zoo: str | None = None
    """The zoo that was learned from, to compare with; not for families of tasks. By default the one that the training
    in the folder names, if it is in a folder here."""
    port: int | None = None
    """Of the page; by default the first free one from 7860."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.port is not None and not 0 < self.port < 2**16:
            raise ConfigError(f"port has to be from 1 to 65535, and is {self.port}.")


@dataclass(frozen=True)
class InfoConfig(StageConfig):
    """Says what a folder holds, or a repository on the Hub: a zoo, a pipeline or a report."""

    place: tyro.conf.Positional[str]
    """The folder, or the name on the Hub: namespace/name."""


@dataclass(frozen=True)
class PushConfig(StageConfig):
    """Makes a repository on the Hub hold a zoo or a pipeline, in one commit."""

    folder: str
    """A zoo (becomes a dataset repository) or a pipeline (becomes a model repository)."""
    repo: str
    """Its name on the Hub: namespace/name."""
    private: bool | None = None
    """Whether a new repository is private; the account's default otherwise."""
    commit_message: str | None = None
    """Of the commit."""
    create_pr: bool = False
    """Open a pull request instead of committing."""
    license: str | None = None
    """The Hub's name of a licence for the card, such as apache-2.0."""


@dataclass(frozen=True)
class PullConfig(StageConfig):
    """Downloads a zoo or a pipeline from the Hub into a folder."""

    repo: str
    """Its name on the Hub: namespace/name."""
    output_dir: str
    """Where it goes."""
    kind: Literal["pipeline", "zoo"] | None = None
    """A model repository with a pipeline, or a dataset repository with a zoo; whichever is there by default."""
    revision: str | None = None
    """Branch, tag or commit."""


@dataclass(frozen=True)
class ImportConfig(StageConfig):
    """Makes a zoo of checkpoints of one architecture, here or on the Hub, or of LoRA adapters of one base model."""

    output_dir: str
    """Folder of the zoo."""
    checkpoints: tuple[str, ...] = ()
    """Files of weights here, a folder of them, or a pattern: 'runs/*.pt'."""
    repositories: tuple[str, ...] = ()
    """Model repositories on the Hub: names, and patterns of them in one namespace: 'org/*-digits'."""
    adapters: tuple[str, ...] = ()
    """LoRA adapters: folders and files here, names on the Hub and patterns of them; PEFT, diffusers, kohya."""
    metadata: str | None = None
    """A file with a JSON object a line, of each adapter: its "source", and columns that the zoo gets."""
    filename: str = "model.safetensors"
    """The file of each repository that holds its weights; safetensors only."""
    patterns: tuple[str, ...] = ("*",)
    """Names of the tensors to generate, as shell-style patterns such as '*.weight'; a ! before one excludes. The
    others are stored once, for all networks."""
    may_differ: tuple[str, ...] = ()
    """Tensors that are not generated have to be the same in all networks. Those of these patterns may differ; the zoo
    has the first network's."""
    key: str | None = None
    """Where the weights are in checkpoint files that hold more: 'model', or 'ema.shadow'."""
    task: str | None = None
    """What the networks do: a built-in task, or path/to/file.py:MyTask."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if sum(map(bool, (self.checkpoints, self.repositories, self.adapters))) != 1:
            raise ConfigError("Pass --checkpoints, --repositories or --adapters: what the zoo is made of.")
        if self.key is not None and not self.checkpoints:
            raise ConfigError("--key is for --checkpoints.")
        if self.metadata is not None and not self.adapters:
            raise ConfigError("--metadata is for adapters: rows of other imported networks have none.")
        if self.adapters and (self.patterns != ("*",) or self.may_differ):
            raise ConfigError("--patterns and --may-differ are for checkpoints: of adapters, everything is generated.")
