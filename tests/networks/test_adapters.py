"""Adapters of a base network: the form in which two of one effect are one, and what PEFT makes of the same tensors."""

import peft
import pytest
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, ViTConfig, ViTForImageClassification

from pdiff_hf import ParameterLayout, Task
from pdiff_hf.errors import TaskError
from pdiff_hf.networks.adapted import PREFIX, AdaptedNetwork, lora
from pdiff_hf.networks.canonical import rounding
from pdiff_hf.networks.gauge import Gauge, pairs_of, symmetry_of
from pdiff_hf.networks.predictor import Predictor
from pdiff_hf.networks.symmetry import Symmetry
from pdiff_hf.networks.trainer import is_stackable


def adapter(rank: int, seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        f"{PREFIX}one.lora_A.weight": torch.randn(rank, 7, generator=generator),
        f"{PREFIX}one.lora_B.weight": torch.randn(5, rank, generator=generator),
        f"{PREFIX}two.lora_A.weight": torch.randn(rank, 3, 2, 2, generator=generator),
        f"{PREFIX}two.lora_B.weight": torch.randn(4, rank, 1, 1, generator=generator),
        f"{PREFIX}head.weight": torch.randn(2, 5, generator=generator),
    }


def zoo_of(rank: int, count: int = 6) -> tuple[Gauge, torch.Tensor]:
    adapters = [adapter(rank, seed) for seed in range(count)]
    layout = ParameterLayout.from_state_dict(adapters[0])
    return Gauge(layout), torch.stack([layout.flatten(one) for one in adapters])


def products(gauge: Gauge, vectors: torch.Tensor) -> list[torch.Tensor]:
    return [b @ a for b, a in (gauge.factors(vectors, pair) for pair in gauge.pairs)]


@pytest.mark.parametrize("rank", [1, 2, 4, 9])
def test_the_canonical_form_keeps_the_product_and_all_that_is_no_factor(rank):
    gauge, vectors = zoo_of(rank)
    canonical = gauge.canonical(vectors, gauge.reference(vectors))
    for before, after in zip(products(gauge, vectors), products(gauge, canonical), strict=True):
        assert (before - after).norm() <= 1e-6 * before.norm()
    head = gauge.layout.slices[f"{PREFIX}head.weight"]
    assert torch.equal(canonical[:, head], vectors[:, head])
    for pair in gauge.pairs:
        b, a = gauge.factors(canonical, pair)
        torch.testing.assert_close(b.mT @ b, a @ a.mT, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("rank", [1, 2, 4])
def test_adapters_of_the_same_product_have_one_canonical_form(rank):
    gauge, vectors = zoo_of(rank)
    reference = gauge.reference(vectors)
    changed = torch.stack([gauge.shuffled(one, torch.Generator().manual_seed(3)) for one in vectors])
    assert (changed - vectors).norm() > 0.1 * vectors.norm()
    torch.testing.assert_close(
        gauge.canonical(changed, reference), gauge.canonical(vectors, reference), atol=1e-4, rtol=1e-4
    )


def test_signs_are_those_of_the_mean_of_the_zoo():
    gauge, vectors = zoo_of(1, count=1)
    noisy = vectors + 0.05 * torch.randn(20, vectors.shape[1], generator=torch.Generator().manual_seed(1))
    signs = torch.ones_like(noisy)
    for pair in gauge.pairs:
        for name in (pair.a, pair.b):
            signs[::2, gauge.layout.slices[name]] = -1
    canonical = gauge.canonical(noisy * signs, gauge.reference(noisy * signs))
    assert (canonical - canonical.mean(0)).norm() < 0.2 * canonical.norm()


def test_zeros_and_deficient_ranks_stay_what_they_are():
    gauge, vectors = zoo_of(3)
    vectors[0] = 0
    for pair in gauge.pairs:
        b, a = gauge.factors(vectors[1:2], pair)
        b[:, :, 2] = b[:, :, 1]
        gauge._put(vectors[1:2], pair, b, a)
    canonical = gauge.canonical(vectors, gauge.reference(vectors))
    assert torch.isfinite(canonical).all()
    assert not canonical[0].any()
    for before, after in zip(products(gauge, vectors), products(gauge, canonical), strict=True):
        torch.testing.assert_close(before, after, atol=1e-5, rtol=1e-5)


def test_a_mix_has_the_mean_update_as_far_as_its_rank_goes():
    gauge, vectors = zoo_of(2)
    same = torch.stack([gauge.shuffled(vectors[0], torch.Generator().manual_seed(seed)) for seed in range(4)])
    balanced = gauge.balance(vectors[:1])
    torch.testing.assert_close(gauge.mix(balanced), balanced[0], atol=1e-5, rtol=1e-5)  # signs stay, too
    for before, after in zip(products(gauge, vectors[:1]), products(gauge, gauge.mix(same)[None]), strict=True):
        torch.testing.assert_close(before, after, atol=1e-5, rtol=1e-5)
    # Factors, averaged in bases of their own, are of another update.
    assert (products(gauge, same.mean(0, keepdim=True))[0] - products(gauge, vectors[:1])[0]).norm() > 1e-2
    (u, s, vh), (mixed,) = (
        torch.linalg.svd(products(gauge, vectors)[0].mean(0)),
        products(gauge, gauge.mix(vectors)[None])[0],
    )
    torch.testing.assert_close(mixed, u[:, :2] * s[:2] @ vh[:2], atol=1e-5, rtol=1e-5)


def test_the_form_is_continuous_where_singular_values_are_equal():
    gauge, vectors = zoo_of(2)
    reference = gauge.reference(vectors)
    equal = vectors[:1].clone()
    for pair in gauge.pairs:
        b, a = (
            torch.linalg.qr(factor.mT).Q.mT if wide else torch.linalg.qr(factor).Q
            for factor, wide in zip(gauge.factors(equal, pair), (False, True), strict=True)
        )
        gauge._put(equal, pair, b, a)
    nudges = 1e-4 * torch.randn(50, equal.shape[1], generator=torch.Generator().manual_seed(0))
    moved = gauge.canonical(equal + nudges, reference) - gauge.canonical(equal, reference)
    assert moved.norm(dim=1).max() < 100 * nudges.norm(dim=1).max()


# ---- the same as PEFT


def vit(classes: int = 3) -> ViTForImageClassification:
    config = ViTConfig(
        image_size=8, patch_size=4, num_channels=1, hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=32, num_labels=classes, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
        attn_implementation="eager",
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return ViTForImageClassification(config).eval()


def gpt2() -> GPT2LMHeadModel:
    config = GPT2Config(vocab_size=20, n_positions=8, n_embd=16, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return GPT2LMHeadModel(config).eval()


def test_training_leaves_the_statistics_of_the_base_network():
    base = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 2))
    network = AdaptedNetwork(base, lora(base, ["3"], 2)).train()
    before = {name: value.clone() for name, value in base.state_dict().items()}
    network(3 + torch.randn(10, 4)).sum().backward()
    assert all(torch.equal(value, before[name]) for name, value in base.state_dict().items())
    assert base[2].training
    assert not network.eval().training
    assert not base[2].training


def test_a_prediction_leaves_the_base_network_in_training_and_networks_that_share_one_do_not_meet():
    base = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.5), nn.Linear(8, 2))
    trained, other, third = (AdaptedNetwork(base.train(mode), lora(base, ["2"], 2)) for mode in (True, True, False))
    assert trained.training
    assert not third.training
    inputs = torch.ones(50, 4)
    trained.train()
    other.eval()
    Task().predict(trained, inputs)
    assert len(trained(inputs).unique(dim=0)) > 1
    assert len(other(inputs).unique(dim=0)) == 1
    assert len(trained(inputs).unique(dim=0)) > 1


class Convolutions(nn.Module):
    def __init__(self):
        super().__init__()
        self.words = nn.Embedding(20, 6)
        self.conv = nn.Conv2d(6, 4, 3, padding=1)

    def forward(self, indices):
        return self.conv(self.words(indices).movedim(-1, 1)).mean((2, 3))


IMAGES = torch.randn(5, 1, 8, 8, generator=torch.Generator().manual_seed(1))
WORDS = torch.randint(20, (5, 6), generator=torch.Generator().manual_seed(1))
LIKE_PEFT = {
    "vit": (vit, ["q_proj", "v_proj"], ["classifier"], IMAGES),
    "layers that store weights by inputs": (gpt2, ["c_attn"], None, WORDS),
    "an embedding that the head is tied to": (gpt2, ["wte"], None, WORDS),
    "a head that is tied to an embedding": (gpt2, ["lm_head"], None, WORDS),
    "convolutions and embeddings": (Convolutions, ["words", "conv"], None, WORDS.view(5, 2, 3)),
}


@pytest.mark.parametrize("name", LIKE_PEFT)
def test_an_adapted_network_is_what_peft_makes_of_the_same_file(name):
    build, targets, trained, inputs = LIKE_PEFT[name]
    torch.manual_seed(0)
    base = build()
    config = peft.LoraConfig(r=2, lora_alpha=2, target_modules=targets, modules_to_save=trained)
    model = peft.get_peft_model(build(), config).eval()
    base.load_state_dict(build().state_dict() if name != "convolutions and embeddings" else {
        key.removeprefix(PREFIX).replace(".base_layer", ""): value
        for key, value in model.state_dict().items() if "lora" not in key
    })  # fmt: skip
    state_dict = {
        # Of a head, PEFT saves the base network's own weight, too.
        key: value if "base_layer" in key else torch.randn(value.shape, generator=torch.Generator().manual_seed(2))
        for key, value in peft.get_peft_model_state_dict(model).items()
    }
    assert not peft.set_peft_model_state_dict(model, state_dict).unexpected_keys
    ours = AdaptedNetwork(base, state_dict)
    assert ours.state_dict().keys() == state_dict.keys()
    theirs = model(inputs)
    torch.testing.assert_close(ours(inputs), getattr(theirs, "logits", theirs), atol=1e-4, rtol=1e-4)
    layout = ParameterLayout.from_state_dict(ours.state_dict())
    changed = Gauge(layout).shuffled(layout.flatten(state_dict), torch.Generator().manual_seed(0))
    ours.load_state_dict(layout.unflatten(changed[None])[0])
    torch.testing.assert_close(ours(inputs), getattr(theirs, "logits", theirs), atol=1e-3, rtol=1e-3)


def test_adapters_are_in_float32_whatever_their_base_is_in():
    begins = lora(vit().bfloat16(), ["q_proj"], 2, ["classifier"])
    assert {value.dtype for value in begins.values()} == {torch.float32}
    state_dict = {name: 0.1 * torch.randn_like(value) for name, value in begins.items()}
    expected, without = (AdaptedNetwork(vit(), some)(IMAGES) for some in (state_dict, begins))
    network = AdaptedNetwork(vit().bfloat16(), state_dict)
    found = network(IMAGES.bfloat16())
    assert found.dtype == torch.bfloat16
    error = (found.float() - expected).abs().max()
    assert error < 0.1 * (expected - without).abs().max()
    # Eight units in the last place of what is rounded most.
    assert rounding(network) == 8 * torch.finfo(torch.bfloat16).eps
    found.float().square().sum().backward()
    assert all(value.grad.dtype == torch.float32 and value.grad.isfinite().all() for value in network.parameters())


def test_what_is_trained_entirely_is_not_adapted_too():
    begins = lora(vit(), ["q_proj", "classifier"], 2, ["classifier"])
    assert begins.keys() == lora(vit(), ["q_proj"], 2, ["classifier"]).keys()


@pytest.mark.parametrize(("build", "targets"), [(vit, ["q_proj", "v_proj"]), (gpt2, ["c_attn"])])
def test_training_begins_with_the_tensors_of_peft(build, targets):
    trained = ["classifier"] if build is vit else None
    torch.manual_seed(0)
    begins = lora(build(), targets, 3, trained)
    config = peft.LoraConfig(r=3, target_modules=targets, modules_to_save=trained)
    theirs = peft.get_peft_model_state_dict(peft.get_peft_model(build(), config))
    assert {name: value.shape for name, value in begins.items()} == {n: value.shape for n, value in theirs.items()}
    for name, value in begins.items():
        if "lora_A" in name:
            assert abs(value.std() / theirs[name].std() - 1) < 0.3
        else:
            assert torch.equal(value, theirs[name])


def test_what_does_not_fit_the_base_network_is_said():
    good = lora(vit(), ["q_proj"], 2)
    with pytest.raises(TaskError, match=r"the base network no `nothing\.weight`"):
        AdaptedNetwork(vit(), {f"{PREFIX}nothing.lora_A.weight": torch.zeros(2, 3)})
    with pytest.raises(TaskError, match=r"has `.*lora_B\.weight`, and no `.*lora_A\.weight`"):
        AdaptedNetwork(vit(), {name: value for name, value in good.items() if "lora_B" in name})
    with pytest.raises(TaskError, match=r"and no `.*lora_B\.weight`"):
        AdaptedNetwork(vit(), {name: value for name, value in good.items() if "lora_A" in name})
    with pytest.raises(TaskError, match=r"The update of .* is \[16, 15\], and the weight \[16, 16\]"):
        AdaptedNetwork(vit(), {n: v[:, :15] if "lora_A" in n else v for n, v in good.items()})
    with pytest.raises(TaskError, match=r"`.*classifier\.weight` is \[3, 16\], and that .* \[4, 16\]"):
        AdaptedNetwork(vit(4), lora(vit(3), ["q_proj"], 2, ["classifier"]))
    with pytest.raises(TaskError, match="has no module `query`"):
        lora(vit(), ["query"], 2)
    with pytest.raises(TaskError, match="no linear layer"):
        lora(vit(), ["layers"], 2)


# ---- as a task


class Images(Task):
    batch_size = 10
    epochs = 1
    base = vit()

    def build_network(self):
        return AdaptedNetwork(self.base, lora(self.base, ["q_proj", "v_proj"], 2, ["classifier"]))

    def data(self, split):
        generator = torch.Generator().manual_seed(len(split))
        return torch.randn(60, 1, 8, 8, generator=generator), torch.randint(3, (60,), generator=generator)


def test_adapters_are_trained_and_run_side_by_side():
    task = Images()
    layout = ParameterLayout.from_state_dict(task.build_network().state_dict())
    assert layout.vector_size == 4 * 2 * (16 + 16) + 3 * 17
    assert is_stackable([task, task], layout)
    vectors = 0.3 * torch.randn(6, layout.vector_size, generator=torch.Generator().manual_seed(0))
    predict = Predictor(task, layout, torch.device("cpu"))
    predict.adopt(1000)
    inputs = task.data("test")[0]
    together = predict(vectors, inputs)
    predict.adopt(None)
    torch.testing.assert_close(together, predict(vectors, inputs), atol=1e-5, rtol=1e-5)


def test_many_examples_are_predicted_on_several_threads():
    task = Images()
    layout = ParameterLayout.from_state_dict(task.build_network().state_dict())
    vectors = 0.3 * torch.randn(3, layout.vector_size, generator=torch.Generator().manual_seed(0))
    inputs = torch.randn(2000, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    predict = Predictor(task, layout, torch.device("cpu"))
    predict.adopt(1000)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(4)
        together = predict(vectors, inputs)
    finally:
        torch.set_num_threads(threads)
    predict.adopt(None)
    torch.testing.assert_close(together, predict(vectors, inputs), atol=1e-5, rtol=1e-5)


def test_the_symmetry_of_adapters_is_that_of_their_ranks():
    task = Images()
    layout = ParameterLayout.from_state_dict(task.build_network().state_dict())
    gauge = symmetry_of(task.build_network(), layout, task.data("train")[0][:1])
    assert isinstance(gauge, Gauge)
    assert str(gauge) == "4 low-rank updates"
    assert len(pairs_of(layout)) == 4
    vector = 0.3 * torch.randn(layout.vector_size, generator=torch.Generator().manual_seed(0))
    assert gauge.holds(Predictor(task, layout, torch.device("cpu")), vector, task.data("test")[0])
    network = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    assert isinstance(
        symmetry_of(network, ParameterLayout.from_state_dict(network.state_dict()), torch.zeros(1, 3)), Symmetry
    )
