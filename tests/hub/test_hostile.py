# Over 400 lines: one subject, which shares a server and what it holds.
"""What a repository of somebody else may hold, and what a folder may hold that came from there."""

import json
import os
import re
import shutil
import sys
import time
from functools import partial
from pathlib import Path

import pytest
import torch
from diffusers import DDPMScheduler, DPMSolverMultistepScheduler
from huggingface_hub import EvalResult, HfApi, ModelCard, RepoCard
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from pdiff_hf import PdiffError, TrainConfig, WeightZoo, ZooError, evaluate, load_pipeline, run_train
from pdiff_hf.cli import main as cli
from pdiff_hf.errors import HubError
from pdiff_hf.evaluation.study import PARTS as SCORES
from pdiff_hf.hub.cards import (
    EVALUATION,
    GENERATED,
    merge_cards,
    write_evaluation,
    write_pipeline_card,
    write_zoo_card,
)
from pdiff_hf.hub.pipeline_files import pipeline_files
from pdiff_hf.hub.push import push
from pdiff_hf.zoo.fill import PARTS

from ..conftest import SMALL_TRAINING, random_network
from ..hub_server import HubClient, HubServer, client_environment


@pytest.fixture(scope="module")
def alice(tmp_path_factory):
    """A process of alice's: calls functions of this module."""
    with HubServer(tmp_path_factory.mktemp("hub"), lfs_threshold=10_000) as server:
        client = HubClient(client_environment(server.url, tmp_path_factory.mktemp("alice"), xet=False))
        yield client
        client.stop()


def said(*arguments: str) -> str:
    """What a command says that fails."""
    try:
        cli(arguments)
    except SystemExit as error:
        return str(error)
    return "nothing"


# ---- cards


def bomb(depth: int) -> str:
    levels = "".join(f"a{i}: &a{i} [{','.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, depth + 1))
    return "---\na0: &a0 [" + ",".join("x" * 10) + f"]\n{levels}tags: *a{depth}\n---\n"


@pytest.mark.parametrize("card", [bomb(3), bomb(30), "---\ntags: [a]\nx: " + "y" * 20_000_000 + "\n---\n"])
@pytest.mark.parametrize("place", ["old", "new", "evaluation"])
def test_metadata_that_would_take_minutes_are_refused_at_once(tmp_path, card, place):
    fine = "---\ntags: [a]\n---\n"
    (tmp_path / "README.md").write_text(card)
    read = {
        "old": lambda: merge_cards(fine, card),
        "new": lambda: merge_cards(card, fine),
        "evaluation": lambda: write_evaluation(tmp_path, "section", [], {}),
    }[place]
    start = time.monotonic()
    with pytest.raises(HubError, match=r"metadata of README\.md cannot be read"):
        read()
    assert time.monotonic() - start < 3


@pytest.mark.parametrize(
    "text",
    [
        "# Networks\n\n| split | accuracy |\n| --- | --- |\n| test | 0.9 |\n",
        "# Networks\n\nIntroduction.\n\n---\n\n*Note*: see the paper.\n",
    ],
)
def test_a_table_or_a_rule_is_no_metadata(tmp_path, text):
    (tmp_path / "README.md").write_text(text)
    for _ in range(2):
        write_zoo_card(tmp_path, "Networks.", None, 3, 9)
    assert f"---\n{text}\n{GENERATED[0]}" in (tmp_path / "README.md").read_text()


def test_metadata_are_bounded_that_the_client_alone_takes_for_them():
    card = bomb(4).replace("---\n", "---\nk:\n---x: 1\n", 1)
    with pytest.raises(HubError, match="aliases"):
        merge_cards("---\ntags: [a]\n---\n", card)


HOSTILE = st.sampled_from([*GENERATED, "<script>alert(1)</script>", "\x1b[2J", "`", "\n\n# Title", "\ud800", "![](x)"])


@given(task=st.lists(HOSTILE | st.text(max_size=9), min_size=1, max_size=5).map("".join), kind=st.sampled_from("zp"))
@settings(max_examples=60, deadline=None, derandomize=True)
def test_the_name_of_a_task_stays_in_its_line_of_the_marked_part(tmp_path_factory, task, kind):
    folder = tmp_path_factory.mktemp("card")
    (folder / "README.md").write_text("---\nlicense: mit\n---\nMine before.\n")
    for _ in range(2):
        if kind == "z":
            write_zoo_card(folder, "Networks.", task, 3, 9)
        else:
            write_pipeline_card(folder, {"task": task, "zoo": task}, task, 3, 9)
    text = (folder / "README.md").read_text()
    before, start, rest = text.partition(GENERATED[0])
    section, end, after = rest.partition(GENERATED[1])
    assert before.endswith("Mine before.\n\n")
    assert (start, end, after) == (*GENERATED, "\n")
    assert "<script" not in section
    assert "\x1b" not in section
    assert section.count("\n# ") == (1 if kind == "z" else 2)  # the title, and in a pipeline's card a comment
    shutil.rmtree(folder)


RESULT = EvalResult(
    task_type="weight-generation", dataset_type="t", dataset_name="t", metric_type="accuracy", metric_value=0.9
)
OURS = "- name: pdiff\n  results: [{task: {type: weight-generation}}]\n"
OTHERS = f"---\nmodel-index:\n- name: somebody\n  results: []\n{OURS}tags: [mine]\n---\n"


def files_of(repo: str) -> list[str]:
    return HfApi().list_repo_files(repo)


def text_of(repo: str) -> str:
    return Path(HfApi().hf_hub_download(repo, "README.md")).read_text()


def push_folder(folder: Path, repo: str, **arguments) -> str:
    return push(folder, repo, **arguments).oid


def pipeline_in(folder: Path, zoo: Path, seed: int) -> None:
    run_train(TrainConfig(zoo=str(zoo), output_dir=str(folder), **{**SMALL_TRAINING, "unet_steps": 5, "seed": seed}))


@pytest.mark.slow
def test_a_pipeline_that_is_trained_again_has_nothing_of_the_earlier_evaluation(alice, zoo, tmp_path):
    folder = tmp_path / "pipeline"
    pipeline_in(folder, zoo.folder, 0)
    picture = tmp_path / "plane.png"
    picture.write_bytes(b"picture")
    write_evaluation(folder, "The section of old weights.", [RESULT], {picture: "What is seen."})
    alice(push_folder, folder, "alice/again")
    assert "evaluation/plane.png" in alice(files_of, "alice/again")
    assert ModelCard(alice(text_of, "alice/again")).data.eval_results
    (folder / "model_index.json").unlink()
    pipeline_in(folder, zoo.folder, 1)
    assert not (folder / "evaluation").exists()
    alice(push_folder, folder, "alice/again")
    card = alice(text_of, "alice/again")
    assert "evaluation/plane.png" not in alice(files_of, "alice/again")
    assert "old weights" not in card
    assert "Not evaluated yet" in card
    assert not ModelCard(card).data.eval_results


def test_results_that_others_measured_stay():
    data = ModelCard(merge_cards("---\ntags: [a]\n---\n", OTHERS), ignore_metadata_errors=True).data.to_dict()
    assert [one["name"] for one in data["model-index"]] == ["somebody"]


@pytest.mark.parametrize("link", ["evaluation", "evaluation/plane.png"])
def test_pictures_stay_in_the_folder_of_their_pipeline(tmp_path, link):
    folder, elsewhere, picture = tmp_path / "pipeline", tmp_path / "elsewhere", tmp_path / "plane.png"
    folder.mkdir()
    elsewhere.mkdir()
    (elsewhere / "plane.png").write_bytes(b"mine")
    picture.write_bytes(b"picture")
    write_pipeline_card(folder, {}, None, 3, 9)
    (folder / link).parent.mkdir(exist_ok=True)
    (folder / link).symlink_to(elsewhere / link.removeprefix("evaluation").removeprefix("/"))
    with pytest.raises(PdiffError, match=f"{link} is a link that leads out of .*pipeline: remove it"):
        write_evaluation(folder, "section", [], {picture: "What is seen."})
    assert (elsewhere / "plane.png").read_bytes() == b"mine"


def test_a_card_that_is_a_link_is_not_read(tmp_path):
    """What it leads to would go up with the next push."""
    (tmp_path / "secret").write_text("secret")
    folder = tmp_path / "pipeline"
    folder.mkdir()
    (folder / "README.md").symlink_to(tmp_path / "secret")
    for write in (partial(write_pipeline_card, folder, {}, None, 3, 9), partial(write_evaluation, folder, "", [], {})):
        with pytest.raises(PdiffError, match=r"README\.md is a link that leads out of .*pipeline: remove it"):
            write()
    assert (folder / "README.md").is_symlink()


def indexed(card: str) -> list[str]:
    return [one["name"] for one in RepoCard(card).data.to_dict()["model-index"]]


def test_an_evaluation_replaces_no_results_that_others_measured(tmp_path):
    write_pipeline_card(tmp_path, {}, None, 3, 9)
    card = tmp_path / "README.md"
    theirs = card.read_text().replace("---\n", OTHERS.removesuffix("tags: [mine]\n---\n"), 1)
    write_evaluation(tmp_path, "section", [RESULT], {})
    ours = card.read_text()
    card.write_text(theirs)
    for _ in range(2):
        write_evaluation(tmp_path, "section", [RESULT], {})
        both = card.read_text()
        assert len(indexed(both)) == 2
        assert indexed(both)[0] == "somebody"
    assert indexed(merge_cards(ours, theirs)) == indexed(merge_cards(both, theirs)) == indexed(both)


@pytest.mark.parametrize("entries", ["abc", "5", "[5, {results: 5}, {results: [5]}, {results: [{task: x}]}]"])
def test_a_strange_model_index_is_no_bug(entries):
    card = f"---\nmodel-index: {entries}\n---\n"
    assert "tags" in merge_cards("---\ntags: [a]\n---\n", card)


def test_a_card_whose_end_mark_is_gone_is_not_cut_off(tmp_path):
    write_pipeline_card(tmp_path, {}, None, 2, 3)
    card = (tmp_path / "README.md").read_text()
    with pytest.raises(HubError, match="lacks the line '<!-- pdiff-hf: end -->'"):
        merge_cards(card, card.replace(GENERATED[1], "") + "\nMine.\n")
    (tmp_path / "README.md").write_text(card.replace(EVALUATION[1], "") + "\nMine.\n")
    with pytest.raises(PdiffError, match="lacks the line '<!-- pdiff-hf: evaluation end -->'"):
        write_evaluation(tmp_path, "section", [], {})
    assert (tmp_path / "README.md").read_text().endswith("Mine.\n")


def test_what_follows_adapters_in_a_repository_is_no_part_of_peft(tmp_path):
    write_zoo_card(tmp_path, "", None, 2, 3, adapter={"r": 2, "base_model_name_or_path": "me/base"})
    adapters = (tmp_path / "README.md").read_text()
    assert "library_name: peft" in adapters
    (tmp_path / "README.md").unlink()
    write_zoo_card(tmp_path, "", None, 2, 3)
    merged = merge_cards((tmp_path / "README.md").read_text(), adapters)
    assert "peft" not in merged
    assert "me/base" not in merged


def test_cards_name_no_folder_of_a_machine(tmp_path):
    for write in (partial(write_zoo_card, tmp_path / "a", ""), partial(write_pipeline_card, tmp_path / "b", {})):
        write.args[0].mkdir()
        write("/home/alice/secret/task.py:Mine", 2, 3)
        card = (write.args[0] / "README.md").read_text()
        assert "task.py:Mine" in card
        assert "alice" not in card


# ---- what is pulled


STRANGE = {
    **dict.fromkeys(("collect.yaml", "train.yaml", "collect.state.pt", "task.py", "setup.py"), b"x"),
    **dict.fromkeys(("checkpoint-20/custom_checkpoint_0.pkl", "checkpoint-20/model.safetensors"), b"x"),
    **dict.fromkeys((f"{PARTS}/networks-0-to-3.safetensors", f"{SCORES}/0.pt", ".pdiff-hf.lock"), b"x"),
    **dict.fromkeys(("unet/other.py", "unet/weights.bin", "sub/pipeline.py", "a.pkl"), b"x"),
}


def upload(folder: Path, repo: str, repo_type: str, files: dict[str, bytes]) -> None:
    push(folder, repo)
    for name, content in files.items():
        HfApi().upload_file(path_or_fileobj=content, path_in_repo=name, repo_id=repo, repo_type=repo_type)


@pytest.mark.slow
def test_a_pull_takes_what_a_zoo_or_a_pipeline_consists_of(alice, zoo, tmp_path):
    zoo.write_card("Networks.")
    pipeline = tmp_path / "pipeline"
    pipeline_in(pipeline, zoo.folder, 0)
    for kind, folder, repo_type in (("zoo", zoo.folder, "dataset"), ("pipeline", pipeline, "model")):
        alice(upload, folder, f"alice/strange-{kind}", repo_type, STRANGE)
        target = tmp_path / f"pulled-{kind}"
        assert (
            alice(said, "pull", "--repo", f"alice/strange-{kind}", "--kind", kind, "--output-dir", str(target))
            == "nothing"
        )
        found = {path.relative_to(target).as_posix() for path in target.rglob("*") if path.is_file()}
        found = {name for name in found if not name.startswith(".cache/")}
        assert not found & STRANGE.keys()
        assert found == {
            path.relative_to(folder).as_posix()
            for path in folder.rglob("*")
            if path.is_file() and (not path.name.startswith("train.") or path.name == "train.facts.json")
        }
    assert torch.equal(WeightZoo(tmp_path / "pulled-zoo").vectors(), zoo.vectors())
    load_pipeline(tmp_path / "pulled-pipeline")


def test_files_of_a_hostile_index_stay_in_their_folders():
    index = {
        "_class_name": ["../x", "Y"],
        "../vae": ["a", "B"],
        "unet": ["../../evil", "C"],
        "vae": ["ok", "D"],
        "x": [1, 2, 3],
    }
    assert not any(".." in pattern for pattern in pipeline_files(index))
    assert "vae/ok.py" in pipeline_files(index)


def replace_vae(folder: Path, repo: str) -> None:
    """A commit whose autoencoder has its weights in another file, and is of other code."""
    push(folder, repo)
    api = HfApi()
    weights = (folder / "vae" / "diffusion_pytorch_model.safetensors").read_bytes()
    api.upload_file(path_or_fileobj=weights, path_in_repo="vae/diffusion_pytorch_model.fp16.safetensors", repo_id=repo)
    api.delete_file("vae/diffusion_pytorch_model.safetensors", repo)


def pull_and_die(repo: str, folder: Path) -> str:
    """Loses the connection when all but the index is there."""
    from pdiff_hf import share

    fetch = share.hf_hub_download
    share.hf_hub_download = lambda *a, **k: fetch(*a, **k) if "local_dir" not in k else 1 / 0
    try:
        return said("pull", "--repo", repo, "--output-dir", str(folder))
    finally:
        share.hf_hub_download = fetch


@pytest.mark.slow
def test_a_pull_over_an_earlier_one_leaves_no_mixture(alice, zoo, tmp_path):
    pipeline, target = tmp_path / "pipeline", tmp_path / "target"
    pipeline_in(pipeline, zoo.folder, 0)
    alice(push_folder, pipeline, "alice/pulled")
    arguments = ("pull", "--repo", "alice/pulled", "--output-dir", str(target))
    assert alice(said, *arguments) == "nothing"
    alice(replace_vae, pipeline, "alice/pulled")
    assert "bug" in alice(pull_and_die, "alice/pulled", target)
    with pytest.raises(PdiffError, match=r"there is no model_index\.json"):
        load_pipeline(target)
    assert alice(said, *arguments) == "nothing"
    weights = [path.name for path in (target / "vae").glob("*.safetensors")]
    assert weights == ["diffusion_pytorch_model.fp16.safetensors"]


@pytest.mark.slow
def test_a_pull_goes_into_no_folder_of_another_kind(alice, zoo, tmp_path):
    pipeline = tmp_path / "pipeline"
    pipeline_in(pipeline, zoo.folder, 0)
    alice(push_folder, zoo.folder, "alice/kinds")
    line = alice(said, "pull", "--repo", "alice/kinds", "--kind", "zoo", "--output-dir", str(pipeline))
    assert "holds a pipeline. Choose another" in line


# ---- what is pushed


def visibility(repo: str) -> bool:
    return HfApi().repo_info(repo, repo_type="dataset").private


def test_a_push_does_not_pretend_to_change_who_sees_a_repository(alice, zoo):
    alice(push_folder, zoo.folder, "alice/seen")
    line = alice(said, "push", "--folder", str(zoo.folder), "--repo", "alice/seen", "--private", "True")
    assert "alice/seen exists and is public, which a push does not change" in line
    assert alice(visibility, "alice/seen") is False
    assert alice(said, "push", "--folder", str(zoo.folder), "--repo", "alice/seen", "--private", "False") == "nothing"
    assert alice(said, "push", "--folder", str(zoo.folder), "--repo", "alice/hid", "--private", "True") == "nothing"
    line = alice(said, "push", "--folder", str(zoo.folder), "--repo", "alice/hid", "--private", "False")
    assert "exists and is private" in line


def weights_of_something_else(repo: str) -> None:
    HfApi().create_repo(repo)
    HfApi().upload_file(path_or_fileobj=b"theirs", path_in_repo="model.safetensors", repo_id=repo)


def test_a_push_removes_no_weights_of_something_else(alice, digits_pipeline):
    alice(weights_of_something_else, "alice/my-llm")
    line = alice(said, "push", "--folder", str(digits_pipeline), "--repo", "alice/my-llm")
    assert "alice/my-llm holds weights of something else, which a push would remove" in line
    assert "model.safetensors" in alice(files_of, "alice/my-llm")
    assert "model_index.json" not in alice(files_of, "alice/my-llm")


def test_a_folder_of_two_kinds_is_not_pushed(zoo):
    (zoo.folder / "model_index.json").write_text("{}")
    with pytest.raises(HubError, match="holds both a zoo and a pipeline"):
        push(zoo.folder, "me/both")


def push_and_note(folder: Path, repo: str) -> tuple[str, list[str]]:
    """What a push says, and the cards that it sent to the Hub."""
    sent, validate = [], RepoCard.validate
    RepoCard.validate = lambda card, *arguments: sent.append(card.content)
    try:
        return said("push", "--folder", str(folder), "--repo", repo), sent
    finally:
        RepoCard.validate = validate


def test_a_card_that_is_a_link_out_of_the_folder_is_sent_nowhere(alice, tmp_path):
    folder, secret = tmp_path / "pipeline", tmp_path / "secret"
    folder.mkdir()
    (folder / "model_index.json").write_text("{}")
    secret.write_text("my secret")
    (folder / "README.md").symlink_to(secret)
    line, sent = alice(push_and_note, folder, "alice/linked")
    assert re.search(r"README\.md is a link that leads out of", line)
    assert sent == []


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have no such names")
def test_a_file_whose_name_is_no_text_is_named(zoo):
    Path(zoo.folder, os.fsdecode(b"notes-\xff.txt")).touch()
    with pytest.raises(HubError, match=r"notes-.*\.txt has a name that is no UTF-8, as the Hub needs it: rename it"):
        push(zoo.folder, "me/odd")


# ---- what lies there as if this machine had made it


def test_planted_networks_are_not_taken_for_ours(digits_pipeline, tmp_path):
    arguments = [
        "generate",
        "--pipeline",
        str(digits_pipeline),
        "--output-dir",
        str(tmp_path),
        "--num-inference-steps",
        "2",
    ]
    cli([*arguments, "--num-networks", "4"])
    expected = WeightZoo(tmp_path).vectors()
    shutil.rmtree(tmp_path)
    cli([*arguments, "--num-networks", "1"])
    planted = tmp_path / PARTS / "networks-0-to-4.safetensors"
    planted.parent.mkdir()
    rows = json.dumps([{"seed": seed} for seed in range(4)])
    save_file({"networks": torch.zeros(4, expected.shape[1])}, planted, {"rows": rows})
    cli([*arguments, "--num-networks", "4"])
    torch.testing.assert_close(WeightZoo(tmp_path).vectors(), expected, atol=1e-5, rtol=1e-5)
    assert (WeightZoo(tmp_path).vectors() != 0).any(1).all()


@pytest.mark.slow
def test_planted_scores_are_not_believed(digits_zoo, tmp_path, monkeypatch):
    arguments = {"trained": digits_zoo, "generated": digits_zoo, "networks_per_point": 2}
    expected = evaluate(**arguments)["groups"]["trained"]["accuracy"]
    kept = []
    monkeypatch.setattr("pdiff_hf.evaluation.stage.shutil.rmtree", lambda folder, **_: kept.append(folder))
    evaluate(**arguments, output_dir=tmp_path)
    parts = sorted((tmp_path / SCORES).glob("*.pt"))
    assert parts
    assert kept
    # Somebody else made them: by the same rule, with another secret.
    for part in parts:
        content = torch.load(part, weights_only=True)
        content["correct"] = {split: torch.zeros_like(values) for split, values in content["correct"].items()}
        torch.save(content, part)
    monkeypatch.setattr("pdiff_hf.evaluation.scoring.own_name", lambda *parts: "mine")
    assert evaluate(**arguments, output_dir=tmp_path)["groups"]["trained"]["accuracy"] == expected


# ---- pipelines whose descriptions ask for too much


@pytest.mark.parametrize(
    ("file", "changes", "message"),
    [
        ("model_index.json", {"scheduler": ["diffusers", "UNet1DModel"]}, "which is no scheduler of diffusers"),
        ("model_index.json", {"scheduler": ["diffusers", 5]}, "cannot be loaded"),
        ("scheduler/scheduler_config.json", {"solver_order": 10**9}, "solver_order is 1e"),
        ("scheduler/scheduler_config.json", {"some": {"nested": [1, 10**15]}}, "nested is 1e"),
        ("unet/config.json", {"layers_per_block": 10**6}, "layers_per_block"),
        ("unet/config.json", {"block_out_channels": [8] * 50_000}, "layers_per_block|more than 20,000 layers"),
        (
            "model_index.json",
            {"unet": ["diffusers", "DiTTransformer2DModel"]},
            "is of the class 'DiTTransformer2DModel'",
        ),
        ("model_index.json", {"unet": ["diffusers", "AutoModel"]}, "is of the class 'AutoModel'"),
        (
            "model_index.json",
            {"unet": ["antigravity.x", "ParameterUNet1DModel"]},
            "unet is of the module 'antigravity.x', which is none of this package",
        ),
        ("vae/config.json", {"latent_channels": 10**13}, "latent_channels is 1e"),
    ],
)
def test_descriptions_are_bounded_before_work(zoo, tmp_path, file, changes, message):
    pipeline_in(tmp_path / "p", zoo.folder, 0)
    described = tmp_path / "p" / file
    described.write_text(json.dumps(json.loads(described.read_text()) | changes))
    start = time.monotonic()
    with pytest.raises(PdiffError, match=message):
        load_pipeline(tmp_path / "p")
    assert time.monotonic() - start < 10


def test_a_foreign_model_of_endless_layers_is_given_up(zoo, tmp_path):
    pipeline_in(tmp_path / "p", zoo.folder, 0)
    index = tmp_path / "p" / "model_index.json"
    index.write_text(json.dumps(json.loads(index.read_text()) | {"unet": ["diffusers", "UNet1DModel"]}))
    (tmp_path / "p" / "unet" / "config.json").write_text(
        json.dumps({"_class_name": "UNet1DModel", "layers_per_block": 10**9, "block_out_channels": [8] * 10_000,
                    "down_block_types": ["DownBlock1D"] * 10_000, "up_block_types": ["UpBlock1D"] * 10_000})
    )  # fmt: skip
    start = time.monotonic()
    with pytest.raises(PdiffError, match="more than 20,000 layers"):
        load_pipeline(tmp_path / "p")
    assert time.monotonic() - start < 30


def test_ordinary_schedulers_pass(zoo, tmp_path):
    pipeline_in(tmp_path / "p", zoo.folder, 0)
    for scheduler in (DPMSolverMultistepScheduler(), DDPMScheduler(num_train_timesteps=4000)):
        scheduler.save_pretrained(tmp_path / "p" / "scheduler")
        index = json.loads((tmp_path / "p" / "model_index.json").read_text())
        index["scheduler"] = ["diffusers", type(scheduler).__name__]
        (tmp_path / "p" / "model_index.json").write_text(json.dumps(index))
        load_pipeline(tmp_path / "p")


# ---- repositories whose weights are not where they are looked for


def publish_others() -> None:
    for name, files in {
        "sharded": ("model.safetensors.index.json", "model-00001-of-00002.safetensors"),
        "pickled": ("pytorch_model.bin", "config.json"),
        "adapter": ("adapter_model.safetensors", "adapter_config.json"),
    }.items():
        HfApi().create_repo(f"alice/other-{name}")
        for file in files:
            HfApi().upload_file(path_or_fileobj=b"{}", path_in_repo=file, repo_id=f"alice/other-{name}")
    for number in (10, 9):
        save_file(random_network(number).state_dict(), f"{number}.safetensors")
        HfApi().create_repo(f"alice/run-{number}")
        HfApi().upload_file(
            path_or_fileobj=f"{number}.safetensors", path_in_repo="model.safetensors", repo_id=f"alice/run-{number}"
        )


@pytest.fixture(scope="module")
def others(alice, tmp_path_factory):
    alice(os.chdir, tmp_path_factory.mktemp("others"))
    alice(publish_others)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("sharded", r"has its weights in several files \(model\.safetensors\.index\.json lists them\)"),
        ("pickled", "no other safetensors file. Formats that can hold code are not read"),
        ("adapter", r"and these: adapter_model\.safetensors\. Name one with --filename"),
    ],
)
@pytest.mark.usefixtures("others")
def test_a_repository_is_told_what_it_has_instead(alice, tmp_path, name, message):
    line = alice(said, "import", "--repositories", f"alice/other-{name}", "--output-dir", str(tmp_path / "zoo"))
    assert re.search(message, line), line
    assert "upload is not complete" not in line
    assert not (tmp_path / "zoo").exists()


@pytest.mark.usefixtures("others")
def test_repositories_come_in_the_order_of_their_numbers(alice, tmp_path):
    assert alice(said, "import", "--repositories", "alice/run-*", "--output-dir", str(tmp_path / "zoo")) == "nothing"
    assert [row["source"] for row in WeightZoo(tmp_path / "zoo").metadata] == ["alice/run-9", "alice/run-10"]


def test_a_single_network_is_no_list_of_networks():
    network = random_network(0).state_dict()
    with pytest.raises(ZooError, match="Expected a list of state dicts"):
        evaluate("digits-mlp", trained=network, generated=[network])
    with pytest.raises(ZooError, match="Expected a list of state dicts, and it holds str"):
        evaluate("digits-mlp", trained=["a", "b"], generated=[network])
