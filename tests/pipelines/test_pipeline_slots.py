"""Which components a pipeline needs, and what it makes of them: networks <-> latents, and a condition."""

import pytest
import torch
from diffusers import DiffusionPipeline

from pdiff_hf import NeuralNetworkDiffusionPipeline

from .cases import (
    FILLINGS,
    TRUSTED,
    assert_same,
    build_components,
    build_kl,
    build_layout,
    build_linear,
    build_pipe,
    build_unet,
    randn,
    run,
)


def vectors_of(pipe: NeuralNetworkDiffusionPipeline, count: int = 3) -> torch.Tensor:
    """Parameter vectors such as those of the zoo."""
    return pipe.layout(randn(count, pipe.layout.vector_size)).vectors


# ---- which components fit together


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"unet": None}, "needs one denoiser, `unet` or `transformer`, and has none"),
        ({"transformer": build_unet()}, "needs one denoiser, `unet` or `transformer`, and has both"),
        ({"layout": None}, "has no layout, without which nothing can be generated"),
        ({"scheduler": None}, "has no scheduler, without which nothing can be generated"),
        ({"vae": build_linear(43)}, "vectors of 43 parameters, and the layout has 42"),
        ({"vae": build_kl(41)}, "vectors of 41 parameters, and the layout has 42"),
        ({"layout": build_layout(("0.*",))}, "vectors of 42 parameters, and the layout has 16"),
        ({"vae": None}, "takes 2 channels, and what it denoises has 1: the pipeline lacks the autoencoder"),
        ({"unet": build_unet(3)}, "takes 3 channels, and what it denoises has 2: it belongs to another autoencoder"),
        ({"unet": None, "transformer": build_unet(3)}, "takes 3 channels, and what it denoises has 2"),
    ],
)
def test_components_that_do_not_fit_together_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        NeuralNetworkDiffusionPipeline(**(build_components() | changes))


# What diffusers is told to leave out of a folder with code of its own it leaves out only where it is no slot.
NEEDED = [
    ("vae", "the pipeline lacks the autoencoder", "package"),
    ("unet", "has none", "package"),
    *((slot, f"has no {slot}", loader) for slot in ("layout", "scheduler") for loader in ("package", "folder")),
]


@pytest.mark.parametrize(("slot", "message", "loader"), NEEDED)
def test_a_folder_without_a_component_that_it_needs_is_refused(tmp_path, slot, message, loader):
    build_pipe().save_pretrained(tmp_path)
    loader_class = NeuralNetworkDiffusionPipeline if loader == "package" else DiffusionPipeline
    with pytest.raises(ValueError, match=message):
        loader_class.from_pretrained(tmp_path, **{slot: None}, **TRUSTED)


def test_the_layout_and_the_scheduler_are_needed_and_the_rest_is_optional():
    assert set(NeuralNetworkDiffusionPipeline._optional_components) == {
        "vae",
        "unet",
        "transformer",
        "condition_encoder",
    }
    pipe = NeuralNetworkDiffusionPipeline(
        layout=build_layout(), scheduler=build_components()["scheduler"], unet=build_unet(1)
    )
    assert pipe.vae is pipe.transformer is pipe.condition_encoder is None


def test_the_denoiser_is_the_model_in_the_filled_slot(pipe):
    assert [part for part in (pipe.unet, pipe.transformer) if part is not None] == [pipe.denoiser]


# ---- networks <-> latents


@pytest.mark.parametrize(
    ("filling", "shape"),
    [("unet-linear", (2, 6)), ("unet-kl", (2, 6)), ("unet", (1, 42)), ("transformer", (2, 6))],
)
def test_the_latent_shape_is_that_of_the_autoencoder_or_of_whole_vectors(filling, shape):
    assert build_pipe(filling).latent_shape == shape


def test_encoding_gives_latents_of_that_shape_and_decoding_float32_vectors(pipe):
    latents = pipe.encode(vectors_of(pipe))
    assert latents.shape == (3, *pipe.latent_shape)
    vectors = pipe.decode(latents)
    assert vectors.shape == (3, 42)
    assert vectors.dtype == torch.float32


def test_latents_are_the_mode_of_the_posterior_of_the_normalized_vectors():
    for filling in ("unet-linear", "unet-kl"):
        pipe = build_pipe(filling)
        vectors = vectors_of(pipe)
        expected = pipe.vae.encode(pipe.layout.normalize(vectors)).latent_dist.mode()
        assert torch.equal(pipe.encode(vectors), expected)


def test_without_an_autoencoder_the_normalized_vectors_are_the_latents():
    pipe = build_pipe("unet")
    vectors = vectors_of(pipe)
    assert torch.equal(pipe.encode(vectors), pipe.layout.normalize(vectors)[:, None])
    assert_same(pipe.decode(pipe.encode(vectors)), vectors)


@torch.no_grad()
def test_a_fitted_autoencoder_decodes_the_networks_that_it_encoded():
    pipe = build_pipe()
    vectors = vectors_of(pipe, count=8)
    normalized = pipe.layout.normalize(vectors)
    pipe.layout.fit([vectors])
    normalized = pipe.layout.normalize(vectors)
    pipe.vae.fit(lambda: [normalized])
    assert_same(pipe.decode(pipe.encode(vectors)), vectors)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_networks_are_encoded_and_decoded_in_the_dtype_of_the_components(pipe, dtype):
    vectors = vectors_of(pipe)
    expected = pipe.decode(pipe.encode(vectors))
    pipe.to(dtype)
    latents = pipe.encode(vectors)
    assert latents.dtype == dtype
    found = pipe.decode(latents)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected, atol=0.02, rtol=0.02)


def test_latents_of_another_dtype_are_decoded(pipe):
    latents = pipe.encode(vectors_of(pipe))
    assert_same(pipe.decode(latents.double()), pipe.decode(latents))


def test_the_noise_of_decoding_is_that_of_its_generators(pipe):
    latents = pipe.encode(vectors_of(pipe, count=2))

    def decode(*seeds: int) -> torch.Tensor:
        return pipe.decode(latents, 0.5, [torch.Generator().manual_seed(seed) for seed in seeds])

    assert torch.equal(decode(0, 1), decode(0, 1))
    assert torch.equal(decode(0, 1)[0], decode(0, 2)[0])
    assert not torch.equal(decode(0, 1)[1], decode(0, 2)[1])


# ---- the condition


def test_the_denoiser_gets_the_embedding_of_nothing_for_each_network():
    pipe = build_pipe("transformer")
    seen = []
    pipe.transformer.condition_in.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].clone()))
    run(pipe, num_networks=3, chunk_size=2, num_inference_steps=1)
    assert torch.equal(seen[0], pipe.condition_encoder.nothing.expand(2, 4))
    assert torch.equal(seen[1], pipe.condition_encoder.nothing.expand(1, 4))


def test_the_embedding_of_the_condition_changes_the_networks():
    pipe = build_pipe("transformer")
    before = run(pipe)
    torch.nn.init.constant_(pipe.condition_encoder.nothing, 2.0)
    assert not torch.allclose(run(pipe), before, atol=1e-4)


def test_a_denoiser_without_a_condition_encoder_gets_no_condition():
    pipe = build_pipe("transformer", condition_encoder=None)
    pipe.transformer.condition_in.register_forward_pre_hook(lambda *_: pytest.fail("there was a condition"))
    assert run(pipe).isfinite().all()


@pytest.mark.parametrize("filling", FILLINGS)
def test_training_modes_and_configs_survive_that_a_pipeline_is_built(filling):
    components = build_components(filling)
    pipe = NeuralNetworkDiffusionPipeline(**components)
    assert all(getattr(pipe, name) is part for name, part in components.items())
