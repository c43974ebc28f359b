# Over 400 lines: one family of tasks, from collecting to the audit, shares its zoos and its pipeline.
"""From a family of tasks to networks for tasks that nobody trained, and what they are worth."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from pdiff_hf import (
    CollectConfig,
    ConditionEncoder,
    EvaluateConfig,
    GenerateConfig,
    NeuronTrainConfig,
    ParameterLayout,
    TrainConfig,
    WeightZoo,
    evaluate,
    load_pipeline,
    quickstart,
    run_collect,
    run_evaluate,
    run_generate,
    run_train,
)
from pdiff_hf.cli import main
from pdiff_hf.configs import QuickstartConfig
from pdiff_hf.errors import ConfigError, ZooError
from pdiff_hf.evaluation import conditions, quality, regression, stage
from pdiff_hf.evaluation.measures import interval, resampled_means
from pdiff_hf.networks.trainer import NetworkTrainer
from pdiff_hf.quickstart import run_quickstart
from pdiff_hf.tasks import load_family
from pdiff_hf.tasks.family import forms_of, solved_alike
from pdiff_hf.text import load_yaml
from pdiff_hf.train.neuron_diffusion import initial_vectors
from pdiff_hf.train.objectives import UNTOLD, ConditionalObjective

from . import families


NAME = f"{families.__name__}:Sides"
FAMILY = families.Sides()
SMALL = {"hidden_size": 16, "num_layers": 2, "num_attention_heads": 2, "batch_size": 32}


@pytest.fixture(scope="module")
def zoo(tmp_path_factory) -> WeightZoo:
    folder = tmp_path_factory.mktemp("family") / "zoo"
    return run_collect(CollectConfig(NAME, str(folder), networks_per_task=4))


@pytest.fixture(scope="module")
def trained(zoo, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("family") / "pipeline"
    places = {"zoo": str(zoo.folder), "output_dir": str(folder), "task": NAME}
    run_train(NeuronTrainConfig(**places, **SMALL, condition=("direction",), transformer_steps=300))
    return folder


@pytest.fixture(scope="module")
def fresh(tmp_path_factory) -> WeightZoo:
    folder = tmp_path_factory.mktemp("family") / "fresh"
    return run_collect(CollectConfig(NAME, str(folder), networks_per_task=2, split="test", seed=1000))


# ---- collecting


def test_each_condition_has_networks_of_its_own_seed_which_solve_their_task(zoo):
    rows = list(zoo.rows())
    asked = FAMILY.conditions("train")
    assert [row["direction"] for row in rows] == [row["direction"] for row in asked] * 4
    assert [row["seed"] for row in rows] == list(range(4 * len(asked)))
    assert sum(row["validation_accuracy"] for row in rows) / len(rows) > 0.9
    assert f"{len(asked)} tasks" in (zoo.folder / "README.md").read_text()


def test_networks_of_different_tasks_at_once_are_those_of_one_by_one(zoo):
    for index in (0, 5, 30):
        row = list(zoo.rows())[index]
        alone = NetworkTrainer(FAMILY.task(row), row["seed"])
        torch.testing.assert_close(
            zoo.vectors([index])[0], zoo.layout.flatten(alone.trained().state_dict()).cpu(), atol=2e-3, rtol=1e-2
        )
    initial = initial_vectors(FAMILY.task(asked := FAMILY.conditions("train")[0]), zoo)
    assert initial.norm(dim=1).tolist() == pytest.approx([row["initial_norm"] for row in zoo.rows()], rel=1e-4)
    assert asked


def test_more_networks_of_each_task_come_after_those_that_are_there(tmp_path):
    folder = tmp_path / "zoo"
    one = run_collect(CollectConfig(NAME, str(folder), networks_per_task=1, epochs=1)).vectors()
    both = run_collect(CollectConfig(NAME, str(folder), networks_per_task=2, epochs=1))
    assert len(both) == 2 * len(one)
    assert torch.equal(both.vectors(range(len(one))), one)
    with pytest.raises(ConfigError, match="holds 48 networks"):
        run_collect(CollectConfig(NAME, str(folder), networks_per_task=1, epochs=1))


def test_tasks_with_inputs_of_their_own_are_trained_on_these(tmp_path):
    name = f"{families.__name__}:OwnInputs"
    zoo = run_collect(CollectConfig(name, str(tmp_path / "zoo"), networks_per_task=1))
    rows = list(zoo.rows())
    assert sum(row["validation_accuracy"] for row in rows) / len(rows) > 0.9
    alone = NetworkTrainer(families.OwnInputs().task(rows[7]), rows[7]["seed"])
    torch.testing.assert_close(
        zoo.vectors([7])[0], zoo.layout.flatten(alone.trained().state_dict()).cpu(), atol=2e-3, rtol=1e-2
    )


def test_tasks_with_other_numbers_of_examples_are_trained_one_by_one(tmp_path):
    name = f"{families.__name__}:Unequal"
    zoo = run_collect(CollectConfig(name, str(tmp_path / "zoo"), networks_per_task=1))
    row = zoo.metadata[1]
    alone = NetworkTrainer(families.Unequal().task({"direction": row["direction"]}), row["seed"])
    torch.testing.assert_close(zoo[1], zoo.layout.flatten(alone.trained().state_dict()).cpu())


# ---- training and asking


def accuracies(pipe, split: str, count: int = 4, **arguments) -> torch.Tensor:
    pipe.set_progress_bar_config(disable=True)
    found = []
    for row in FAMILY.conditions(split):
        task = FAMILY.task(row)
        inputs, targets = task.data("test")
        made = pipe(count, condition=row, generator=torch.Generator().manual_seed(0), **arguments).state_dicts
        for state_dict in made:
            network = task.build_network()
            network.load_state_dict(state_dict, strict=True)
            found.append(task.correct(task.predict(network, inputs), targets).float().mean())
    return torch.stack(found)


def test_networks_solve_tasks_that_no_network_was_trained_for(trained):
    card = (trained / "README.md").read_text()
    assert "Known are direction (a list of 2 numbers)." in card
    assert "| condition | direction |" in card
    pipe = load_pipeline(trained)
    assert "direction (a list of 2 numbers)" in pipe.condition_encoder.known()
    # Guidance was learned: what stands for nothing asked starts at 0.
    assert (pipe.condition_encoder.unasked != 0).any()
    assert accuracies(pipe, "test").mean() > 0.8
    assert accuracies(pipe, "test", guidance_scale=1.5).mean() > 0.8


def test_some_networks_are_told_nothing_in_training_and_some_not_all():
    generator = torch.Generator().manual_seed(0)
    for columns, each in ((["a", "b"], (1 - UNTOLD) ** 2), (["a"], 1 - UNTOLD)):
        rows = [{name: float(place**power) for power, name in enumerate(columns, 1)} for place in range(5)]
        encoder = ConditionEncoder.from_rows(rows, columns, 4)
        torch.nn.init.normal_(encoder.unasked)
        objective = ConditionalObjective(torch.nn.Identity(), None, encoder)
        asked = objective.draw_asked(20_000, generator)["asked"]
        assert asked.float().mean(0).tolist() == pytest.approx([each] * len(columns), abs=0.01)
        assert asked.any(1).float().mean().item() == pytest.approx(
            (1 - UNTOLD) * (1 - UNTOLD**2 if len(columns) > 1 else 1), abs=0.01
        )
        codes = encoder.codes(rows)
        nothing, everything = (objective.told(codes, torch.full_like(asked[:5], told)) for told in (False, True))
        torch.testing.assert_close(nothing["condition"], encoder([{}] * 5))
        torch.testing.assert_close(everything["condition"], encoder(rows))


def test_the_published_family_can_be_asked_too(zoo, tmp_path, capsys):
    run_train(
        TrainConfig(
            zoo=str(zoo.folder),
            output_dir=str(tmp_path),
            condition=("direction", "validation_accuracy", "source"),
            autoencoder="linear",
            latent_channels=2,
            latent_length=4,
            unet_steps=20,
        )
    )
    assert "--family neuron learns them; for this family, `pdiff-hf align`" in capsys.readouterr().err
    pipe = load_pipeline(tmp_path)
    pipe.set_progress_bar_config(disable=True)
    assert "source (one of" in pipe.condition_encoder.known()
    asked = pipe(
        condition=[{"direction": [1.0, 0.0]}, {"validation_accuracy": 0.5}, {}],
        num_inference_steps=3,
        generator=torch.Generator().manual_seed(0),
    )
    assert len(asked.state_dicts) == 3


def test_a_condition_that_the_zoo_lacks_is_said_with_what_it_has(zoo, tmp_path):
    places = {"zoo": str(zoo.folder), "output_dir": str(tmp_path)}
    with pytest.raises(ConfigError, match=r"No row has 'angle'.*columns are direction, index, initial_norm"):
        run_train(NeuronTrainConfig(**places, task=NAME, **SMALL, condition=("angle",)))
    with pytest.raises(ConfigError, match=r"averages what is asked for, too, and 'source' holds words"):
        run_train(TrainConfig(**places, condition=("source",), checkpoint_averaging=2))


def test_the_command_takes_conditions_and_rows_record_them(trained, tmp_path, capsys):
    places = ["--pipeline", str(trained), "--output-dir"]
    asked = {"direction": [0.0, 1.0]}
    main(["generate", *places, str(tmp_path / "a"), "--num-networks", "2", "--condition", json.dumps(asked)])
    rows = list(WeightZoo(tmp_path / "a").rows())
    assert [(row["direction"], row["guidance_scale"]) for row in rows] == [([0.0, 1.0], 1.0)] * 2
    learned = load_yaml((trained / "train.yaml").read_text())["zoo"]
    assert f"Next: pdiff-hf evaluate --trained {learned} --generated {trained}\n" in capsys.readouterr().out

    file = tmp_path / "asked.jsonl"
    file.write_text(json.dumps(asked) + "\n\n" + json.dumps({}) + "\n")
    config = GenerateConfig(
        str(trained), output_dir=str(tmp_path / "b"), num_networks=3, conditions=str(file), batch_size=1
    )
    zoo = run_generate(config)
    assert [row.get("direction") for row in zoo.rows()] == [[0.0, 1.0], None, [0.0, 1.0]]
    torch.testing.assert_close(zoo.vectors([0]), WeightZoo(tmp_path / "a").vectors([0]), atol=1e-4, rtol=1e-4)

    file.write_text(json.dumps({"direction": [1.0, 1.0]}) + "\n")
    with pytest.raises(ConfigError, match="cannot be resumed"):
        run_generate(config)
    capsys.readouterr()


def test_networks_are_generated_with_the_guidance_that_their_rows_name(trained, tmp_path):
    settings = {"guidance_scale": 2.0, "num_inference_steps": 3}
    asked = {"direction": [0.0, 1.0]}
    made = run_generate(
        GenerateConfig(
            *(str(trained),), output_dir=str(tmp_path), num_networks=2, condition=json.dumps(asked), **settings
        )
    )
    pipe = load_pipeline(trained)
    generators = [torch.Generator().manual_seed(row["seed"]) for row in made.rows()]
    again = pipe(2, condition=asked, generator=generators, output_type="pt", **settings).state_dicts
    torch.testing.assert_close(made.vectors(), again, atol=1e-4, rtol=1e-4)
    assert [row["guidance_scale"] for row in made.rows()] == [2.0, 2.0]


def test_what_was_asked_for_is_recorded_beside_what_rows_say_of_themselves(zoo, tmp_path):
    with WeightZoo.create(tmp_path / "zoo", zoo.layout) as named:
        for index in range(8):
            named.append(zoo.state_dict(index), source=f"me/{index % 2}")
    config = TrainConfig(
        zoo=str(named.folder),
        output_dir=str(tmp_path / "pipeline"),
        condition=("source",),
        autoencoder="linear",
        latent_channels=2,
        latent_length=4,
        unet_steps=2,
    )
    run_train(config)
    asked = json.dumps({"source": "me/1"})
    made = run_generate(
        GenerateConfig(config.output_dir, output_dir=str(tmp_path / "a"), num_networks=1, condition=asked)
    )
    assert [(row["asked_source"], row["source"]) for row in made.rows()] == [("me/1", "generated")]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"condition": "{"}, "condition is no JSON"),
        ({"condition": "[1]"}, "condition has to be a JSON object"),
        (
            {"condition": '{"angle": 1}'},
            "cannot be asked for this: 'angle' is nothing to ask for. Known are direction",
        ),
        ({"condition": '{"direction": [1]}'}, "'direction' cannot be"),
        ({"conditions": "nowhere.jsonl"}, "cannot be read"),
        ({"condition": "{}", "conditions": "nowhere.jsonl"}, "pass one of them"),
        ({"guidance_scale": 2.0}, "nothing is asked for"),
    ],
)
def test_what_cannot_be_asked_for_is_said_before_anything_is_made(trained, tmp_path, settings, message):
    with pytest.raises(ConfigError, match=message):
        run_generate(GenerateConfig(str(trained), output_dir=str(tmp_path / "zoo"), **settings))
    assert not (tmp_path / "zoo" / "zoo.json").exists()


def test_a_pipeline_without_conditions_cannot_be_asked(digits_pipeline, tmp_path):
    with pytest.raises(ConfigError, match="trained without --condition"):
        run_generate(GenerateConfig(str(digits_pipeline), output_dir=str(tmp_path), condition='{"a": 1}'))


# ---- the audit


@pytest.fixture(scope="module")
def report(zoo, trained, fresh, tmp_path_factory) -> tuple[dict, Path]:
    folder = tmp_path_factory.mktemp("family") / "report"
    config = EvaluateConfig(NAME, str(zoo.folder), str(trained), fresh=str(fresh.folder), output_dir=str(folder))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(regression, "STEPS", 500)
        return run_evaluate(config), folder


def test_the_audit_compares_with_all_that_needs_no_generator(report):
    figures, folder = report
    groups = figures["groups"]
    assert figures["conditions"] == len(FAMILY.conditions("test"))
    assert figures["guidance_scale"] in conditions.GUIDANCES
    assert {"shuffled condition", "majority class", "nearest condition", "mean of the nearest"} <= groups.keys()
    assert {"ridge regression", "ridge, pairs", "hypernetwork", "trained on the task"} <= groups.keys()
    assert groups["the side itself"]["single"]["mean"] == 1
    assert figures["verdict"]["label"] == "no-better-than-retrieval"
    assert figures["verdict"]["gains"]["retrieval"]["over"] == "the side itself"
    assert groups["trained on the task"]["single"]["mean"] > 0.9
    assert groups["hypernetwork"]["single"]["mean"] > 0.95
    # It is not told which side is asked for.
    assert groups["one network for all tasks"]["single"]["mean"] < 0.75
    assert groups["shuffled condition"]["single"]["mean"] < groups["generated"]["single"]["mean"] - 0.2
    assert 0.4 < groups["majority class"]["single"]["mean"] < 0.65
    assert set(figures["verdict"]["gains"]) == {"shuffled", "retrieval", "regression"}
    assert figures["baselines_on"] == "canonical form"
    for name in ("report.json", "report.md", "report.html", "conditions.png", "conditions.svg"):
        assert (folder / name).stat().st_size > 0
    text = (folder / "report.md").read_text()
    assert figures["verdict"]["sentence"] in text
    assert "| hypernetwork |" in text
    assert "the same networks (canonical form: hidden units in one order and scale)" in " ".join(text.split())
    assert json.loads((folder / "report.json").read_text())["groups"].keys() == groups.keys()


def test_the_hypernetwork_weighs_outputs_as_validation_conditions_prefer(zoo, trained, monkeypatch):
    audit = conditions.ConditionAudit(FAMILY, zoo, load_pipeline(trained))
    monkeypatch.setattr(regression, "STEPS", 60)

    def answered(*weights: float) -> torch.Tensor:
        monkeypatch.setattr(regression, "WEIGHTS", weights)
        audit.seen = conditions.Seen(weight=weights[0])
        return dict(audit._answers())["hypernetwork"]

    once, often = answered(1.0), answered(256.0)
    assert not torch.allclose(once, often)
    chosen = answered(1.0, 256.0)
    assert torch.equal(chosen, once) or torch.equal(chosen, often)
    assert torch.equal(chosen, answered(256.0, 1.0))


@pytest.mark.parametrize("preferred", [1.0, 64.0, 256.0])
def test_the_weight_that_validation_prefers_is_taken(monkeypatch, preferred):
    def tagged(conditions, networks, behaviour, seed, weight, steps):
        return lambda asked: torch.full((len(asked), 1), weight)

    monkeypatch.setattr(regression, "_hypernetwork", tagged)
    rows = [{"x": float(place)} for place in range(20)]
    found = regression.answers(
        *(rows, torch.zeros(20, 1), object(), 0),
        lambda answer: -abs(answer(rows[:1]).item() - preferred),
        weight=64.0,
    )
    assert found["hypernetwork"](rows[:1]).item() == preferred


def test_what_needs_no_generator_is_what_its_name_says(monkeypatch):
    monkeypatch.setattr(regression, "STEPS", 8)
    places = [0.0, 1, 2, 3, 3, 4, 5, 6, 7, 8, 9]
    rows = [{"x": place, "word": "ab"[int(place) % 2]} for place in places]
    known = regression.Conditions(rows)
    assert known.rows[:, 1:].tolist() == [[1.0 - place % 2, place % 2] for place in places]
    known = regression.Conditions([{"x": place} for place in places])
    networks = torch.tensor(places)[:, None]
    # Nearest to 3.2 are 3, of which there are two networks, 4, 2 and 5.
    mean = regression._averaging(known, networks, 4)([{"x": 3.2}, {"x": 8.9}])
    assert mean[:, 0].tolist() == pytest.approx([17 / 5, 30 / 4])
    found = regression.answers([{"x": place} for place in places], networks, None, 0, lambda answer: 0.0)
    assert found["nearest condition"]([{"x": 3.2}, {"x": 100.0}])[:, 0].tolist() == [3.0, 9.0]
    assert found["mean network"]([{"x": 3.2}]).item() == pytest.approx(sum(places) / len(places))
    products = regression._interactions(torch.tensor([[2.0, 3, 5]]), 3)
    assert products.tolist() == [[1, 2, 3, 5, 6, 10, 15, 30]]


def test_the_hypernetwork_has_the_training_of_the_generator(zoo, trained, monkeypatch):
    monkeypatch.setattr(regression, "STEPS", 8)
    drawn = []

    class Counted(conditions.Behaviour):
        def draw(self, count, generator):
            drawn.append(super().draw(count, generator))
            return drawn[-1]

    monkeypatch.setattr(conditions, "Behaviour", Counted)
    for networks, steps, weight, tried in ((10 * regression.BATCH, 10, 1.0, 2), (10, 8, 64.0, 3)):
        drawn.clear()
        seen = conditions.Seen(networks, inputs=5, weight=weight)
        conditions.ConditionAudit(FAMILY, zoo, load_pipeline(trained), seen=seen)._answers()
        assert len(drawn) == tried * 2 + steps  # each weight for two steps, and the best one
        assert {inputs.shape for inputs in drawn} == {(1, 5)}


def test_examples_that_each_task_makes_anew_are_the_same_examples(zoo, trained):
    audit = conditions.ConditionAudit(FAMILY, zoo, load_pipeline(trained))
    assert audit._same_examples
    for task in audit.tasks:
        data = task.data
        task.data = lambda split, data=data: tuple(part.clone() for part in data(split))
    anew = conditions.ConditionAudit(FAMILY, zoo, load_pipeline(trained))
    anew.tasks = audit.tasks
    assert anew._same_examples
    first = anew.tasks[0].data
    anew.tasks[0].data = lambda split: tuple(part.flip(0) for part in first(split))
    other = conditions.ConditionAudit(FAMILY, zoo, load_pipeline(trained))
    other.tasks = anew.tasks
    assert not other._same_examples


def test_networks_without_numbers_are_wrong_and_in_no_ensemble(zoo, trained):
    audit = conditions.ConditionAudit(FAMILY, zoo, load_pipeline(trained))
    four = audit._generate(audit.asked, 4, 1.0)
    broken = four.clone()
    broken[0, 0] = torch.nan
    whole, found = audit._score(four), audit._score(broken)
    assert whole["least"][0] > 0
    assert found["least"][0] == 0
    assert found["single"][0].mean() == pytest.approx(audit._score(four[:, 1:])["single"][0].mean().item() * 3 / 4)
    assert found["ensemble of 4"][0].mean() > 0.5
    broken[0] = torch.nan
    assert audit._score(broken)["ensemble of 4"][0].sum() == 0


def test_strengths_are_those_that_validation_conditions_prefer(zoo, trained, monkeypatch):
    assert regression._best([3, 1, 2], lambda one: -abs(one - 1)) == 1
    audit = conditions.ConditionAudit(FAMILY, zoo, load_pipeline(trained))
    asked = []

    def generate(conditions_, count, scale):
        asked.append(conditions_)
        return scale

    monkeypatch.setattr(audit, "_generate", generate)
    for best in conditions.GUIDANCES:
        monkeypatch.setattr(audit, "_on_validation", lambda scale, best=best: -abs(scale - best))
        assert audit._guidance() == best
    held_out = FAMILY.conditions("validation")
    assert all(one == held_out for one in asked)


def test_nothing_is_chosen_on_test_data(zoo, trained, monkeypatch):
    audit = conditions.ConditionAudit(FAMILY, zoo, load_pipeline(trained))
    _ = audit._symmetry  # of which the inputs alone are read
    read = []
    data = families.Side.data
    monkeypatch.setattr(families.Side, "data", lambda task, split: read.append(split) or data(task, split))
    monkeypatch.setattr(regression, "STEPS", 8)
    audit._guidance()
    audit._answers()
    assert "validation" in read
    assert "test" not in read


def test_what_a_training_saw_stays_with_its_pipeline(trained, tmp_path):
    """What was pushed and pulled, too, whose configuration stays where it was."""
    assert stage.seen_in_training(trained) == conditions.Seen(300 * SMALL["batch_size"], 64, 1.0)
    facts = tmp_path / "train.facts.json"
    for seen in (
        {"networks": 10**15, "inputs": -1, "weight": 1e30},
        {"networks": True, "inputs": 9.0, "other": 1},
        [3],
        None,
    ):
        facts.write_text(json.dumps({"seen": seen}))
        assert stage.seen_in_training(tmp_path) == conditions.Seen()


def test_kept_outputs_change_nothing_but_the_time(zoo, trained, monkeypatch):
    audit = conditions.ConditionAudit(FAMILY, zoo, load_pipeline(trained))
    monkeypatch.setattr(regression, "STEPS", 60)
    found = []
    for most in (regression.MOST_OUTPUTS, 0):
        monkeypatch.setattr(regression, "MOST_OUTPUTS", most)
        found.append(dict(audit._answers())["hypernetwork"])
    torch.testing.assert_close(*found, atol=1e-3, rtol=1e-3)


def test_conditions_whose_networks_in_other_forms_were_learned_from_are_not_held_out(zoo, trained):
    """The opposite direction of each, whose last digits differ."""
    few = families.Sides()
    asked = [{"direction": [-x for x in row["direction"]]} for row in FAMILY.conditions("train")[::2]]
    few.conditions = lambda split: asked if split == "test" else FAMILY.conditions(split)
    with WeightZoo.create(zoo.folder.parent / "half", zoo.layout) as half:
        for index, row in enumerate(zoo.rows()):
            if row["direction"] in [one["direction"] for one in FAMILY.conditions("train")[::2]]:
                half.append(zoo.state_dict(index), direction=row["direction"])
    with pytest.raises(ZooError, match=r"has networks of .*, or other forms of them, which is held out"):
        conditions.ConditionAudit(few, half, load_pipeline(trained))


def test_a_pipeline_is_audited_with_the_zoo_that_it_learned_from(zoo, trained, fresh, tmp_path):
    grown = tmp_path / "zoo"
    run_collect(CollectConfig(NAME, str(grown), networks_per_task=1, epochs=1))
    config = EvaluateConfig(NAME, str(grown), str(trained), output_dir=str(tmp_path / "report"))
    with pytest.raises(ZooError, match=r"did not learn from .*zoo as it is now: it has grown or changed"):
        run_evaluate(config)


def test_the_card_carries_the_verdict_on_conditions(report, trained):
    card = (trained / "README.md").read_text()
    assert report[0]["verdict"]["sentence"] in card
    assert "conditions.png" in card
    assert "conditions that no training network had" in card


def test_an_audit_needs_a_pipeline_that_can_be_asked(zoo, trained, fresh, tmp_path):
    with pytest.raises(ConfigError, match="holds no pipeline to ask for"):
        run_evaluate(EvaluateConfig(NAME, str(zoo.folder), str(zoo.folder), output_dir=str(tmp_path / "a")))
    pipe = load_pipeline(trained)
    pipe.register_modules(condition_encoder=None)
    with pytest.raises(ZooError, match=r"cannot be asked for direction: it was trained without --condition"):
        evaluate(FAMILY, trained=zoo, generated=pipe)
    other = load_pipeline(trained)
    encoder = ConditionEncoder.from_rows([{"angle": 0.0}, {"angle": 1.0}], ["angle"])
    other.register_modules(condition_encoder=encoder)
    with pytest.raises(ZooError, match="cannot be asked for what the tasks differ by: 'direction' is nothing to ask"):
        evaluate(FAMILY, trained=zoo, generated=other)
    with WeightZoo.create(tmp_path / "b", zoo.layout) as some:
        for index, row in enumerate(zoo.rows()):
            some.append(zoo.state_dict(index), direction=None if index == 3 else row["direction"])
    with pytest.raises(ZooError, match="lack the condition 'direction'"):
        evaluate(FAMILY, trained=some, generated=load_pipeline(trained))
    with pytest.raises(ZooError, match="which is held out: nothing can be said"):
        evaluate(FAMILY, trained=fresh, generated=load_pipeline(trained))
    alphabetical = ParameterLayout.from_state_dict(dict(sorted(zoo.state_dict(0).items())))
    with WeightZoo.create(tmp_path / "c", alphabetical) as other_order:
        for index, row in enumerate(fresh.rows()):
            other_order.append(fresh.state_dict(index), direction=row["direction"])
    with pytest.raises(ZooError, match="hold networks of different architectures"):
        evaluate(FAMILY, trained=zoo, generated=load_pipeline(trained), fresh=other_order)
    few = families.Sides()
    few.conditions = lambda split: FAMILY.conditions(split)[: 2 if split == "test" else None]
    with pytest.raises(ZooError, match="needs two held-out conditions, which other networks solve"):
        evaluate(few, trained=zoo, generated=load_pipeline(trained))
    with pytest.raises(ZooError, match="come in a zoo, whose rows hold their conditions"):
        evaluate(FAMILY, trained=[{}], generated=pipe)
    with pytest.raises(ZooError, match="what is audited is a pipeline, which is asked for some of them, and not list"):
        evaluate(FAMILY, trained=zoo, generated=[zoo.state_dict(0)])


def test_conditions_that_the_same_networks_solve_count_once(zoo):
    alike = solved_alike(forms_of(FAMILY, zoo.layout, FAMILY.conditions("test")))
    assert alike.tolist() == [place // 2 for place in range(16)]
    subsets = load_family("digits-subsets")
    asked = subsets.conditions("test")
    layout = ParameterLayout.from_state_dict(subsets.task(asked[0]).build_network().state_dict())
    assert solved_alike(forms_of(subsets, layout, asked)).bincount().tolist() == [2] * 102
    values = torch.randn(50, generator=torch.Generator().manual_seed(0))
    twice = resampled_means(values.repeat_interleave(2), 0, torch.arange(50).repeat_interleave(2))
    torch.testing.assert_close(twice, resampled_means(values, 0))
    low, high = interval(resampled_means(values.repeat_interleave(2), 0))
    assert high - low < 0.8 * (interval(twice)[1] - interval(twice)[0])


def test_the_constant_of_a_ridge_regression_is_free():
    known = regression.Conditions([{"x": float(place)} for place in range(20)])
    networks = 5 + 0.1 * known.rows @ torch.tensor([[1.0, -2.0]])
    features = regression._interactions(known.rows, 1)
    for answer in regression._ridge(known, features, networks, 1):
        torch.testing.assert_close(answer([{"x": 9.5}]), torch.full((1, 2), 5.0))


@pytest.mark.slow
def test_tasks_whose_targets_are_no_classes_have_no_majority(tmp_path, monkeypatch):
    monkeypatch.setattr(regression, "STEPS", 20)
    name = f"{families.__name__}:Lines"
    zoo = run_collect(CollectConfig(name, str(tmp_path / "zoo"), networks_per_task=4))
    settings = {"task": name, "condition": ("slope",), "transformer_steps": 10, **SMALL}
    pipe = run_train(NeuronTrainConfig(str(zoo.folder), str(tmp_path / "pipeline"), **settings))
    groups = evaluate(families.Lines(), trained=zoo, generated=pipe)["groups"]
    assert "mean network" in groups
    assert "majority class" not in groups


def test_what_a_ridge_regression_is_told_several_times_changes_nothing():
    known = regression.Conditions([{"x": float(place)} for place in range(20)])
    twice = regression.Conditions([{"x": float(place)} for place in range(20)] * 2)
    networks = torch.randn(20, 3, generator=torch.Generator().manual_seed(0))
    features = [regression._interactions(one.rows, 1) for one in (known, twice)]
    once = regression._ridge(known, features[0], networks, 1)
    again = regression._ridge(twice, features[1], networks.repeat(2, 1), 1)
    found = [answer([{"x": 3.0}]) for answer in once]
    for one, other in zip(found, again, strict=True):
        torch.testing.assert_close(one, other([{"x": 3.0}]))
    # The strongest tells nearly the mean network, the weakest nearly least squares.
    assert (found[-1] - networks.mean(0)).norm() < 0.6 * (found[0] - networks.mean(0)).norm()


def test_examples_that_all_conditions_share_are_drawn_with_them():
    generator = torch.Generator().manual_seed(0)
    of_conditions, of_examples = (torch.randn(size, generator=generator) for size in ((100, 1), (1, 400)))
    # What varies over examples alone is nothing to an interval over conditions.
    values = of_examples.expand(100, -1)
    assert resampled_means(values.mean(1), 0).std() < 1e-6
    assert resampled_means(values, 0).std().item() == pytest.approx(of_examples.std().item() / 20, rel=0.15)
    both = resampled_means(of_conditions + of_examples, 0).std().square()
    each = resampled_means(of_conditions.expand(-1, 400), 0).var() + resampled_means(values, 0).var()
    assert both.item() == pytest.approx(each.item(), rel=0.15)
    torch.testing.assert_close(resampled_means(of_conditions, 0), resampled_means(of_conditions[:, 0], 0))


def scores(**means: float) -> dict:
    noise = 0.01 * torch.randn(200, generator=torch.Generator().manual_seed(0))
    return {name.replace("_", " "): {"single": mean + noise.roll(i)} for i, (name, mean) in enumerate(means.items())}


@pytest.mark.parametrize(
    ("generated", "shuffled", "retrieval", "ridge", "label"),
    [
        (0.9, 0.9, 0.7, 0.7, "ignores-the-condition"),
        (0.9, 0.5, 0.9, 0.7, "no-better-than-retrieval"),
        (0.9, 0.5, 0.8995, 0.7, "no-better-than-retrieval"),  # better, and no more than by chance
        (0.9, 0.5, 0.8, 0.95, "no-better-than-regression"),
        (0.9, 0.5, 0.8, 0.8995, "no-better-than-regression"),
        (0.9, 0.5, 0.8, 0.88, "generalizes"),
    ],
)
def test_verdicts(generated, shuffled, retrieval, ridge, label):
    groups = scores(
        generated=generated,
        shuffled_condition=shuffled,
        majority_class=0.5,
        mean_network=0.5,
        one_network_for_all_tasks=0.5,
        nearest_condition=0.6,
        mean_of_the_nearest=retrieval,
        ridge_regression=ridge,
        hypernetwork=0.6,
    )
    assert conditions._verdict(groups, [], torch.arange(200))["label"] == label


@pytest.mark.slow
def test_a_quality_that_is_asked_for_is_measured(digits_zoo, tmp_path):
    config = TrainConfig(
        zoo=str(digits_zoo.folder),
        output_dir=str(tmp_path),
        condition=("validation_accuracy",),
        autoencoder="linear",
        unet_steps=30,
    )
    run_train(config)
    report = evaluate(trained=digits_zoo, generated=str(tmp_path), num_networks=3, networks_per_point=3)
    found = report["quality"]
    assert found["num_inference_steps"] == 50
    accuracies = [row["validation_accuracy"] for row in digits_zoo.rows()]
    assert min(accuracies) <= found["asked"][0] < found["asked"][-1] <= max(accuracies)
    assert len(found["measured"]) == len(found["asked"]) == quality.LEVELS
    assert found["interval"][0] <= found["slope"] <= found["interval"][1]
    assert found["slope"] == pytest.approx(np.polyfit(found["asked"], found["measured"], 1)[0], rel=1e-3)
    generated = str(tmp_path / "generated")
    config = GenerateConfig(pipeline=str(tmp_path), output_dir=generated, num_networks=3, num_inference_steps=7)
    run_generate(config)
    report = evaluate(trained=digits_zoo, generated=generated, pipeline=str(tmp_path), networks_per_point=3)
    assert report["quality"]["num_inference_steps"] == 7
    assert report["quality"]["measured"] != found["measured"]
    with WeightZoo.create(tmp_path / "others", digits_zoo.layout, task=digits_zoo.task) as others:
        for vector in WeightZoo(generated).vectors():
            others.append(vector, num_inference_steps=7, scheduler="DPMSolverMultistepScheduler")
    report = evaluate(trained=digits_zoo, generated=others, pipeline=str(tmp_path), networks_per_point=3)
    assert report["quality"] == found
    with WeightZoo.create(tmp_path / "equal", digits_zoo.layout, task=digits_zoo.task) as equal:
        for index in range(len(digits_zoo)):
            equal.append(digits_zoo[index], validation_accuracy=0.97)
    unknown = [digits_zoo.state_dict(index) for index in range(4)]
    for trained in (equal, unknown):
        report = evaluate(digits_zoo.task, trained=trained, generated=load_pipeline(tmp_path), num_networks=3)
        assert report["quality"] is None


@pytest.mark.slow
def test_the_quickstart_tells_the_story_of_conditions(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(quickstart, "SUBSETS_STEPS", 20)
    monkeypatch.setattr(regression, "STEPS", 50)
    report = run_quickstart(QuickstartConfig(story="subsets", output_dir=str(tmp_path), task=NAME))
    assert set(report["timings_s"]) == {"collect", "train", "evaluate"}
    assert report["verdict"]["sentence"].split()[0] in capsys.readouterr().out
    assert len(WeightZoo(tmp_path / "fresh")) == 2 * len(FAMILY.conditions("test"))
    assert (tmp_path / "report" / "conditions.png").exists()
    with pytest.raises(ConfigError, match="The story is 'subset'"):
        QuickstartConfig(story="subset")
