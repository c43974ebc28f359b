"""What many networks predict."""

import copy
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import torch

from ..pipelines.neural_network_diffusion import ParameterLayout
from ..runs import own_randomness
from ..tasks import Task
from .stacked import NotStackableError, StackedNetwork, VmappedNetwork, side_by_side, stack


# Values of one activation that are in flight at a time: on a CPU they should stay in its cache, while an accelerator
# should have much to do.
ACTIVATION_VALUES = 2**20
ACCELERATOR_VALUES = 2**26
EXAMPLES = 200


@contextmanager
def in_float32() -> Iterator[None]:
    """Convolutions in float32, which CUDA computes in TF32 by default: rounding that changes which examples are right,
    and what many networks give at once from what they give one by one."""
    convolutions = torch.backends.cudnn.conv  # type: ignore[attr-defined]
    before = convolutions.fp32_precision
    convolutions.fp32_precision = "ieee"
    try:
        yield
    finally:
        convolutions.fp32_precision = before


class Predictor:
    r"""
    What many networks predict, several at a time where their architecture has a stacked form and one by one
    elsewhere.

    Args:
        task (`Task`): Gives the architecture, and the probabilities of its outputs.
        layout (`ParameterLayout`): Of the networks.
        device (`torch.device`): Where they run.

    Attributes:
        plan (`int`, *optional*):
            Values of the largest activation of a network, where several run at a time; `None` where they run one by
            one. [`~Predictor.choose`] finds it, on the first networks.
    """

    def __init__(self, task: Task, layout: ParameterLayout, device: torch.device):
        self.task, self.layout, self.device = task, layout, device
        with own_randomness():  # the caller's randomness is not ours to draw from
            self.network = task.build_network().to(device).eval()
        self._stacked: StackedNetwork | VmappedNetwork | None = None
        self.plan: int | None = None
        self._chosen = False
        if type(task).predict is Task.predict:
            try:
                self._stacked = side_by_side(self.network, layout.frozen_state_dict())
            except NotStackableError:
                self._stacked = None

    def of(self, task: Task) -> "Predictor":
        """The same for another task of the architecture: itself, but where tasks say themselves what outputs mean;
        there, networks run one by one, since there are few of each task."""
        kinds = (type(self.task), type(task))
        if task is self.task or all(
            kind.predict is Task.predict and kind.probabilities is Task.probabilities for kind in kinds
        ):
            return self
        other = copy.copy(self)
        other.task = task
        other.adopt(None)
        return other

    @in_float32()
    @torch.inference_mode()
    def __call__(self, vectors: torch.Tensor, inputs: torch.Tensor) -> torch.Tensor:
        r"""
        Args:
            vectors (`torch.Tensor`): Parameter vectors, `[N, P]`.
            inputs (`torch.Tensor`): Examples, `[E, ...]`.

        Returns:
            `torch.Tensor`: Probabilities, `[N, E, classes]`, on the CPU.

        Raises:
            `RuntimeError`: the networks do not fit the task.
        """
        if not self._chosen:
            self.adopt(self.choose(vectors, inputs))
        if self._stacked is not None and self.plan is not None:
            return self._run_stacked(self._stacked, vectors, inputs, self.plan)
        return self._run_one_by_one(vectors, inputs)

    @in_float32()
    @torch.inference_mode()
    def choose(self, vectors: torch.Tensor, inputs: torch.Tensor) -> int | None:
        """A plan: one by one where the stacked form has a gap, is wrong, or is slower (large convolutions). Several
        processes have to adopt the same."""
        network = self._stacked
        if network is None:
            return None
        few, examples = vectors[:8], inputs[:EXAMPLES]
        expected, loop_seconds = _timed(lambda: self._run_one_by_one(few, examples))
        try:
            weights, example = stack(self.layout, few[[0, 0]].to(self.device)), examples[:1].to(self.device)
            plan = network.largest_activation(weights, example)
            predictions, seconds = _timed(lambda: self._run_stacked(network, few, examples, plan))
        except Exception:  # a gap of the rules, which the networks themselves do not have
            return None
        # Whatever the architecture does that tracing does not see shows here.
        right = torch.allclose(predictions, expected, rtol=1e-3, atol=1e-4, equal_nan=True)
        return plan if right and seconds <= loop_seconds else None

    def adopt(self, plan: int | None) -> None:
        """From now on follows a plan."""
        self.plan, self._chosen = plan, True

    def _run_one_by_one(self, vectors: torch.Tensor, inputs: torch.Tensor) -> torch.Tensor:
        return torch.stack([self._run_one(vector, inputs) for vector in vectors])

    @torch.inference_mode(False)  # in which a forward of the user's own cannot differentiate
    @torch.no_grad()
    def _run_one(self, vector: torch.Tensor, inputs: torch.Tensor) -> torch.Tensor:
        self.network.load_state_dict(self.layout.unflatten(vector[None])[0], strict=True)
        return self.task.predict(self.network, inputs.to(self.device)).cpu()

    def _run_stacked(
        self, network: StackedNetwork | VmappedNetwork, vectors: torch.Tensor, inputs: torch.Tensor, largest: int
    ) -> torch.Tensor:
        if self.device.type == "cpu":
            examples = min(max(ACTIVATION_VALUES // largest, 1), EXAMPLES)
            together = max(ACTIVATION_VALUES // (largest * examples), 1)
        else:
            together = min(max(ACCELERATOR_VALUES // (largest * EXAMPLES), 1), len(vectors))
            examples = max(ACCELERATOR_VALUES // (largest * together), 1)

        chunks = [stack(self.layout, chunk.to(self.device)) for chunk in vectors.split(together)]

        def run(block: torch.Tensor) -> torch.Tensor:
            common: dict[Any, Any] = {}
            shared_inputs = block.to(self.device)[None]
            with torch.inference_mode():
                outputs = [self._probabilities(network(weights, shared_inputs, common)) for weights in chunks]
                return torch.cat(outputs).cpu()

        blocks = inputs.split(examples)
        threads = torch.get_num_threads()
        if self.device.type != "cpu" or threads == 1 or len(blocks) == 1 or not network.in_threads:
            return torch.cat([run(block) for block in blocks], dim=1)
        # Small operations gain more from running side by side than from threads of their own.
        with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            predictions = list(pool.map(run, blocks))
        torch.set_num_threads(threads)
        return torch.cat(predictions, dim=1)

    def _probabilities(self, outputs: torch.Tensor) -> torch.Tensor:
        """Of outputs `[N, E, classes]`."""
        if type(self.task).probabilities is Task.probabilities:
            # Classes first: a softmax over a short last dimension is slow.
            return outputs.movedim(-1, 0).contiguous().softmax(0).movedim(0, -1)
        return torch.stack([self.task.probabilities(output) for output in outputs])


def _timed(run: Callable[[], torch.Tensor]) -> tuple[torch.Tensor, float]:
    """A result and the shortest of three times, in seconds."""
    times = []
    for _ in range(3):
        start = time.perf_counter()
        result = run()
        times.append(time.perf_counter() - start)
    return result, min(times)
