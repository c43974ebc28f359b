"""Neural Network Diffusion: the pipeline and its components."""

from .condition_encoder.condition_encoder import ConditionEncoder
from .layout.parameter_layout import ParameterLayout
from .pipeline import NeuralNetworkDiffusionPipeline, NeuralNetworkDiffusionPipelineOutput
from .transformer.neuron_transformer import NeuronTransformerModel
from .unet.parameter_unet import ParameterUNet1DModel
from .vae.linear_autoencoder import LinearParameterAutoencoder
from .vae.parameter_autoencoder import ParameterAutoencoderKL


__all__ = [
    "ConditionEncoder",
    "LinearParameterAutoencoder",
    "NeuralNetworkDiffusionPipeline",
    "NeuralNetworkDiffusionPipelineOutput",
    "NeuronTransformerModel",
    "ParameterAutoencoderKL",
    "ParameterLayout",
    "ParameterUNet1DModel",
]
