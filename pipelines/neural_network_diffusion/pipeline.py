# Over 400 lines: a repository on the Hub holds a pipeline in one file, and half of it documents arguments.
"""Samples neural networks: noise -> latents -> normalized vectors -> state dicts."""

import importlib.util
import inspect
import json
import math
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from numbers import Integral
from pathlib import Path
from typing import Any, Generic, Literal, TypeVar, overload

import numpy as np
import torch
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from diffusers.models.modeling_utils import ModelMixin
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from diffusers.schedulers import FlowMatchEulerDiscreteScheduler, FlowMatchHeunDiscreteScheduler
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from diffusers.utils import BaseOutput
from diffusers.utils.torch_utils import randn_tensor
from huggingface_hub import CommitInfo, CommitOperationAdd, HfApi


# In the folder of a pipeline, while it is saved.
UNFINISHED = ".unfinished-pipeline"
FLOW_MATCHING = (FlowMatchEulerDiscreteScheduler, FlowMatchHeunDiscreteScheduler)
# Numbers of a chunk of networks that are in memory, in each of about a dozen forms: up to 3 GB.
CHUNK_VALUES = 2**26
StateDict = dict[str, torch.Tensor]
Networks = TypeVar("Networks", list[StateDict], torch.Tensor, np.ndarray)
Callback = Callable[["NeuralNetworkDiffusionPipeline", int, Any, dict[str, torch.Tensor]], dict[str, torch.Tensor]]


@dataclass
class NeuralNetworkDiffusionPipelineOutput(BaseOutput, Generic[Networks]):
    """
    Args:
        state_dicts (`list[dict[str, torch.Tensor]]`, `torch.Tensor` or `np.ndarray`):
            The generated networks in the form that `output_type` asked for: state dicts, parameter vectors `[N, P]`,
            or latents `[N, C, L]`.
    """

    state_dicts: Networks


class NeuralNetworkDiffusionPipeline(DiffusionPipeline):
    r"""
    Pipeline that generates trained networks of one architecture (Neural Network Diffusion, arXiv 2402.13144).

    Args:
        layout (`ParameterLayout`): Turns normalized vectors into state dicts.
        scheduler (`SchedulerMixin`):
            The noise of the training, such as `DDPMScheduler` or, for flow matching,
            `FlowMatchEulerDiscreteScheduler`. Another one of its kind can be swapped in with
            `SchedulerClass.from_config(pipe.scheduler.config)`.
        vae (`ParameterAutoencoderKL` or `LinearParameterAutoencoder`, *optional*):
            Decodes latents `[B, C, L]` to normalized parameter vectors. Without one, these vectors themselves are
            denoised, as `[B, 1, P]`.
        unet (`ParameterUNet1DModel`, *optional*): Denoises. Any 1-D model with the same `forward` serves.
        transformer (`ModelMixin`, *optional*): Denoises in its place: exactly one of the two is there.
        condition_encoder (`ModelMixin`, *optional*):
            Turns what is asked for into embeddings `[B, E]`, which the denoiser gets as `condition`.
    """

    model_cpu_offload_seq = "condition_encoder->unet->transformer->vae"
    # It has no parameters, which Accelerate's hooks look for, and is small.
    _exclude_from_cpu_offload = ["layout"]
    _optional_components = ["vae", "unet", "transformer", "condition_encoder"]
    _callback_tensor_inputs = ["latents"]

    def __init__(
        self,
        layout: ModelMixin,
        scheduler: SchedulerMixin,
        vae: ModelMixin | None = None,
        unet: ModelMixin | None = None,
        transformer: ModelMixin | None = None,
        condition_encoder: ModelMixin | None = None,
    ):
        super().__init__()
        for name, part in (("layout", layout), ("scheduler", scheduler)):
            if part is None:
                raise ValueError(f"The pipeline has no {name}, without which nothing can be generated.")
        if (unet is None) == (transformer is None):
            raise ValueError(
                "The pipeline needs one denoiser, `unet` or `transformer`, and has "
                f"{'none' if unet is None else 'both'}."
            )
        # What takes whole networks: the autoencoder, and a denoiser of them.
        for name, part in (("autoencoder", vae), ("denoiser", unet if transformer is None else transformer)):
            size = None if part is None else getattr(part.config, "num_parameters", None)
            if size not in (None, layout.vector_size):
                raise ValueError(
                    f"The {name} is made for vectors of {size} parameters, and the layout has {layout.vector_size}: "
                    "they belong to different networks."
                )
        self.register_modules(
            layout=layout,
            scheduler=scheduler,
            vae=vae,
            unet=unet,
            transformer=transformer,
            condition_encoder=condition_encoder,
        )
        expected, channels = getattr(self.denoiser.config, "in_channels", None), self.latent_shape[0]
        if expected not in (None, channels):
            raise ValueError(
                f"The denoiser takes {expected} channels, and what it denoises has {channels}: "
                + ("the pipeline lacks the autoencoder." if vae is None else "it belongs to another autoencoder.")
            )
        self._interrupt = False

    @property
    def denoiser(self) -> ModelMixin:
        """The model in the one filled of the two slots."""
        return self.unet if self.unet is not None else self.transformer

    @property
    def latent_shape(self) -> tuple[int, int]:
        """C and L of what is denoised, `[B, C, L]`: the latents, or without an autoencoder 1 and P."""
        return (1, self.layout.vector_size) if self.vae is None else self.vae.latent_shape

    @property
    def default_inference_steps(self) -> int:
        """Denoising steps where their number is not passed."""
        return 20 if isinstance(self.scheduler, FLOW_MATCHING) else 50

    @property
    def default_chunk_size(self) -> int:
        """Networks at a time where their number is not passed: 100, and fewer where they are large."""
        of_one = max(1, self.layout.vector_size, getattr(self.denoiser, "pair_values", 0))
        return max(1, min(100, CHUNK_VALUES // of_one))

    @property
    def takes_initial(self) -> bool:
        """Whether the denoiser is told the initialization of a network."""
        return bool(getattr(self.denoiser.config, "with_initial", False))

    @torch.no_grad()
    def encode(self, vectors: torch.Tensor) -> torch.Tensor:
        """The latents `[N, C, L]` of networks, the mode of their posterior, from their parameter vectors `[N, P]`."""
        normalized = self.layout.normalize(vectors.to(self.layout.device))
        if self.vae is None:
            return normalized[:, None]
        return self.vae.encode(normalized.to(self._execution_device, self.vae.dtype)).latent_dist.mode()

    @torch.no_grad()
    def decode(
        self,
        latents: torch.Tensor,
        parameter_noise: float = 0.0,
        generator: torch.Generator | list[torch.Generator] | None = None,
    ) -> torch.Tensor:
        r"""
        The networks of latents.

        Args:
            latents (`torch.Tensor`): `[N, C, L]`.
            parameter_noise (`float`, *optional*, defaults to 0.0): As in `__call__`.
            generator (`torch.Generator` or `list[torch.Generator]`, *optional*): Of that noise.

        Returns:
            `torch.Tensor`: Parameter vectors, float32 `[N, P]`.
        """
        if self.vae is None:
            normalized = latents.flatten(1)
        else:
            normalized = self.vae.decode(latents.to(self._execution_device, self.vae.dtype), return_dict=False)[0]
        if parameter_noise:
            noise = randn_tensor(normalized.shape, generator, normalized.device, torch.float32)
            normalized = normalized + parameter_noise * noise.to(normalized.dtype)
        return self.layout(normalized.to(self.layout.device), return_dict=False)[0]

    def check_inputs(
        self,
        num_networks: int,
        num_inference_steps: int,
        generator: Any,
        latents: Any,
        initial: Any,
        condition: Any,
        guidance_scale: float,
        parameter_noise: float,
        chunk_size: int,
        output_type: str,
        tensor_inputs: Sequence[str],
    ) -> None:
        """Raises `ValueError` for arguments of `__call__` that do not fit together."""
        for name, value in (
            ("num_networks", num_networks),
            ("num_inference_steps", num_inference_steps),
            ("chunk_size", chunk_size),
        ):
            if not isinstance(value, Integral) or value < 1:
                raise ValueError(f"`{name}` has to be a positive integer, and is {value!r}.")
        for name, strength in (("parameter_noise", parameter_noise), ("guidance_scale", guidance_scale)):
            if not 0 <= strength < math.inf:
                raise ValueError(f"`{name}` has to be at least 0, and is {strength!r}.")
        generators = generator if isinstance(generator, (list, tuple)) else [generator]
        for one in generators:
            if not isinstance(one, torch.Generator | None):
                raise ValueError(
                    f"`generator` has to be a torch.Generator or a list of them, and there is {one!r}: pass "
                    "torch.Generator().manual_seed(0)."
                )
        if generators is generator and len(generators) != num_networks:
            raise ValueError(
                f"{len(generators)} generators were passed for {num_networks} networks: pass one for each."
            )
        shape = (num_networks, *self.latent_shape)
        if latents is not None and not isinstance(latents, torch.Tensor):
            raise ValueError(f"`latents` has to be a tensor of shape {shape}, and is a {type(latents).__name__}.")
        if latents is not None and latents.shape != shape:
            raise ValueError(f"`latents` has shape {tuple(latents.shape)}; expected {shape} for these networks.")
        if initial is not None and not self.takes_initial:
            raise ValueError("`initial` was passed, and this denoiser knows nothing of initializations.")
        if not isinstance(initial, torch.Tensor | list | tuple | None):
            raise ValueError(
                f"`initial` has to be a list of state dicts, and is a {type(initial).__name__}: [initial]."
            )
        if initial is not None and len(initial) != num_networks:
            raise ValueError(f"{len(initial)} initial networks were passed for {num_networks}: pass one for each.")
        size = self.layout.vector_size
        if isinstance(initial, torch.Tensor) and initial.shape != (num_networks, size):
            raise ValueError(f"`initial` has shape {tuple(initial.shape)}; expected {(num_networks, size)}.")
        if self.condition_encoder is None:
            for name, asked in (("condition", condition is not None), ("guidance_scale", guidance_scale != 1)):
                if asked:
                    raise ValueError(f"`{name}` was passed, and this pipeline cannot be asked for anything.")
        elif condition is None and guidance_scale != 1:
            raise ValueError("`guidance_scale` is for what is asked for: pass `condition`.")
        if isinstance(condition, (list, tuple)) and len(condition) != num_networks:
            raise ValueError(f"{len(condition)} conditions were passed for {num_networks} networks: one for each.")
        if not isinstance(condition, dict | list | tuple | None):
            raise ValueError(f"`condition` has to be a dict, or a list of them, and is {condition!r:.200}.")
        if output_type not in ("state_dict", "pt", "np", "latent"):
            raise ValueError(f"`output_type` is {output_type!r}; expected 'state_dict', 'pt', 'np' or 'latent'.")
        if not set(tensor_inputs) <= set(self._callback_tensor_inputs):
            raise ValueError(
                f"`callback_on_step_end_tensor_inputs` has to be in {self._callback_tensor_inputs}, and is "
                f"{list(tensor_inputs)}."
            )
        step = inspect.signature(getattr(self.scheduler, "step", lambda: None)).parameters
        needed = {name for name, parameter in step.items() if parameter.default is inspect.Parameter.empty}
        if needed != {"model_output", "timestep", "sample"}:
            raise ValueError(
                f"{type(self.scheduler).__name__} does not step from one timestep to the next. Swap in one that does, "
                "of the kind that the denoiser was trained with: DDPMScheduler, DDIMScheduler or "
                "DPMSolverMultistepScheduler, or for flow matching FlowMatchEulerDiscreteScheduler."
            )

    def _prepare_initial(
        self, initial: Sequence[StateDict] | torch.Tensor | None, generators: list[torch.Generator]
    ) -> torch.Tensor:
        """Initial networks as the denoiser takes them, `[N, C, L]`; drawn where there are none."""
        if initial is None:
            vectors = self.layout.draw_initial(generators)
        elif isinstance(initial, torch.Tensor):
            vectors = initial
        else:
            vectors = torch.stack([self.layout.flatten(state_dict) for state_dict in initial])
        return self.encode(vectors).to(self._execution_device, self.denoiser.dtype)

    def prepare_extra_step_kwargs(self, generator: list[torch.Generator], eta: float) -> dict[str, Any]:
        """Schedulers differ in what their `step` takes; only the stochastic ones take generators, and DDIM `eta`."""
        accepted = inspect.signature(self.scheduler.step).parameters
        offered = {"generator": generator, "eta": eta}
        return {name: value for name, value in offered.items() if name in accepted}

    def _set_timesteps(
        self,
        num_inference_steps: int,
        timesteps: Sequence[float] | None,
        sigmas: Sequence[float] | None,
        device: torch.device,
    ) -> torch.Tensor:
        given: dict[str, Any] = {"timesteps": timesteps, "sigmas": sigmas}
        custom = {name: value for name, value in given.items() if value is not None}
        if len(custom) == 2:
            raise ValueError("`timesteps` and `sigmas` both set the steps: pass one of them.")
        for name in custom.keys() - inspect.signature(self.scheduler.set_timesteps).parameters.keys():
            raise ValueError(f"{type(self.scheduler).__name__} takes no {name} of one's own.")
        last = self.scheduler.config.get("shift_terminal")
        if custom and last:
            # By itself the scheduler would stretch them to end there, and given timesteps would tell other levels.
            most = self.scheduler.config.num_train_timesteps
            levels = sigmas if timesteps is None else [timestep / most for timestep in timesteps]
            self.scheduler.register_to_config(shift_terminal=None)
            try:
                self.scheduler.set_timesteps(sigmas=levels, device=device)
            finally:
                self.scheduler.register_to_config(shift_terminal=last)
        else:
            self.scheduler.set_timesteps(**(custom or {"num_inference_steps": num_inference_steps}), device=device)
        if not torch.isfinite(torch.as_tensor(self.scheduler.timesteps, dtype=torch.float32)).all():
            raise ValueError(f"{num_inference_steps} denoising steps are too few for this scheduler: take 2 or more.")
        return self.scheduler.timesteps

    # A form and a wrapper of the result for each `output_type` and `return_dict`.
    @overload
    def __call__(
        self,
        num_networks: int | None = ...,
        num_inference_steps: int | None = ...,
        *,
        return_dict: Literal[False],
        **arguments: Any,
    ) -> tuple[Any]: ...

    @overload
    def __call__(
        self,
        num_networks: int | None = ...,
        num_inference_steps: int | None = ...,
        *,
        output_type: Literal["pt", "latent"],
        return_dict: Literal[True] = ...,
        **arguments: Any,
    ) -> NeuralNetworkDiffusionPipelineOutput[torch.Tensor]: ...

    @overload
    def __call__(
        self,
        num_networks: int | None = ...,
        num_inference_steps: int | None = ...,
        *,
        output_type: Literal["np"],
        return_dict: Literal[True] = ...,
        **arguments: Any,
    ) -> NeuralNetworkDiffusionPipelineOutput[np.ndarray]: ...

    @overload
    def __call__(
        self,
        num_networks: int | None = ...,
        num_inference_steps: int | None = ...,
        *,
        output_type: Literal["state_dict"] = ...,
        return_dict: Literal[True] = ...,
        **arguments: Any,
    ) -> NeuralNetworkDiffusionPipelineOutput[list[StateDict]]: ...

    @torch.no_grad()  # type: ignore[misc]
    def __call__(
        self,
        num_networks: int | None = None,
        num_inference_steps: int | None = None,
        timesteps: Sequence[float] | None = None,
        sigmas: Sequence[float] | None = None,
        eta: float = 0.0,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: torch.Tensor | None = None,
        initial: Sequence[StateDict] | torch.Tensor | None = None,
        condition: dict[str, Any] | Sequence[dict[str, Any]] | None = None,
        guidance_scale: float = 1.0,
        parameter_noise: float = 0.0,
        chunk_size: int | None = None,
        output_type: str = "state_dict",
        return_dict: bool = True,
        callback_on_step_end: Callback | PipelineCallback | MultiPipelineCallbacks | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] | None = ("latents",),
    ) -> Any:
        r"""
        Generates networks.

        Args:
            num_networks (`int`, *optional*):
                How many. Defaults to one for each of the `generator`s, `latents`, `initial` networks or conditions,
                and to 1 without a list of them.
            num_inference_steps (`int`, *optional*):
                Denoising steps. Defaults to 50: of 1000, 50, 20 and 10, the smallest whose networks are as good as
                those of 1000 steps with the scheduler of the training (`benchmarks/samplers.py`). With flow matching,
                20.
            timesteps (`list[int]`, *optional*): The timesteps themselves, where the scheduler takes them.
            sigmas (`list[float]`, *optional*): The noise levels themselves, where the scheduler takes them.
            eta (`float`, *optional*, defaults to 0.0):
                Noise of the steps of a DDIM scheduler, from 0 to 1 (Song et al. 2020, arXiv 2010.02502); ignored by
                the others.
            generator (`torch.Generator` or `list[torch.Generator]`, *optional*):
                One for all networks, or one for each. Every network draws its noise from a CPU generator of its own
                that is seeded by the next draw of the generator passed here, so the same seed gives the same networks
                (up to rounding) whatever `chunk_size`, device and dtype are, and the first networks stay the same
                when `num_networks` grows.
            latents (`torch.Tensor`, *optional*): Noise `[num_networks, C, L]` to start from instead of drawn noise.
            initial (`list[dict[str, torch.Tensor]]` or `torch.Tensor`, *optional*):
                Untrained networks, state dicts or vectors `[num_networks, P]`, where the denoiser was trained to be
                told the initialization: each network is what training would make of its own. By default they are drawn
                as those of the training zoo were; where these are neither uniform, normal, constant nor the same in
                all networks, they are needed.
            condition (`dict` or `list[dict]`, *optional*):
                What is asked for, such as `{"classes": [0, 1, 1], "validation_accuracy": 0.97}`: of all networks, or a
                dict for each. `pipe.condition_encoder.known()` says what there is. By default nothing is asked for.
            guidance_scale (`float`, *optional*, defaults to 1.0):
                By how much predictions with the condition are moved away from those without (classifier-free guidance,
                Ho and Salimans 2022, arXiv 2207.12598); 1 is off, and saves half of the time.
            parameter_noise (`float`, *optional*, defaults to 0.0):
                Standard deviation of Gaussian noise on each decoded parameter, in units of the parameter's own over
                the training zoo: what a sample of the autoencoder's likelihood has over its mean. Networks become
                more novel and less accurate, as with noise on training networks; constants stay.
            chunk_size (`int`, *optional*):
                Networks denoised and decoded at a time. Defaults to 100, and to fewer where networks are large.
            output_type (`str`, *optional*, defaults to `"state_dict"`):
                `"state_dict"` (on the CPU, complete, in the base network's dtypes; frozen tensors are shared among
                them), `"pt"` or `"np"` (parameter vectors, float32 `[N, P]`) or `"latent"` (float32 `[N, C, L]`).
            return_dict (`bool`, *optional*, defaults to `True`):
                Whether to return a [`NeuralNetworkDiffusionPipelineOutput`] instead of a tuple.
            callback_on_step_end (`Callable`, `PipelineCallback` or `MultiPipelineCallbacks`, *optional*):
                Called as `callback(pipe, step, timestep, tensors)` after each denoising step of each chunk; what it
                returns may replace the tensors. Where it sets `pipe._interrupt = True`, denoising stops: the result
                is that of the chunks that were begun.
            callback_on_step_end_tensor_inputs (`list[str]`, *optional*, defaults to `["latents"]`):
                The tensors that the callback gets; a `PipelineCallback` names its own.

        Returns:
            [`NeuralNetworkDiffusionPipelineOutput`] or `tuple`: the networks in `state_dicts`.

        Raises:
            `ValueError`: arguments that do not fit, or results that are not finite.

        Example:

        ```py
        >>> import torch
        >>> from diffusers import DiffusionPipeline

        >>> pipe = DiffusionPipeline.from_pretrained("runs/quickstart/pipeline", trust_remote_code=True)
        >>> state_dicts = pipe(num_networks=8, generator=torch.Generator().manual_seed(0)).state_dicts
        >>> network.load_state_dict(state_dicts[0])
        ```
        """
        # 1. Check the arguments
        if isinstance(callback_on_step_end, PipelineCallback | MultiPipelineCallbacks):
            callback_on_step_end_tensor_inputs = callback_on_step_end.tensor_inputs
        tensor_inputs = callback_on_step_end_tensor_inputs or ()
        if isinstance(tensor_inputs, str):
            tensor_inputs = (tensor_inputs,)
        if num_networks is None:
            several: Any = generator if isinstance(generator, (list, tuple)) else latents
            several = initial if several is None else several
            several = condition if several is None and not isinstance(condition, dict) else several
            num_networks = len(several) if hasattr(several, "__len__") else 1
        if num_inference_steps is None:
            num_inference_steps = self.default_inference_steps
        if chunk_size is None:
            chunk_size = self.default_chunk_size
        self.check_inputs(
            num_networks,
            num_inference_steps,
            generator,
            latents,
            initial,
            condition,
            guidance_scale,
            parameter_noise,
            chunk_size,
            output_type,
            tensor_inputs,
        )
        device = self._execution_device
        self._interrupt = False

        # 2. What is asked for, and one seed a network
        asked = nothing = None
        if self.condition_encoder is not None:
            rows = condition if isinstance(condition, (list, tuple)) else [condition or {}] * num_networks
            asked = self.condition_encoder(rows)
            nothing = None if guidance_scale == 1 else self.condition_encoder([{}])
        generators = generator if isinstance(generator, (list, tuple)) else [generator] * num_networks
        seeds = [draw_seed(parent) for parent in generators]

        chunks: list[torch.Tensor] = []
        starts = range(0, num_networks, chunk_size)
        self._num_timesteps = len(self._set_timesteps(num_inference_steps, timesteps, sigmas, device))
        with self.progress_bar(total=self._num_timesteps * len(starts)) as progress_bar:
            for start in starts:
                if self.interrupt:
                    break
                chunk_generators = [torch.Generator().manual_seed(seed) for seed in seeds[start : start + chunk_size]]

                # 3. Noise
                if latents is None:
                    shape = (len(chunk_generators), *self.latent_shape)
                    noise = randn_tensor(shape, generator=chunk_generators, device=device, dtype=torch.float32)
                else:
                    noise = latents[start : start + chunk_size].to(device, torch.float32)
                told = {}
                if self.takes_initial:
                    some = None if initial is None else initial[start : start + chunk_size]
                    told["initial"] = self._prepare_initial(some, chunk_generators)
                if asked is not None:
                    told["condition"] = asked[start : start + chunk_size].to(device, self.denoiser.dtype)

                # 4. Denoise
                steps = self._set_timesteps(num_inference_steps, timesteps, sigmas, device)
                if hasattr(self.scheduler, "noise_sampler_seed"):  # its steps take no generators
                    self.scheduler.noise_sampler_seed = [one.initial_seed() for one in chunk_generators]
                extra = self.prepare_extra_step_kwargs(chunk_generators, eta)
                guide = None if nothing is None else (guidance_scale, nothing.to(device, self.denoiser.dtype))
                chunk = self._denoise(
                    noise, told, guide, steps, extra, progress_bar, callback_on_step_end, tensor_inputs
                )

                # 5. Decode
                if output_type != "latent":
                    chunk = self.decode(chunk, parameter_noise, chunk_generators)
                if not torch.isfinite(chunk).all():
                    raise ValueError(
                        f"Some of the networks are not finite: {type(self.scheduler).__name__} does not fit this "
                        "denoiser, or the steps are too few, or the pipeline was trained too briefly."
                    )
                chunks.append(chunk if output_type in ("pt", "latent") else chunk.cpu())

        # 6. Give them the form that was asked for
        networks: Any = torch.cat(chunks)
        if output_type == "np":
            networks = networks.numpy()
        elif output_type == "state_dict":
            networks = self.layout.unflatten(networks)

        self.maybe_free_model_hooks()

        return NeuralNetworkDiffusionPipelineOutput(state_dicts=networks) if return_dict else (networks,)

    def _denoise(
        self,
        latents: torch.Tensor,
        told: dict[str, torch.Tensor],
        guide: tuple[float, torch.Tensor] | None,
        timesteps: torch.Tensor,
        extra_step_kwargs: dict[str, Any],
        progress_bar: Any,
        callback: Callback | None,
        tensor_inputs: Sequence[str],
    ) -> torch.Tensor:
        # What flow-matching schedulers lack leaves the sample as it is.
        latents = latents * getattr(self.scheduler, "init_noise_sigma", 1.0)
        scale_model_input = getattr(self.scheduler, "scale_model_input", lambda sample, timestep: sample)
        to_clean = getattr(self.denoiser, "self_conditioned", False)
        for step, timestep in enumerate(timesteps):
            if self.interrupt:
                break
            # predict, then take one step back, in float32: schedulers draw their noise in the dtype of the prediction
            model_input = scale_model_input(latents, timestep).to(self.denoiser.dtype)
            prediction = self.denoiser(model_input, timestep, **told, return_dict=False)[0].to(torch.float32)
            if guide is not None:
                scale, nothing = guide
                free = {**told, "condition": nothing.expand_as(told["condition"])}
                unasked = self.denoiser(model_input, timestep, **free, return_dict=False)[0].to(torch.float32)
                prediction = unasked + scale * (prediction - unasked)
            if to_clean:
                sigma = timestep / self.scheduler.config.num_train_timesteps
                told = {**told, "previous": (latents - sigma * prediction).to(self.denoiser.dtype)}
            latents = self.scheduler.step(prediction, timestep, latents, **extra_step_kwargs, return_dict=False)[0]

            if callback is not None:
                tensors = {"latents": latents} if "latents" in tensor_inputs else {}
                latents = (callback(self, step, timestep, tensors) or {}).get("latents", latents)
            progress_bar.update()
        return latents

    @property
    def interrupt(self) -> bool:
        """Whether a callback asked to stop, by `pipe._interrupt = True`."""
        return self._interrupt

    @property
    def num_timesteps(self) -> int:
        """Denoising steps of the present or latest call, for callbacks."""
        return self._num_timesteps

    @classmethod
    def from_pipe(cls, pipeline: DiffusionPipeline, **kwargs: Any) -> Any:
        # The models are taken over whatever their classes; annotations cannot name them (their code travels apart).
        models = {name: part for name, part in pipeline.components.items() if isinstance(part, ModelMixin)}
        return super().from_pipe(pipeline, **(models | kwargs))

    def register_modules(self, **kwargs: Any) -> None:
        for part in (self, *kwargs.values()):
            _read_code(type(getattr(part, "_orig_mod", part)))
        super().register_modules(**kwargs)

    def register_to_config(self, **kwargs: Any) -> None:
        # Custom components are named by the file that travels with them, wherever their code was loaded from.
        for name, value in kwargs.items():
            if isinstance(value, tuple) and value[0] is not None and _is_custom(value[0]):
                if value[0] == "__main__":
                    raise ValueError(f"{value[1]} is defined in a script: put it into a module, which can be saved.")
                kwargs[name] = (value[0].rpartition(".")[2], value[1])
        super().register_to_config(**kwargs)

    def save_pretrained(
        self, save_directory: str | Path, safe_serialization: bool = True, variant: str | None = None, **kwargs: Any
    ) -> None:
        # Written beside and moved into place when all of it is there: what was there before stays whole if this fails,
        # and without model_index.json, which goes first and comes last, there is no pipeline.
        folder, beside = Path(save_directory), Path(save_directory, UNFINISHED)
        kwargs = {"safe_serialization": safe_serialization, "variant": variant, **kwargs}
        if kwargs.get("push_to_hub"):
            kwargs.setdefault("repo_id", folder.name)
        if folder.is_file():
            super().save_pretrained(str(folder), **kwargs)  # which says what is wrong
            return
        shutil.rmtree(beside, ignore_errors=True)
        try:
            super().save_pretrained(str(beside), **kwargs)
            for file in beside.rglob("*"):
                if file.is_file():
                    with file.open("rb") as content:
                        os.fsync(content.fileno())
        except BaseException:
            shutil.rmtree(beside, ignore_errors=True)
            raise
        index = folder / self.config_name
        former = _slots(index)
        index.unlink(missing_ok=True)
        for name in former - {path.name for path in beside.iterdir()}:
            shutil.rmtree(folder / name, ignore_errors=True)
        for path in sorted(beside.iterdir(), key=lambda path: path.name == self.config_name):
            target = folder / path.name
            if target.is_dir() and variant is None and any(target.glob("*config.json")):
                shutil.rmtree(target)
            elif target.is_dir():  # beside other variants, or what is no component
                for stale in target.glob(f"*.{variant}*"):
                    stale.unlink()
                for file in path.iterdir():
                    file.replace(target / file.name)
                continue
            path.replace(target)
        shutil.rmtree(beside)

    def save_config(self, save_directory: str | Path, **kwargs: Any) -> None:
        # Makes the folder complete: the pipeline's code and that of each custom component stand beside the weights,
        # and nothing in it tells where the parts were loaded from.
        folder = Path(save_directory)
        super().save_config(save_directory, **kwargs)
        _rewrite_json(folder / self.config_name, _class_name=[Path(__file__).stem, type(self).__name__])
        _write_code(type(self), folder)
        for name, component in self.components.items():
            component_class = type(getattr(component, "_orig_mod", component))
            if component is not None and (folder / name / component_class.config_name).exists():
                _rewrite_json(folder / name / component_class.config_name)
            _write_code(component_class, folder / name)

    def _upload_folder(
        self,
        working_dir: str | Path,
        repo_id: str,
        token: str | None = None,
        commit_message: str | None = None,
        create_pr: bool = False,
        subfolder: str | None = None,
    ) -> CommitInfo:
        # One commit, all or nothing: `upload_folder` may make several. Nothing changed, no commit.
        files = sorted(path for path in Path(working_dir).rglob("*") if path.is_file())
        names = [path.relative_to(working_dir).as_posix() for path in files]
        return HfApi(token=token).create_commit(
            repo_id,
            [
                CommitOperationAdd(f"{subfolder}/{name}" if subfolder else name, path)
                for name, path in zip(names, files, strict=True)
            ],
            commit_message=commit_message or f"Upload {type(self).__name__}",
            create_pr=create_pr,
        )

    @classmethod
    def load_config(cls, *args: Any, **kwargs: Any) -> Any:
        # Called on this class rather than on `DiffusionPipeline`: the code that is here serves, and none of the
        # folder's own is run.
        config = super().load_config(*args, **kwargs)
        package = __name__.rpartition(".")[0]
        for name, value in config.items():
            if not isinstance(value, (list, tuple)) or len(value) != 2 or not name.isidentifier():
                continue
            if isinstance(value[0], str) and value[0].isidentifier():
                module = f"{package}.{name}.{value[0]}"
                if name == "_class_name":
                    config[name] = value[1]
                elif importlib.util.find_spec(f"{package}.{name}") and importlib.util.find_spec(module):
                    config[name] = [module, value[1]]
        return config


def _slots(index: Path) -> set[str]:
    """Names of the components of a saved pipeline."""
    try:
        described = json.loads(index.read_text(encoding="utf-8")).items()
    except (OSError, ValueError, AttributeError):
        return set()
    return {name for name, value in described if isinstance(value, list) and name.isidentifier() and name[0] != "_"}


def draw_seed(generator: torch.Generator | None) -> int:
    """That of a network."""
    device = "cpu" if generator is None else generator.device
    return int(torch.randint(2**63 - 1, (), generator=generator, device=device))


def _is_custom(module: str) -> bool:
    return module.partition(".")[0] != "diffusers"


def _rewrite_json(file: Path, **changes: Any) -> None:
    content = json.loads(file.read_text(encoding="utf-8")) | changes
    content.pop("_name_or_path", None)
    file.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _read_code(code_of: type) -> tuple[str, bytes] | None:
    """
    Name and bytes of the file of a custom class as it was when it was loaded: others of the same name come since,
    and even into the same module. So they are kept on the class.
    """
    custom = _is_custom(code_of.__module__) and code_of.__module__ not in ("builtins", "__main__")
    if custom and "_saved_code" not in vars(code_of):
        file = Path(inspect.getfile(code_of))
        code_of._saved_code = (file.name, file.read_bytes())  # type: ignore[attr-defined]
    return vars(code_of).get("_saved_code")


def _write_code(code_of: type, folder: Path) -> None:
    if code := _read_code(code_of):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / code[0]).write_bytes(code[1])
