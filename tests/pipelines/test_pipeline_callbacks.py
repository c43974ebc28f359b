"""Callbacks see, change and stop the denoising, and the progress bar counts it: as diffusers asks of its pipelines."""

import diffusers
import pytest
import torch
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback

from .cases import assert_same, build_pipe, run


class Counter(PipelineCallback):
    """A callback object as diffusers writes them: it names the tensors that it wants."""

    tensor_inputs = ["latents"]
    steps = 0

    def callback_fn(self, pipeline, step_index, timestep, callback_kwargs):
        self.steps += 1
        assert step_index < pipeline.num_timesteps
        assert list(callback_kwargs) == self.tensor_inputs
        return callback_kwargs


class CounterWithoutTensors(Counter):
    tensor_inputs = []


class CounterOfPrompts(Counter):
    tensor_inputs = ["prompt_embeds"]


class Stop:
    """Interrupts after one step of the denoising, and keeps the latents of each step."""

    def __init__(self, after: int):
        self.after, self.seen = after, []

    def __call__(self, pipe, step, timestep, tensors):
        self.seen.append(tensors["latents"].clone())
        if len(self.seen) == self.after:
            pipe._interrupt = True
        return tensors


def test_callbacks_get_the_tensors_they_ask_for_at_each_step(pipe):
    seen = []

    def note(pipe, step, timestep, tensors):
        seen.append((step, float(timestep), sorted(tensors)))
        return tensors

    run(pipe, callback_on_step_end=note, callback_on_step_end_tensor_inputs=pipe._callback_tensor_inputs)
    timesteps = pipe.scheduler.timesteps.tolist()
    assert seen == [(step, timestep, ["latents"]) for step, timestep in enumerate(timesteps)]


@pytest.mark.parametrize("nothing", [[], None])
def test_callbacks_may_ask_for_no_tensors_and_return_none(pipe, nothing):
    seen = []
    vectors = run(
        pipe,
        callback_on_step_end=lambda pipe, step, timestep, tensors: seen.append(dict(tensors)),
        callback_on_step_end_tensor_inputs=nothing,
    )
    assert seen == [{}, {}, {}]
    assert_same(vectors, run(pipe))


def test_a_callback_replaces_the_latents_of_the_last_step(pipe):
    def zero_at_the_end(pipe, step, timestep, tensors):
        if step == pipe.num_timesteps - 1:
            tensors["latents"] = torch.zeros_like(tensors["latents"])
        return tensors

    latents = run(pipe, output_type="latent", callback_on_step_end=zero_at_the_end)
    assert latents.abs().sum() == 0
    assert pipe.num_timesteps == 3


def test_callbacks_asking_for_unknown_tensors_are_refused(pipe):
    with pytest.raises(ValueError, match=r"callback_on_step_end_tensor_inputs.*latents"):
        run(pipe, callback_on_step_end_tensor_inputs=["latents", "prompt_embeds"])


# ---- the callback objects of diffusers


def test_the_callback_objects_of_diffusers_serve(pipe):
    counter = Counter(cutoff_step_ratio=0.5)
    run(pipe, callback_on_step_end=counter)
    assert counter.steps == 3


@pytest.mark.parametrize("argument", [["latents"], ["prompt_embeds"], None])
def test_a_callback_object_names_its_own_tensors_whatever_the_argument_says(argument):
    counter = CounterWithoutTensors()
    run(build_pipe(), callback_on_step_end=counter, callback_on_step_end_tensor_inputs=argument)
    assert counter.steps == 3


def test_a_callback_object_that_wants_unknown_tensors_is_refused():
    with pytest.raises(ValueError, match=r"has to be in \['latents'\], and is \['prompt_embeds'\]"):
        run(build_pipe(), callback_on_step_end=CounterOfPrompts())


def test_several_callback_objects_run_one_after_the_other():
    counters = [Counter(), Counter()]
    run(build_pipe(), callback_on_step_end=MultiPipelineCallbacks(counters), callback_on_step_end_tensor_inputs=None)
    assert [counter.steps for counter in counters] == [3, 3]


# ---- stopping


def test_a_callback_that_interrupts_ends_the_denoising_with_the_latents_of_that_step(pipe):
    stop = Stop(after=2)
    latents = run(pipe, output_type="latent", callback_on_step_end=stop)
    assert len(stop.seen) == 2
    assert torch.equal(latents, stop.seen[1])
    assert pipe.interrupt


def test_interrupting_in_the_first_of_several_chunks_gives_the_networks_of_that_chunk(pipe):
    stop = Stop(after=1)
    vectors = run(pipe, num_networks=5, chunk_size=2, callback_on_step_end=stop)
    assert len(stop.seen) == 1
    assert vectors.shape == (2, pipe.layout.vector_size)
    assert_same(vectors, pipe.decode(stop.seen[0]))


def test_interrupting_in_a_later_chunk_keeps_the_chunks_before_it_whole(pipe):
    expected = run(pipe, num_networks=5, chunk_size=2)
    stop = Stop(after=3 + 1)
    vectors = run(pipe, num_networks=5, chunk_size=2, callback_on_step_end=stop)
    assert len(vectors) == 4
    assert torch.equal(vectors[:2], expected[:2])
    assert_same(vectors[2:], pipe.decode(stop.seen[-1]))


def test_interrupting_gives_as_many_state_dicts_as_networks_were_begun():
    assert (
        len(run(build_pipe(), num_networks=5, chunk_size=2, output_type="state_dict", callback_on_step_end=Stop(1)))
        == 2
    )


def test_an_interrupt_lasts_for_one_call(pipe):
    expected = run(pipe)
    run(pipe, callback_on_step_end=Stop(after=1))
    assert_same(run(pipe), expected)
    assert not pipe.interrupt


# ---- the progress bar


@pytest.mark.parametrize(
    ("scheduler", "chunk_size", "count"),
    [
        ("DDIMScheduler", 5, "5/5"),
        ("HeunDiscreteScheduler", 5, "9/9"),  # two evaluations a step, but for the last
        ("KDPM2DiscreteScheduler", 5, "9/9"),
        ("DDIMScheduler", 2, "15/15"),
        ("HeunDiscreteScheduler", 2, "27/27"),
    ],
)
def test_the_progress_bar_counts_denoising_steps_of_all_chunks(capfd, scheduler, chunk_size, count):
    pipe = build_pipe()
    pipe.scheduler = getattr(diffusers, scheduler).from_config(pipe.scheduler.config)
    pipe.set_progress_bar_config(disable=False, desc="networks")
    run(pipe, num_networks=5, num_inference_steps=5, chunk_size=chunk_size)
    printed = capfd.readouterr().err
    assert "networks: 100%" in printed
    assert f" {count} " in printed


def test_the_progress_bar_can_be_disabled(pipe, capfd):
    run(pipe)
    assert capfd.readouterr().err == ""
