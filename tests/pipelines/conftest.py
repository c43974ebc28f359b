"""Fixtures of the conformance tests: each component, and the pipeline in each filling of its slots."""

import pytest
import torch

from pdiff_hf import NeuralNetworkDiffusionPipeline

from .cases import CASES, FILLINGS, Case, build_pipe


@pytest.fixture(params=list(CASES))
def case(request: pytest.FixtureRequest) -> Case:
    return CASES[request.param]


@pytest.fixture(params=["unet", "linear", "kl", "neuron"])
def trainable(request: pytest.FixtureRequest) -> Case:
    return CASES[request.param]


@pytest.fixture(params=["linear", "kl"])
def autoencoder(request: pytest.FixtureRequest) -> Case:
    return CASES[request.param]


@pytest.fixture(params=list(FILLINGS))
def filling(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def pipe(filling: str) -> NeuralNetworkDiffusionPipeline:
    return build_pipe(filling)


@pytest.fixture
def clean_compiler():
    torch.compiler.reset()
    yield
    torch.compiler.reset()
