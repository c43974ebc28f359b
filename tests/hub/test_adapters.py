"""Repositories of adapters on the Hub, of whatever state."""

import json
import os
from pathlib import Path

import peft
import pytest
import torch
from huggingface_hub import CommitOperationAdd, HfApi, ModelCard
from safetensors.torch import save_file

from pdiff_hf import AdaptedNetwork, PdiffError, WeightZoo
from pdiff_hf.cli import main as cli

from ..documents import Document
from ..hub_server import USERS, HubClient, HubServer, client_environment
from .test_hostile import said


MANY = 40
CONFIG = {
    "peft_type": "LORA",
    "r": 2,
    "lora_alpha": 4,
    "target_modules": ["query"],
    "base_model_name_or_path": "alice/base",
}
NAME = "base_model.model.query.lora_{}.weight"


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with HubServer(tmp_path_factory.mktemp("hub"), users={**USERS, "hf_me": "me"}, lfs_threshold=10_000) as server:
        yield server


@pytest.fixture(scope="module")
def alice(server, tmp_path_factory):
    """A process of alice's: calls functions of this module."""
    client = HubClient(client_environment(server.url, tmp_path_factory.mktemp("alice"), xet=False))
    client(os.chdir, tmp_path_factory.mktemp("work"))
    client(publish)
    yield client
    client.stop()


def factors(seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        NAME.format("A"): torch.randn(2, 6, generator=generator),
        NAME.format("B"): torch.randn(5, 2, generator=generator),
    }


def publish_one(name: str, files: dict[str, bytes | str], private: bool = False, owner: str = "alice") -> None:
    HfApi().create_repo(f"{owner}/{name}", private=private)
    operations = [
        CommitOperationAdd(file, content.encode() if isinstance(content, str) else content)
        for file, content in files.items()
    ]
    HfApi().create_commit(f"{owner}/{name}", operations, commit_message="Everything")


def publish() -> None:
    publish_one("base", {"README.md": "---\nlicense: apache-2.0\n---\n"})
    save_file(factors(0), "adapter_model.safetensors")
    weights = Path("adapter_model.safetensors").read_bytes()
    for number in range(MANY):
        save_file(factors(number), "one.safetensors")
        one = Path("one.safetensors").read_bytes()
        publish_one(
            f"topic-{number}-lora", {"adapter_config.json": json.dumps(CONFIG), "adapter_model.safetensors": one}
        )
    publish_one("partial", {"adapter_config.json": json.dumps(CONFIG)})
    publish_one("pickled", {"adapter_config.json": json.dumps(CONFIG), "adapter_model.bin": b"\x80"})
    publish_one("empty", {"README.md": "# Nothing\n"})
    other = json.dumps(CONFIG | {"base_model_name_or_path": "alice/another"})
    publish_one("wrong-base", {"adapter_config.json": other, "adapter_model.safetensors": weights})
    publish_one("secret", {"adapter_config.json": json.dumps(CONFIG), "adapter_model.safetensors": weights}, True)
    deep = "[" * 100_000
    for name, config in {
        "deep": deep,
        "large": json.dumps(CONFIG | {"auto_mapping": "x" * 2**21}),
        "regex": json.dumps(CONFIG | {"rank_pattern": {"(a+)+$": 2}}),
        "kind": json.dumps(CONFIG | {"peft_type": "../../evil"}),
        "huge": json.dumps(CONFIG | {"r": 10**12}),
        "names": json.dumps(CONFIG | {"target_modules": [{"a": 1}]}),
    }.items():
        publish_one(f"evil-{name}", {"adapter_config.json": config, "adapter_model.safetensors": weights})
    code = CONFIG | {"auto_mapping": {"parent_library": "os"}, "megatron_core": "os", "runtime_config": {"x": 1}}
    publish_one("code", {"adapter_config.json": json.dumps(code), "adapter_model.safetensors": weights})


def test_many_repositories_become_a_zoo_that_names_base_and_licence(alice, tmp_path):
    command = ("import", "--adapters", "alice/topic-*-lora", "--output-dir", str(tmp_path / "zoo"))
    assert alice(said, *command) == "nothing"
    zoo = WeightZoo(tmp_path / "zoo")
    assert [row["source"] for row in zoo.metadata] == [f"alice/topic-{number}-lora" for number in range(MANY)]
    assert all(len(row["revision"]) == 40 for row in zoo.metadata)
    state_dict, expected = zoo.state_dict(7), factors(7)
    product = state_dict[NAME.format("B")] @ state_dict[NAME.format("A")]
    torch.testing.assert_close(product, 2 * expected[NAME.format("B")] @ expected[NAME.format("A")])
    card = ModelCard.load(tmp_path / "zoo" / "README.md")
    assert card.data.to_dict()["base_model"] == "alice/base"
    assert {"lora", "peft"} <= set(card.data.tags)
    assert "The licence of the base model is apache-2.0" in card.text


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "partial",
            "alice/partial: it has an adapter_config.json and no adapter_model.safetensors: its",
        ),
        ("pickled", "or its weights are in a format that may run code"),
        ("empty", "it has neither adapter_config.json nor pytorch_lora_weights.safetensors"),
        ("absent", "alice/absent is no folder here, and is not on the Hub or is private"),
        ("none-*", "No model repository on the Hub matches 'alice/none-*'"),
        ("evil-deep", "its adapter_config.json is damaged"),
        ("evil-large", "is larger than 1,048,576 bytes"),
        ("evil-regex", "has rank_pattern = "),
        ("evil-kind", "it is an adapter of type '../../evil'"),
        ("evil-huge", "says rank 1000000000000, and"),
        ("evil-names", "has target_modules = "),
    ],
)
def test_what_cannot_be_imported_is_said_and_leaves_nothing(alice, tmp_path, name, message):
    line = alice(said, "import", "--adapters", f"alice/{name}", "--output-dir", str(tmp_path / "zoo"))
    assert message in line, line
    assert not (tmp_path / "zoo").exists()


def test_another_base_model_is_refused(alice, tmp_path):
    names = ("alice/topic-3-lora", "alice/wrong-base")
    line = alice(said, "import", "--adapters", *names, "--output-dir", str(tmp_path / "zoo"))
    assert "have different base models: 'alice/another' and 'alice/base'" in line
    assert not (tmp_path / "zoo").exists()


def imported(name: str, folder: Path) -> int | str:
    try:
        return len(WeightZoo.from_adapters(folder, name))
    except PdiffError as error:
        return str(error)


@pytest.mark.slow
def test_private_adapters_are_for_their_owner_alone(server, alice, tmp_path):
    assert alice(imported, "alice/secret", tmp_path / "mine") == 1
    other = HubClient(client_environment(server.url, tmp_path / "bob", token="hf_bob", xet=False))
    assert "is private" in other(imported, "alice/secret", tmp_path / "theirs")
    other.stop()
    assert not (tmp_path / "theirs").exists()


def test_what_a_configuration_says_of_code_stays_where_it_is(alice, tmp_path):
    assert alice(imported, "alice/code", tmp_path / "zoo") == 1
    zoo = WeightZoo(tmp_path / "zoo")
    zoo.export(tmp_path / "out")
    written = json.loads((tmp_path / "out" / "00000" / "adapter_config.json").read_text())
    assert not {"auto_mapping", "megatron_core", "runtime_config"} & written.keys()
    assert written["base_model_name_or_path"] == "alice/base"


def publish_topics() -> None:
    for number in range(6):
        model = peft.get_peft_model(Base(), peft.LoraConfig(r=2, target_modules=["query"]))
        model.peft_config["default"].base_model_name_or_path = "me/base"
        names = peft.get_peft_model_state_dict(model)
        generator = torch.Generator().manual_seed(number)
        values = {name: torch.randn(value.shape, generator=generator) for name, value in names.items()}
        peft.set_peft_model_state_dict(model, values)
        model.save_pretrained("one")
        files = {name: Path("one", name).read_bytes() for name in ("adapter_config.json", "adapter_model.safetensors")}
        publish_one(f"topic-{number}-lora", files, owner="me")
    rows = [{"source": f"me/topic-{number}-lora", "topic": ["cats", "dogs"][number % 2]} for number in range(6)]
    Path("topics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


class Base(torch.nn.Module):
    def __init__(self):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.query = torch.nn.Linear(6, 5)

    def forward(self, inputs):
        return self.query(inputs)


SHORTER = {"import": (), "train": ("--unet-steps", "20"), "generate": ("--num-inference-steps", "3")}


def run_the_readme() -> list[str]:
    stages = Document("README.md").commands("import --adapters")
    for _, stage, *arguments in stages:
        cli([stage, *arguments, *SHORTER[stage]])
    space = {"base": Base()}
    exec(Document("README.md").containing("python", "PeftModel"), space)
    zoo = WeightZoo("runs/adapters/generated")
    inputs = torch.randn(3, 6)
    torch.testing.assert_close(space["model"](inputs), AdaptedNetwork(Base(), zoo.state_dict(0))(inputs))
    assert [row["topic"] for row in zoo.metadata] == ["cats"] * 8
    return [stage for _, stage, *_ in stages]


@pytest.mark.slow
def test_the_readme_from_the_hub_to_peft(server, tmp_path):
    me = HubClient(client_environment(server.url, tmp_path / "home", token="hf_me", xet=False))
    me(os.chdir, tmp_path)
    me(publish_topics)
    assert me(run_the_readme) == ["import", "train", "generate"]
    me.stop()
