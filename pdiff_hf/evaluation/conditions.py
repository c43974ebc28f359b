"""What a condition is worth: on conditions that no training network had, against what needs no generator."""

import copy
from collections.abc import Sequence
from functools import cached_property
from typing import Any, NamedTuple

import torch

from ..errors import ZooError
from ..hub.pipelines import check_draws
from ..networks.behaviour import VARIANCE_NETWORKS, Behaviour, run_at_once
from ..networks.canonical import REFERENCE_NETWORKS, CanonicalForm
from ..networks.gauge import Gauge
from ..networks.predictor import Predictor
from ..networks.stacked import NotStackableError
from ..networks.trainer import NetworkTrainer, data_of, flatten
from ..parallel import processes
from ..pipelines.neural_network_diffusion import NeuralNetworkDiffusionPipeline
from ..runs import own_randomness
from ..tasks import Task, TaskFamily
from ..tasks.family import DECIMALS, forms_of, is_shared, key_of, solved_alike, training_inputs, with_equivalents
from ..zoo import WeightZoo, evenly
from .canonical import symmetry_that_holds
from .equal_time import train_as_long
from .measures import interval, resampled_means
from .regression import Answer, answers
from .subjects import check_together
from .verdict import CONFIDENCE, points


Row = dict[str, Any]
# Held-out conditions, evenly picked, and generated networks of each; members of ensembles.
MOST_CONDITIONS, NETWORKS = 256, 16
ENSEMBLES = (4, 16)
# Validation conditions, on which the strength of a baseline is chosen, and that of guidance, by so many networks each.
MOST_CHOSEN_ON, CHOSEN_BY = 64, 4
GUIDANCES = (1.0, 1.5, 2.0)
# Which of the answers are no more than looking up.
LOOKED_UP = (
    *("majority class", "one network for all tasks", "mean network", "nearest condition", "mean of the nearest"),
    "mix of the nearest",
)
# Tasks that one network is trained for together, and for how many times as long as those of one task.
TOGETHER, TIMES = 256, (4, 16)


class Seen(NamedTuple):
    """What a training saw: networks, those of all steps together, and inputs of each step, for which it compares
    outputs; and how much outputs count in its loss."""

    networks: int = 0
    inputs: int = 64
    weight: float = 1.0


class ConditionAudit:
    r"""
    The audit of a conditional generator.

    Args:
        family (`TaskFamily`): What the networks do.
        trained (`WeightZoo`): Networks of its training conditions, whose rows hold them.
        pipeline (`NeuralNetworkDiffusionPipeline`): Learned from them, and can be asked for the conditions.
        fresh (`WeightZoo`, *optional*): Networks trained on held-out conditions: the gold standard.
        seed (`int`, *optional*, defaults to 0): Of the generated networks.
        seen (`Seen`, *optional*):
            What the training of the pipeline saw, where it is known: the hypernetwork sees as much, or more.

    Raises:
        [`ZooError`]: rows without conditions, a pipeline that cannot be asked for them, or other networks.
    """

    def __init__(
        self,
        family: TaskFamily,
        trained: WeightZoo,
        pipeline: NeuralNetworkDiffusionPipeline,
        fresh: WeightZoo | None = None,
        seed: int = 0,
        seen: Seen | None = None,
    ):
        self.family, self.trained, self.pipeline, self.fresh, self.seed = family, trained, pipeline, fresh, seed
        self.seen = seen or Seen()
        every = family.conditions("test")
        self.asked = [every[place] for place in evenly(len(every), MOST_CONDITIONS)]
        names = list(self.asked[0])
        check_together(trained, pipeline.layout, "the pipeline")
        if fresh is not None:
            check_together(trained, fresh.layout, fresh.folder)
        check_draws(pipeline)
        if pipeline.condition_encoder is None:
            raise ZooError(f"The pipeline cannot be asked for {', '.join(names)}: it was trained without --condition.")
        held_out = [*self.asked, *family.conditions("validation")]
        try:
            pipeline.condition_encoder.codes(held_out)
        except ValueError as error:
            raise ZooError(f"The pipeline cannot be asked for what the tasks differ by: {error}") from error
        self.rows = [{name: row.get(name) for name in names} for row in trained.rows()]
        if lacking := [name for name in names if any(row[name] is None for row in self.rows)]:
            raise ZooError(f"Rows of {trained.folder} lack the condition {lacking[0]!r}.")
        had = {key_of(row, DECIMALS) for row in self.rows}
        forms = forms_of(family, trained.layout, held_out)
        for condition, keys in zip(held_out, forms, strict=True):
            if not had.isdisjoint(keys):
                raise ZooError(
                    f"{trained.folder} has networks of {condition!r:.200}, or other forms of them, which is held out: "
                    'nothing can be said of conditions that no training network had. Collect them with split "train".'
                )
        self.alike = solved_alike(forms[: len(self.asked)])
        if len(self.alike.unique()) < 2:
            raise ZooError("The audit of a condition needs two held-out conditions, which other networks solve.")
        self.tasks = [family.task(condition) for condition in self.asked]
        self.predict = Predictor(self.tasks[0], trained.layout, processes().device)

    def figures(self) -> dict[str, Any]:
        """All that the report says."""
        scale = self._guidance()
        generated = self._generate(self.asked, NETWORKS, scale)
        order = torch.randperm(len(self.asked), generator=torch.Generator().manual_seed(self.seed))
        others = [self.asked[place] for place in _deranged(order)]
        groups = {
            "generated": self._score(generated),
            "shuffled condition": self._score(self._generate(others, NETWORKS, scale)),
        }
        if (majority := self._majority()) is not None:
            groups["majority class"] = {"single": majority, "least": None}
        rivals = self._rivals()
        groups |= rivals
        groups["one network for all tasks"] = self._score(self._together().expand(len(self.asked), 1, -1))
        for name, vectors in self._answers():
            groups[name] = self._score(vectors[:, None])
        if self.fresh is not None:
            groups["trained on the task"] = self._score(self._of_zoo(self.fresh))
        training, trained = self._training(generated, scale)
        groups |= trained
        return {
            "conditions": len(self.asked),
            "networks_per_condition": NETWORKS,
            "guidance_scale": scale,
            "baselines_on": "networks as they are" if self._symmetry is None else "canonical form",
            "verdict": _verdict(groups, list(rivals), self.alike),
            "groups": {name: _summary(group, self.alike) for name, group in groups.items()},
            "training": training,
        }

    def _generate(self, asked: Sequence[Row], count: int, scale: float) -> torch.Tensor:
        """So many networks of each condition, `[C, K, P]`."""
        self.pipeline.set_progress_bar_config(desc=f"generate {count} of each condition", unit="step", leave=False)
        seeds = range(self.seed, self.seed + count * len(asked))
        made = self.pipeline(
            condition=[condition for condition in asked for _ in range(count)],
            guidance_scale=scale,
            generator=[torch.Generator().manual_seed(seed) for seed in seeds],
            output_type="pt",
        )
        return made.state_dicts.cpu().unflatten(0, (len(asked), count))

    @cached_property
    def _validation(self) -> tuple[list[Row], list[Task]]:
        """The conditions on which strengths are chosen, and their tasks."""
        every = self.family.conditions("validation")
        asked = [every[place] for place in evenly(len(every), MOST_CHOSEN_ON)]
        return asked, [self.family.task(condition) for condition in asked]

    def _on_validation(self, vectors: torch.Tensor) -> float:
        """Mean accuracy of networks of each of these conditions, `[C, K, P]`."""
        found = _scored(self._validation[1], vectors, self.predict, "validation")["single"]
        return torch.stack([one.mean() for one in found]).mean().item()

    def _guidance(self) -> float:
        """The scale that is best on validation conditions."""
        asked = self._validation[0]
        return max(GUIDANCES, key=lambda scale: self._on_validation(self._generate(asked, CHOSEN_BY, scale)))

    def _score(self, vectors: torch.Tensor) -> dict[str, Any]:
        """Accuracy `[C, E]` on the tasks of the asked conditions, of single networks `[C, K, P]` and of ensembles."""
        found = _scored(self.tasks, vectors, self.predict, "test")
        return {name: values if name == "least" else self._of_examples(values) for name, values in found.items()}

    @cached_property
    def _same_examples(self) -> bool:
        """Whether all tasks are tested on the same inputs, whose chance all of them share."""
        inputs = [inputs for inputs, _ in data_of(self.tasks, "test")]
        return is_shared(inputs) or all(torch.equal(one, inputs[0]) for one in inputs[1:])

    def _of_examples(self, shares: Sequence[torch.Tensor]) -> torch.Tensor:
        """How often each example is answered right, `[C, E]`; its mean, `[C, 1]`, where tasks have examples of their
        own."""
        return torch.stack([share if self._same_examples else share.mean(0, keepdim=True) for share in shares])

    def _majority(self) -> torch.Tensor | None:
        """Of always answering the class that is the most frequent in training, `[C, E]`; None where targets are not
        one class an example."""
        found = []
        for (_, targets), (_, tested) in zip(data_of(self.tasks, "train"), data_of(self.tasks, "test"), strict=True):
            if targets.ndim != 1 or targets.is_floating_point():
                return None
            found.append((tested == targets.mode().values).float().cpu())
        return self._of_examples(found)

    def _rivals(self) -> dict[str, dict[str, Any]]:
        """What the family knows to solve its tasks without a network, `[C, E]`."""
        found: dict[str, list[torch.Tensor]] = {}
        for condition, task, (inputs, targets) in zip(
            self.asked, self.tasks, data_of(self.tasks, "test"), strict=True
        ):
            for name, predictions in self.family.rivals(condition, inputs).items():
                found.setdefault(name, []).append(task.correct(predictions, targets).float().cpu())
        return {name: {"single": self._of_examples(values), "least": None} for name, values in found.items()}

    def _together(self) -> torch.Tensor:
        """A network that is trained on examples of many training tasks, without being told of which, for as long as
        validation conditions prefer, `[P]`."""
        conditions, count = self.family.conditions("train"), len(self._validation[0])
        tasks = [self.family.task(conditions[place]) for place in evenly(len(conditions), TOGETHER)]
        data = list(data_of(tasks, "train"))
        found = [self._trained_together(tasks[0], data, times) for times in TIMES]
        return max(found, key=lambda vector: self._on_validation(vector.expand(count, 1, -1)))

    def _trained_together(self, task: Task, data: Sequence[Any], times: int) -> torch.Tensor:
        """One that is trained for so many times as long as for one task, on a part of the data of each, `[P]`."""
        every = max(1, len(data) // times)
        parts = [
            (inputs[place % every :: every], targets[place % every :: every])
            for place, (inputs, targets) in enumerate(data)
        ]
        inputs, targets = (torch.cat(some) for some in zip(*parts, strict=True))
        together = copy.copy(task)
        together.data = lambda split: (inputs, targets)  # type: ignore[method-assign]
        network = NetworkTrainer(together, self.seed).trained()
        return flatten(self.trained.layout, network.state_dict())

    @cached_property
    def _symmetry(self) -> CanonicalForm | None:
        """That of the networks, where it is known."""
        return symmetry_that_holds(self.trained, self.predict, self.tasks[0].data("test")[0][:50])

    def _answers(self) -> list[tuple[str, torch.Tensor]]:
        """What needs no generator, the best of each kind on validation conditions: vectors `[C, P]`."""
        # On the CPU, wherever the pipeline is, but for what takes long: the training of the hypernetwork.
        zoo, layout = self.trained, copy.deepcopy(self.pipeline.layout).cpu().float()
        symmetry = self._symmetry
        rows, vectors = self.rows, torch.cat(list(zoo.batches())).float()
        if self.pipeline.transformer is not None:  # whose training has them, too
            rows, in_all_forms = with_equivalents(self.family, zoo.layout, rows)
            vectors = in_all_forms(vectors)
        mix = None
        if symmetry is not None:
            vectors = symmetry.canonical(
                vectors, symmetry.reference(zoo.vectors(evenly(len(zoo), REFERENCE_NETWORKS)))
            )
        if isinstance(symmetry, Gauge):
            gauge = symmetry
            # Whose factors have other scales than those that the pipeline was trained on.
            layout = layout.fit([vectors])

            def mix(near: torch.Tensor) -> torch.Tensor:
                return layout.normalize(gauge.mix(vectors[near])[None])[0]

        networks = layout.normalize(vectors)
        behaviour = None
        try:
            inputs = training_inputs(self.family)
            stacked = run_at_once(self.predict.network, layout, inputs)
            some = networks[list(evenly(len(networks), VARIANCE_NETWORKS))]
            device = processes().device
            there = copy.deepcopy(layout).to(device)
            behaviour = Behaviour(stacked, there, inputs.to(device), some, self.seen.inputs)
        except NotStackableError:
            pass

        def on_validation(answer: Answer) -> float:
            return self._on_validation(layout(answer(self._validation[0]), return_dict=False)[0][:, None])

        found = answers(rows, networks, behaviour, self.seed, on_validation, mix, self.seen.networks, self.seen.weight)
        return [(name, layout(answer(self.asked), return_dict=False)[0]) for name, answer in found.items()]

    def _of_zoo(self, zoo: WeightZoo) -> torch.Tensor:
        """Networks of a zoo for each asked condition, as many for each, `[C, K, P]`."""
        names = list(self.asked[0])
        places: dict[str, list[int]] = {}
        for index, row in enumerate(zoo.rows()):
            places.setdefault(key_of({name: row.get(name) for name in names}), []).append(index)
        found = [places.get(key_of(condition), []) for condition in self.asked]
        count = min(map(len, found))
        if count == 0:
            lacking = self.asked[[not some for some in found].index(True)]
            raise ZooError(f"{zoo.folder} has no network of {lacking}, which `pdiff-hf collect --split test` trains.")
        return torch.stack([zoo.vectors(some[:count]) for some in found])

    def _training(
        self, generated: torch.Tensor, scale: float
    ) -> tuple[dict[str, Any] | None, dict[str, dict[str, Any]]]:
        """Training from scratch as long as generating takes, and so long from the generated network, and twice."""
        initial = []
        with own_randomness():
            torch.manual_seed(self.seed)
            for task in self.tasks:
                initial.append(self.trained.layout.flatten(task.build_network().state_dict()))
        scratch = torch.stack(initial)
        found = train_as_long(
            self.tasks,
            self.trained.layout,
            lambda count: self.pipeline(condition=self.asked[:count], guidance_scale=scale, output_type="pt"),
            {
                "training from scratch, as long": (scratch, 1),
                "training from scratch, twice as long": (scratch, 2),
                "generated, then trained as long": (generated[:, 0], 1),
            },
        )
        if found is None:
            return None, {}
        facts, networks = found
        return facts, {name: self._score(vectors[:, None]) for name, vectors in networks.items()}


def _deranged(order: torch.Tensor) -> list[int]:
    """A permutation without fixed places: each place's successor in this order."""
    following = torch.empty_like(order)
    following[order] = order.roll(-1)
    return following.tolist()


def _scored(tasks: Sequence[Any], vectors: torch.Tensor, predict: Predictor, split: str) -> dict[str, Any]:
    """How often the networks of a task, `[K, P]` each, and their ensembles answer each of its examples right, `[E]`
    for each task; and the accuracy of the least, `[C]`."""
    accuracies: dict[str, list[torch.Tensor]] = {}
    least = []
    for task, networks, (inputs, targets) in zip(tasks, vectors, data_of(tasks, split), strict=True):
        predictions = predict.of(task)(networks.float(), inputs)

        def accuracy(probabilities: torch.Tensor, task: Any = task, targets: Any = targets) -> torch.Tensor:
            return task.correct(probabilities, targets.cpu()).float().flatten()

        # What is no number is wrong, and no part of an ensemble.
        numbers = predictions.isfinite().flatten(1).all(1)
        each = torch.stack([accuracy(one) for one in predictions]) * numbers[:, None]
        counted = torch.where(numbers.view(-1, *[1] * (predictions.ndim - 1)), predictions, 0)
        accuracies.setdefault("single", []).append(each.mean(0))
        least.append(each.mean(1).min())
        for size in ENSEMBLES:
            if len(networks) >= size:
                whole = len(networks) if len(networks) % size == 0 else size
                groups = counted[:whole].unflatten(0, (-1, size))
                members = numbers[:whole].view(-1, size).sum(1).tolist()
                joint = torch.stack(
                    [accuracy(group.sum(0) / max(1, n)) * (n > 0) for group, n in zip(groups, members, strict=True)]
                ).mean(0)
                accuracies.setdefault(f"ensemble of {size}", []).append(joint)
    return {**accuracies, "least": torch.stack(least)}


def _summary(group: dict[str, Any], alike: torch.Tensor) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, values in group.items():
        if name == "least":
            found["min"] = None if values is None else values.min().item()
        else:
            found[name] = {"mean": values.mean().item(), "interval": interval(resampled_means(values, 0, alike))}
    return found


def _verdict(groups: dict[str, dict[str, Any]], rivals: Sequence[str], alike: torch.Tensor) -> dict[str, Any]:
    """The generator against each, over conditions, those that are solved alike together, and the examples that they
    share; what the family knows without a network is looked up, too."""
    ours = groups["generated"]["single"]

    def gain(names: Sequence[str]) -> dict[str, Any]:
        best = max(names, key=lambda name: groups[name]["single"].mean().item())
        difference = ours - groups[best]["single"]
        return {
            "over": best,
            "mean": difference.mean().item(),
            "interval": interval(resampled_means(difference, 0, alike), CONFIDENCE),
        }

    regressions = [name for name in groups if name.startswith(("ridge", "hypernetwork"))]
    gains = {
        "shuffled": gain(["shuffled condition"]),
        "retrieval": gain([name for name in (*LOOKED_UP, *rivals) if name in groups]),
        "regression": gain(regressions),
    }
    accuracy = f"{100 * ours.mean().item():.2f} % on {len(ours)} conditions that no training network had"

    labels = {
        "shuffled": ("ignores-the-condition", "Ignores the condition"),
        "retrieval": ("no-better-than-retrieval", "No better than looking up the nearest"),
        "regression": ("no-better-than-regression", "No better than regression"),
    }
    failed = next((name for name in labels if not gains[name]["interval"][0] > 0), None)
    label, words = labels[failed] if failed else ("generalizes", "Generalizes")
    against = failed or "regression"
    rival = {
        "shuffled": "those that were asked for another condition",
        "retrieval": f"the best of looking up, {gains['retrieval']['over']}",
        "regression": f"the best regression, {gains['regression']['over']}",
    }
    sentence = f"{words}: {accuracy}, {points(gains[against]['mean'], gains[against]['interval'])} {rival[against]}."
    return {"label": label, "sentence": sentence, "confidence": CONFIDENCE, "gains": gains}
