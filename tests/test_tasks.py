import gzip

import numpy as np
import pytest
import torch

from pdiff_hf import CollectConfig, ParameterLayout, Task, load_task, run_collect
from pdiff_hf.errors import TaskError
from pdiff_hf.tasks import check_family, cifar100, images, load_family


@pytest.mark.parametrize(
    ("name", "parameters", "generated"),
    [
        ("digits-convnet", 1898, 1898),
        ("digits-mlp", 2410, 2410),
        ("digits-resnet", 42938, 256),
        ("breast-cancer-mlp", 530, 530),
        ("wine-mlp", 275, 275),
        ("fashion-mlp", 970, 970),
        ("cifar10-convnet", 7778, 7778),
    ],
)
def test_tasks_have_the_documented_sizes(name, parameters, generated):
    task = load_task(name)
    network = task.build_network()
    assert sum(parameter.numel() for parameter in network.parameters()) == parameters
    assert ParameterLayout.from_state_dict(network.state_dict(), task.patterns).vector_size == generated


def test_splits_of_digits_are_fixed_disjoint_and_complete():
    task = load_task("digits-convnet")
    splits = {split: task.data(split) for split in ("train", "validation", "test")}
    assert {split: len(targets) for split, (_, targets) in splits.items()} == {
        "train": 1000,
        "validation": 200,
        "test": 597,
    }
    for split, (inputs, targets) in splits.items():
        assert inputs.shape[1:] == (1, 8, 8)
        assert inputs.min() >= -1
        assert inputs.max() <= 1
        assert torch.equal(load_task("digits-mlp").data(split)[1], targets)
    images = [tuple(image.flatten().tolist()) for inputs, _ in splits.values() for image in inputs]
    assert len(set(images)) == len(images) == 1797


@pytest.mark.parametrize(("name", "least"), [("breast-cancer-mlp", 0.94), ("wine-mlp", 0.9)])
def test_networks_for_tables_learn(name, least, tmp_path):
    zoo = run_collect(CollectConfig(name, str(tmp_path), num_networks=3, protocol="independent"))
    assert min(row["validation_accuracy"] for row in zoo.metadata) > least
    inputs, targets = load_task(name).data("train")
    assert inputs.mean(0).abs().max() < 1e-4
    assert len(targets) == len(inputs)


def test_cifar100_resnet18_has_the_size_of_the_paper():
    task = load_task("cifar100-resnet18")
    network = task.build_network()
    layout = ParameterLayout.from_state_dict(network.state_dict(), task.patterns)
    learned = [tensor for tensor in layout.tensors("generated") if "running" not in tensor["name"]]
    assert sum(torch.Size(tensor["shape"]).numel() for tensor in learned) == 2048
    assert network(torch.zeros(2, 3, 32, 32)).shape == (2, 100)


def test_augmentation_of_cifar100_keeps_shape_and_depends_on_the_generator_alone():
    task = load_task("cifar100-resnet18")
    images = torch.randn(8, 3, 32, 32)
    once, again = (task.augment(images, torch.Generator().manual_seed(3)) for _ in range(2))
    assert torch.equal(once, again)
    assert once.shape == images.shape
    assert not torch.equal(once, images)


@pytest.fixture
def small_cifar100(tmp_path, monkeypatch):
    """A data set of 40 and 10 random images with the columns of the real one, read by the real code."""
    datasets = pytest.importorskip("datasets")
    features = datasets.Features(img=datasets.Image(), fine_label=datasets.ClassLabel(num_classes=100))
    for split, count in (("train", 40), ("test", 10)):
        pixels = np.random.default_rng(count).integers(0, 256, (count, 32, 32, 3), dtype=np.uint8)
        columns = {"img": [datasets.Image().encode_example(image) for image in pixels], "fine_label": range(count)}
        datasets.Dataset.from_dict(columns, features=features).to_parquet(tmp_path / f"{split}.parquet")
    monkeypatch.setattr(cifar100, "REPOSITORY", str(tmp_path))
    cifar100._cifar100.cache_clear()
    yield
    cifar100._cifar100.cache_clear()


def test_cifar100_is_read_standardized_and_split(small_cifar100):
    task = load_task("cifar100-resnet18")
    splits = {split: task.data(split) for split in ("train", "validation", "test")}
    assert {split: tuple(inputs.shape) for split, (inputs, _) in splits.items()} == {
        "train": (36, 3, 32, 32),
        "validation": (4, 3, 32, 32),
        "test": (10, 3, 32, 32),
    }
    assert splits["validation"][1].tolist() == [36, 37, 38, 39]
    pixels = splits["train"][0] * cifar100.STD + cifar100.MEAN
    assert 0 <= pixels.min() < 0.01
    assert 0.99 < pixels.max() <= 1 + 1e-6


def test_the_recipe_of_the_paper_collects_its_two_batch_norms(small_cifar100, tmp_path):
    config = CollectConfig(task="cifar100-resnet18", output_dir=str(tmp_path / "zoo"), num_networks=2, epochs=1)
    zoo = run_collect(config)
    assert zoo.vectors().shape == (2, 4096)
    assert {t["name"].rpartition(".")[0] for t in zoo.layout.tensors("generated")} == {"layer4.1.bn1", "layer4.1.bn2"}
    load_task("cifar100-resnet18").build_network().load_state_dict(zoo.state_dict(1), strict=True)


def small_fashion(folder):
    """2,300 and 40 random images as the idx files of Fashion-MNIST."""
    (folder / "fashion-mnist").mkdir()
    for prefix, count in (("train", 2300), ("t10k", 40)):
        pixels = np.random.default_rng(count).integers(0, 256, (count, 28, 28), dtype=np.uint8)
        header = np.zeros(16, np.uint8).tobytes()
        labels = header[:8] + bytes(index % 10 for index in range(count))
        (folder / "fashion-mnist" / f"{prefix}-images-idx3-ubyte").write_bytes(header + pixels.tobytes())
        (folder / "fashion-mnist" / f"{prefix}-labels-idx1-ubyte.gz").write_bytes(gzip.compress(labels))


@pytest.fixture
def fashion(tmp_path, monkeypatch):
    monkeypatch.setenv("PDIFF_HF_DATA", str(tmp_path))
    for cached in (images.load, images._pooled):
        cached.cache_clear()
    yield tmp_path
    for cached in (images.load, images._pooled):
        cached.cache_clear()


def test_pixels_are_averaged_down_and_standardized_over_the_training_images(fashion):
    small_fashion(fashion)
    task = load_task("fashion-mlp")
    inputs, _ = task.data("train")
    assert inputs.shape == (300, 1, 7, 7)
    torch.testing.assert_close(inputs.mean(0), torch.zeros(1, 7, 7), atol=1e-5, rtol=0)
    torch.testing.assert_close(inputs.std(0), torch.ones(1, 7, 7))
    assert [len(task.data(split)[1]) for split in ("validation", "test")] == [2000, 40]
    assert sum(parameter.numel() for parameter in task.build_network().parameters()) == 970


def test_subsets_of_clothes_are_a_family_whose_tasks_share_their_images(fashion):
    small_fashion(fashion)
    family = load_family("fashion-subsets")
    check_family(family)
    one, other = (family.task({"classes": classes}) for classes in ([0, 1] * 5, [1] + 9 * [0]))
    assert one.data("train")[0].data_ptr() == other.data("train")[0].data_ptr()
    _, classes = load_task("fashion-mlp").data("test")
    assert torch.equal(one.data("test")[1], classes % 2)
    assert torch.equal(other.data("test")[1], (classes == 0).long())
    assert sum(parameter.numel() for parameter in one.build_network().parameters()) == 1902


def test_a_folder_without_the_images_is_named(fashion):
    with pytest.raises(TaskError, match=r"PDIFF_HF_DATA is .*, where fashion-mnist is not"):
        load_task("fashion-mlp").data("train")


def test_images_of_the_hub_are_those_of_the_folder(fashion, monkeypatch):
    datasets = pytest.importorskip("datasets")
    small_fashion(fashion)
    local = load_task("fashion-mlp").data("test")
    features = datasets.Features(image=datasets.Image(), label=datasets.ClassLabel(num_classes=10))
    for split, prefix, count in (("train", "train", 2300), ("test", "t10k", 40)):
        pixels = np.fromfile(fashion / "fashion-mnist" / f"{prefix}-images-idx3-ubyte", np.uint8, offset=16)
        columns = {
            "image": [datasets.Image().encode_example(image) for image in pixels.reshape(-1, 28, 28)],
            "label": [index % 10 for index in range(count)],
        }
        datasets.Dataset.from_dict(columns, features=features).to_parquet(fashion / "hub" / f"{split}.parquet")
    monkeypatch.setitem(images.REPOSITORIES, "fashion-mnist", (str(fashion / "hub"), "image", "label"))
    monkeypatch.delenv("PDIFF_HF_DATA")
    for cached in (images.load, images._pooled):
        cached.cache_clear()
    for here, there in zip(local, load_task("fashion-mlp").data("test"), strict=True):
        assert torch.equal(here, there)


def test_prediction_is_in_evaluation_mode_and_leaves_each_mode_as_it_was():
    task = Task()
    network = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.BatchNorm1d(3).eval(), torch.nn.Dropout(0.5))
    inputs = torch.randn(10, 4)
    first, second = task.predict(network, inputs, batch_size=3), task.predict(network, inputs)
    torch.testing.assert_close(first, second)
    torch.testing.assert_close(first.sum(1), torch.ones(10))
    assert [module.training for module in network] == [True, False, True]


def test_a_file_may_import_its_neighbours_and_use_dataclasses(tmp_path):
    (tmp_path / "neighbour_of_mine.py").write_text("import torch\nLAYER = torch.nn.Linear(3, 2)\n")
    (tmp_path / "mine2.py").write_text(
        "from __future__ import annotations\n"
        "from dataclasses import dataclass\n"
        "from neighbour_of_mine import LAYER\n"
        "@dataclass\n"
        "class Mine:\n"
        "    width: int = 3\n"
        "    def build_network(self): return LAYER\n"
        "    def data(self, split): return None\n"
    )
    assert load_task(f"{tmp_path}/mine2.py:Mine").build_network().in_features == 3


def test_a_plain_class_of_ones_own_file_becomes_a_task(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(
        "import torch\n"
        "class Mine:\n"
        "    def build_network(self): return torch.nn.Linear(2, 2)\n"
        "    def data(self, split): return torch.zeros(4, 2), torch.zeros(4, dtype=torch.long)\n"
    )
    task = load_task(f"{file}:Mine")
    assert isinstance(task, Task)
    assert task.patterns == ("*",)
    assert task.build_network().in_features == 2


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("own_tasks:Needy", "has to be built without arguments: .*missing 1 required positional argument: 'width'"),
        ("broken_tasks:Mine", "'broken_tasks:Mine' cannot be loaded: ZeroDivisionError"),
        ("absent_tasks:Mine", "'absent_tasks:Mine' cannot be loaded: ModuleNotFoundError: No module named 'absent'"),
        ("own_tasks:Conditions", r"Conditions\.conditions\('train'\): KeyError: 'nothing'"),
    ],
)
def test_errors_of_ones_own_code_are_said_as_such(name, message, tmp_path, monkeypatch):
    (tmp_path / "broken_tasks.py").write_text("1 / 0\n")
    (tmp_path / "absent_tasks.py").write_text("import absent\n")
    (tmp_path / "own_tasks.py").write_text(
        "class Needy:\n"
        "    def __init__(self, width): pass\n"
        "    def build_network(self): pass\n"
        "    def data(self, split): pass\n"
        "class Conditions:\n"
        "    def conditions(self, split): return {}['nothing']\n"
        "    def task(self, condition): pass\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(TaskError, match=message):
        check_family(load_family(name))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("digits", r"no task 'digits'. Built in: digits-convnet"),
        ("nowhere.py:Mine", "does not exist"),
        ("no_such_module:Mine", "names a module that does not exist"),
        ("pdiff_hf.tasks.digits:Mine", "has no class 'Mine'"),
        ("torch.nn:Linear", "is no task: it lacks build_network and data"),
    ],
)
def test_a_task_that_is_not_there_is_explained(name, message):
    with pytest.raises(TaskError, match=message):
        load_task(name)


def test_the_tensors_that_are_asked_for_are_collected(tmp_path):
    config = CollectConfig("digits-mlp", str(tmp_path), num_networks=2, epochs=1, patterns=("*.bias",))
    zoo = run_collect(config)
    assert set(zoo.layout.slices) == {name for name in zoo.state_dict(0) if name.endswith(".bias")}
    assert zoo.vector_size == 32 + 10
