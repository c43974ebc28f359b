"""Each component compiles and exports as diffusers asks of its models."""

from pathlib import Path

import pytest
import torch

from .cases import CASES, randn


@torch.no_grad()
@pytest.mark.usefixtures("clean_compiler")
@pytest.mark.parametrize(
    "backend", ["aot_eager", pytest.param("inductor", marks=[pytest.mark.slow, pytest.mark.long])]
)
def test_the_model_compiles_to_one_graph_and_only_once(case, backend):
    model = case.model().eval()
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for _ in range(2):
            torch.testing.assert_close(case.run(compiled), case.run(model), atol=1e-4, rtol=1e-4)


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.usefixtures("clean_compiler")
def test_the_compiled_unet_serves_all_shapes():
    model = CASES["unet"].model().eval()
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend="aot_eager")
    with torch._dynamo.config.patch(error_on_recompile=True):
        # The first batch differs from the channels: the compiler takes equal sizes for the same one.
        for batch, length in ((3, 6), (4, 8), (5, 10)):
            sample, timestep = randn(batch, 2, length), torch.arange(batch)
            torch.testing.assert_close(compiled(sample, timestep)[0], model(sample, timestep)[0], atol=1e-4, rtol=1e-4)


@torch.no_grad()
@pytest.mark.usefixtures("clean_compiler")
@pytest.mark.parametrize("name", ["linear", "kl", "layout"])
def test_the_compiled_model_serves_all_batch_sizes(name):
    model = CASES[name].model().eval()
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend="aot_eager")
    width = CASES[name].output_shape[1]
    with torch._dynamo.config.patch(error_on_recompile=True):
        for batch in (3, 4, 7):
            inputs = randn(batch, width)
            expected, found = model(inputs), compiled(inputs)
            if name != "layout":
                expected, found = expected[0], found[0]
            torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


@torch.no_grad()
@pytest.mark.usefixtures("clean_compiler")
def test_the_repeated_blocks_compile_once_for_each_of_their_shapes(trainable):
    model = trainable.model().eval()
    assert model._repeated_blocks == [trainable.block]
    expected = trainable.run(model)
    model.compile_repeated_blocks(fullgraph=True, backend="aot_eager")
    limit = "recompile_limit" if hasattr(torch._dynamo.config, "recompile_limit") else "cache_size_limit"
    with torch._dynamo.config.patch({limit: trainable.graphs}):
        for _ in range(2):
            torch.testing.assert_close(trainable.run(model), expected, atol=1e-4, rtol=1e-4)


@torch.no_grad()
@pytest.mark.usefixtures("clean_compiler")
@pytest.mark.slow
def test_a_group_offloaded_model_compiles(case):
    model = case.model().eval()
    expected = case.run(model)
    model.enable_group_offload(torch.device("cpu"), offload_type="block_level", num_blocks_per_group=1)
    model.compile(backend="aot_eager")
    for _ in range(2):
        torch.testing.assert_close(case.run(model), expected, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_the_model_exports_ahead_of_time(case):
    model = case.model().eval()
    exported = torch.export.export(model, args=(), kwargs=case.inputs()).module()
    torch.testing.assert_close(case.run(exported), case.run(model), atol=1e-5, rtol=0)


@torch.no_grad()
@pytest.mark.slow
@pytest.mark.long
def test_the_exported_model_is_packaged_and_runs(case, tmp_path):
    model = case.model().eval()
    exported = torch.export.export(model, args=(), kwargs=case.inputs())
    package = torch._inductor.aoti_compile_and_package(exported, package_path=str(tmp_path / "model.pt2"))
    assert Path(package).exists()
    loaded = torch._inductor.aoti_load_package(package, run_single_threaded=True)
    torch.testing.assert_close(case.run(loaded), case.run(model), atol=1e-4, rtol=1e-4)
