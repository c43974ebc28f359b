"""Neural Network Diffusion: the pipeline and its components."""

import importlib
from typing import TYPE_CHECKING


if TYPE_CHECKING:  # `as`: exported, for type checkers too
    from .condition_encoder.condition_encoder import ConditionEncoder as ConditionEncoder
    from .layout.parameter_layout import ParameterLayout as ParameterLayout
    from .pipeline import NeuralNetworkDiffusionPipeline as NeuralNetworkDiffusionPipeline
    from .pipeline import NeuralNetworkDiffusionPipelineOutput as NeuralNetworkDiffusionPipelineOutput
    from .transformer.neuron_transformer import NeuronTransformerModel as NeuronTransformerModel
    from .unet.parameter_unet import ParameterUNet1DModel as ParameterUNet1DModel
    from .vae.linear_autoencoder import LinearParameterAutoencoder as LinearParameterAutoencoder
    from .vae.parameter_autoencoder import ParameterAutoencoderKL as ParameterAutoencoderKL


# Imported where asked for: what handles networks needs the layout alone, and diffusers' pipelines take seconds.
_HOMES = {
    "ConditionEncoder": "condition_encoder.condition_encoder",
    "LinearParameterAutoencoder": "vae.linear_autoencoder",
    "NeuralNetworkDiffusionPipeline": "pipeline",
    "NeuralNetworkDiffusionPipelineOutput": "pipeline",
    "NeuronTransformerModel": "transformer.neuron_transformer",
    "ParameterAutoencoderKL": "vae.parameter_autoencoder",
    "ParameterLayout": "layout.parameter_layout",
    "ParameterUNet1DModel": "unet.parameter_unet",
}
__all__ = sorted(_HOMES)


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_HOMES[name]}", __name__), name)


def __dir__() -> list[str]:
    return __all__
