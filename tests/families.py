"""A small family of tasks: on which side of a line a point lies; the line's direction is the condition."""

import math
from functools import cache

import torch
from torch import nn

from pdiff_hf import AdaptedNetwork, Task, lora
from pdiff_hf.tasks import TaskFamily


@cache
def points(split: str) -> torch.Tensor:
    seed = ("train", "validation", "test").index(split)
    return torch.randn(200, 2, generator=torch.Generator().manual_seed(seed))


class Side(Task):
    """On the side to which the angle shows, or not."""

    epochs = 12
    learning_rate = 2e-2

    def __init__(self, angle: float):
        self.angle = angle

    def build_network(self):
        return nn.Sequential(nn.Linear(2, 4), nn.ReLU(), nn.Linear(4, 2))

    def data(self, split):
        inputs = points(split)
        return inputs, (inputs @ torch.tensor([math.cos(self.angle), math.sin(self.angle)]) > 0).long()


class Sides(TaskFamily):
    """Directions all around: `{"direction": [cos, sin]}`; an angle and its opposite are on the same side."""

    def conditions(self, split):
        first = {"train": range(0, 24, 2), "validation": (1, 9, 17), "test": (3, 5, 7, 11, 13, 15, 19, 21)}[split]
        return [
            {"direction": [math.cos(angle), math.sin(angle)]}
            for angle in (place * math.pi / 24 + turn for place in first for turn in (0, math.pi))
        ]

    def task(self, condition):
        x, y = condition["direction"]
        return Side(math.atan2(y, x))

    def equivalents(self, condition, state_dict):
        outputs = list(state_dict)[-2:]
        swapped = {name: values.flip(0) if name in outputs else values for name, values in state_dict.items()}
        return [({"direction": [-x for x in condition["direction"]]}, swapped)]

    def rivals(self, condition, inputs):
        return {"the side itself": torch.stack([-inputs @ (d := torch.tensor(condition["direction"])), inputs @ d], 1)}


class Base(nn.Module):
    """What adapters are trained for."""

    name_or_path = "me/base"

    def __init__(self):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.hidden = nn.Linear(2, 8)
            self.out = nn.Linear(8, 8)
            self.head = nn.Linear(8, 2)

    def forward(self, inputs):
        return self.head(self.out(self.hidden(inputs).tanh()).tanh())


class AdapterOfSide(Side):
    """The same with an adapter of rank 2, and a head, of a base network."""

    def build_network(self):
        base = Base()
        return AdaptedNetwork(base, lora(base, ["hidden", "out"], 2, ["head"]))


class AdaptersOfSides(Sides):
    """Adapters for directions all around."""

    def task(self, condition):
        return AdapterOfSide(super().task(condition).angle)


class UpdatesOfSides(Sides):
    """Adapters that are updates alone."""

    def task(self, condition):
        side = AdapterOfSide(super().task(condition).angle)
        base = Base()
        side.build_network = lambda: AdaptedNetwork(base, lora(base, ["hidden", "out"], 2))
        return side


class OwnInputs(Sides):
    """Each task with inputs of its own."""

    def task(self, condition):
        task = super().task(condition)
        shift = task.angle

        class Shifted(Side):
            def data(self, split):
                inputs, targets = super().data(split)
                return inputs * (1 + 0.1 * math.sin(shift)), targets

        return Shifted(shift)


class Unequal(Sides):
    """The first and the last of three tasks have as many examples, and the second has fewer."""

    def conditions(self, split):
        return super().conditions(split)[:3]

    def task(self, condition):
        task = super().task(condition)
        if condition == self.conditions("train")[1]:
            data = task.data
            task.data = lambda split: tuple(part[:150] for part in data(split))
        return task


class Line(Task):
    """Two numbers to be predicted."""

    epochs = 2

    def __init__(self, slope: float):
        self.slope = slope

    def build_network(self):
        return nn.Sequential(nn.Linear(2, 4), nn.ReLU(), nn.Linear(4, 2))

    def data(self, split):
        inputs = points(split)
        return inputs, self.slope * inputs

    def loss(self, outputs, targets):
        return (outputs - targets).square().mean()

    def probabilities(self, outputs):
        return outputs

    def correct(self, predictions, targets):
        return (predictions - targets).abs().amax(1) < 0.5


class Lines(TaskFamily):
    """Slopes: `{"slope": float}`."""

    def conditions(self, split):
        return [{"slope": place / 10} for place in range(("train", "validation", "test").index(split), 21, 3)]

    def task(self, condition):
        return Line(condition["slope"])


class Overlapping(Sides):
    """The same conditions to learn from and to be tested on."""

    def conditions(self, split):
        return super().conditions("train")


class Unnamed(Sides):
    """Conditions with different keys."""

    def conditions(self, split):
        return [*super().conditions(split), {"angle": 0.0}]


class Taken(Sides):
    """A key that rows of a zoo have already."""

    def conditions(self, split):
        return [{"seed": row["direction"]} for row in super().conditions(split)]


class Empty(Sides):
    """Nothing to be tested on."""

    def conditions(self, split):
        return [] if split == "test" else super().conditions(split)
