"""A zoo in canonical form: of the networks that differ by what means nothing, one representative each."""

import shlex
import time
from pathlib import Path

import torch
from tqdm.auto import tqdm

from .configs import AlignConfig
from .errors import ConfigError, TaskError, ZooError
from .extras import require
from .networks.canonical import REFERENCE_NETWORKS, relative_change
from .networks.gauge import Gauge, symmetry_of
from .networks.predictor import Predictor
from .networks.symmetry import UnknownSymmetryError
from .parallel import processes, written
from .runs import own_randomness, save_run
from .tasks import check_family, load_family
from .tasks.family import training_inputs
from .tasks.task import trusted_name
from .text import own_task, time_since
from .zoo import WeightZoo, built, check_room_for, evenly, networks_per_batch


EXAMPLES = 100


def run_align(config: AlignConfig) -> str:
    r"""
    Writes the aligned zoo, and says by how much predictions and distances changed.

    Raises:
        [`TaskError`]: an architecture whose hidden units are not recognized. The message names the part.
        [`ZooError`]: predictions changed by more than the tolerance, and there is no aligned zoo then; or there is a
            zoo already.
        [`ConfigError`]: several processes were started, or the folder holds something else.
    """
    if processes().num_processes > 1:
        raise ConfigError("`pdiff-hf align` runs in one process.")
    require("scipy.optimize", "report")
    started = time.perf_counter()
    with written(config.output_dir, "align"):
        return _align(config, Path(config.output_dir), started)


def _align(config: AlignConfig, folder: Path, started: float) -> str:
    zoo = WeightZoo.from_pretrained(config.zoo)
    if len(zoo) == 0:
        raise ZooError(f"{config.zoo} has no networks.")
    name = trusted_name(config.task, zoo.task)
    family = load_family(name)
    check_family(family, processes().device, training=False)
    task, inputs = family.task(family.conditions("train")[0]), training_inputs(family)[:EXAMPLES]
    try:
        with own_randomness():
            symmetry = symmetry_of(task.build_network(), zoo.layout, inputs[:1])
    except UnknownSymmetryError as error:
        raise TaskError(f"Networks of {name} cannot be aligned: {error}") from error
    predict = Predictor(task, zoo.layout, processes().device)
    check_room_for(folder, len(zoo), zoo.layout, str(zoo.dtype).removeprefix("torch."))  # type: ignore[arg-type]

    some = evenly(len(zoo), networks_per_batch(zoo.vector_size, REFERENCE_NETWORKS))
    reference = symmetry.reference(zoo.vectors(some))
    mean = torch.zeros(zoo.vector_size, dtype=torch.float32)
    for batch in zoo.batches():
        mean += batch.sum(0) / len(zoo)
    largest = before = after = 0.0
    rows = zoo.rows()
    making = built(
        folder,
        zoo.layout,
        task=name if config.task is not None else zoo.task,
        dtype=str(zoo.dtype).removeprefix("torch."),  # type: ignore[arg-type]
        may_differ=zoo.may_differ,
    )
    with making as aligned, tqdm(total=len(zoo), desc="align", unit="network") as progress:
        for batch in zoo.batches():
            canonical = symmetry.canonical(batch, reference)
            expected = predict(batch, inputs)
            difference = relative_change(expected, predict(canonical, inputs))
            if zoo.dtype != torch.float32:  # what is stored is rounded, too
                stored = predict(canonical.to(zoo.dtype).float(), inputs)
                largest = max(largest, relative_change(expected, stored))
            largest = max(largest, difference)
            if not difference <= config.tolerance:
                raise ZooError(
                    f"Predictions of {zoo.folder} changed by {difference:.2g} of the largest, more than the tolerance "
                    f"of {config.tolerance:.2g}: these networks have other symmetries than their forward pass shows."
                )
            before += (batch - mean).norm(dim=1).sum().item()
            after += (canonical - reference).norm(dim=1).sum().item()
            for vector in canonical:
                # Its initialization is as it was.
                aligned.append(vector, **{k: v for k, v in next(rows).items() if k != "initial_norm"})
            progress.update(len(batch))
    save_run(folder, "align", config)
    origin = Path(config.zoo).resolve().name if Path(config.zoo).is_dir() else config.zoo
    WeightZoo(folder).write_card(f"The networks of `{origin}` in canonical form.")
    learner = " --family neuron --no-initial" if isinstance(symmetry, Gauge) else ""
    options = own_task(name) + "".join(f" --condition {column}" for column in family.conditions("train")[0])
    return (
        f"{len(zoo)} networks with {symmetry}: the mean distance to their mean was "
        f"{before / len(zoo):.4g} and is {after / len(zoo):.4g}. Predictions differ by {largest:.2g} of the "
        f"largest at most. They are in {folder} ({time_since(started)}). Next: pdiff-hf train"
        f"{learner}{options} --zoo {shlex.quote(str(folder))}"
    )
