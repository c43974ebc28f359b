"""`pdiff-hf play`: a page where networks of a pipeline are asked for, tried out and looked at."""

import json
import math
import re
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from torch.nn import functional as F

from .configs import PlayConfig
from .errors import ConfigError, TaskError, ZooError
from .evaluation.measures import similarity
from .extras import require
from .hub.pipelines import load_pipeline, pipeline_folder
from .info import verdict_of_card
from .networks.predictor import Predictor
from .parallel import processes
from .schedulers import replacement
from .tasks import Task, load_family
from .tasks.task import trusted_name
from .text import printable
from .zoo import WeightZoo, evenly


# Training networks in the plane, test images to choose from, stops of a walk, pictures of a denoising.
TRAINED, IMAGES, STOPS, PICTURES = 100, 24, 13, 8


# Else the first touch of the pad asks for a tool.
TAKE_THE_PEN = "() => setTimeout(() => document.querySelector('#pad button[aria-label=Brush]')?.click(), 700)"


class Playground:
    r"""
    What the page shows, without the page.

    Args:
        pipeline (`str`): Its folder, or its name on the Hub, whose code is not run.
        task (`str`, *optional*): What the networks do; by default what the pipeline's card names, if it is built in.
        zoo (`str`, *optional*): The training networks, to compare with.

    Raises:
        [`PdiffError`]: there is no such pipeline, task or zoo.
    """

    def __init__(self, pipeline: str, task: str | None = None, zoo: str | None = None):
        folder = pipeline_folder(pipeline)
        self.pipe = load_pipeline(folder).to(processes().device)
        self.pipe.set_progress_bar_config(disable=True)
        file = folder / "README.md"
        card = file.read_text(encoding="utf-8", errors="replace") if file.is_file() else ""
        named = re.search(r"networks for the task `([^`]+)`", card)
        self.name = trusted_name(task, named and named[1])
        self.verdict = printable(" ".join(verdict_of_card(folder)))
        self.family = load_family(self.name)
        encoder = self.pipe.condition_encoder
        self.columns: list[dict[str, Any]] = [] if encoder is None else encoder.config.columns
        self.example = self.family.conditions("test")[0]
        first = self.family.task(self.example)
        try:
            self.pipe.layout.flatten(first.build_network().state_dict())
        except ValueError as error:
            raise TaskError(f"{pipeline} generates no networks of {self.name}: {error}") from error
        self.images = first.data("test")[0]
        self._one_at_a_time = threading.Lock()
        self.trained: tuple[torch.Tensor, torch.Tensor] | None = None
        if zoo is not None:
            networks = WeightZoo.from_pretrained(zoo)
            if networks.layout.architecture != self.pipe.layout.architecture:
                raise ZooError(f"{zoo} holds networks of another architecture than {pipeline} generates.")
            vectors = networks.vectors(evenly(len(networks), TRAINED))
            self.trained = self.score(vectors, first)

    @property
    def draws(self) -> bool:
        """Whether inputs are pictures: `[N, 1 or 3, H, W]`."""
        return self.images.ndim == 4 and self.images.shape[1] in (1, 3)

    def score(self, vectors: torch.Tensor, task: Task) -> tuple[torch.Tensor, torch.Tensor]:
        """Accuracies `[N]` on the test split, and wrong answers, boolean `[N, E]`."""
        inputs, targets = task.data("test")
        predictions = Predictor(task, self.pipe.layout, self.pipe.device)(vectors, inputs)
        wrong = ~torch.stack([task.correct(one, targets) for one in predictions])
        return 1 - wrong.float().mean(1), wrong

    def networks(self, condition: dict[str, Any], count: int, seed: int, guidance: float) -> Iterator[torch.Tensor]:
        """Networks, one after the other, as vectors `[1, P]`."""
        for one in range(seed, seed + count):
            yield self._sample(condition, generator=torch.Generator().manual_seed(one), guidance_scale=guidance)

    def places(self, vectors: torch.Tensor, condition: dict[str, Any]) -> list[dict[str, Any]]:
        """Where networks are in the plane of accuracy and, where a zoo is there, similarity."""
        accuracies, wrong = self.score(vectors, self.family.task(condition or self.example))
        rows = []
        for index, accuracy in enumerate(accuracies.tolist()):
            row = {"network": index + 1, "accuracy, %": 100 * accuracy, "networks": "generated"}
            if self.trained is not None:
                row["similarity"] = similarity(wrong[index : index + 1], self.trained[1]).max().item()
            rows.append(row)
        if self.trained is not None:
            overlap = similarity(self.trained[1], self.trained[1]).fill_diagonal_(-1).amax(1)
            pairs = zip(self.trained[0].tolist(), overlap.tolist(), strict=True)
            rows += [{"accuracy, %": 100 * a, "similarity": s, "networks": "trained"} for a, s in pairs]
        return rows

    def together(self, vectors: torch.Tensor, condition: dict[str, Any]) -> float:
        """The accuracy of the ensemble."""
        task = self.family.task(condition or self.example)
        inputs, targets = task.data("test")
        predictions = Predictor(task, self.pipe.layout, self.pipe.device)(vectors, inputs).mean(0)
        return task.correct(predictions, targets).float().mean().item()

    def classify(self, vectors: torch.Tensor, image: torch.Tensor, condition: dict[str, Any]) -> torch.Tensor:
        """What networks say to an image `[C, H, W]`: probabilities `[N, classes]`."""
        task = self.family.task(condition or self.example)
        return Predictor(task, self.pipe.layout, self.pipe.device)(vectors, image[None])[:, 0]

    def drawn(self, ink: np.ndarray) -> torch.Tensor:
        """A drawing, 0 to 1 `[height, width]`, as the inputs are: cut out, centred, at their size and range."""
        rows, columns = np.nonzero(ink > 0.1)
        _, channels, height, width = (len(self.images), *self.images.shape[1:])
        low, high = self.images.min().item(), self.images.max().item()
        if not len(rows):
            return torch.full((channels, height, width), low)
        cut = ink[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1]
        side = max(cut.shape)
        square = np.zeros((side, side))
        top, left = (side - cut.shape[0]) // 2, (side - cut.shape[1]) // 2
        square[top : top + cut.shape[0], left : left + cut.shape[1]] = cut
        small = F.interpolate(torch.tensor(square)[None, None], (height, width), mode="area")[0].float()
        return low + (high - low) * (small / small.max()).expand(channels, -1, -1)

    def walk(self, first: int, second: int, condition: dict[str, Any]) -> list[dict[str, float]]:
        """Accuracies on the way from the noise (and the initialization, where the denoiser is told it) of one seed to
        that of another, without further noise on the way, along a circle: it stays noise."""
        angles = torch.linspace(0, math.pi / 2, STOPS)

        def between(draw: Callable[[torch.Generator], torch.Tensor]) -> torch.Tensor:
            start, end = (draw(torch.Generator().manual_seed(seed)) for seed in (first, second))
            shares = [part.reshape(-1, *[1] * (start.ndim - 1)) for part in (angles.cos(), angles.sin())]
            return shares[0] * start + shares[1] * end

        arguments = {"latents": between(lambda one: torch.randn(1, *self.pipe.latent_shape, generator=one))}
        if self.pipe.takes_initial:
            arguments["initial"] = between(lambda one: self.pipe.layout.draw_initial([one]))
        vectors = self._sample(condition, deterministic(self.pipe.scheduler), **arguments)
        accuracies, _ = self.score(vectors, self.family.task(condition or self.example))
        return [
            {"way": step / (STOPS - 1), "accuracy, %": 100 * accuracy}
            for step, accuracy in enumerate(accuracies.tolist())
        ]

    def denoising(self, seed: int, condition: dict[str, Any]) -> tuple[list[dict[str, float]], list[np.ndarray]]:
        """Accuracy after each step of the denoising of a network, and pictures of its largest matrix."""
        steps: list[torch.Tensor] = []

        def keep(_: Any, step: int, timestep: Any, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
            steps.append(self.pipe.decode(tensors["latents"]))
            return tensors

        self._sample(condition, generator=torch.Generator().manual_seed(seed), callback_on_step_end=keep)
        vectors = torch.cat(steps).cpu()
        accuracies, _ = self.score(vectors, self.family.task(condition or self.example))
        rows = [{"step": step + 1.0, "accuracy, %": 100 * a} for step, a in enumerate(accuracies.tolist())]
        shown = torch.linspace(0, len(vectors) - 1, min(PICTURES, len(vectors))).round().long()
        dicts = self.pipe.layout.unflatten(vectors[shown])
        name = max(dicts[0], key=lambda one: dicts[0][one].numel())
        matrices = [one[name].float().flatten(1) if one[name].ndim > 1 else one[name].float()[None] for one in dicts]
        return rows, [heat(matrix, matrices[-1].abs().max().item()) for matrix in matrices]

    def _sample(self, condition: dict[str, Any], scheduler: Any = None, **arguments: Any) -> torch.Tensor:
        if condition:
            arguments["condition"] = condition
        with self._one_at_a_time:  # visitors share a pipeline
            own = self.pipe.scheduler
            try:
                self.pipe.scheduler = scheduler or own
                vectors: torch.Tensor = self.pipe(**arguments, output_type="pt").state_dicts
            finally:
                self.pipe.scheduler = own
        return vectors.cpu()


def deterministic(scheduler: Any) -> Any:
    """A scheduler of the same noise that adds none while sampling."""
    if isinstance(scheduler, FlowMatchEulerDiscreteScheduler):
        return type(scheduler).from_config(scheduler.config, stochastic_sampling=False)
    return replacement("DDIMScheduler", scheduler)


def heat(matrix: torch.Tensor, most: float) -> np.ndarray:
    """A matrix as a picture, RGB uint8: red above zero, blue below, white at it; `most` is full colour."""
    share = (matrix / (most or 1)).clamp(-1, 1)
    red, blue = 1 + share.clamp(max=0), 1 - share.clamp(min=0)
    picture = torch.stack([red, torch.minimum(red, blue), blue], -1)
    scale = max(1, 240 // max(picture.shape[:2]))
    return (255 * picture).byte().numpy().repeat(scale, 0).repeat(scale, 1)


def grey(image: torch.Tensor) -> np.ndarray:
    """An input `[C, H, W]` as a picture, `[height, width, 3]` uint8."""
    low, high = image.min(), image.max()
    picture = ((image - low) / (high - low).clamp_min(1e-6)).expand(3, -1, -1).permute(1, 2, 0)
    scale = max(1, 64 // max(picture.shape[:2]))
    return (255 * picture).byte().numpy().repeat(scale, 0).repeat(scale, 1)


def said(probabilities: torch.Tensor, families: bool) -> str:
    """What networks `[N, classes]` say, in words."""
    answers = probabilities.argmax(-1)
    most = int(answers.mode().values)
    word = ("no" if most == 0 else "yes") if families and probabilities.shape[1] == 2 else f"class {most}"
    return f"**{word}**, say {int((answers == most).sum())} of {len(answers)} networks"


def page(pipeline: str, task: str | None = None, zoo: str | None = None) -> Any:
    r"""
    The page of a pipeline: `page(...).launch()` serves it.

    Args: as those of [`Playground`].

    Returns:
        `gradio.Blocks`: the page.
    """
    gr, pandas = require("gradio", "play"), require("pandas", "play")
    ground = Playground(pipeline, task, zoo)
    families = bool(ground.example)

    def asked(*values: Any) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for column, value in zip(ground.columns, values, strict=True):
            if column["kind"] == "numbers" and ticks(column):
                value = [int(place in value) for place in range(len(column["mean"]))]
            elif column["kind"] == "numbers":
                value = json.loads(value)
            if value is not None and value != "":
                found[column["name"]] = value
        return found

    def ticks(column: dict[str, Any]) -> bool:
        """Whether a list is of zeros and ones."""
        values = [row.get(column["name"]) for row in ground.family.conditions("test")]
        return all(isinstance(one, list) and set(one) <= {0, 1} for one in values)

    def widget(column: dict[str, Any]) -> Any:
        name, known = column["name"], ground.example.get(column["name"])
        if column["kind"] == "word":
            return gr.Dropdown(column["words"], value=known or column["words"][0], label=name)
        if column["kind"] == "number":
            (mean,), (std,) = column["mean"], column["std"]
            return gr.Slider(mean - 3 * std, mean + 3 * std, value=known or mean, label=name)
        if ticks(column):
            return gr.CheckboxGroup(
                list(range(len(column["mean"]))), value=[i for i, one in enumerate(known or ()) if one], label=name
            )
        return gr.Textbox(json.dumps(known or column["mean"]), label=f"{name}, a list")

    def ask(count: float, seed: float, guidance: float, *values: Any) -> Iterator[Any]:
        try:
            condition, vectors = asked(*values), []
            for vector in ground.networks(condition, int(count), int(seed), guidance):
                vectors.append(vector)
                all_of_them = torch.cat(vectors)
                rows = ground.places(all_of_them, condition)
                accuracies = [row["accuracy, %"] for row in rows if row["networks"] == "generated"]
                text = f"**{len(accuracies)} networks**: {sum(accuracies) / len(accuracies):.2f} % on average, "
                text += f"{min(accuracies):.2f} % at least"
                if len(accuracies) == count > 1:
                    text += f"; all together: {100 * ground.together(all_of_them, condition):.2f} %"
                limits = {"x_lim": [0, int(count) + 1]} if ground.trained is None else {}
                plot = gr.ScatterPlot(pandas.DataFrame(rows), **limits)
                yield plot, f"{text}.", (all_of_them, condition)
        except (ValueError, IndexError, RuntimeError) as error:
            raise gr.Error(printable(str(error))) from error

    def answer(state: Any, image: torch.Tensor) -> tuple[Any, str, np.ndarray]:
        if state is None:
            raise gr.Error("Ask for networks first, in the first tab.")
        probabilities = ground.classify(state[0], image, state[1])
        together = probabilities.mean(0).tolist()
        names = ["no", "yes"] if families and len(together) == 2 else [str(place) for place in range(len(together))]
        return dict(zip(names, together, strict=True)), said(probabilities, families), grey(image)

    def draw(state: Any, drawing: Any) -> Any:
        layers = [] if drawing is None else drawing["layers"]
        ink = sum((layer[..., -1] / 255 for layer in layers), np.zeros((1, 1)))
        return answer(state, ground.drawn(np.asarray(ink)))

    def pick(state: Any, event: gr.SelectData) -> Any:  # type: ignore[name-defined]
        return answer(state, ground.images[event.index])

    def walk(first: float, second: float, *values: Any) -> tuple[Any, str]:
        rows = ground.walk(int(first), int(second), asked(*values))
        least = min(row["accuracy, %"] for row in rows)
        return pandas.DataFrame(rows), f"The least accurate network on the way has {least:.2f} %."

    def denoise(seed: float, *values: Any) -> tuple[Any, list[np.ndarray]]:
        rows, pictures = ground.denoising(int(seed), asked(*values))
        return pandas.DataFrame(rows), pictures

    x = "network" if ground.trained is None else "similarity"
    with gr.Blocks(title=f"Networks for {ground.name}", analytics_enabled=False) as blocks:
        networks = gr.State(None)
        gr.Markdown(
            f"# Networks that nobody trained\n\nThis page samples neural networks for the task `{ground.name}` from "
            f"`{Path(pipeline).name if Path(pipeline).exists() else pipeline}`, {ground.pipe.layout.vector_size:,} "
            f"parameters each. {ground.verdict or 'Its card has no verdict yet: `pdiff-hf evaluate` gives one.'}"
        )
        widgets = [widget(column) for column in ground.columns]
        with gr.Tab("Ask"):
            with gr.Row():
                count = gr.Slider(1, 32, value=8, step=1, label="networks")
                seed = gr.Number(0, precision=0, label="seed")
                guidance = gr.Slider(0, 3, value=1, step=0.25, label="guidance", visible=bool(widgets))
            button = gr.Button("Ask for networks", variant="primary", elem_id="ask")
            summary = gr.Markdown(elem_id="summary")
            plane = gr.ScatterPlot(x=x, y="accuracy, %", color="networks", height=320, show_label=False)
            gr.Markdown(
                "Each dot is a network, its height the share of test examples that it gets right."
                if ground.trained is None
                else "Each dot is a network. Up is better; left is more unlike every training network. Good ones are "
                "as high as the trained ones, and as far to the left."
            )
            button.click(ask, [count, seed, guidance, *widgets], [plane, summary, networks])
        if ground.draws:
            with gr.Tab("Try") as trying:
                gr.Markdown("What do the networks say to a drawing, or to a test image? Click one.")
                with gr.Row():
                    with gr.Column():
                        pad = gr.Sketchpad(
                            type="numpy",
                            label="draw",
                            canvas_size=(280, 280),
                            layers=False,
                            brush=gr.Brush(default_size=15, colors=["#000000"], color_mode="fixed"),
                            elem_id="pad",
                        )
                        gallery = gr.Gallery(
                            [grey(image) for image in ground.images[:IMAGES]],
                            columns=3,
                            height=330,
                            label="test images",
                            allow_preview=False,
                            elem_id="images",
                        )
                    with gr.Column():
                        words = gr.Markdown(elem_id="words")
                        label = gr.Label(num_top_classes=4, label="all of them together")
                        seen = gr.Image(label="what they see", height=150, interactive=False)
                outputs = [label, words, seen]
                trying.select(None, js=TAKE_THE_PEN)
                pad.change(draw, [networks, pad], outputs)
                gallery.select(pick, [networks], outputs)
        with gr.Tab("Walk"):
            gr.Markdown("From the noise that becomes one network to that of another: do the networks between work?")
            with gr.Row():
                first = gr.Number(0, precision=0, label="seed of the first")
                second = gr.Number(1, precision=0, label="seed of the second")
            walking = gr.Button("Walk", elem_id="walk")
            words_of_walk = gr.Markdown()
            way = gr.LinePlot(x="way", y="accuracy, %", y_lim=[0, 100], height=280, show_label=False)
            walking.click(walk, [first, second, *widgets], [way, words_of_walk])
        with gr.Tab("Denoise"):
            gr.Markdown(
                "A network begins as noise. Above: its accuracy after each step. Below: its largest matrix, red where "
                "weights are positive, blue where they are negative."
            )
            from_seed = gr.Number(0, precision=0, label="seed")
            denoising = gr.Button("Denoise", elem_id="denoise")
            course = gr.LinePlot(x="step", y="accuracy, %", y_lim=[0, 100], height=280, show_label=False)
            matrices = gr.Gallery(columns=4, label="from noise to network", elem_id="matrices")
            denoising.click(denoise, [from_seed, *widgets], [course, matrices])
    return blocks


def serve(pipeline: str, task: str | None = None, zoo: str | None = None, **where: Any) -> None:
    r"""
    Serves the page until it is interrupted.

    Args:
        pipeline, task, zoo: as those of [`Playground`].
        where (*optional*): What gradio's `launch` takes.

    Raises:
        [`ConfigError`]: the port is taken.
    """
    # No fonts from another host.
    theme = require("gradio", "play").themes.Soft(font=["system-ui", "sans-serif"], font_mono=["monospace"])
    blocks = page(pipeline, task, zoo)
    try:
        blocks.launch(theme=theme, footer_links=[], **where)
    except OSError as error:
        raise ConfigError(f"The page cannot be served at port {where.get('server_port')}: {error}") from error


def run_play(config: PlayConfig) -> None:
    """Serves the page on this machine until it is interrupted."""
    serve(config.pipeline, config.task, config.zoo, server_name="127.0.0.1", server_port=config.port)
