"""What is measured of networks: accuracy, calibration, overlap of errors, distances, and how certain all of it is."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from tqdm.auto import tqdm

from ..extras import require
from ..stacked import Predictor
from ..tasks import Task, TaskError
from ..zoo import WeightZoo


CONFIDENCE = 0.95
RESAMPLES = 1000
CALIBRATION_BINS = 15
SPLITS = ("validation", "test")
VALUES_PER_TENSOR = 20_000


@dataclass
class Scores:
    r"""
    How N networks do.

    Attributes:
        validation (`torch.Tensor`): Accuracy on the validation split, from 0 to 1, `[N]`.
        wrong (`torch.Tensor`): Which test examples a network gets wrong, boolean `[N, E]`.
        finite (`torch.Tensor`): Whether all outputs are numbers, boolean `[N]`; where not, every example is wrong.
        calibration (`dict[str, torch.Tensor]`):
            `nll`, `brier`, `ece`, `ece_scaled` and `temperature` of each network, `[N]`; empty where predictions are
            no class probabilities.
        ensembles (`list[dict]`): Averages of the predictions of 1, 2, 4, ... networks, in random order.
    """

    validation: torch.Tensor
    wrong: torch.Tensor
    finite: torch.Tensor
    calibration: dict[str, torch.Tensor] = field(default_factory=dict)
    ensembles: list[dict[str, Any]] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.wrong)

    @property
    def test(self) -> torch.Tensor:
        """Accuracy on the test split, `[N]`."""
        return 1 - self.wrong.double().mean(1)

    def summary(self, similarity: torch.Tensor) -> dict[str, Any]:
        """The figures of the group; `similarity` is the largest of each network, `[N]`."""
        test = self.test
        by_network, by_example = resample(len(self), 0), resample(self.wrong.shape[1], 1)
        return {
            "count": len(self),
            "accuracy": {
                "mean": test.mean().item(),
                "min": test.min().item(),
                "max": test.max().item(),
                "best_on_validation": test[self.validation.argmax()].item(),
                "interval_networks": interval(by_network @ test),
                "interval_examples": interval(1 - by_example @ self.wrong.double().mean(0)),
            },
            "maximum_similarity": {
                "mean": similarity.mean().item(),
                "interval_networks": interval(by_network @ similarity),
            },
            "not_finite": int((~self.finite).sum()),
            **{name: _finite_mean(values) for name, values in self.calibration.items()},
        }


def _finite_mean(values: torch.Tensor) -> float | None:
    values = values[torch.isfinite(values)]
    return values.mean().item() if len(values) else None


class Scorer:
    r"""
    Scores networks of one layout on a task.

    Args:
        task (`Task`): What they do.
        zoo (`WeightZoo`): Gives the layout.
        device (`torch.device`): Where they run.
    """

    def __init__(self, task: Task, zoo: WeightZoo, device: torch.device):
        self.task, self.layout = task, zoo.layout
        self.predict = Predictor(task, zoo.layout, device)
        data = {split: task.data(split) for split in SPLITS}
        self.targets = {split: targets.cpu() for split, (_, targets) in data.items()}
        self.inputs = torch.cat([inputs for inputs, _ in data.values()])

    def __call__(self, batches: Iterable[torch.Tensor], count: int, name: str, calibrate: bool = False) -> Scores:
        r"""
        Args:
            batches (`Iterable[torch.Tensor]`): Parameter vectors, `[n, P]` each; `count` together.
            count (`int`): Networks.
            name (`str`): What they are, for the progress bar.
            calibrate (`bool`, *optional*, defaults to `False`): Whether to measure calibration and ensembles too.

        Raises:
            `RuntimeError`: the networks do not fit the task.
        """
        correct: dict[str, list[torch.Tensor]] = {split: [] for split in SPLITS}
        finite, calibration = [], []
        sizes = sorted({*(2**power for power in range(count.bit_length())), count})
        ranks = torch.randperm(count, generator=torch.Generator().manual_seed(0))
        sums: dict[str, torch.Tensor] = {}
        members = torch.zeros(len(sizes), dtype=torch.long)
        done = 0
        for vectors in tqdm(batches, desc=f"score {name}", unit="batch", leave=False):
            counts = [len(self.targets[split]) for split in SPLITS]
            predictions = dict(zip(SPLITS, self.predict(vectors, self.inputs).split(counts, dim=1), strict=True))
            numbers = torch.stack([torch.isfinite(p).flatten(1).all(1) for p in predictions.values()]).all(0)
            finite.append(numbers)
            for split in SPLITS:
                correct[split].append(self._correct(predictions[split], split) & numbers[:, None])
            if calibrate:
                calibration += [
                    self.calibration({split: predictions[split][i].double() for split in SPLITS})
                    for i in range(len(vectors))
                ]
                # Each network belongs to the ensembles that are larger than its rank in a random order.
                member = (ranks[done : done + len(vectors)] < torch.tensor(sizes)[:, None]) & numbers
                members += member.sum(1)
                for split in SPLITS:
                    values = torch.where(numbers.view(-1, *[1] * (predictions[split].ndim - 1)), predictions[split], 0)
                    sums[split] = sums.get(split, 0) + torch.tensordot(member.double(), values.double(), 1)
            done += len(vectors)
        return Scores(
            validation=torch.cat(correct["validation"]).double().mean(1),
            wrong=~torch.cat(correct["test"]),
            finite=torch.cat(finite),
            calibration={
                key: torch.tensor([row[key] for row in calibration], dtype=torch.float64) for key in calibration[0]
            }
            if calibration and calibration[0]
            else {},
            ensembles=[
                {"size": size, **self.ensemble({split: sums[split][i] for split in SPLITS}, int(members[i]))}
                for i, size in enumerate(sizes)
            ]
            if calibrate
            else [],
        )

    def single(self, predictions: dict[str, torch.Tensor]) -> Scores:
        """The scores of one set of predictions, `[E, classes]` a split."""
        correct = {split: self._correct(predictions[split][None], split) for split in SPLITS}
        calibration = self.calibration(predictions)
        return Scores(
            validation=correct["validation"].double().mean(1),
            wrong=~correct["test"],
            finite=torch.ones(1, dtype=torch.bool),
            calibration={key: torch.tensor([value], dtype=torch.float64) for key, value in calibration.items()},
        )

    def ensemble(self, sums: dict[str, torch.Tensor], members: int) -> dict[str, Any]:
        """Accuracy and calibration of averaged predictions; `sums` are over so many members."""
        if members == 0:
            return {"accuracy": 0.0, "predictions": None}
        predictions = {split: values / members for split, values in sums.items()}
        scores = self.single(predictions)
        figures = {key: _finite_mean(values) for key, values in scores.calibration.items()}
        return {"accuracy": scores.test.item(), **figures, "predictions": predictions}

    def _correct(self, predictions: torch.Tensor, split: str) -> torch.Tensor:
        targets = self.targets[split]
        correct = torch.stack([self.task.correct(p, targets) for p in predictions])
        if correct.dtype != torch.bool or correct.shape[1:] != (len(targets),):
            raise TaskError(
                f"{type(self.task).__name__}.correct() has to give a boolean for each of {len(targets)} examples; "
                f"found {correct.dtype} of shape {list(correct.shape[1:])}."
            )
        return correct

    def calibration(self, predictions: dict[str, torch.Tensor]) -> dict[str, float]:
        r"""
        Negative log-likelihood (nats), Brier score (the sum over classes), expected calibration error (15 bins; Guo
        et al. 2017, arXiv 1706.04599), the latter again after temperature scaling on the validation split, and that
        temperature. Empty where predictions are no probabilities of classes.
        """
        test, targets = predictions["test"], self.targets["test"]
        if test.ndim != 2 or targets.ndim != 1 or targets.is_floating_point() or test.shape[1] < 2:
            return {}
        if int(targets.max()) >= test.shape[1] or int(targets.min()) < 0:
            return {}
        if not all(torch.isfinite(p).all() for p in predictions.values()):
            return dict.fromkeys(("nll", "brier", "ece", "ece_scaled", "temperature"), float("nan"))
        logs = {split: p.clamp_min(1e-12).log() for split, p in predictions.items()}
        of_target = test.gather(1, targets[:, None])[:, 0]
        temperature = self._temperature(logs["validation"], self.targets["validation"])
        return {
            "nll": -logs["test"].gather(1, targets[:, None]).mean().item(),
            "brier": (test.square().sum(1) - 2 * of_target + 1).mean().item(),
            "ece": _calibration_error(test, targets),
            "ece_scaled": _calibration_error((logs["test"] / temperature).softmax(1), targets),
            "temperature": temperature,
        }

    @staticmethod
    def _temperature(logs: torch.Tensor, targets: torch.Tensor) -> float:
        values, index = logs.numpy(), targets.numpy()
        logsumexp = require("scipy.special", "report").logsumexp

        def nll(log_temperature: float) -> float:
            scaled = values / np.exp(log_temperature)
            return float((logsumexp(scaled, axis=1) - scaled[np.arange(len(index)), index]).mean())

        found = require("scipy.optimize", "report").minimize_scalar(nll, bounds=(-3, 3), method="bounded")
        return float(np.exp(found.x))


def _calibration_error(predictions: torch.Tensor, targets: torch.Tensor) -> float:
    classification = require("torchmetrics.functional.classification", "report")
    return classification.multiclass_calibration_error(
        predictions, targets, predictions.shape[1], n_bins=CALIBRATION_BINS, validate_args=False
    ).item()


def similarity(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Intersection over union of wrong predictions, 1 where both are empty: `[N, E]` and `[M, E]` to `[N, M]`."""
    a, b = a.double(), b.double()
    intersection = a @ b.T
    union = a.sum(1)[:, None] + b.sum(1)[None] - intersection
    return torch.where(union == 0, 1.0, intersection / union.clamp_min(1))


def resample(count: int, seed: int) -> torch.Tensor:
    """Weights of bootstrap samples of so many, `[RESAMPLES, count]`; each row sums to 1 (Efron 1979)."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(count, (RESAMPLES, count), generator=generator)
    weights = torch.zeros(RESAMPLES, count, dtype=torch.float64)
    return weights.scatter_add_(1, drawn, torch.ones_like(weights)) / count


def interval(values: torch.Tensor, confidence: float = CONFIDENCE) -> list[float]:
    """The percentile interval of bootstrap values."""
    tail = (1 - confidence) / 2
    return [torch.quantile(values.double(), q, interpolation="nearest").item() for q in (tail, 1 - tail)]


def batches(zoo: WeightZoo) -> Iterator[torch.Tensor]:
    """The vectors of a zoo in double precision, a bounded amount at a time."""
    for batch in zoo.batches():
        yield batch.double()


def distances(a: WeightZoo, b: WeightZoo) -> torch.Tensor:
    """L2 distances of parameter vectors, `[N, M]`, without the cancellation that inner products would bring."""
    exact = "donot_use_mm_for_euclid_dist"
    return torch.cat([torch.cat([torch.cdist(x, y, compute_mode=exact) for y in batches(b)], 1) for x in batches(a)])


def outside_span(trained: WeightZoo, generated: WeightZoo, nearest: torch.Tensor, away: torch.Tensor) -> float:
    r"""
    Mean share of the squared way from the nearest training network to a generated one that is orthogonal to all
    differences of training networks.

    Args:
        trained (`WeightZoo`): N networks.
        generated (`WeightZoo`): n networks.
        nearest (`torch.Tensor`): Index of the nearest training network of each, `[n]`.
        away (`torch.Tensor`): The distance to it, `[n]`.
    """
    mean = torch.stack([batch.sum(0) for batch in batches(trained)]).sum(0) / len(trained)
    of_trained, of_generated = (
        torch.cat([torch.cat([(x - mean) @ (y - mean).T for y in batches(zoo)], 1) for x in batches(trained)])
        for zoo in (trained, generated)
    )
    products = of_generated - of_trained[:, nearest]
    inside = (products * (torch.linalg.pinv(of_trained, hermitian=True, rtol=1e-10) @ products)).sum(0)
    share = torch.where(away > 0, 1 - inside / away.square().clamp_min(1e-300), 0.0)
    return share.clamp(0, 1).mean().item()


def parameter_statistics(trained: WeightZoo, generated: WeightZoo) -> list[dict[str, Any]]:
    r"""
    For each generated tensor: mean and standard deviation of its values over both zoos, and the Wasserstein distance
    of the two distributions (of at most `VALUES_PER_TENSOR` values, in the unit of the parameters).
    """
    stats = require("scipy.stats", "report")
    rows = []
    for name, values in tensor_values(trained, generated).items():
        # Squares of what is finite in single precision may not be.
        a, b = (value.double().numpy() for value in values)
        rows.append(
            {
                "tensor": name,
                "trained": {"mean": float(a.mean()), "std": float(a.std())},
                "generated": {"mean": float(b.mean()), "std": float(b.std())},
                "wasserstein": float(stats.wasserstein_distance(a, b)),
            }
        )
    return rows


def tensor_values(*zoos: WeightZoo) -> dict[str, tuple[torch.Tensor, ...]]:
    """Values of each generated tensor in each zoo, evenly picked: at most `VALUES_PER_TENSOR` of each."""
    picked = [zoo.vectors(sorted({*range(0, len(zoo), -(-len(zoo) // 50))})) for zoo in zoos]
    values, start = {}, 0
    for tensor in zoos[0].layout.tensors("generated"):
        size = torch.Size(tensor["shape"]).numel()
        parts = [vectors[:, start : start + size].flatten() for vectors in picked]
        values[tensor["name"]] = tuple(part[:: -(-len(part) // VALUES_PER_TENSOR)] for part in parts)
        start += size
    return values
