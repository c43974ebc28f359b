# Over 400 lines: all of it shares one running server and its clients.
"""Zoos and pipelines over a real server with the real clients. What talks to it runs in a process of its own."""

import contextlib
import hashlib
import io
import json
import os
import re
import shutil
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline
from huggingface_hub import DatasetCard, HfApi, ModelCard, snapshot_download
from huggingface_hub.errors import GatedRepoError
from huggingface_hub.utils import httpx
from safetensors.torch import save_file

from pdiff_hf import ParameterLayout, PdiffError, WeightZoo, ZooError, load_pipeline
from pdiff_hf.cli import main as cli
from pdiff_hf.errors import HubError
from pdiff_hf.hub.cards import GENERATED, merge_cards, write_pipeline_card
from pdiff_hf.hub.client import explained
from pdiff_hf.hub.pipeline_files import weights_sha256
from pdiff_hf.hub.push import push, push_evaluation
from pdiff_hf.share import PULLED

from ..conftest import SMALL_TRAINING, random_network, site_without_this_package
from ..documents import Document
from ..hub_server import NOTHING_IS_LARGE, HubClient, HubClientError, HubServer, client_environment
from ..pipelines.cases import CONDITIONS, build_layout, build_neuron, build_pipe


@pytest.fixture(scope="module", params=["lfs", pytest.param("xet", marks=[pytest.mark.slow, pytest.mark.long])])
def server(request, tmp_path_factory):
    """A server, once with large files by LFS and once with Xet on and every file a regular one."""
    threshold = NOTHING_IS_LARGE if request.param == "xet" else 10_000
    with HubServer(tmp_path_factory.mktemp("hub"), lfs_threshold=threshold) as server:
        server.xet = request.param == "xet"
        yield server


@pytest.fixture(scope="module")
def alice(server, tmp_path_factory):
    """A process of alice's: calls functions of this module."""
    client = HubClient(client_environment(server.url, tmp_path_factory.mktemp("alice"), xet=server.xet))
    yield client
    client.stop()


@pytest.fixture
def big_zoo(tmp_path) -> WeightZoo:
    """A thousand networks in eight shards."""
    network = {"weight": torch.zeros(50)}
    zoo = WeightZoo.create(tmp_path / "big", ParameterLayout.from_state_dict(network), networks_per_shard=128)
    with zoo:
        for index in range(1000):
            zoo.append(torch.full((50,), float(index)), seed=index)
    return zoo


def sample(pipe, **asked) -> torch.Tensor:
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    return pipe(num_networks=3, num_inference_steps=3, output_type="pt", generator=generator, **asked).state_dicts


def commits(repo: str, repo_type: str = "model") -> list[str]:
    return [commit.commit_id for commit in HfApi().list_repo_commits(repo, repo_type=repo_type)]


def push_folder(folder: Path, repo: str, **arguments) -> str:
    return push(folder, repo, **arguments).oid


def push_as_diffusers_does(folder: Path, repo: str) -> list[str]:
    DiffusionPipeline.from_pretrained(folder, trust_remote_code=True).push_to_hub(repo)
    return HfApi().list_repo_files(repo)


def load_and_sample(repo: str, **arguments) -> torch.Tensor:
    return sample(DiffusionPipeline.from_pretrained(repo, trust_remote_code=True, **arguments))


def load_cached_and_sample(repo: str) -> torch.Tensor:
    # By name, diffusers asks the Hub for the commit of remote code even when it is offline.
    return load_and_sample(snapshot_download(repo))


def load_with_the_package_and_sample(repo: str) -> torch.Tensor:
    return sample(load_pipeline(repo))


def message_of(function, *arguments) -> str:
    try:
        function(*arguments)
    except PdiffError as error:
        return str(error)
    return "no error"


def test_a_pushed_pipeline_is_complete_and_anyone_loads_it(server, alice, digits_pipeline):
    files = alice(push_as_diffusers_does, digits_pipeline, "alice/diffusers-way")
    assert {"pipeline.py", "layout/parameter_layout.py", "unet/parameter_unet.py", "README.md"} < set(files)
    assert len(alice(commits, "alice/diffusers-way")) == 2  # the one that made the repository, and one
    expected = sample(load_pipeline(digits_pipeline))
    assert torch.equal(alice(load_and_sample, "alice/diffusers-way"), expected)


def test_a_denoiser_of_hidden_units_travels_with_what_initializations_are_drawn_from(alice, tmp_path):
    layout = build_layout(("*",))
    layout.fit_initial(torch.randn(40, layout.vector_size))
    pipe = build_pipe(
        "neuron", layout=layout, transformer=build_neuron(with_initial=True).eval(), condition_encoder=None
    )
    pipe.save_pretrained(tmp_path)
    files = alice(push_as_diffusers_does, tmp_path, "alice/neurons")
    assert {"transformer/neuron_transformer.py", "layout/config.json"} < set(files)
    for load in (load_and_sample, load_with_the_package_and_sample):
        torch.testing.assert_close(alice(load, "alice/neurons"), sample(pipe))


def ask(repo: str, own: bool) -> torch.Tensor:
    """Networks of a condition, by the code of this package or of the repository."""
    pipe = load_pipeline(repo) if own else DiffusionPipeline.from_pretrained(repo, trust_remote_code=True)
    return sample(pipe, condition=CONDITIONS[0], guidance_scale=1.5)


@pytest.mark.slow
def test_a_pipeline_that_can_be_asked_travels_with_what_it_knows(alice, tmp_path):
    pipe = build_pipe("neuron")
    pipe.save_pretrained(tmp_path)
    assert "condition_encoder/condition_encoder.py" in alice(push_as_diffusers_does, tmp_path, "alice/asked")
    expected = sample(pipe, condition=CONDITIONS[0], guidance_scale=1.5)
    assert not torch.equal(expected, sample(pipe, condition=CONDITIONS[1], guidance_scale=1.5))
    for own in (True, False):
        torch.testing.assert_close(alice(ask, "alice/asked", own), expected)


def test_remote_code_is_neither_run_nor_downloaded_by_the_package(server, alice, digits_pipeline):
    alice(push_folder, digits_pipeline, "alice/no-code")
    server.clear_log()
    found = alice(load_with_the_package_and_sample, "alice/no-code")
    assert torch.equal(found, sample(load_pipeline(digits_pipeline)))
    fetched = [exchange["path"] for exchange in server.log("/resolve/") if exchange["method"] == "GET"]
    assert fetched
    assert not [path for path in fetched if path.endswith(".py")]


def test_the_same_content_makes_no_second_commit(alice, digits_pipeline, zoo):
    for folder, repo, repo_type in (
        (digits_pipeline, "alice/twice", "model"),
        (zoo.folder, "alice/twice-zoo", "dataset"),
    ):
        first = alice(push_folder, folder, repo)
        assert alice(push_folder, folder, repo) == first
        assert len(alice(commits, repo, repo_type)) == 2


def tag_and_change(folder: Path, repo: str) -> None:
    HfApi().create_tag(repo, tag="v1")
    pipe = DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)
    with torch.no_grad():
        pipe.unet.conv_out.weight.zero_()
    pipe.push_to_hub(repo)


def save_and_push(folder: Path, repo: str, target: Path) -> list[str]:
    load_pipeline(folder).save_pretrained(target, push_to_hub=True, repo_id=repo)
    return HfApi().list_repo_files(repo)


def test_saving_pushes_where_it_is_asked_to(alice, digits_pipeline, tmp_path):
    files = alice(save_and_push, digits_pipeline, "alice/saved", tmp_path / "saved")
    assert {"model_index.json", "pipeline.py", "unet/config.json"} <= set(files)
    assert torch.equal(alice(load_and_sample, "alice/saved"), sample(load_pipeline(digits_pipeline)))


def test_a_tag_keeps_its_networks(alice, digits_pipeline):
    alice(push_folder, digits_pipeline, "alice/tagged")
    alice(tag_and_change, digits_pipeline, "alice/tagged")
    expected = sample(load_pipeline(digits_pipeline))
    assert torch.equal(alice(load_and_sample, "alice/tagged"), expected) is False
    offline = {"revision": "v1"}
    assert torch.equal(alice(call_with, load_and_sample, "alice/tagged", offline), expected)


def call_with(function, name: str, arguments: dict):
    return function(name, **arguments)


@pytest.mark.slow
def test_another_environment_without_this_package_samples_saves_and_pushes_the_same(
    server, alice, digits_pipeline, tmp_path
):
    alice(push_folder, digits_pipeline, "alice/elsewhere")
    before = alice(commits, "alice/elsewhere")
    site = site_without_this_package(tmp_path)
    script = textwrap.dedent("""
        import importlib.util, sys
        sys.path.insert(0, sys.argv[1])
        import torch
        from diffusers import DiffusionPipeline
        assert importlib.util.find_spec("pdiff_hf") is None
        torch.set_num_threads(1)
        pipe = DiffusionPipeline.from_pretrained("alice/elsewhere", trust_remote_code=True)
        generator = torch.Generator().manual_seed(0)
        vectors = pipe(num_networks=3, num_inference_steps=3, output_type="pt", generator=generator).state_dicts
        torch.save(vectors, sys.argv[2])
        pipe.push_to_hub("alice/elsewhere")
    """)
    done = subprocess.run(
        [sys.executable, "-S", "-c", script, str(site), str(tmp_path / "vectors.pt")],
        cwd=tmp_path,
        env={**os.environ, **client_environment(server.url, tmp_path / "home", xet=server.xet)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert torch.equal(torch.load(tmp_path / "vectors.pt"), sample(load_pipeline(digits_pipeline)))
    assert alice(commits, "alice/elsewhere") == before


def read_network(repo: str, index: int) -> tuple[int, torch.Tensor, dict]:
    zoo = WeightZoo.from_pretrained(repo)
    return len(zoo), zoo[index], zoo.metadata[index]


def read_all(repo: str, revision: str | None = None) -> torch.Tensor:
    return torch.cat(list(WeightZoo.from_pretrained(repo, revision=revision).batches(100)))


def test_one_network_of_eight_shards_costs_one_shard(server, alice, big_zoo):
    alice(push_folder, big_zoo.folder, "alice/big")
    server.clear_log()
    count, network, row = alice(read_network, "alice/big", 300)
    assert (count, row["seed"]) == (1000, 300)
    assert torch.equal(network, torch.full((50,), 300.0))
    fetched = {exchange["path"] for exchange in server.log("networks-") if exchange["bytes_out"] > 5000}
    assert len(fetched) == 1
    assert "networks-00003-of-00008" in fetched.pop()
    assert torch.equal(alice(read_all, "alice/big"), big_zoo.vectors())


def test_a_grown_zoo_is_a_new_commit_and_the_old_one_stays(alice, zoo):
    first = alice(push_folder, zoo.folder, "alice/growing")
    with zoo:
        for seed in range(10, 17):
            zoo.append(random_network(seed).state_dict(), seed=seed)
    second = alice(push_folder, zoo.folder, "alice/growing")
    assert second != first
    assert torch.equal(alice(read_all, "alice/growing"), zoo.vectors())
    assert torch.equal(alice(read_all, "alice/growing", first), zoo.vectors(range(10)))


def test_the_card_of_a_grown_zoo_is_of_all_its_networks(alice, zoo):
    arguments = ["--folder", str(zoo.folder), "--repo", "alice/grown-card"]
    alice(run_cli, "push", *arguments)
    assert "Networks of one architecture." in (zoo.folder / "README.md").read_text()
    zoo.write_card("What they are.\n\nHow they were made.")
    with zoo:
        zoo.append(random_network(10).state_dict(), seed=10, accuracy=0.5)
    alice(run_cli, "push", *arguments)
    text = (zoo.folder / "README.md").read_text()
    assert "11 networks of" in text
    assert "What they are.\n\nHow they were made.\n" in text
    features = alice(card, "alice/grown-card", "dataset")["dataset_info"]["features"]
    assert {"name": "accuracy", "dtype": "float64"} in features
    (zoo.folder / "README.md").write_text("---\ntags: [a]\n---\nMine.\n")
    alice(run_cli, "push", *arguments)
    assert (zoo.folder / "README.md").read_text().endswith("Mine.\n")


def read_twice(repo: str) -> list[str]:
    zoo, messages = WeightZoo.from_pretrained(repo), []
    for _ in range(2):
        try:
            _ = zoo[9]
        except ZooError as error:
            messages.append(str(error))
    return messages


def shorten_the_last_shard(folder: Path, repo: str) -> None:
    push(folder, repo)
    name = "networks-00003-of-00003.safetensors"
    save_file({"networks": torch.zeros(1, 42)}, "short.safetensors")
    HfApi().upload_file(path_or_fileobj="short.safetensors", path_in_repo=name, repo_id=repo, repo_type="dataset")


def test_a_shard_that_is_not_what_its_repository_says_is_refused_from_the_cache_too(alice, zoo, tmp_path):
    alice(os.chdir, tmp_path)
    alice(shorten_the_last_shard, zoo.folder, "alice/short")
    messages = alice(read_twice, "alice/short")
    assert len(messages) == 2
    assert all("does not hold the 2 networks that metadata.jsonl names" in message for message in messages)


def append_to_the_cache(repo: str) -> str:
    try:
        WeightZoo.from_pretrained(repo).append(torch.zeros(42))
    except ZooError as error:
        return str(error)
    return "no error"


def copy_and_append(repo: str, folder: Path) -> int:
    WeightZoo.from_pretrained(repo).save_pretrained(folder)
    with WeightZoo(folder) as zoo:
        zoo.append(random_network(99).state_dict(), seed=99)
    zoo.push_to_hub(repo)
    return len(WeightZoo.from_pretrained(repo))


def test_the_cache_is_not_appended_to_but_a_copy_is(alice, zoo, tmp_path):
    alice(push_folder, zoo.folder, "alice/copied")
    assert "read-only: copy it with save_pretrained" in alice(append_to_the_cache, "alice/copied")
    assert alice(copy_and_append, "alice/copied", tmp_path / "copy") == 11
    assert not any(path.is_symlink() for path in (tmp_path / "copy").iterdir())


def load_table(repo: str) -> list[dict]:
    import datasets

    datasets.config.USE_PARQUET_EXPORT = False
    return list(datasets.load_dataset(repo, split="train"))


def test_the_metadata_is_a_table_for_datasets(alice, digits_zoo):
    alice(push_folder, digits_zoo.folder, "alice/table")
    rows = alice(load_table, "alice/table")
    assert [row["step"] for row in rows] == [row["step"] for row in digits_zoo.metadata]


def try_to_push(folder: Path, repo: str) -> str:
    try:
        push(folder, repo)
    except Exception as error:
        return type(error).__name__
    return "no error"


def test_a_push_that_dies_half_way_changes_nothing_and_can_be_repeated(server, alice, big_zoo):
    first = alice(push_folder, big_zoo.folder, "alice/dying")
    with big_zoo:
        big_zoo.append(torch.zeros(50))
    server.faults("drop", path="/commit/", after_bytes=0, count=50)
    outcome = alice(try_to_push, big_zoo.folder, "alice/dying")
    server.clear_faults()
    assert outcome != "no error"
    assert alice(commits, "alice/dying", "dataset")[0] == first
    alice(push_folder, big_zoo.folder, "alice/dying")
    assert len(alice(read_all, "alice/dying")) == 1001


@pytest.mark.slow
def test_a_killed_push_changes_nothing(server, alice, big_zoo, tmp_path):
    first = alice(push_folder, big_zoo.folder, "alice/killed")
    with big_zoo:
        big_zoo.append(torch.zeros(50))
    server.clear_log()
    server.faults("delay", path="/preupload/", seconds=30)
    program = f"from pdiff_hf import WeightZoo; WeightZoo({str(big_zoo.folder)!r}).push_to_hub('alice/killed')"
    process = subprocess.Popen(
        [sys.executable, "-c", program],
        env={**os.environ, **client_environment(server.url, tmp_path / "home", xet=server.xet)},
    )
    while not server.log("/preupload/"):
        assert process.poll() is None
        time.sleep(0.05)
    process.kill()
    process.wait()
    server.clear_faults()
    assert alice(commits, "alice/killed", "dataset")[0] == first
    alice(push_folder, big_zoo.folder, "alice/killed")
    assert len(alice(read_all, "alice/killed")) == 1001


def push_against_another_writer(folder: Path, repo: str) -> str:
    """Pushes while somebody else commits between the look at the repository and the commit."""
    look = HfApi.list_repo_files

    def look_and_be_overtaken(self, repo_id, **arguments):
        files = look(self, repo_id, **arguments)
        HfApi.list_repo_files = look
        options = {"path_in_repo": "notes.txt", "repo_id": repo_id, "repo_type": arguments["repo_type"]}
        HfApi().upload_file(path_or_fileobj=b"first", **options)
        return files

    HfApi.list_repo_files = look_and_be_overtaken
    return message_of(push, folder, repo)


def test_of_two_writers_the_second_is_told_to_pull(alice, zoo):
    alice(push_folder, zoo.folder, "alice/race")
    with zoo:
        zoo.append(random_network(50).state_dict(), seed=50)
    assert "Somebody else pushed meanwhile. Nothing was changed" in alice(
        push_against_another_writer, zoo.folder, "alice/race"
    )
    assert len(alice(read_all, "alice/race")) == 10
    alice(push_folder, zoo.folder, "alice/race")
    assert len(alice(read_all, "alice/race")) == 11


def errors_of(repo: str, folder: Path) -> dict[str, str]:
    return {
        "absent": message_of(WeightZoo.from_pretrained, "alice/never-was"),
        "revision": message_of(WeightZoo.from_pretrained, repo, "v9"),
        "namespace": message_of(push, folder, "bob/mine"),
        "name": message_of(push, folder, "a/b/c"),
    }


def test_errors_say_what_to_do_and_never_a_token(alice, zoo):
    alice(push_folder, zoo.folder, "alice/errors")
    messages = alice(errors_of, "alice/errors", zoo.folder)
    assert "is not on the Hub or is private. Check the name, or log in with `hf auth login`" in messages["absent"]
    assert "alice/errors has no revision 'v9'" in messages["revision"]
    assert "This account may not do that there" in messages["namespace"]
    assert "is no name of a repository" in messages["name"]
    assert not re.search("hf_alice|http", "".join(messages.values()))


@pytest.mark.slow
def test_a_private_zoo_is_for_its_owner_alone(server, alice, zoo, tmp_path):
    alice(call_with, push_private, "alice/secret", {"folder": zoo.folder})
    assert len(alice(read_all, "alice/secret")) == 10
    for token in ("hf_bob", None):
        other = HubClient(client_environment(server.url, tmp_path / str(token), token=token, xet=server.xet))
        assert "is private" in other(message_of, WeightZoo.from_pretrained, "alice/secret")
        other.stop()


def push_private(repo: str, folder: Path) -> None:
    push(folder, repo, private=True)


@pytest.mark.slow
def test_without_the_hub_the_cache_serves_and_what_is_not_in_it_is_named(
    server, alice, zoo, digits_pipeline, tmp_path
):
    alice(push_folder, zoo.folder, "alice/offline")
    alice(push_folder, digits_pipeline, "alice/offline-pipeline")
    home = tmp_path / "home"
    online = HubClient(client_environment(server.url, home, xet=server.xet))
    online(read_network, "alice/offline", 1)
    expected = online(load_cached_and_sample, "alice/offline-pipeline")
    online.stop()
    offline = HubClient({**client_environment(server.url, home), "HF_HUB_OFFLINE": "1"})
    server.clear_log()
    assert torch.equal(offline(read_network, "alice/offline", 0)[1], zoo[0])
    assert torch.equal(offline(load_with_the_package_and_sample, "alice/offline-pipeline"), expected)
    assert torch.equal(offline(load_cached_and_sample, "alice/offline-pipeline"), expected)
    host = server.url.removeprefix("http://")
    said = offline(message_of, read_all, "alice/offline")
    assert f"not in the cache, and the Hub at {host} cannot be reached (offline?)" in said
    assert "not in the cache" in offline(message_of, WeightZoo.from_pretrained, "alice/never-seen")
    assert server.log() == []
    offline.stop()


def run_card(repo: str, repo_type: str) -> int:
    programs = re.findall(r"^```python\n(.*?)^```", card_of(repo, repo_type), flags=re.MULTILINE | re.DOTALL)
    scope: dict = {}
    exec("".join(programs), scope)
    if repo_type == "model":
        return len(scope["state_dicts"])
    assert torch.allclose(torch.tensor(scope["rows"][2]["weights"]), scope["zoo"][2])
    return len(scope["zoo"])


@pytest.mark.slow
def test_what_a_card_shows_runs_as_pasted(alice, digits_pipeline, zoo):
    zoo.write_card("A zoo.")
    alice(push_folder, zoo.folder, "alice/shown-zoo")
    alice(push_folder, digits_pipeline, "alice/shown-pipeline")
    assert alice(run_card, "alice/shown-zoo", "dataset") == 10
    assert alice(run_card, "alice/shown-pipeline", "model") == 8


def edit_card(repo: str) -> None:
    card = ModelCard.load(repo)
    card.text = "My own introduction.\n" + card.text + "\nMy own end.\n"
    card.data.license = "mit"
    HfApi().upload_file(path_or_fileobj=card.content.encode(), path_in_repo="README.md", repo_id=repo)


def card_of(repo: str, repo_type: str) -> str:
    return (DatasetCard if repo_type == "dataset" else ModelCard).load(repo).content


def test_what_a_person_wrote_into_a_card_stays(alice, digits_pipeline):
    alice(push_folder, digits_pipeline, "alice/card")
    alice(edit_card, "alice/card")
    alice(push_folder, digits_pipeline, "alice/card")
    card = alice(card_of, "alice/card", "model")
    assert card.index("My own introduction.") < card.index(GENERATED[0]) < card.index(GENERATED[1])
    assert card.index(GENERATED[1]) < card.index("My own end.")
    metadata = ModelCard(card).data.to_dict()
    assert metadata["license"] == "mit"
    assert metadata["library_name"] == "diffusers"


def test_cards_are_merged_around_the_generated_part():
    start, end = GENERATED
    new = f"---\ntags: [b]\n---\n{start}\nnew\n{end}\n"
    old = f"---\nlicense: mit\ntags: [a]\npretty_name: Mine\n---\nbefore\n{start}\nold\n{end}\nafter\n"
    merged = merge_cards(new, old)
    assert merged.split("---\n")[2] == f"before\n{start}\nnew\n{end}\nafter\n"
    assert ModelCard(merged).data.to_dict() == {"license": "mit", "tags": ["a", "b"], "pretty_name": "Mine"}
    assert merge_cards(new, merged) == merged
    assert merge_cards(new, None) == merge_cards(new, new)
    foreign = merge_cards(new, "---\nlicense: mit\n---\n# Somebody else's\n")
    assert foreign.index("# Somebody else's") < foreign.index("new")


def test_what_was_made_of_earlier_content_leaves_a_card():
    start, end = GENERATED
    new = f"---\ntags: [diffusers]\n---\n{start}\nnew\n{end}\n"
    data = (
        "base_model: org/vit\ndataset_info: {features: []}\ntags: [diffusers, lora, peft, mine]\npretty_name: Mine\n"
    )
    merged = ModelCard(merge_cards(new, f"---\n{data}---\n{start}\nold\n{end}\n")).data.to_dict()
    assert merged == {"tags": ["diffusers", "mine"], "pretty_name": "Mine"}
    # Of a card that no push made, nothing is ours.
    kept = ModelCard(merge_cards(new, f"---\n{data}---\n# Mine\n")).data.to_dict()
    assert kept["base_model"] == "org/vit"
    assert kept["tags"] == ["diffusers", "lora", "mine", "peft"]


def test_what_a_person_writes_into_the_card_of_a_folder_arrives(alice, zoo):
    zoo.write_card("Networks.")
    alice(push_folder, zoo.folder, "alice/written")
    file, start = zoo.folder / "README.md", GENERATED[0]
    file.write_text(file.read_text().replace(start, f"My introduction, written later.\n\n{start}"))
    alice(push_folder, zoo.folder, "alice/written")
    assert "My introduction, written later." in alice(card_of, "alice/written", "dataset")
    zoo.write_card("The same networks.")
    assert "My introduction, written later." in file.read_text()
    file.write_text("---\nlicense: mit\n---\n# My own card\n")
    alice(push_folder, zoo.folder, "alice/written")
    card = alice(card_of, "alice/written", "dataset")
    assert card.endswith("---\n# My own card\n")
    assert start not in card


def test_text_around_the_generated_part_is_that_of_the_new_card_where_it_has_any():
    start, end = GENERATED
    section = f"{start}\nnew\n{end}"
    old = f"before\n{start}\nold\n{end}\nafter\n"
    for new, expected in (
        (f"\n{section}\n\n", f"before\n{section}\nafter\n"),
        (f"mine\n{section}\n", f"mine\n{section}\n"),
        (f"{section}\nmine\n", f"{section}\nmine\n"),
        ("mine alone\n", "mine alone\n"),
    ):
        assert merge_cards(f"---\nlicense: mit\n---\n{new}", old).endswith(f"---\n{expected}")


def publish_networks() -> None:
    for seed in range(3):
        save_file(random_network(seed).state_dict(), "model.safetensors")
        HfApi().create_repo(f"alice/small-{seed}-digits")
        HfApi().upload_file(
            path_or_fileobj="model.safetensors", path_in_repo="model.safetensors", repo_id=f"alice/small-{seed}-digits"
        )
    HfApi().create_repo("alice/other")


def import_errors(folder: Path) -> list[str]:
    messages = []
    for arguments in (
        ("alice/none-*",),
        ("*/x",),
        ("alice/small-*", "model.bin"),
        ("alice/small-*", "no.safetensors"),
    ):
        try:
            WeightZoo.from_hub(folder, *arguments)
        except PdiffError as error:
            messages.append(str(error))
    return messages


def test_repositories_of_one_architecture_become_a_zoo(alice, tmp_path):
    alice(os.chdir, tmp_path)
    alice(publish_networks)
    arguments = ["--repositories", "alice/small-0-digits", "alice/small-[12]-*", "--output-dir", str(tmp_path / "zoo")]
    alice(run_cli, "import", *arguments)
    zoo = WeightZoo(tmp_path / "zoo")
    assert [row["source"] for row in zoo.metadata] == [f"alice/small-{seed}-digits" for seed in range(3)]
    assert zoo.metadata[2]["revision"] == alice(commits, "alice/small-2-digits")[0]
    for seed in range(3):
        expected = random_network(seed).state_dict()
        assert all(torch.equal(value, expected[name]) for name, value in zoo.state_dict(seed).items())
    none, pattern, pickle, lacking = alice(import_errors, tmp_path / "none")
    assert "No model repository on the Hub matches 'alice/none-*'" in none
    assert "expected namespace/name" in pattern
    assert "only safetensors files are read from the Hub" in pickle
    assert "alice/small-0-digits at revision" in lacking
    assert not (tmp_path / "none").exists()


def make_again(row: dict) -> torch.Tensor:
    pipe = load_pipeline(row["pipeline"], revision=row["revision"])
    generator = torch.Generator().manual_seed(row["seed"])
    arguments = {"num_inference_steps": row["num_inference_steps"], "output_type": "pt"}
    return pipe(generator=generator, **arguments).state_dicts[0]


def test_a_generated_zoo_names_repository_and_commit(alice, digits_pipeline, tmp_path):
    commit = alice(push_folder, digits_pipeline, "alice/origin")
    arguments = ["--pipeline", "alice/origin", "--output-dir", str(tmp_path), "--num-networks", "2"]
    alice(run_cli, "generate", *arguments, "--num-inference-steps", "3")
    alice(tag_and_change, digits_pipeline, "alice/origin")
    zoo = WeightZoo(tmp_path)
    assert zoo.metadata[1]["pipeline"] == "alice/origin"
    assert zoo.metadata[1]["revision"] == commit
    torch.testing.assert_close(alice(make_again, zoo.metadata[1]), zoo[1], atol=1e-4, rtol=1e-4)


def run_cli(*arguments: str) -> None:
    sys.argv = ["pdiff-hf", *arguments]
    cli()


def put_model(repo: str) -> None:
    """A model of another kind."""
    HfApi().create_repo(repo)
    HfApi().upload_file(path_or_fileobj=b"{}", path_in_repo="config.json", repo_id=repo)


def test_the_command_line_pushes_and_pulls(alice, zoo, digits_pipeline, tmp_path):
    alice(run_cli, "push", "--folder", str(zoo.folder), "--repo", "alice/cli-zoo")
    alice(run_cli, "pull", "--repo", "alice/cli-zoo", "--kind", "zoo", "--output-dir", str(tmp_path / "zoo2"))
    assert torch.equal(WeightZoo(tmp_path / "zoo2").vectors(), zoo.vectors())
    alice(run_cli, "push", "--folder", str(digits_pipeline), "--repo", "alice/cli-pipeline", "--private", "True")
    alice(run_cli, "pull", "--repo", "alice/cli-pipeline", "--output-dir", str(tmp_path / "pipeline2"))
    assert torch.equal(sample(load_pipeline(tmp_path / "pipeline2")), sample(load_pipeline(digits_pipeline)))
    assert "10 networks" in alice(run_cli_aloud, "info", "alice/cli-zoo")
    alice(put_model, "alice/cli-zoo")
    assert "10 networks" in alice(run_cli_aloud, "info", "alice/cli-zoo")
    assert "A pipeline that samples networks of 1,898" in alice(run_cli_aloud, "info", "alice/cli-pipeline")


def run_cli_in(folder: Path, arguments: list[str]) -> None:
    os.chdir(folder)
    run_cli(*arguments)


def run_cli_aloud(*arguments: str) -> str:
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        run_cli(*arguments)
    return said.getvalue()


def test_a_stage_that_pushes_says_where_to_look(alice, server, tmp_path):
    zoo, pipeline = str(tmp_path / "zoo"), str(tmp_path / "pipeline")
    said = alice(run_cli_aloud, "collect", "--num-networks", "4", "--epochs", "1", "--output-dir", zoo,
                 "--push-to-hub", "alice/said-zoo")  # fmt: skip
    assert f"; on the Hub, {server.url}/datasets/alice/said-zoo). Next:" in said
    said = alice(run_cli_aloud, "train", "--zoo", zoo, "--output-dir", pipeline, "--autoencoder", "linear",
                 "--unet-steps", "2", "--push-to-hub", "alice/said-pipeline")  # fmt: skip
    assert f"; on the Hub, {server.url}/alice/said-pipeline). Next:" in said
    said = alice(run_cli_aloud, "pull", "--repo", "alice/said-zoo", "--output-dir", str(tmp_path / "pulled"))
    there = re.escape(str(tmp_path / "pulled"))
    assert re.fullmatch(rf"The zoo is in {there} \(\d+\.\d s\)\. Next: pdiff-hf info {there}\n", said)


def test_the_readme_shares_as_it_says(alice, digits_zoo, digits_pipeline, tmp_path):
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "zoo").symlink_to(digits_zoo.folder)
    (tmp_path / "runs" / "pipeline").symlink_to(digits_pipeline)
    lines = Document("README.md").commands("pdiff-hf push")
    assert [arguments[:2] for arguments in lines] == [
        ["hf", "auth"],
        ["pdiff-hf", "push"],
        ["pdiff-hf", "push"],
        ["pdiff-hf", "pull"],
    ]
    for arguments in lines[1:]:
        alice(run_cli_in, tmp_path, [argument.replace("me/", "alice/") for argument in arguments[1:]])
    assert torch.equal(WeightZoo(tmp_path / "runs" / "pulled").vectors(), digits_zoo.vectors())
    found = alice(load_and_sample, "alice/pdiff-digits-convnet")
    assert torch.equal(found, sample(load_pipeline(digits_pipeline)))


@pytest.mark.slow
def test_training_pushes_in_the_end_and_keeps_checkpoints_to_itself(alice, digits_zoo, tmp_path):
    arguments = ["--zoo", str(digits_zoo.folder), "--output-dir", str(tmp_path), "--push_to_hub", "alice/trained"]
    arguments += ["--unet-steps", str(SMALL_TRAINING["unet_steps"])]
    alice(run_cli, "train", *arguments, "--checkpointing-steps", "50")
    assert (tmp_path / "checkpoint-50").exists()
    files = alice(list_files, "alice/trained")
    assert "model_index.json" in files
    assert not [name for name in files if "checkpoint" in name]
    assert len(alice(commits, "alice/trained")) == 2


def card(repo: str, repo_type: str) -> dict:
    return (DatasetCard if repo_type == "dataset" else ModelCard).load(repo).data.to_dict()


def test_every_stage_pushes_what_it_made(alice, digits_pipeline, tmp_path):
    collected = ["--task", "digits-mlp", "--epochs", "0", "--num-networks", "3", "--output-dir", str(tmp_path / "zoo")]
    alice(run_cli, "collect", *collected, "--push-to-hub", "alice/collected")
    assert alice(read_all, "alice/collected").equal(WeightZoo(tmp_path / "zoo").vectors())

    shutil.copytree(digits_pipeline, tmp_path / "pipeline")
    generated = ["--pipeline", str(tmp_path / "pipeline"), "--num-networks", "2", "--num-inference-steps", "3"]
    generated += ["--output-dir", str(tmp_path / "generated"), "--push-to-hub", "alice/sampled"]
    alice(run_cli, "generate", *generated)
    assert alice(read_all, "alice/sampled").equal(WeightZoo(tmp_path / "generated").vectors())


@pytest.mark.slow
def test_evaluation_pushes_figures_and_pictures_of_a_pipeline_on_the_hub(alice, digits_zoo, digits_pipeline, tmp_path):
    alice(push_folder, digits_pipeline, "alice/judged")
    arguments = ["--trained", str(digits_zoo.folder), "--generated", "alice/judged", "--num-networks", "10"]
    alice(run_cli, "evaluate", *arguments, "--output-dir", str(tmp_path), "--push-to-hub", "alice/judged")
    report = json.loads((tmp_path / "report.json").read_text())
    model = ModelCard.load(alice(snapshot_download, "alice/judged") + "/README.md")
    assert report["verdict"]["sentence"] in model.text
    assert "evaluation/plane.png" in alice(list_files, "alice/judged")
    values = {result.metric_name: result.metric_value for result in model.data.eval_results}
    expected = report["groups"]["generated"]["accuracy"]["mean"]
    assert values["mean accuracy of 10 generated networks"] == pytest.approx(expected, abs=1e-6)
    assert len(alice(commits, "alice/judged")) == 3


def push_figures(repo: str, figures: str, weights: str) -> str:
    return message_of(lambda: push_evaluation(repo, repo, figures, [], {}, weights=weights))


def test_figures_do_not_go_into_the_card_of_other_weights(alice, digits_pipeline, tmp_path):
    alice(push_folder, digits_pipeline, "alice/measured")
    measured = weights_sha256(digits_pipeline)
    assert alice(push_figures, "alice/measured", "FIRST", measured) == "no error"
    # Checkpoints of the training, which come and go, are no part of it.
    beside = shutil.copytree(digits_pipeline, tmp_path / "beside")
    (beside / "checkpoint-50").mkdir()
    shutil.copy(next(beside.glob("unet/*.safetensors")), beside / "checkpoint-50" / "average.safetensors")
    assert weights_sha256(beside) == measured
    pipe = load_pipeline(digits_pipeline)
    with torch.no_grad():
        next(pipe.unet.parameters()).add_(1)
    pipe.save_pretrained(tmp_path / "other")
    alice(push_folder, tmp_path / "other", "alice/measured")
    said = alice(push_figures, "alice/measured", "SECOND", measured)
    assert "weights of alice/measured changed since they were evaluated" in said
    assert "SECOND" not in Path(alice(snapshot_download, "alice/measured"), "README.md").read_text()


def push_licensed(folder: Path, repo: str) -> None:
    WeightZoo(folder).push_to_hub(repo, license="apache-2.0")


def test_a_licence_goes_into_the_card_and_stays(alice, zoo):
    alice(push_licensed, zoo.folder, "alice/licensed")
    assert alice(card, "alice/licensed", "dataset")["license"] == "apache-2.0"
    alice(push_folder, zoo.folder, "alice/licensed")
    assert alice(card, "alice/licensed", "dataset")["license"] == "apache-2.0"


def push_mislicensed(folder: Path, repo: str) -> str:
    with pytest.raises(HubError) as error:
        WeightZoo(folder).push_to_hub(repo, license="apache-2")
    return str(error.value)


@pytest.mark.skipif(version("huggingface_hub").startswith("1."), reason="its check of cards asks huggingface.co")
def test_a_licence_that_the_hub_does_not_know_makes_no_repository(alice, zoo, server):
    server.clear_log()
    said = alice(push_mislicensed, zoo.folder, "alice/mislicensed")
    assert said.startswith('The Hub does not take the card: "license" must be one of [apache-2.0, ')
    assert not server.log("/api/repos/create")


def test_a_card_names_the_models_that_the_networks_come_from(layout, tmp_path):
    with WeightZoo.create(tmp_path / "zoo", layout) as zoo:
        for seed in (1, 0):
            zoo.append(random_network(seed).state_dict(), source=f"org/net-{seed}", revision="0" * 40)
        zoo.append(random_network(2).state_dict(), source="net.safetensors")
    write_pipeline_card(tmp_path, {}, None, 3, zoo.vector_size, zoo.repositories(), dataset="org/zoo")
    data = ModelCard.load(tmp_path / "README.md").data
    assert data.base_model == ["org/net-0", "org/net-1"]
    assert data.datasets == ["org/zoo"]


def list_files(repo: str) -> list[str]:
    return HfApi().list_repo_files(repo)


SHARD = "networks-00005-of-00008.safetensors"


def shards_fetched(server: HubServer) -> list[str]:
    """The names of the shards whose contents were asked for, once for each time."""
    gets = [exchange["path"] for exchange in server.log("networks-") if exchange["method"] == "GET"]
    return sorted(path.rpartition("/")[2] for path in gets)


def pull(repo: str, folder: Path) -> torch.Tensor:
    run_cli("pull", "--repo", repo, "--kind", "zoo", "--output-dir", str(folder))
    return WeightZoo(folder).vectors()


def stream(repo: str, folder: Path) -> torch.Tensor:
    return read_all(repo)


def error_of(function, *arguments) -> str:
    try:
        function(*arguments)
    except BaseException as error:  # also what ends the command line
        return f"{type(error).__name__}: {error}"
    return "no error"


@contextmanager
def faulty(server: HubServer, action: str, **fault) -> Iterator[None]:
    server.faults(action, **fault)
    try:
        yield
    finally:
        server.clear_faults()


@pytest.mark.parametrize("get", [pull, stream])
def test_a_download_that_loses_its_connection_goes_on_where_it_was(server, alice, big_zoo, tmp_path, get):
    repo = f"alice/dropped-{get.__name__}"
    alice(push_folder, big_zoo.folder, repo)
    server.clear_log()
    server.faults("drop", method="GET", path=SHARD, after_bytes=10_000)
    assert torch.equal(alice(get, repo, tmp_path / "zoo"), big_zoo.vectors())
    shards = sorted(shard.name for shard in big_zoo.folder.glob("networks-*"))
    # Parts of less than the client's 10 MB at a time are not kept.
    assert shards_fetched(server) == sorted([*shards, SHARD])


def test_a_pull_over_an_earlier_one_whose_connection_fails_is_no_mixture(server, alice, big_zoo, tmp_path):
    """The client keeps the file that is there where the Hub does not answer."""
    alice(push_folder, big_zoo.folder, "alice/half-pulled")
    before = alice(pull, "alice/half-pulled", tmp_path / "zoo")
    with big_zoo:
        big_zoo.append({"weight": torch.ones(50)}, seed=1000)
    alice(push_folder, big_zoo.folder, "alice/half-pulled")
    with faulty(server, "status", method="HEAD", path="metadata.jsonl", status=500, count=99):
        said = alice(error_of, pull, "alice/half-pulled", tmp_path / "zoo")
    assert "metadata.jsonl could not be downloaded: the connection to the Hub was lost. Pull again." in said
    with pytest.raises(ZooError):
        WeightZoo(tmp_path / "zoo")
    mark = tmp_path / "zoo" / ".cache" / "huggingface" / PULLED
    assert mark.exists()
    assert len(alice(pull, "alice/half-pulled", tmp_path / "zoo")) == len(before) + 1
    assert not mark.exists()


@pytest.mark.parametrize(
    ("status", "said"),
    [
        (403, "This account may not do that there.* It says: Injected: Forbidden"),
        (400, "The Hub answered with status 400. It says: Injected: Bad Request"),
    ],
)
def test_a_download_that_the_hub_refuses_says_why(server, alice, zoo, tmp_path, status, said):
    alice(push_folder, zoo.folder, "alice/refused")
    with faulty(server, "status", method="GET", path="alice/refused", status=status, count=99):
        assert re.search(said, alice(error_of, pull, "alice/refused", tmp_path / "pulled"))


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (ConnectionError("to the CAS"), "me/zoo: the connection to the Hub at .* was lost"),
        (TimeoutError("of the CAS"), "me/zoo: the connection to the Hub at .* was lost"),
        (RuntimeError("Data processing error: CAS service error"), "me/zoo: the connection to the Hub at .* was lost"),
        (json.JSONDecodeError("Expecting value", "<html>", 0), "me/zoo: what the Hub at .* answered is no JSON"),
    ],
)
def test_what_the_client_raises_of_its_transport_is_an_error_of_the_hub(error, said):
    with pytest.raises(HubError, match=said), explained("me/zoo", None):
        raise error


def test_a_gated_repository_is_no_missing_one():
    response = httpx.Response(403, request=httpx.Request("GET", "http://127.0.0.1/me/zoo"))
    message = "me/zoo is open to those alone who were given access: ask for it"
    with pytest.raises(HubError, match=message), explained("me/zoo", None):
        raise GatedRepoError("gated", response=response)


def test_a_pull_says_what_lacks(alice, zoo, tmp_path, digits_pipeline):
    alice(push_folder, digits_pipeline, "alice/known")
    alice(put_model, "alice/weights-alone")
    error = alice(error_of, run_cli, "info", "alice/weights-alone")
    assert "alice/weights-alone holds no pipeline: there is no model_index.json" in error

    def said(*arguments: str) -> str:
        return alice(error_of, run_cli, "pull", *arguments, "--output-dir", str(tmp_path / "new"))

    assert "alice/known has no revision 'v9'" in said("--repo", "alice/known", "--revision", "v9")
    assert "alice/weights-alone holds no pipeline: there is no model_index.json" in said(
        "--repo", "alice/weights-alone"
    )
    assert "alice/nothing is no folder here, and is not on the Hub" in said("--repo", "alice/nothing")


@pytest.mark.parametrize("get", [pull, stream])
def test_a_download_that_failed_is_repeated_for_what_is_missing(server, alice, big_zoo, tmp_path, get):
    repo = f"alice/failed-{get.__name__}"
    alice(push_folder, big_zoo.folder, repo)
    server.clear_log()
    with faulty(server, "drop", method="GET", path=SHARD, count=99):
        assert alice(error_of, get, repo, tmp_path / "zoo") != "no error"
    before = set(shards_fetched(server)) - {SHARD}
    server.clear_log()
    assert torch.equal(alice(get, repo, tmp_path / "zoo"), big_zoo.vectors())
    assert shards_fetched(server) == sorted({shard.name for shard in big_zoo.folder.glob("networks-*")} - before)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("program", "others"),
    [
        ("from pdiff_hf.share import *; run_pull(PullConfig({repo!r}, {folder!r}, 'zoo'))", 7),
        ("from pdiff_hf import *; list(WeightZoo.from_pretrained({repo!r}).batches())", 4),
    ],
    ids=["pull", "stream"],
)
def test_a_killed_download_is_repeated_for_what_is_missing(server, alice, big_zoo, tmp_path, program, others):
    repo, get = f"alice/killed-{others}", pull if others == 7 else stream
    alice(push_folder, big_zoo.folder, repo)
    environment = client_environment(server.url, tmp_path / "home", xet=server.xet)
    program = program.format(repo=repo, folder=str(tmp_path / "zoo"))
    with faulty(server, "delay", method="GET", path=SHARD, seconds=60):
        kill_when(
            lambda: len(list(tmp_path.rglob("networks-*-of-00008.safetensors"))) == 8 + others, program, environment
        )
    server.clear_log()
    again = HubClient(environment)
    assert torch.equal(again(get, repo, tmp_path / "zoo"), big_zoo.vectors())
    again.stop()
    assert len(shards_fetched(server)) == 8 - others
    assert SHARD in shards_fetched(server)


def kill_when(condition: Callable[[], bool], program: str, environment: dict[str, str]) -> None:
    """Runs a program with the environment of a client, and kills it in the moment when this is so."""
    process = subprocess.Popen([sys.executable, "-c", program], env={**os.environ, **environment})
    while not condition():
        assert process.poll() is None
        time.sleep(0.05)
    process.kill()
    process.wait()


def errors_without_a_connection(zoo: Path, folder: Path) -> list[str]:
    return [
        error_of(push, zoo, "alice/unreachable"),
        error_of(WeightZoo.from_pretrained, "alice/unreachable"),
        error_of(load_pipeline, "alice/unreachable"),
        error_of(pull, "alice/unreachable", folder),
    ]


def test_a_lost_connection_is_explained(server, alice, zoo, tmp_path):
    with faulty(server, "drop", count=1000):
        messages = alice(errors_without_a_connection, zoo.folder, tmp_path / "zoo2")
    assert [message.partition(":")[0] for message in messages] == ["HubError", "HubError", "HubError", "SystemExit"]
    assert all("alice/unreachable" in message and "again" in message for message in messages)
    assert not re.search("hf_alice|http", "".join(messages))


def uploads(server: HubServer) -> list[str]:
    """The SHA-256 of each large file that was sent and arrived."""
    puts = [exchange for exchange in server.log("/lfs/upload/") if exchange["method"] == "PUT"]
    return sorted(re.search("[0-9a-f]{64}", put["path"])[0] for put in puts if put["status"] == 200)


def sha256(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


@pytest.mark.slow
def test_a_killed_upload_is_repeated_for_what_had_not_arrived(server, alice, big_zoo, tmp_path):
    if server.xet:
        pytest.skip("without large files, a commit is one request")
    missing = sha256(big_zoo.folder / SHARD)
    files = list(big_zoo.folder.iterdir())
    large = [file for file in files if file.stat().st_size >= 10_000 or file.suffix == ".safetensors"]
    server.clear_log()
    program = f"from pdiff_hf import WeightZoo; WeightZoo({str(big_zoo.folder)!r}).push_to_hub('alice/killed-upload')"
    environment = client_environment(server.url, tmp_path / "home")
    with faulty(server, "delay", method="PUT", path=missing, seconds=60):
        kill_when(lambda: len(uploads(server)) == len(large) - 1, program, environment)
    assert alice(list_datasets_files, "alice/killed-upload") == [".gitattributes"]
    server.clear_log()
    alice(push_folder, big_zoo.folder, "alice/killed-upload")
    assert uploads(server) == [missing]
    assert torch.equal(alice(read_all, "alice/killed-upload"), big_zoo.vectors())


@pytest.mark.slow  # the client tries for twenty seconds
@pytest.mark.long
def test_an_upload_that_failed_is_repeated_for_what_had_not_arrived(server, alice, big_zoo):
    if server.xet:
        pytest.skip("without large files, a commit is one request")
    missing = sha256(big_zoo.folder / SHARD)
    server.clear_log()
    with faulty(server, "drop", method="PUT", path=missing, after_bytes=10_000, count=99):
        assert alice(error_of, push, big_zoo.folder, "alice/failed-upload") != "no error"
    before = uploads(server)
    server.clear_log()
    alice(push_folder, big_zoo.folder, "alice/failed-upload")
    assert missing in uploads(server)
    assert not set(uploads(server)) & set(before)
    assert torch.equal(alice(read_all, "alice/failed-upload"), big_zoo.vectors())


def list_datasets_files(repo: str) -> list[str]:
    return HfApi().list_repo_files(repo, repo_type="dataset")


def first_batch(repo: str) -> torch.Tensor:
    return next(WeightZoo.from_pretrained(repo).batches(100))


def test_a_batch_costs_its_shard_and_all_of_them_each_shard_once(server, alice, big_zoo):
    alice(push_folder, big_zoo.folder, "alice/batches")
    server.clear_log()
    assert torch.equal(alice(first_batch, "alice/batches"), big_zoo.vectors(range(100)))
    assert shards_fetched(server) == ["networks-00001-of-00008.safetensors"]
    assert torch.equal(alice(read_all, "alice/batches"), big_zoo.vectors())
    assert shards_fetched(server) == sorted(shard.name for shard in big_zoo.folder.glob("networks-*"))


@pytest.mark.slow
@pytest.mark.xfail(
    strict=True,
    raises=HubClientError,
    reason="diffusers asks the Hub for the commit of remote code, offline too (get_cached_module_file)",
)
def test_offline_remote_code_is_loaded_by_name(server, alice, digits_pipeline, tmp_path):
    alice(push_folder, digits_pipeline, "alice/by-name")
    environment = client_environment(server.url, tmp_path / "home", xet=server.xet)
    online = HubClient(environment)
    expected = online(load_and_sample, "alice/by-name")
    online.stop()
    offline = HubClient({**environment, "HF_HUB_OFFLINE": "1"})
    found = offline(load_and_sample, "alice/by-name")
    offline.stop()
    assert torch.equal(found, expected)


def test_a_zoo_that_grew_is_pulled_into_the_same_folder(alice, zoo, tmp_path):
    alice(push_folder, zoo.folder, "alice/pulled-twice")
    alice(pull, "alice/pulled-twice", tmp_path / "pulled")
    with zoo:
        for seed in range(10, 17):
            zoo.append(random_network(seed).state_dict(), seed=seed)
    alice(push_folder, zoo.folder, "alice/pulled-twice")
    assert torch.equal(alice(pull, "alice/pulled-twice", tmp_path / "pulled"), zoo.vectors())


def test_a_zoo_is_not_pulled_over_another_one(alice, zoo, big_zoo):
    alice(push_folder, zoo.folder, "alice/pulled-over")
    before = big_zoo.vectors()
    assert "big" in alice(error_of, pull, "alice/pulled-over", big_zoo.folder)
    assert torch.equal(WeightZoo(big_zoo.folder).vectors(), before)


def contents(folder: Path) -> dict[str, bytes]:
    found = (path for path in folder.rglob("*") if path.is_file() and ".cache" not in path.parts)
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in found}


def test_a_pull_replaces_nothing_that_was_changed_or_made_here(alice, zoo, tmp_path):
    zoo.write_card("Networks.")
    alice(push_folder, zoo.folder, "alice/worked-on")
    (tmp_path / "project").mkdir()
    (tmp_path / "project" / "notes.txt").write_text("mine")
    alice(pull, "alice/worked-on", tmp_path / "project")
    alice(pull, "alice/worked-on", tmp_path / "project")
    with WeightZoo(tmp_path / "project") as mine:
        for seed in range(10, 17):
            mine.append(random_network(seed).state_dict(), seed=seed)
    before = contents(tmp_path / "project")
    error = alice(error_of, pull, "alice/worked-on", tmp_path / "project")
    assert "and a pull would replace it. Choose another --output-dir" in error
    assert contents(tmp_path / "project") == before
    alice(pull, "alice/worked-on", tmp_path / "edited")
    later = time.time() + 10
    os.utime(tmp_path / "edited" / "README.md", (later, later))
    error = alice(error_of, pull, "alice/worked-on", tmp_path / "edited")
    assert "README.md was changed since it was pulled, and a pull would replace it." in error
    assert (tmp_path / "edited" / "zoo.json").exists()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "metadata.jsonl").write_text("mine")
    error = alice(error_of, pull, "alice/worked-on", tmp_path / "mine")
    assert "metadata.jsonl was not pulled" in error
    assert (tmp_path / "mine" / "metadata.jsonl").read_text() == "mine"


def test_a_pull_that_was_interrupted_is_repeated(alice, zoo, tmp_path):
    alice(push_folder, zoo.folder, "alice/interrupted")
    (tmp_path / "there").mkdir()
    for name in ("networks-00001-of-00003.safetensors", "metadata.jsonl"):  # copied in part from the cache
        (tmp_path / "there" / name).write_bytes((zoo.folder / name).read_bytes()[:50])
    assert "was not pulled" in alice(error_of, pull, "alice/interrupted", tmp_path / "there")
    mark = tmp_path / "there" / ".cache" / "huggingface" / PULLED
    mark.parent.mkdir(parents=True)
    mark.touch()
    assert torch.equal(alice(pull, "alice/interrupted", tmp_path / "there"), zoo.vectors())
    assert not mark.exists()
    mark.touch()  # what was finished meanwhile is not replaced for that
    later = time.time() + 10
    os.utime(tmp_path / "there" / "metadata.jsonl", (later, later))
    assert "and a pull would replace it" in alice(error_of, pull, "alice/interrupted", tmp_path / "there")


def test_what_is_not_of_a_zoo_is_not_pushed_with_it(alice, zoo, tmp_path):
    (tmp_path / "secret.txt").write_text("hf_alice")
    (tmp_path / "secrets").mkdir()
    (tmp_path / "secrets" / "secret.txt").write_text("hf_alice")
    (zoo.folder / "linked.txt").symlink_to(tmp_path / "secret.txt")
    (zoo.folder / "linked").symlink_to(tmp_path / "secrets")
    (zoo.folder / "inner").mkdir()
    (zoo.folder / "inner" / "linked.txt").symlink_to(tmp_path / "secret.txt")
    for name in (".env", ".netrc"):
        (zoo.folder / name).write_text("hf_alice")
    for link in ("inner/linked.txt", "linked.txt"):
        assert f"{link} is a link that leads out of" in alice(error_of, push, zoo.folder, "alice/tidy")
        assert "no error" not in alice(error_of, list_datasets_files, "alice/tidy")
        (zoo.folder / link).unlink()
    alice(push_folder, zoo.folder, "alice/tidy")
    files = set(alice(list_datasets_files, "alice/tidy"))
    assert "zoo.json" in files
    assert not files & {"linked.txt", "linked/secret.txt", "inner/linked.txt", ".env", ".netrc"}


@pytest.mark.parametrize("token", ["hf_alice\n", "hf_aliceü"])
def test_a_token_that_is_none_is_not_repeated(alice, zoo, token):
    for function in (push_with_token, read_with_token):
        message = alice(error_of, function, zoo.folder, token)
        assert message.startswith("HubError")
        assert "hf_alice" not in message


def push_with_token(folder: Path, token: str) -> None:
    push(folder, "alice/token", token=token)


def read_with_token(folder: Path, token: str) -> None:
    WeightZoo.from_pretrained("alice/token", token=token)


@pytest.mark.parametrize(
    "metadata",
    [
        "- a",
        "42",
        "tags: [",
        "tags: 5",
        "tags: [1, a]",
        "tags: [null]",
        "tags: [[a]]",
        "1: 2",
        "self: x",
        "!!python/x",
    ],
)
def test_a_card_with_strange_metadata_is_merged_or_refused(metadata):
    start, end = GENERATED
    try:
        merged = merge_cards(f"---\ntags: [b]\n---\n{start}\nnew\n{end}\n", f"---\n{metadata}\n---\nmine\n")
    except PdiffError:
        return
    assert "b" in ModelCard(merged).data.tags
    assert "mine" in merged


def test_a_tag_that_is_no_list_is_one_tag():
    merged = merge_cards("---\ntags: [b]\n---\n", "---\ntags: hello\n---\n")
    assert ModelCard(merged).data.tags == ["b", "hello"]


def test_a_card_that_is_no_text_is_refused(zoo):
    (zoo.folder / "README.md").write_bytes(b"\xff\xfe")
    with pytest.raises(PdiffError, match=r"README\.md"):
        zoo.write_card("A zoo.")


def test_neither_zoo_nor_pipeline_is_not_pushed(tmp_path, zoo):
    (tmp_path / "empty").mkdir()
    with pytest.raises(HubError, match="holds neither a zoo"):
        push(tmp_path / "empty", "alice/empty")
    (zoo.folder / "networks-00004-of-00004.safetensors.part").touch()
    with pytest.raises(HubError, match="is unfinished"):
        push(zoo.folder, "alice/unfinished")
    assert json.loads((zoo.folder / "zoo.json").read_text())["task"] == "none"
