"""Whatever bytes a zoo, a layout or a pipeline holds, reading it ends in success or in an error of our own."""

import faulthandler
import json
import multiprocessing
import re
import resource
import shutil
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import diffusers
import pytest
import torch
from diffusers import DDPMScheduler
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pdiff_hf import (
    NeuralNetworkDiffusionPipeline,
    ParameterAutoencoderKL,
    ParameterLayout,
    ParameterUNet1DModel,
    PdiffError,
    WeightZoo,
    ZooError,
    load_pipeline,
)

from .conftest import random_network


FILES = ("zoo.json", "metadata.jsonl", "frozen.safetensors", "networks-00001-of-00002.safetensors")
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=9), inner, max_size=4),
    max_leaves=8,
)
MANY = settings(max_examples=2000, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
FEWER = settings(MANY, max_examples=1000)
EDITS = st.lists(st.tuples(st.integers(0, 10**4), st.integers(0, 16), st.binary(max_size=16)), min_size=1, max_size=4)
CUT = st.none() | st.integers(0, 10**4)
COMPONENTS = ("layout", "unet", "vae")
DESCRIPTIONS = (
    "model_index.json",
    "scheduler/scheduler_config.json",
    *(f"{component}/config.json" for component in COMPONENTS),
)
WEIGHTS = tuple(f"{component}/diffusion_pytorch_model.safetensors" for component in COMPONENTS)
# What is in descriptions elsewhere, and numbers that a loader may take for a size.
KNOWN = st.sampled_from(
    ["DDIMScheduler", "UNet1DModel", "canary", "diffusers", "layout", "learned", "pipeline", "sample", "sigmoid"]
) | st.sampled_from([-1, 0, 1, 2, 3, 4, 2.0, 10**6, 10**9, 10**12])
ENTRIES = st.sampled_from(["_name_or_path", "quantization_config", "safety_checker", "trained_betas", "tied_to"])
# Far more than 20 kB of weights need.
MOST_BYTES = 2**30
MOST_SECONDS = 30


@pytest.fixture(scope="module")
def original(tmp_path_factory) -> WeightZoo:
    layout = ParameterLayout.from_state_dict(random_network(0).state_dict(), ("0.*", "1.*"))
    zoo = WeightZoo.create(tmp_path_factory.mktemp("fuzz") / "zoo", layout, task="none", networks_per_shard=3)
    with zoo:
        for seed in range(5):
            zoo.append(random_network(seed).state_dict() | layout.frozen_state_dict(), seed=seed)
    return zoo


def read(folder: Path) -> None:
    """Reads everything that a zoo has."""
    try:
        zoo = WeightZoo(folder)
        assert zoo.vectors().shape == (len(zoo), zoo.vector_size)
        assert len(zoo.metadata) == len(zoo)
        if len(zoo):
            assert len(zoo.state_dict(len(zoo) - 1)) == len(zoo.layout.config["tensors"])
    except ZooError:
        pass


@pytest.fixture
def copy(original, tmp_path) -> Path:
    return Path(shutil.copytree(original.folder, tmp_path / "zoo"))


def edited(original: bytes, edits: list[tuple[int, int, bytes]], cut: int | None) -> bytes:
    content = bytearray(original)
    for start, length, replacement in edits:
        start %= len(content) + 1
        content[start : start + length] = replacement
    return bytes(content[:cut])


def mutated(data, description: dict, replacements):
    """The description with one thing replaced, anywhere in it."""
    root = {"": description}
    place, key = root, ""
    for _ in range(data.draw(st.integers(0, 5))):
        inside = place[key]
        keys = (
            list(inside) if isinstance(inside, dict) else list(range(len(inside))) if isinstance(inside, list) else []
        )
        if keys:
            place, key = inside, data.draw(st.sampled_from(keys))
    place[key] = data.draw(replacements)
    return root[""]


@pytest.mark.slow
@MANY
@given(name=st.sampled_from(FILES), edits=EDITS, cut=CUT)
def test_mutated_bytes(copy, original, name, edits, cut):
    (copy / name).write_bytes(edited((original.folder / name).read_bytes(), edits, cut))
    read(copy)
    shutil.copyfile(original.folder / name, copy / name)


@pytest.mark.slow
@MANY
@given(data=st.data())
def test_mutated_descriptions(copy, original, data):
    root = json.loads((original.folder / "zoo.json").read_text())
    (copy / "zoo.json").write_text(json.dumps(mutated(data, root, JSON)))
    read(copy)


@pytest.mark.slow
@MANY
@given(
    tensors=st.lists(st.dictionaries(st.sampled_from(["name", "shape", "dtype", "role", "tied_to"]), JSON), max_size=3)
)
def test_arbitrary_layouts(tensors):
    try:
        layout = ParameterLayout(tensors=tensors)
    except ValueError:
        return
    assert torch.isfinite(layout.mean).all()


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory) -> Path:
    """The folder of a pipeline of a few hundred weights, whose code leaves a trace when it is run."""
    folder = tmp_path_factory.mktemp("fuzz") / "pipeline"
    layout = ParameterLayout.from_state_dict(random_network(0).state_dict(), ("0.*", "1.*"))
    vae = ParameterAutoencoderKL(
        layout.vector_size,
        latent_channels=2,
        latent_length=4,
    )
    unet = ParameterUNet1DModel(2, 2, block_out_channels=(4,), norm_num_groups=2)
    NeuralNetworkDiffusionPipeline(layout, DDPMScheduler(), vae, unet).save_pretrained(folder)
    canary = f"open({str(trace_beside(folder))!r}, 'w').close()\n"
    for file in [*folder.rglob("*.py"), *(folder / part / "canary.py" for part in ("", *COMPONENTS))]:
        file.write_text(canary)
    return folder


def trace_beside(folder: Path) -> Path:
    return folder.parent / "code-was-run"


class LimitedProcess:
    """A process that loads pipelines within `MOST_BYTES` and `MOST_SECONDS`; it is started again where it ends."""

    def __init__(self, pipeline: Path):
        self.pipeline = pipeline
        self.start()

    def start(self) -> None:
        spawn = multiprocessing.get_context("spawn")
        self.pool = ProcessPoolExecutor(1, mp_context=spawn, initializer=limit, initargs=(self.pipeline,))

    def outcome(self, folder: Path) -> str:
        try:
            return self.pool.submit(load_and_sample, folder).result()
        except BrokenProcessPool:
            self.pool.shutdown()
            self.start()
            return "the process crashed, or was ended since it took too long"


def limit(pipeline: Path) -> None:
    """Lets this process have so much more memory than it has after loading."""
    torch.set_num_threads(1)
    diffusers.utils.logging.disable_progress_bar()
    diffusers.utils.logging.set_verbosity(diffusers.utils.logging.CRITICAL)
    assert load_and_sample(pipeline) == "sampled"
    used = int(re.search(r"VmSize:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024
    resource.setrlimit(resource.RLIMIT_AS, (used + MOST_BYTES, used + MOST_BYTES))


def load_and_sample(folder: Path) -> str:
    faulthandler.dump_traceback_later(MOST_SECONDS, exit=True)
    try:
        pipe = load_pipeline(folder)
    except PdiffError as error:
        return "memory" if is_lack_of_memory(error) else "refused"
    except BaseException as error:
        return f"loading raised {error!r}"
    try:
        pipe.set_progress_bar_config(disable=True)
        vectors = pipe(num_inference_steps=2, generator=torch.Generator().manual_seed(0), output_type="pt").state_dicts
        return "sampled" if vectors.shape == (1, pipe.layout.vector_size) else f"sampled {list(vectors.shape)}"
    except BaseException as error:
        return "memory" if is_lack_of_memory(error) else f"sampling raised {error!r}"
    finally:
        faulthandler.cancel_dump_traceback_later()


def is_lack_of_memory(error: BaseException | None) -> bool:
    while error is not None:
        if isinstance(error, MemoryError) or "allocate" in str(error):
            return True
        error = error.__cause__ or error.__context__
    return False


@pytest.fixture(scope="module")
def limited(pipeline) -> Iterator[LimitedProcess]:
    process = LimitedProcess(pipeline)
    yield process
    process.pool.shutdown()


@pytest.fixture
def pipeline_copy(pipeline, tmp_path) -> Path:
    return Path(shutil.copytree(pipeline, tmp_path / "pipeline"))


def check_pipeline(limited: LimitedProcess, folder: Path, changed: str) -> None:
    outcome = limited.outcome(folder)
    # Whatever the scheduler does not understand, it says so in diffusers' own words, when it is used.
    about_the_scheduler = changed in ("model_index.json", "scheduler/scheduler_config.json")
    assert outcome in ("sampled", "refused") or (about_the_scheduler and outcome.startswith("sampling raised"))
    assert not trace_beside(limited.pipeline).exists()


@pytest.mark.slow
@FEWER
@given(name=st.sampled_from(DESCRIPTIONS + WEIGHTS), edits=EDITS, cut=CUT)
def test_mutated_bytes_of_pipelines(limited, pipeline, pipeline_copy, name, edits, cut):
    (pipeline_copy / name).write_bytes(edited((pipeline / name).read_bytes(), edits, cut))
    check_pipeline(limited, pipeline_copy, name)
    shutil.copyfile(pipeline / name, pipeline_copy / name)


@pytest.mark.slow
@FEWER
@given(name=st.sampled_from(DESCRIPTIONS), data=st.data())
def test_mutated_descriptions_of_pipelines(limited, pipeline, pipeline_copy, name, data):
    description = json.loads((pipeline / name).read_text())
    if data.draw(st.booleans()):
        description[data.draw(ENTRIES)] = None
    (pipeline_copy / name).write_text(json.dumps(mutated(data, description, KNOWN | JSON)))
    check_pipeline(limited, pipeline_copy, name)
    shutil.copyfile(pipeline / name, pipeline_copy / name)


def test_a_pipeline_that_is_not_mutated_samples(limited, pipeline_copy):
    check_pipeline(limited, pipeline_copy, "nothing")
    assert limited.outcome(pipeline_copy) == "sampled"


def tensor(*shape: int) -> dict:
    return {"name": "0.weight", "shape": list(shape), "dtype": "float32", "role": "generated"}


@pytest.mark.parametrize(
    ("name", "claims"),
    [
        ("layout/config.json", {"tensors": [tensor(10**9)]}),
        ("layout/config.json", {"_class_name": "Another", "tensors": [tensor(10**9)]}),
        ("scheduler/scheduler_config.json", {"num_train_timesteps": 10**9}),
        ("unet/config.json", {"block_out_channels": [20_000]}),
        ("unet/config.json", {"_class_name": "Another", "block_out_channels": [20_000]}),
        ("unet/config.json", {"layers_per_block": 10**6}),
        ("vae/config.json", {"num_blocks": 10**6}),
        ("vae/config.json", {"latent_length": 10**7}),
        ("vae/config.json", {"_class_name": "Another", "latent_length": 10**7}),
    ],
)
def test_what_a_pipeline_claims_is_refused_before_it_is_allocated(limited, pipeline_copy, name, claims):
    change(pipeline_copy / name, claims)
    assert limited.outcome(pipeline_copy) == "refused"


@pytest.mark.parametrize("groups", [-1, 2.0, True])
def test_a_denoiser_that_cannot_run_is_refused(limited, pipeline_copy, groups):
    change(pipeline_copy / "unet" / "config.json", {"norm_num_groups": groups})
    assert limited.outcome(pipeline_copy) == "refused"


def change(description: Path, entries: dict) -> None:
    description.write_text(json.dumps(json.loads(description.read_text()) | entries))


def fetched(folder: Path) -> WeightZoo:
    """The zoo as one that lies in the cache of the Hub, whose shards are not looked at before they are read."""
    return WeightZoo(folder, fetch=lambda name: folder / name)


@pytest.mark.parametrize(
    "read",
    [lambda zoo: zoo[0], lambda zoo: next(zoo.batches()), lambda zoo: zoo.layout],
    ids=["one", "batch", "layout"],
)
def test_a_fetched_zoo_that_claims_too_much_is_refused(copy, read):
    tensors = json.loads((copy / "zoo.json").read_text())["layout"]["tensors"]
    frozen = [entry for entry in tensors if entry["role"] == "frozen"]
    change(copy / "zoo.json", {"layout": {"tensors": [tensor(9 * 10**10), *frozen]}})
    with pytest.raises(ZooError):
        read(fetched(copy))


def test_links_out_of_folders_inside_a_zoo_are_refused(copy, tmp_path):
    (tmp_path / "secret.txt").touch()
    (copy / "inner").mkdir()
    (copy / "inner" / "link").symlink_to(tmp_path / "secret.txt")
    with pytest.raises(ZooError, match="leads out of the zoo"):
        WeightZoo(copy)


def test_links_in_a_circle_are_refused(copy):
    (copy / "a").symlink_to("b")
    (copy / "b").symlink_to("a")
    with pytest.raises(ZooError):
        WeightZoo(copy)


def test_the_root_folder_holds_no_zoo():
    with pytest.raises(ZooError):
        WeightZoo("/")


def test_networks_of_many_shards_are_found_at_once(copy):
    with (copy / "metadata.jsonl").open("a") as file:
        file.write("{}\n" * 30_000)
    start = time.monotonic()
    with pytest.raises(ZooError):
        fetched(copy).vectors()
    assert time.monotonic() - start < 5
