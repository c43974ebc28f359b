"""The page to play with: what it computes, what it shows in a browser, and that it is a Space."""

import contextlib
import copy
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import gradio
import numpy as np
import pytest
import torch
import yaml
from diffusers import FlowMatchHeunDiscreteScheduler

from pdiff_hf import (
    CollectConfig,
    NeuronTrainConfig,
    ParameterLayout,
    TrainConfig,
    WeightZoo,
    load_task,
    run_collect,
    run_train,
)
from pdiff_hf.errors import TaskError, ZooError
from pdiff_hf.play import page
from pdiff_hf.playground import Playground, deterministic, each_said, heat, said

from . import families
from .conftest import ROOT, SMALL_TRAINING


SPACE = ROOT / "spaces" / "playground"
BROWSER = next((place for name in ("chromium", "google-chrome") if (place := shutil.which(name))), None)


@pytest.fixture(scope="module")
def ground(digits_pipeline, digits_zoo) -> Playground:
    return Playground(str(digits_pipeline), "digits-convnet", str(digits_zoo.folder))


@pytest.fixture(scope="module")
def asked(tmp_path_factory) -> Path:
    """A pipeline that can be asked for subsets of digits, hardly trained."""
    folder = tmp_path_factory.mktemp("play")
    zoo, pipeline = str(folder / "zoo"), folder / "pipeline"
    run_collect(CollectConfig("digits-subsets", zoo, networks_per_task=2, split="validation", epochs=1))
    settings = {"transformer_steps": 20, "hidden_size": 32, "num_layers": 1, "condition": ("classes",)}
    run_train(NeuronTrainConfig(zoo=zoo, output_dir=str(pipeline), **settings))
    return pipeline


def test_networks_have_the_accuracy_that_the_task_finds(ground):
    vectors = torch.cat(list(ground.networks({}, 3, 5, 1.0)))
    rows = ground.places(vectors, {})
    task = load_task("digits-convnet")
    inputs, targets = task.data("test")
    network = task.build_network()
    for row, vector in zip(rows, vectors, strict=False):
        network.load_state_dict(ground.pipe.layout.unflatten(vector[None])[0])
        expected = 100 * task.correct(task.predict(network, inputs), targets).float().mean().item()
        assert row["accuracy, %"] == pytest.approx(expected, abs=0.2)
        assert 0 <= row["similarity"] <= 1
    assert {row["networks"] for row in rows} == {"generated", "trained"}
    alone = ground.pipe(generator=torch.Generator().manual_seed(6), output_type="pt").state_dicts
    torch.testing.assert_close(vectors[1:2], alone, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_the_command_serves_the_page(digits_pipeline, digits_zoo):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    places = ["--pipeline", str(digits_pipeline), "--zoo", str(digits_zoo.folder), "--task", "digits-convnet"]
    command = [sys.executable, "-m", "pdiff_hf", "play", *places, "--port", str(port)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as served:
        try:
            page = None
            for _ in range(240):
                with contextlib.suppress(OSError):
                    page = urllib.request.urlopen(f"http://127.0.0.1:{port}/", timeout=5).read().decode()
                    break
                assert served.poll() is None, served.stdout.read()
                time.sleep(0.5)
            assert page is not None
            assert "Networks that nobody trained" in page
        finally:
            served.terminate()


def test_a_walk_leads_from_one_network_to_the_other(ground):
    there, back = ground.walk(0, 1, {}), ground.walk(1, 0, {})
    assert [row["way"] for row in there] == pytest.approx([step / 12 for step in range(13)])
    accuracies = [row["accuracy, %"] for row in there]
    assert accuracies == pytest.approx([row["accuracy, %"] for row in back[::-1]], abs=0.2)
    assert len(set(accuracies)) > 1
    assert type(ground.pipe.scheduler).__name__ == "DDPMScheduler"


@pytest.mark.parametrize("initial", [False, True])
def test_the_ends_of_a_walk_are_the_networks_of_its_seeds(asked, ground, initial, monkeypatch):
    ground = Playground(str(asked)) if initial else ground
    assert ground.pipe.takes_initial == initial
    condition = ground.example
    scheduler = ground.pipe.scheduler
    expected = [
        ground._sample(condition, deterministic(scheduler), generator=torch.Generator().manual_seed(seed))
        for seed in (4, 5)
    ]
    score, walked = ground.score, []
    monkeypatch.setattr(ground, "score", lambda vectors, task: (walked.append(vectors), score(vectors, task))[1])
    ground.walk(4, 5, condition)
    torch.testing.assert_close(walked[0][[0, -1]], torch.cat(expected), rtol=1e-3, atol=1e-4)


def test_heuns_flow_matching_walks_as_it_is():
    scheduler = deterministic(FlowMatchHeunDiscreteScheduler(shift=2.0))
    assert type(scheduler) is FlowMatchHeunDiscreteScheduler
    assert scheduler.config.shift == 2.0


def test_networks_that_are_not_comparable_are_not_compared(digits_zoo, digits_pipeline, tmp_path):
    layout = copy.deepcopy(digits_zoo.layout)
    with WeightZoo.create(tmp_path / "few", layout) as few:
        few.append(digits_zoo[0])
    with pytest.raises(ZooError, match="few holds fewer than two networks"):
        Playground(str(digits_pipeline), "digits-convnet", str(few.folder))
    pipeline = Path(shutil.copytree(digits_pipeline, tmp_path / "pipeline"))
    settings = yaml.safe_load((pipeline / "train.yaml").read_text()) | {"zoo": str(few.folder)}
    (pipeline / "train.yaml").write_text(yaml.safe_dump(settings))
    assert Playground(str(pipeline), "digits-convnet").trained is None


@pytest.mark.slow
def test_a_generated_matrix_is_denoised_and_no_frozen_one(tmp_path):
    task = load_task("digits-resnet")
    state = task.build_network().state_dict()
    layout = ParameterLayout.from_state_dict(state, task.patterns)
    with WeightZoo.create(tmp_path / "zoo", layout, task="digits-resnet") as zoo:
        for _ in range(3):
            zoo.append(
                {
                    name: value + torch.rand_like(value) if name in layout.slices else value
                    for name, value in state.items()
                }
            )
    run_train(TrainConfig(zoo=str(zoo.folder), output_dir=str(tmp_path / "pipeline"), **SMALL_TRAINING))
    _, pictures = Playground(str(tmp_path / "pipeline"), "digits-resnet").denoising(0, {})
    assert not np.array_equal(pictures[0], pictures[-1])
    other = {name: value if name in layout.slices else value + 1 for name, value in state.items()}
    with WeightZoo.create(tmp_path / "other", ParameterLayout.from_state_dict(other, task.patterns)) as strange:
        for _ in range(2):
            strange.append(other)
    with pytest.raises(ZooError, match=r"do not go together: .* is not generated, and differs"):
        Playground(str(tmp_path / "pipeline"), "digits-resnet", str(strange.folder))


def test_denoising_ends_in_the_network(ground):
    rows, pictures = ground.denoising(3, {})
    (network,) = ground.places(torch.cat(list(ground.networks({}, 1, 3, 1.0))), {})[:1]
    assert len(rows) == 50
    assert rows[-1]["accuracy, %"] == pytest.approx(network["accuracy, %"], abs=0.2)
    assert len(pictures) == 8
    assert all(picture.dtype == np.uint8 and picture.shape[-1] == 3 for picture in pictures)


def test_a_drawing_becomes_an_input(ground):
    ink = np.zeros((200, 300))
    ink[20:180, 200:220] = 1
    image = ground.drawn(ink)
    assert image.shape == (1, 8, 8)
    assert (image.min(), image.max()) == (ground.images.min(), ground.images.max())
    assert image[0, :, 4].mean() > image[0, :, 0].mean()
    assert (ground.drawn(np.zeros((9, 9))) == ground.images.min()).all()
    vectors = torch.cat(list(ground.networks({}, 3, 0, 1.0)))
    probabilities = ground.classify(vectors, image, {})
    assert probabilities.shape == (3, 10)
    assert probabilities.sum(1) == pytest.approx([1, 1, 1])


def test_words_and_pictures():
    assert said(torch.tensor([[0.1, 0.9], [0.3, 0.7], [0.8, 0.2]]), True) == "**yes, it counts**, say 2 of 3 networks"
    assert said(torch.eye(3)[[2, 2]], False) == "**class 2**, say 2 of 2 networks"
    assert each_said(torch.tensor([[0.1, 0.9], [0.75, 0.25]]), True) == [
        {"network": 1, "says": "yes", "sure, %": 90.0},
        {"network": 2, "says": "no", "sure, %": 75.0},
    ]
    colours = heat(torch.tensor([[1.0, 0.0, -1.0]]), 1.0)[0, ::80]
    assert colours.tolist() == [[255, 0, 0], [255, 255, 255], [0, 0, 255]]


def test_a_card_does_not_choose_the_code_that_runs(digits_pipeline, tmp_path):
    folder = tmp_path / "pipeline"
    shutil.copytree(digits_pipeline, folder)
    card = folder / "README.md"
    assert Playground(str(folder)).name == "digits-convnet"
    card.write_text(card.read_text().replace("the task `digits-convnet`", "the task `evil.py:Task`"))
    with pytest.raises(TaskError, match=r"code of its own: pass --task evil\.py:Task"):
        Playground(str(folder))
    card.write_text(card.read_text().replace("the task `evil.py:Task`", "the task `networks`"))
    with pytest.raises(TaskError, match="Nothing says what these networks do: pass --task"):
        Playground(str(folder))


def test_training_networks_are_found_where_the_training_says(digits_pipeline, digits_zoo, zoo, tmp_path):
    folder = tmp_path / "pipeline"
    shutil.copytree(digits_pipeline, folder)
    assert len(Playground(str(folder)).trained[0]) == len(digits_zoo)
    text = (folder / "train.yaml").read_text()
    for place in (str(zoo.folder), str(tmp_path), "alice/zoo", "[1]"):  # of another architecture, and none
        (folder / "train.yaml").write_text(text.replace(str(digits_zoo.folder), place))
        assert Playground(str(folder)).trained is None


def test_what_does_not_go_together_is_refused(digits_pipeline, zoo):
    with pytest.raises(TaskError, match="generates no networks of digits-mlp"):
        Playground(str(digits_pipeline), "digits-mlp")
    with pytest.raises(TaskError, match="cannot be asked for 'classes', by which the tasks of digits-subsets differ"):
        Playground(str(digits_pipeline), "digits-subsets")
    with pytest.raises(ZooError, match="hold networks of different architectures"):
        Playground(str(digits_pipeline), zoo=str(zoo.folder))


def test_a_list_that_is_none_is_said_in_every_tab(tmp_path):
    task, zoo = f"{families.__name__}:Sides", str(tmp_path / "zoo")
    run_collect(CollectConfig(task, zoo, networks_per_task=1, epochs=1))
    settings = {"transformer_steps": 2, "hidden_size": 32, "num_layers": 1, "condition": ("direction",)}
    run_train(NeuronTrainConfig(zoo=zoo, output_dir=str(tmp_path / "pipeline"), task=task, **settings))
    answers = {one.fn.__name__: one.fn for one in page(str(tmp_path / "pipeline"), task).fns.values()}
    for name, numbers in {"ask": (2, 0, 1.0), "walk": (0, 1), "denoise": (0,)}.items():
        with pytest.raises(gradio.Error, match=r"direction has to be a list like \[.*Expecting value"):
            list(answers[name](*numbers, "north"))
        with pytest.raises(gradio.Error, match=r"cannot be .*&lt;img src=x&gt;"):
            list(answers[name](*numbers, '["<img src=x>"]'))
        assert list(answers[name](*numbers, ""))  # left blank, it is not asked for


def test_ticks_that_are_no_task_are_said_in_every_tab(asked):
    answers = {one.fn.__name__: one.fn for one in page(str(asked)).fns.values() if one.fn}
    for name, numbers in {"ask": (1, 0, 1.0), "walk": (0, 1), "denoise": (0,)}.items():
        for ticked in ([], list(range(10))):
            with pytest.raises(gradio.Error, match="classes: no task of digits-subsets has just these ticked"):
                list(answers[name](*numbers, ticked))
    ((_, _, (networks, condition)),) = answers["ask"](1, 0, 1.0, [3])
    assert len(networks) == 1
    assert condition == {"classes": [0, 0, 0, 1, 0, 0, 0, 0, 0, 0]}


def test_the_space_is_one():
    _, front, text = (SPACE / "README.md").read_text(encoding="utf-8").split("---\n", 2)
    settings = yaml.safe_load(front)
    assert (settings["sdk"], settings["app_file"], settings["license"]) == ("gradio", "app.py", "apache-2.0")
    assert len(settings["short_description"]) <= 60
    assert (SPACE / settings["app_file"]).is_file()
    assert all(name in text for name in ("PIPELINE", "TASK", "ZOO"))
    assert "pdiff-hf[" in (SPACE / "requirements.txt").read_text()


@pytest.mark.slow
def test_the_space_serves_the_page(digits_pipeline, monkeypatch):
    monkeypatch.setenv("PIPELINE", str(digits_pipeline))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    monkeypatch.setenv("GRADIO_SERVER_PORT", str(port))
    with subprocess.Popen([sys.executable, "app.py"], cwd=SPACE, stdout=subprocess.DEVNULL) as process:
        try:
            page = None
            for _ in range(600):
                assert process.poll() is None
                with (
                    contextlib.suppress(urllib.error.URLError),
                    urllib.request.urlopen(f"http://127.0.0.1:{port}") as answer,
                ):
                    page = answer.read().decode()
                    break
                time.sleep(0.1)
            assert page is not None
            assert "Networks for digits-convnet" in page
        finally:
            process.terminate()


@pytest.mark.slow
@pytest.mark.skipif(BROWSER is None, reason="no Chromium on this machine")
@pytest.mark.parametrize("width", [390, 1200])
def test_the_page_in_a_browser(asked, width, tmp_path):
    from playwright.sync_api import sync_playwright

    blocks = page(str(asked))
    _, address, _ = blocks.launch(prevent_thread_lock=True, quiet=True, server_name="127.0.0.1")
    elsewhere, errors = [], []
    try:
        with sync_playwright() as driver:
            browser = driver.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
            view = browser.new_page(viewport={"width": width, "height": 900})
            view.on("request", lambda one: elsewhere.append(one.url) if "127.0.0.1" not in one.url else None)
            view.on("pageerror", lambda error: errors.append(str(error)))
            view.goto(address)
            view.locator("#ask").click()
            summary = view.locator("#summary")
            summary.get_by_text("all together").wait_for(timeout=60_000)
            assert "8 networks" in summary.inner_text()
            view.get_by_role("tab", name="Try").click()
            view.locator("#images img").nth(2).click()
            view.locator("#words").get_by_text("of 8 networks").wait_for(timeout=30_000)
            view.locator("#alone").get_by_text("sure, %").first.wait_for(timeout=30_000)
            assert view.evaluate("document.documentElement.scrollWidth") <= width
            view.screenshot(path=tmp_path / "try.png", full_page=True)
            view.get_by_role("tab", name="Walk").click()
            view.locator("#walk").click()
            view.get_by_text("The least accurate network on the way").wait_for(timeout=60_000)
            view.get_by_role("tab", name="Denoise").click()
            view.locator("#denoise").click()
            view.locator("#matrices img").nth(7).wait_for(timeout=60_000)
            assert view.evaluate("document.documentElement.scrollWidth") <= width
            view.screenshot(path=tmp_path / "page.png")
    finally:
        blocks.close()
    assert elsewhere == []
    assert errors == []


def test_the_zoo_is_that_of_the_pipeline(ground, digits_zoo):
    assert ground.trained is not None
    assert len(ground.trained[0]) == len(WeightZoo(digits_zoo.folder))
