"""`pdiff-hf play`: a page where networks of a pipeline are asked for, tried out and looked at."""

import html
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .configs import PlayConfig
from .errors import ConfigError
from .extras import require
from .playground import IMAGES, Playground, each_said, grey, names_of, said
from .tasks.family import SPLITS
from .text import printable


# Else the first touch of the pad asks for a tool.
TAKE_THE_PEN = "() => setTimeout(() => document.querySelector('#pad button[aria-label=Brush]')?.click(), 700)"


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
    # Columns of zeros and ones, with what tasks have in them.
    ticks: dict[str, set[tuple[int, ...]]] = {}
    rows = [row for split in SPLITS for row in ground.family.conditions(split)]
    for column in ground.columns:
        values: list[Any] = [row.get(column["name"]) for row in rows]
        if all(isinstance(one, list) and set(one) <= {0, 1} for one in values):
            ticks[column["name"]] = {tuple(one) for one in values}

    def asked(*values: Any) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for column, value in zip(ground.columns, values, strict=True):
            if column["name"] in ticks:
                value = [int(place in value) for place in range(len(column["mean"]))]
                if tuple(value) not in ticks[column["name"]]:
                    raise ValueError(f"{column['name']}: no task of {ground.name} has just these ticked.")
            elif column["kind"] == "numbers" and value:
                try:
                    value = json.loads(value)
                except ValueError as error:
                    example = json.dumps(column["mean"][:3])
                    raise ValueError(f"{column['name']} has to be a list like {example}: {error}") from error
            if value is not None and value != "":
                found[column["name"]] = value
        return found

    def widget(column: dict[str, Any]) -> Any:
        name, known = column["name"], ground.example.get(column["name"])
        if column["kind"] == "word":
            return gr.Dropdown(column["words"], value=known or column["words"][0], label=name)
        if column["kind"] == "number":
            (mean,), (std,) = column["mean"], column["std"]
            return gr.Slider(mean - 3 * std, mean + 3 * std, value=mean if known is None else known, label=name)
        if name in ticks:
            return gr.CheckboxGroup(
                list(range(len(column["mean"]))),
                value=[i for i, one in enumerate(known or ()) if one],
                label=f"{name}: 1 where ticked",
            )
        return gr.Textbox(json.dumps(known or column["mean"]), label=f"{name}, a list")

    @contextmanager
    def in_words() -> Iterator[None]:
        """What is wrong with what was asked for, on the page."""
        try:
            yield
        except (ValueError, TypeError, IndexError, RuntimeError) as error:
            # It may quote what a pipeline calls its columns, and is shown as HTML.
            raise gr.Error(html.escape(printable(str(error)))) from error

    def ask(count: float, seed: float, guidance: float, *values: Any) -> Iterator[Any]:
        with in_words():
            condition, vectors, generated = asked(*values), [], []
            for vector in ground.networks(condition, int(count), int(seed), guidance):
                vectors.append(vector)
                all_of_them = torch.cat(vectors)
                row, *others = ground.places(vector, condition, len(vectors))
                generated.append(row)
                accuracies = [row["accuracy, %"] for row in generated]
                text = f"**{len(accuracies)} networks**: {sum(accuracies) / len(accuracies):.2f} % on average, "
                text += f"the worst {min(accuracies):.2f} %"
                if len(accuracies) == count > 1:
                    text += f"; all together: {100 * ground.together(all_of_them, condition):.2f} %"
                shown = generated + others
                low, high = (end(row["accuracy, %"] for row in shown) for end in (min, max))
                margin = 0.1 * (high - low) + 0.1
                limits = {"x_lim": [0, int(count) + 1]} if ground.trained is None else {}
                plot = gr.ScatterPlot(pandas.DataFrame(shown), y_lim=[low - margin, high + margin], **limits)
                yield plot, f"{text}.", (all_of_them, condition)

    def answer(state: Any, image: torch.Tensor) -> tuple[Any, str, Any, np.ndarray]:
        if state is None:
            raise gr.Error("Ask for networks first, in the first tab.")
        vectors, condition = state
        probabilities = ground.classify(vectors, image, condition)
        together = probabilities.mean(0).tolist()
        names = names_of(len(together), families)
        alone = pandas.DataFrame(each_said(probabilities, families))
        return dict(zip(names, together, strict=True)), said(probabilities, families), alone, grey(image)

    def draw(state: Any, drawing: Any) -> Any:
        layers = [] if drawing is None else drawing["layers"]
        ink = sum((layer[..., -1] / 255 for layer in layers), np.zeros((1, 1)))
        return answer(state, ground.drawn(np.asarray(ink)))

    def pick(state: Any, event: gr.SelectData) -> Any:  # type: ignore[name-defined]
        return answer(state, ground.images[event.index])

    def walk(first: float, second: float, *values: Any) -> tuple[Any, str]:
        with in_words():
            rows = ground.walk(int(first), int(second), asked(*values))
        least = min(row["accuracy, %"] for row in rows)
        return pandas.DataFrame(rows), f"The least accurate network on the way has {least:.2f} %."

    def denoise(seed: float, *values: Any) -> tuple[Any, list[np.ndarray]]:
        with in_words():
            rows, pictures = ground.denoising(int(seed), asked(*values))
        return pandas.DataFrame(rows), pictures

    x = "network" if ground.trained is None else "similarity"
    with gr.Blocks(title=f"Networks for {ground.name}", analytics_enabled=False) as blocks:
        networks = gr.State(None)
        gr.Markdown(
            f"# Networks that nobody trained\n\nThis page samples neural networks for the task `{ground.name}` from "
            f"`{Path(pipeline).name if Path(pipeline).exists() else pipeline}`, {ground.pipe.layout.vector_size:,} "
            "generated parameters each. "
            f"{ground.verdict or 'Its card has no verdict yet: `pdiff-hf evaluate` gives one.'}"
        )
        if ground.columns:
            gr.Markdown("What the networks are asked for:")
        widgets = [widget(column) for column in ground.columns]
        with gr.Tab("Ask"):
            with gr.Row():
                count = gr.Slider(1, 32, value=8, step=1, label="networks")
                seed = gr.Number(0, precision=0, label="seed")
                guidance = gr.Slider(
                    0,
                    3,
                    value=1,
                    step=0.25,
                    label="guidance",
                    info="how strictly the condition is followed: 1 as it was learned, 0 not at all",
                    visible=bool(widgets),
                )
            button = gr.Button("Ask for networks", variant="primary", elem_id="ask")
            summary = gr.Markdown(elem_id="summary")
            plane = gr.ScatterPlot(x=x, y="accuracy, %", color="networks", height=320, show_label=False)
            gr.Markdown(
                "Each dot is a network, its height the share of test examples that it gets right."
                if ground.trained is None
                else "Each dot is a network. Up is better; left is more unlike every training network. Good ones are "
                "as high as the trained ones, which were learned from, and as far to the left. Similarity: how much "
                "of its errors a network shares with the training network that is most like it; 1 is all."
            )
            button.click(ask, [count, seed, guidance, *widgets], [plane, summary, networks])
        if ground.draws:
            with gr.Tab("Try") as trying:
                gr.Markdown("Draw, or click a test image: what do the networks say?")
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
                        alone = gr.Dataframe(label="each alone", max_height=240, interactive=False, elem_id="alone")
                        seen = gr.Image(label="what they see", height=150, interactive=False)
                outputs = [label, words, alone, seen]
                trying.select(None, js=TAKE_THE_PEN)
                pad.change(draw, [networks, pad], outputs)
                gallery.select(pick, [networks], outputs)
        with gr.Tab("Walk"):
            gr.Markdown(
                "Two seeds are two noises, which become two networks. Networks of the noises between them, and how "
                "good they are:"
            )
            with gr.Row():
                first = gr.Number(0, precision=0, label="seed of the first")
                second = gr.Number(1, precision=0, label="seed of the second")
            walking = gr.Button("Walk", elem_id="walk")
            words_of_walk = gr.Markdown()
            way = gr.LinePlot(x="way", y="accuracy, %", y_lim=[0, 100], height=280, show_label=False)
            walking.click(walk, [first, second, *widgets], [way, words_of_walk])
        with gr.Tab("Denoise"):
            gr.Markdown(
                "A network begins as noise. The curve is its accuracy after each step; the pictures are its largest "
                "matrix, red where weights are positive, blue where they are negative."
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
