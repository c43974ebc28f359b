"""New networks of independent ones: flow matching on the networks themselves, whose hidden units are tokens."""

import sys
from collections.abc import Callable

import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from torch import nn

from ..configs import NeuronTrainConfig
from ..errors import ConfigError, TaskError, ZooError
from ..extras import require
from ..networks.behaviour import VARIANCE_NETWORKS, Behaviour, run_at_once
from ..networks.canonical import REFERENCE_NETWORKS
from ..networks.gauge import Gauge, symmetry_of
from ..networks.predictor import Predictor
from ..networks.stacked import NotStackableError, StackedNetwork, VmappedNetwork
from ..networks.symmetry import Symmetry, UnknownSymmetryError
from ..parallel import processes
from ..pipelines.neural_network_diffusion import NeuronTransformerModel, ParameterLayout
from ..pipelines.neural_network_diffusion.layout.parameter_layout import SMALLEST_VARIANCE
from ..pipelines.neural_network_diffusion.transformer.neuron_transformer import UnitIndex
from ..runs import own_randomness, seed_everything
from ..tasks.family import check_family, code_sha256, load_family, training_inputs, with_equivalents
from ..tasks.task import Task, trusted_name
from ..zoo import WeightZoo, evenly, networks_per_batch
from .loop import TrainingLoop
from .models import check_memory, check_networks, condition_encoder, seeded, selected
from .objectives import Batch, FlowMatchingObjective


# Inputs on which networks in another order have to predict the same.
EXAMPLES = 50
# Of the initializations, evenly picked, so many tell what they are drawn from.
INITIALS = 256
# In about so many forms a block keeps the features of pairs of units for the gradients: 9 in bfloat16, 15 in float32.
FORMS = 9
# By how much the norm of an initialization may differ from that of its record.
NORM_TOLERANCE = 1e-3


class NeuronDiffusion:
    r"""
    The recipe of networks of independent seeds.

    Args:
        config (`NeuronTrainConfig`): Its settings.
        zoo (`WeightZoo`): N networks.

    Raises:
        [`TaskError`]: it is not known what the networks do, or their hidden units are not recognized.
        [`ConfigError`]: the networks or the model do not fit this machine's memory, or cannot run side by side.
    """

    slot = "transformer"

    def __init__(self, config: NeuronTrainConfig, zoo: WeightZoo):
        self.config, self.zoo = config, zoo
        name = trusted_name(config.task, zoo.task)
        family = load_family(name)
        check_family(family, training=False)
        task = family.task(family.conditions("train")[0])
        with own_randomness():
            network = task.build_network().eval()
        self.inputs = training_inputs(family)
        check_networks(network, zoo, name)
        try:
            self.symmetry = symmetry_of(network, zoo.layout, self.inputs[:1])
        except UnknownSymmetryError as error:
            raise TaskError(f"Hidden units of {name} cannot be tokens: {error}") from error
        # Directions of adapters have an order, which `align` gives them, too.
        self.ordered = config.ordered or not isinstance(self.symmetry, Symmetry)
        if config.ordered:
            self._check_order(task, network)
        self.network: StackedNetwork | VmappedNetwork | None = None
        if config.behaviour_weight:
            try:
                self.network = run_at_once(network, zoo.layout, self.inputs)
            except NotStackableError as error:
                raise ConfigError(f"The behaviour loss needs networks that run side by side. {error}") from error
        self.rows, self.in_all_forms = with_equivalents(family, zoo.layout, zoo.metadata)
        self.facts = {"forms": len(self.rows), "task_sha256": code_sha256(family)}
        self.encoder = condition_encoder(self.rows, config.condition, config.seed)
        check_memory(
            lambda: [self._model()],
            more=4 * (self._stored_values() + self._kept_values()),
            remedy="A smaller --batch-size, --hidden-size or --pair-channels, or fewer networks, take less.",
        )
        self.initial = initial_vectors(task, zoo) if config.initial else None

    def encode(
        self, layout: ParameterLayout, loop: TrainingLoop
    ) -> tuple[dict[str, nn.Module | None], Callable[[torch.Tensor], Batch], int]:
        """No further components; the networks in all forms, in canonical form where they are to be ordered, and their
        initializations, both `[n, 1, P]` of indices. The statistics of the layout are those of all forms."""
        vectors = self.in_all_forms(torch.cat(list(self.zoo.batches())))
        if self.config.ordered:
            # In this order audits have them.
            reference = self.symmetry.reference(self.zoo.vectors(evenly(len(self.zoo), REFERENCE_NETWORKS)))
            for batch in vectors.split(networks_per_batch(self.zoo.vector_size)):
                batch.copy_(self.symmetry.canonical(batch, reference))
        if self.config.ordered or len(self.rows) > len(self.zoo):
            layout.fit([vectors])
        if not self.ordered:
            share_statistics(layout, self.symmetry)
        data = {"networks": layout.normalize(vectors)[:, None]}
        if self.initial is not None:
            layout.fit_initial(self.initial[list(evenly(len(self.initial), INITIALS))])
            data["initial"] = layout.normalize(self.in_all_forms(self.initial))[:, None]
            self._warn(layout)
        if self.encoder is not None:
            data["codes"] = self.encoder.codes(selected(self.rows, self.config.condition))
        return {}, lambda indices: {name: rows[indices.cpu()] for name, rows in data.items()}, len(self.rows)

    def _check_order(self, task: Task, network: nn.Module) -> None:
        if isinstance(self.symmetry, Symmetry):
            require("scipy.optimize", "report")
        predict = Predictor(task, self.zoo.layout, processes().device)
        if not self.symmetry.holds(predict, self.zoo[0], self.inputs[:EXAMPLES]):
            raise TaskError(
                f"The hidden units of {type(network).__name__} cannot be put into an order: exchanging them changes "
                "what its networks predict. Train without --ordered."
            )

    def _warn(self, layout: ParameterLayout) -> None:
        """Says what the pipeline will not be able to draw."""
        others = [t["name"] for t in layout.tensors("generated") if t["initial"]["distribution"] == "other"]
        if others and processes().is_main_process:
            print(
                f"{', '.join(others):.200}: no independent draws of one distribution before training. The pipeline "
                "will need `initial=` to generate.",
                file=sys.stderr,
            )

    def objective(self, layout: ParameterLayout, loop: TrainingLoop) -> FlowMatchingObjective:
        """The transformer, with straight paths from noise to networks."""
        behaviour = None
        if self.network is not None:
            device = loop.accelerator.device
            inputs = self.inputs.to(device)
            some = layout.normalize(self.zoo.vectors(evenly(len(self.zoo), VARIANCE_NETWORKS)))
            behaviour = Behaviour(self.network, layout.to(device), inputs, some, self.config.behaviour_inputs)
        model = seeded(self.config.seed, self._model)
        return FlowMatchingObjective(
            model,
            FlowMatchEulerDiscreteScheduler(stochastic_sampling=True, shift_terminal=self.config.last_sigma),
            self.encoder,
            behaviour,
            self.config.behaviour_weight,
            self.config.min_sigma,
        )

    @property
    def budget(self) -> tuple[int, float]:
        """Optimizer steps of the transformer, and their learning rate."""
        return self.config.transformer_steps, self.config.transformer_learning_rate

    def _stored_values(self) -> int:
        """Parameters of all networks in all forms, and of their initializations."""
        return (2 if self.config.initial else 1) * len(self.rows) * self.zoo.vector_size

    def _kept_values(self) -> int:
        """Features of pairs of units in this machine's memory from a forward pass to its backward one."""
        if processes().device.type != "cpu":
            return 0
        try:
            pairs = UnitIndex(**self.symmetry.described(self.zoo.layout)).num_pairs
        except ValueError as error:
            raise ConfigError(f"These networks are too large for units as tokens: {error}") from error
        return FORMS * self.config.batch_size * self.config.num_layers * self.config.pair_channels * pairs

    def _model(self) -> NeuronTransformerModel:
        config = self.config
        return NeuronTransformerModel(
            **self.symmetry.described(self.zoo.layout),
            ordered=self.ordered,
            hidden_size=config.hidden_size,
            num_layers=config.num_layers,
            num_attention_heads=config.num_attention_heads,
            pair_channels=config.pair_channels,
            with_initial=config.initial,
            condition_dim=None if self.encoder is None else self.encoder.config.embedding_dim,
        )


def share_statistics(layout: ParameterLayout, symmetry: Symmetry | Gauge) -> None:
    """Gives the parameters that exchanging units exchanges the same mean and standard deviation: those of all."""
    for places in UnitIndex(**symmetry.described(layout)).exchangeable:
        log, mean, std = (values[places].double() for values in (layout.log, layout.mean, layout.std))
        logs = log.amax(0)
        # Constants among values of which logarithms are taken are stored without.
        mean = torch.where(logs > log, mean.clamp_min(SMALLEST_VARIANCE).log(), mean)
        centre = mean.mean(0)
        spread = (std.square() + (mean - centre).square()).mean(0).sqrt()
        for target, shared in ((layout.log, logs > 0), (layout.mean, centre), (layout.std, spread)):
            target[places] = shared.to(target.dtype).expand(places.shape)


def initial_vectors(task: Task, zoo: WeightZoo) -> torch.Tensor:
    r"""
    What the networks of a zoo were before training, `[N, P]`, built again from their seeds.

    Raises:
        [`ZooError`]: the zoo does not record it, or what is built is not what was trained.
    """
    vectors = torch.empty(len(zoo), zoo.vector_size, dtype=torch.float32)
    with own_randomness():
        for index, row in enumerate(zoo.rows()):
            seed, norm = row.get("seed"), row.get("initial_norm")
            if type(seed) is not int or not 0 <= seed < 2**63 or not isinstance(norm, float):
                raise ZooError(
                    f"{zoo.folder} does not record how its networks were initialized, which `pdiff-hf collect "
                    "--protocol independent` does. Train without: --no-initial."
                )
            seed_everything(seed)
            vectors[index] = zoo.layout.flatten(task.build_network().state_dict())
            if not abs(vectors[index].norm().item() - norm) <= NORM_TOLERANCE * norm:
                raise ZooError(
                    f"{type(task).__name__}.build_network() with seed {seed} does not build what network {index} of "
                    f"{zoo.folder} was trained from: it is another task, or another version of it or of torch. Train "
                    "without: --no-initial."
                )
    return vectors
