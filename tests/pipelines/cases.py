"""Small components and pipelines, as the tests of this folder share them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler
from diffusers.models.modeling_utils import ModelMixin
from torch import nn
from torch.nn import functional as F

from pdiff_hf import (
    ConditionEncoder,
    LinearParameterAutoencoder,
    NeuralNetworkDiffusionPipeline,
    NeuronTransformerModel,
    ParameterAutoencoderKL,
    ParameterLayout,
    ParameterUNet1DModel,
)

from ..conftest import random_network
from .components.row_encoder import RowEncoder
from .components.token_denoiser import TokenDenoiser


NUM_PARAMETERS = 42  # of the small network
LATENT_SHAPE = (2, 6)
SLOTS = {"layout", "scheduler", "vae", "unet", "transformer", "condition_encoder"}
TRUSTED = {"trust_remote_code": True}
OFFLOADING = [{"offload_type": "block_level", "num_blocks_per_group": 1}, {"offload_type": "leaf_level"}]


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=seeded(seed))


def build_layout(patterns: Sequence[str] = ("0.*", "1.*")) -> ParameterLayout:
    networks = [random_network(seed).state_dict() for seed in range(6)]
    layout = ParameterLayout.from_state_dict(networks[0], patterns)
    return layout.fit([torch.stack([layout.flatten(network) for network in networks])])


def build_unet(channels: int = 2, condition_dim: int | None = None) -> ParameterUNet1DModel:
    return ParameterUNet1DModel(
        in_channels=channels,
        out_channels=channels,
        block_out_channels=(8, 16),
        norm_num_groups=4,
        condition_dim=condition_dim,
    )


CONDITIONS = [
    {"accuracy": 0.9, "classes": [0, 1, 1], "kind": "ball"},
    {"accuracy": 0.8, "classes": [1, 0, 1], "kind": "cube"},
    {"accuracy": 0.6, "classes": [1, 1, 1], "kind": "tree"},
    {"accuracy": None, "classes": [0, 1, 0], "kind": "cube"},
]


def build_encoder() -> ConditionEncoder:
    """Of a number, a list of three, and a word."""
    return ConditionEncoder.from_rows(CONDITIONS, ["accuracy", "classes", "kind"], 6)


def build_linear(num_parameters: int = NUM_PARAMETERS) -> LinearParameterAutoencoder:
    return LinearParameterAutoencoder(num_parameters=num_parameters, latent_channels=2, latent_length=6)


def build_kl(num_parameters: int = NUM_PARAMETERS) -> ParameterAutoencoderKL:
    """After some training, as it were: the blocks of a new one do nothing."""
    vae = ParameterAutoencoderKL(
        num_parameters=num_parameters, latent_channels=2, latent_length=6, patch_size=8, hidden_channels=4
    )
    for block in (*vae.encoder_blocks, *vae.decoder_blocks):
        nn.init.normal_(block.conv2.weight, std=0.2)
    return vae


def build_neuron(num_parameters: int = NUM_PARAMETERS, **settings) -> NeuronTransformerModel:
    """Three units, two more, weights between them, and a rest; after some training, as it were."""
    tensors = [
        {"start": 0, "shape": [3, 4], "axes": [[0, 0, 1]]},
        {"start": 12, "shape": [2, 3, 2], "axes": [[0, 1, 1], [1, 0, 1]]},
        {"start": 24, "shape": [2], "axes": [[0, 1, 1]]},
        {"start": 26, "shape": [num_parameters - 26], "axes": []},
    ]
    sizes = {"hidden_size": 16, "num_layers": 2, "num_attention_heads": 2, "pair_channels": 4, "pair_head_dim": 2}
    model = NeuronTransformerModel(num_parameters=num_parameters, units=[3, 2], tensors=tensors, **(sizes | settings))
    for layer in model.modules():
        if isinstance(layer, nn.Linear) and (layer.weight == 0).all():
            nn.init.normal_(layer.weight, std=0.2)
    return model


# ---- components


@dataclass
class Case:
    """A small model, its inputs, and the shape of its output."""

    build: Callable[[], ModelMixin]
    inputs: Callable[[], dict]
    output_shape: tuple[int, ...]
    # The block that gradient checkpointing and compilation repeat, and how many graphs all of them together make:
    # one for each combination of widths, memory formats and arguments.
    block: str = ""
    graphs: int = 0

    def model(self) -> ModelMixin:
        torch.manual_seed(0)
        return self.build()

    def run(self, model: ModelMixin, **changes) -> torch.Tensor:
        output = model(**self.inputs(), **changes)
        return output if isinstance(output, torch.Tensor) else output[0]

    def loss(self, model: ModelMixin) -> torch.Tensor:
        output = self.run(model)
        return F.mse_loss(output.float(), randn(*output.shape, seed=1).to(output.device))


CASES = {
    "unet": Case(
        build_unet,
        lambda: {"sample": randn(2, 2, 6), "timestep": torch.tensor([3, 500])},
        output_shape=(2, 2, 6),
        block="TimeResidualBlock1D",
        graphs=7,
    ),
    "linear": Case(
        build_linear,
        lambda: {"sample": randn(2, NUM_PARAMETERS)},
        output_shape=(2, NUM_PARAMETERS),
        block="LinearBasis",
        graphs=2,
    ),
    "kl": Case(
        build_kl,
        lambda: {"sample": randn(2, NUM_PARAMETERS)},
        output_shape=(2, NUM_PARAMETERS),
        block="ResidualBlock1D",
        graphs=1,
    ),
    "neuron": Case(
        lambda: build_neuron(with_initial=True, condition_dim=3, ordered=True),
        lambda: {
            "sample": randn(2, 1, NUM_PARAMETERS),
            "timestep": torch.tensor([300, 900]),
            "condition": randn(2, 3),
            "initial": randn(2, 1, NUM_PARAMETERS, seed=1),
            "previous": randn(2, 1, NUM_PARAMETERS, seed=2),
        },
        output_shape=(2, 1, NUM_PARAMETERS),
        block="NeuronTransformerBlock",
        graphs=1,
    ),
    "layout": Case(build_layout, lambda: {"normalized": randn(2, 32)}, output_shape=(2, 32)),
}


def assert_same_tensors(one: nn.Module, other: nn.Module) -> None:
    expected, found = one.state_dict(), other.state_dict()
    assert list(expected) == list(found)
    for name in expected:
        assert expected[name].dtype == found[name].dtype
        assert torch.equal(expected[name], found[name]), name


# ---- pipelines


FILLINGS: dict[str, Callable[[int], dict[str, ModelMixin]]] = {
    "unet-linear": lambda size: {"unet": build_unet(), "vae": build_linear(size)},
    "unet-kl": lambda size: {"unet": build_unet(), "vae": build_kl(size)},
    "unet": lambda size: {"unet": build_unet(channels=1)},
    "neuron": lambda size: {"transformer": build_neuron(size, condition_dim=6), "condition_encoder": build_encoder()},
    "transformer": lambda size: {
        "transformer": TokenDenoiser(),
        "condition_encoder": RowEncoder(),
        "vae": build_linear(size),
    },
}


def build_components(filling: str = "unet-linear", patterns: Sequence[str] = ("*",)) -> dict:
    torch.manual_seed(0)
    layout = build_layout(patterns)
    models = {name: model.eval() for name, model in FILLINGS[filling](layout.vector_size).items()}
    # The velocity of a denoiser that was not trained leads to small latents; its noise would lead to huge ones.
    scheduler = DDPMScheduler(num_train_timesteps=1000, clip_sample=False, prediction_type="v_prediction")
    if filling == "neuron":
        scheduler = FlowMatchEulerDiscreteScheduler()
    return models | {"layout": layout, "scheduler": scheduler}


def build_pipe(filling: str = "unet-linear", **components) -> NeuralNetworkDiffusionPipeline:
    return quiet(NeuralNetworkDiffusionPipeline(**(build_components(filling) | components)))


def load(folder: Path, **kwargs) -> NeuralNetworkDiffusionPipeline:
    """By the code of this package, but for components that only the folder has code of."""
    own = not (folder / "transformer" / "token_denoiser.py").exists()
    return quiet(NeuralNetworkDiffusionPipeline.from_pretrained(folder, **({} if own else TRUSTED), **kwargs))


def quiet(pipe):
    pipe.set_progress_bar_config(disable=True)
    return pipe


def denoiser_slot(pipe: NeuralNetworkDiffusionPipeline) -> str:
    return "transformer" if pipe.unet is None else "unet"


def models_of(pipe: NeuralNetworkDiffusionPipeline) -> dict[str, nn.Module]:
    return {name: part for name, part in pipe.components.items() if isinstance(part, nn.Module)}


def run(pipe: NeuralNetworkDiffusionPipeline, **changes):
    """The first output for the standard inputs, with some of them changed."""
    inputs = {"num_networks": 2, "num_inference_steps": 3, "generator": seeded(0), "output_type": "pt"}
    return pipe(**(inputs | changes))[0]


def assert_same(one: torch.Tensor, other: torch.Tensor, atol: float = 1e-4) -> None:
    assert one.isfinite().all()
    torch.testing.assert_close(one, other, atol=atol, rtol=0)


def files_of(folder: Path) -> dict[str, bytes]:
    """Every file of a folder and its bytes."""
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
