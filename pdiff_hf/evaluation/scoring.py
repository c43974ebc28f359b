"""How networks do: accuracy, calibration and ensembles, scored by several processes and kept for a killed run."""

import hashlib
import inspect
import pickle
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm.auto import tqdm

from ..errors import TaskError, ZooError
from ..extras import require
from ..files import check_opens, own_name, whole
from ..networks.predictor import Predictor
from ..parallel import from_main, share
from ..tasks import Task
from ..zoo import BATCH_VALUES, WeightZoo, networks_per_batch
from .measures import interval, resample, resampled_means


CALIBRATION_BINS = 15
SPLITS = ("validation", "test")
# Networks that a process scores before it is another one's turn: few enough to share, many enough to run at once.
NETWORKS_TOGETHER = 16
MOST_GROUPS = 64
# Networks whose errors are counted at a time.
TOGETHER = 4096


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
        return 1 - self.wrong.sum(1).double() / self.wrong.shape[1]

    def summary(self, similarity: torch.Tensor) -> dict[str, Any]:
        """The figures of the group; `similarity` is the largest of each network, or of some evenly picked ones."""
        test = self.test
        by_example = resample(self.wrong.shape[1], 1)
        rate = torch.stack([rows.sum(0, dtype=torch.float64) for rows in self.wrong.split(TOGETHER)]).sum(0)
        return {
            "count": len(self),
            "accuracy": {
                "mean": test.mean().item(),
                "min": test.min().item(),
                "max": test.max().item(),
                "best_on_validation": test[self.validation.argmax()].item(),
                "interval_networks": interval(resampled_means(test, 0)) if len(self) > 1 else None,
                "interval_examples": interval(1 - by_example @ (rate / len(self))),
            },
            "maximum_similarity": {
                "mean": similarity.mean().item(),
                "interval_networks": interval(resampled_means(similarity, 0)) if len(similarity) > 1 else None,
            },
            "not_finite": int((~self.finite).sum()),
            **{name: _finite_mean(values) for name, values in self.calibration.items()},
        }


def _sha256(*parts: Any) -> str:
    digest = hashlib.sha256()
    for part in parts:
        is_tensor = isinstance(part, torch.Tensor)
        digest.update(part.detach().cpu().flatten().view(torch.uint8).numpy() if is_tensor else repr(part).encode())
    return digest.hexdigest()


def _code(task: Task) -> list[str]:
    """The code of a task, as far as it lies in files."""
    found = []
    for one in type(task).__mro__[:-1]:
        with suppress(OSError, TypeError):
            found.append(inspect.getsource(one))
    return found


def _read_part(file: Path) -> dict[str, Any]:
    try:
        check_opens(file)
    except OSError as error:
        raise ZooError(f"{file} cannot be opened: {error}.") from error
    try:
        return torch.load(file, weights_only=True)
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise ZooError(f"{file} is damaged. Delete it and run the same command again.") from error


def _finite_mean(values: torch.Tensor) -> float | None:
    values = values[torch.isfinite(values)]
    return values.mean().item() if len(values) else None


class Scorer:
    r"""
    Scores networks of one layout on a task. Several processes share the networks, and all of them know the scores.

    Args:
        task (`Task`): What they do.
        zoo (`WeightZoo`): Gives the layout, and the networks on which to choose how many run at once.
        device (`torch.device`): Where they run.
        parts (`Path`, *optional*):
            A folder that keeps what was scored for a run that goes on where this one was killed.

    Raises:
        `RuntimeError`: the networks do not fit the task.
    """

    def __init__(self, task: Task, zoo: WeightZoo, device: torch.device, parts: Path | None = None):
        self.task, self.layout, self.parts = task, zoo.layout, parts
        self.predict = Predictor(task, zoo.layout, device)
        data = {split: task.data(split) for split in SPLITS}
        self.targets = {split: targets.cpu() for split, (_, targets) in data.items()}
        self.inputs = torch.cat([inputs for inputs, _ in data.values()])
        self.predict.adopt(from_main(lambda: self.predict.choose(zoo.vectors(range(min(8, len(zoo)))), self.inputs)))
        # What was scored is used again for the same examples, networks and code only.
        ends = zoo.vectors([0, -1])
        outputs = self.predict(ends, self.inputs)
        self._outputs_of_one = outputs[0].numel()
        predictions = outputs.split([len(targets) for targets in self.targets.values()], dim=1)
        correct = [self._correct(p, split) for p, split in zip(predictions, SPLITS, strict=True)]
        # Parts by other names are not ours.
        self._mark = from_main(lambda: own_name("scores"))
        self._digest = _sha256(
            *(
                self.inputs,
                *self.targets.values(),
                self.layout.config["tensors"],
                "" if parts is None else zoo.networks_sha256(),
            ),
            *(*_code(task), *correct),
        )

    def __call__(
        self,
        vectors: Callable[[range], torch.Tensor],
        count: int,
        name: str,
        key: torch.Tensor | str | None = None,
        calibrate: bool = False,
        most_values: int = BATCH_VALUES,
    ) -> Scores:
        r"""
        Args:
            vectors (`Callable[[range], torch.Tensor]`): Gives the parameter vectors, `[n, P]`, of some networks.
            count (`int`): Networks in all.
            name (`str`): What they are.
            key (`torch.Tensor` or `str`, *optional*): With the name and the zoo, tells these networks from all others.
            calibrate (`bool`, *optional*, defaults to `False`): Whether to measure calibration and ensembles too.
            most_values (`int`, *optional*): Parameters of all networks together that `vectors` is asked for at once.

        Raises:
            `RuntimeError`: the networks do not fit the task.
        """
        batch_size = min(
            networks_per_batch(self.layout.vector_size, values=most_values), networks_per_batch(self._outputs_of_one)
        )
        sizes = sorted({*(2**power for power in range(count.bit_length())), count})
        ranks = torch.randperm(count, generator=torch.Generator().manual_seed(0))
        # How networks are split depends on their number alone: sums are the same whoever adds their terms.
        groups = min(MOST_GROUPS, -(-count // NETWORKS_TOGETHER))
        bounds = [count * group // groups for group in range(groups + 1)]

        def score(group: int) -> dict[str, Any]:
            indices = range(bounds[group], bounds[group + 1])
            part = (
                self.parts
                and self.parts / f"{_sha256(self._mark, self._digest, name, key, count, group, calibrate)}.pt"
            )
            if part is not None and part.exists():
                return _read_part(part)
            scored = self._score(vectors, indices, batch_size, ranks, sizes if calibrate else [], name)
            if part is not None:
                with whole(part) as temporary:
                    torch.save(scored, temporary)
            return scored

        correct: dict[str, list[torch.Tensor]] = {split: [] for split in SPLITS}
        finite, calibration = [], []
        sums: dict[str, Any] = dict.fromkeys(SPLITS, 0)
        members: Any = 0
        for scored in share(groups, score):
            for split in SPLITS:
                correct[split].append(scored["correct"][split])
                sums[split] = sums[split] + scored["sums"].get(split, 0)
            finite.append(scored["finite"])
            calibration += scored["calibration"]
            members = members + scored["members"]
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
                {
                    "size": size,
                    **self.ensemble({split: sums[split][i] for split in SPLITS}, int(members[i])),
                }
                for i, size in enumerate(sizes)
            ]
            if calibrate
            else [],
        )

    def _score(
        self,
        vectors: Callable[[range], torch.Tensor],
        indices: range,
        batch_size: int,
        ranks: torch.Tensor,
        sizes: list[int],
        name: str,
    ) -> dict[str, Any]:
        """What is to be known of these networks: for ensembles of so many, the sum of their members among them."""
        correct: dict[str, list[torch.Tensor]] = {split: [] for split in SPLITS}
        counts = [len(self.targets[split]) for split in SPLITS]
        finite, calibration = [], []
        sums: dict[str, Any] = {}
        members = torch.zeros(len(sizes), dtype=torch.long)
        starts = range(0, len(indices), batch_size)
        silent: dict[str, Any] = {"disable": True} if len(starts) == 1 else {}  # else TQDM_DISABLE decides
        for start in tqdm(starts, desc=f"score {name}", unit="batch", leave=False, **silent):
            some = indices[start : start + batch_size]
            outputs = self.predict(vectors(some), self.inputs)
            predictions = dict(zip(SPLITS, outputs.split(counts, dim=1), strict=True))
            numbers = torch.stack([torch.isfinite(p).flatten(1).all(1) for p in predictions.values()]).all(0)
            finite.append(numbers)
            for split in SPLITS:
                correct[split].append(self._correct(predictions[split], split) & numbers[:, None])
            if sizes:
                calibration += [
                    self.calibration({split: predictions[split][i].double() for split in SPLITS})
                    for i in range(len(some))
                ]
                # Each network belongs to the ensembles that are larger than its rank in a random order.
                member = (ranks[some.start : some.stop] < torch.tensor(sizes)[:, None]) & numbers
                members += member.sum(1)
                for split in SPLITS:
                    values = torch.where(numbers.view(-1, *[1] * (predictions[split].ndim - 1)), predictions[split], 0)
                    sums[split] = sums.get(split, 0) + torch.tensordot(member.double(), values.double(), 1)
        return {
            "correct": {split: torch.cat(rows) for split, rows in correct.items()},
            "finite": torch.cat(finite),
            "calibration": calibration,
            "members": members,
            "sums": sums,
        }

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
            return {"accuracy": 0.0, "intervals": {"accuracy": [0.0, 0.0]}, "predictions": None}
        predictions = {split: values / members for split, values in sums.items()}
        scores = self.single(predictions)
        figures = {key: _finite_mean(values) for key, values in scores.calibration.items()}
        bands = self._bands(predictions["test"], ~scores.wrong[0], figures.get("temperature"))
        return {"accuracy": scores.test.item(), **figures, "intervals": bands, "predictions": predictions}

    def _bands(
        self, predictions: torch.Tensor, correct: torch.Tensor, temperature: float | None
    ) -> dict[str, list[float]]:
        """The intervals of accuracy, NLL and calibration error over bootstrap samples of the test examples."""
        by_example = resample(len(correct), 1)
        values = {"accuracy": by_example @ correct.double()}
        if temperature is not None:
            logs = predictions.double().clamp_min(1e-12).log()
            targets = self.targets["test"].long()
            values["nll"] = -by_example @ logs.gather(1, targets[:, None])[:, 0]
            confidence, answers = (logs / temperature).softmax(1).max(1)
            # The error is the sum over bins of how far the confident are from being right there.
            bins = (confidence * CALIBRATION_BINS).long().clamp_max(CALIBRATION_BINS - 1)
            gaps = torch.zeros(len(correct), CALIBRATION_BINS, dtype=torch.float64)
            gaps[torch.arange(len(correct)), bins] = confidence - (answers == targets).double()
            values["ece_scaled"] = (by_example @ gaps).abs().sum(1)
        found = {name: interval(resampled) for name, resampled in values.items()}
        if temperature is not None:
            # Resampling adds to an error as sampling did: what it added is taken off (the basic bootstrap interval).
            error = gaps.mean(0).abs().sum().item()
            found["ece_scaled"] = [max(0.0, 2 * error - end) for end in reversed(found["ece_scaled"])]
        return found

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
        targets = targets.long()  # smaller integers are no indices
        if not all(torch.isfinite(p).all() for p in predictions.values()):
            return dict.fromkeys(("nll", "brier", "ece", "ece_scaled", "temperature"), float("nan"))
        logs = {split: p.clamp_min(1e-12).log() for split, p in predictions.items()}
        of_target = test.gather(1, targets[:, None])[:, 0]
        temperature = self._temperature(logs["validation"], self.targets["validation"].long())
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
