"""Samples neural networks: noise -> latents -> normalized vectors -> state dicts."""

import importlib.util
import inspect
import json
import math
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from numbers import Integral
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline
from diffusers.models.modeling_utils import ModelMixin
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from diffusers.utils import BaseOutput
from diffusers.utils.torch_utils import randn_tensor
from huggingface_hub import CommitInfo, CommitOperationAdd, HfApi


@dataclass
class NeuralNetworkDiffusionPipelineOutput(BaseOutput):
    """
    Args:
        state_dicts (`list[dict[str, torch.Tensor]]`, `torch.Tensor` or `np.ndarray`):
            The generated networks in the form that `output_type` asked for: state dicts, parameter vectors `[N, P]`,
            or latents `[N, C, L]`.
    """

    state_dicts: list[dict[str, torch.Tensor]] | torch.Tensor | np.ndarray


class NeuralNetworkDiffusionPipeline(DiffusionPipeline):
    r"""
    Pipeline that generates trained networks of one architecture (Neural Network Diffusion, arXiv 2402.13144).

    Args:
        unet (`ParameterUNet1DModel`): Denoises latents. Any 1-D model with the same `forward` serves.
        vae (`ParameterAutoencoderKL`): Decodes latents to normalized parameter vectors.
        layout (`ParameterLayout`): Turns normalized vectors into state dicts.
        scheduler (`SchedulerMixin`): `DDPMScheduler` in training; any discrete-time scheduler of diffusers can be
            swapped in with `SchedulerClass.from_config(pipe.scheduler.config)` (see `pipe.scheduler.compatibles`).
    """

    model_cpu_offload_seq = "unet->vae"
    # It has no parameters, which Accelerate's hooks look for, and is small.
    _exclude_from_cpu_offload = ["layout"]
    _callback_tensor_inputs = ["latents"]

    def __init__(self, unet: ModelMixin, vae: ModelMixin, layout: ModelMixin, scheduler: SchedulerMixin):
        super().__init__()
        if vae.config.num_parameters != layout.vector_size:
            raise ValueError(
                f"The autoencoder is made for vectors of {vae.config.num_parameters} parameters, and the layout has "
                f"{layout.vector_size}: they belong to different networks."
            )
        self.register_modules(unet=unet, vae=vae, layout=layout, scheduler=scheduler)

    def check_inputs(
        self,
        num_networks,
        num_inference_steps,
        generator,
        latents,
        parameter_noise,
        batch_size,
        output_type,
        tensor_inputs,
    ):
        """Raises `ValueError` for arguments of `__call__` that do not fit together."""
        for name, value in (
            ("num_networks", num_networks),
            ("num_inference_steps", num_inference_steps),
            ("batch_size", batch_size),
        ):
            if not isinstance(value, Integral) or value < 1:
                raise ValueError(f"`{name}` has to be a positive integer, and is {value!r}.")
        if not 0 <= parameter_noise < math.inf:
            raise ValueError(f"`parameter_noise` has to be at least 0, and is {parameter_noise!r}.")
        if isinstance(generator, (list, tuple)) and len(generator) != num_networks:
            raise ValueError(
                f"{len(generator)} generators were passed for {num_networks} networks: pass one for each."
            )
        shape = (num_networks, self.vae.config.latent_channels, self.vae.config.latent_length)
        if latents is not None and latents.shape != shape:
            raise ValueError(f"`latents` has shape {tuple(latents.shape)}; expected {shape} for these networks.")
        if output_type not in ("state_dict", "pt", "np", "latent"):
            raise ValueError(f"`output_type` is {output_type!r}; expected 'state_dict', 'pt', 'np' or 'latent'.")
        if not set(tensor_inputs) <= set(self._callback_tensor_inputs):
            raise ValueError(
                f"`callback_on_step_end_tensor_inputs` has to be in {self._callback_tensor_inputs}, and is "
                f"{list(tensor_inputs)}."
            )
        step = inspect.signature(getattr(self.scheduler, "step", lambda: None)).parameters
        needed = {name for name, parameter in step.items() if parameter.default is inspect.Parameter.empty}
        if (
            needed != {"model_output", "timestep", "sample"}
            or not hasattr(self.scheduler, "scale_model_input")
            or not hasattr(self.scheduler, "init_noise_sigma")
        ):
            raise ValueError(
                f"{type(self.scheduler).__name__} does not fit a denoiser that was trained on discrete timesteps. "
                "Swap in one such as DDPMScheduler, DDIMScheduler or DPMSolverMultistepScheduler."
            )

    def prepare_extra_step_kwargs(self, generator: list[torch.Generator]) -> dict:
        """Schedulers differ in what their `step` takes; only the stochastic ones take generators."""
        accepted = inspect.signature(self.scheduler.step).parameters
        return {"generator": generator} if "generator" in accepted else {}

    @torch.no_grad()
    def __call__(
        self,
        num_networks: int | None = None,
        num_inference_steps: int = 50,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: torch.Tensor | None = None,
        parameter_noise: float = 0.0,
        batch_size: int = 100,
        output_type: str = "state_dict",
        return_dict: bool = True,
        callback_on_step_end: Callable[["NeuralNetworkDiffusionPipeline", int, int, dict], dict] | None = None,
        callback_on_step_end_tensor_inputs: list[str] | tuple[str, ...] = ("latents",),
    ) -> NeuralNetworkDiffusionPipelineOutput | tuple:
        r"""
        Generates networks.

        Args:
            num_networks (`int`, *optional*):
                How many. Defaults to one for each of the `generator`s or `latents`, and to 1 without a list of them.
            num_inference_steps (`int`, *optional*, defaults to 50):
                Denoising steps. Of 1000, 50, 20 and 10, the default is the smallest whose networks are as good as
                those of 1000 steps with the default scheduler (`benchmarks/samplers.py`).
            generator (`torch.Generator` or `list[torch.Generator]`, *optional*):
                One for all networks, or one for each. Every network draws its noise from a CPU generator of its own
                that is seeded by the next draw of the generator passed here, so the same seed gives the same networks
                (up to rounding) whatever `batch_size` and device are, and the first networks stay the same when
                `num_networks` grows.
            latents (`torch.Tensor`, *optional*): Noise `[num_networks, C, L]` to start from instead of drawn noise.
            parameter_noise (`float`, *optional*, defaults to 0.0):
                Standard deviation of Gaussian noise on each decoded parameter, in units of the parameter's own over
                the training zoo: what a sample of the autoencoder's likelihood has over its mean. Networks become
                more novel and less accurate, as with noise on training networks; constants stay.
            batch_size (`int`, *optional*, defaults to 100): Networks denoised and decoded at a time.
            output_type (`str`, *optional*, defaults to `"state_dict"`):
                `"state_dict"` (on the CPU, complete, in the base network's dtypes; frozen tensors are shared among
                them), `"pt"` or `"np"` (parameter vectors, float32 `[N, P]`) or `"latent"` (`[N, C, L]`).
            return_dict (`bool`, *optional*, defaults to `True`):
                Whether to return a [`NeuralNetworkDiffusionPipelineOutput`] instead of a tuple.
            callback_on_step_end (`Callable`, *optional*):
                Called as `callback(pipe, step, timestep, tensors)` after each denoising step of each batch; what it
                returns may replace the tensors.
            callback_on_step_end_tensor_inputs (`list[str]`, *optional*, defaults to `["latents"]`):
                The tensors that the callback gets.

        Returns:
            [`NeuralNetworkDiffusionPipelineOutput`] or `tuple`: the networks in `state_dicts`.

        Raises:
            `ValueError`: arguments that do not fit.

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
        if num_networks is None:
            several = generator if isinstance(generator, (list, tuple)) else latents
            num_networks = 1 if several is None else len(several)
        self.check_inputs(
            num_networks,
            num_inference_steps,
            generator,
            latents,
            parameter_noise,
            batch_size,
            output_type,
            callback_on_step_end_tensor_inputs,
        )
        device = self._execution_device

        # 2. One seed a network
        generators = generator if isinstance(generator, (list, tuple)) else [generator] * num_networks
        seeds = [_draw_seed(parent) for parent in generators]

        batches = []
        starts = range(0, num_networks, batch_size)
        with self.progress_bar(total=num_inference_steps * len(starts)) as progress_bar:
            for start in starts:
                batch_generators = [torch.Generator().manual_seed(seed) for seed in seeds[start : start + batch_size]]

                # 3. Noise
                shape = (len(batch_generators), self.vae.config.latent_channels, self.vae.config.latent_length)
                if latents is None:
                    noise = randn_tensor(shape, generator=batch_generators, device=device, dtype=self.unet.dtype)
                else:
                    noise = latents[start : start + batch_size].to(device, self.unet.dtype)

                # 4. Denoise
                batch = self._denoise(
                    noise,
                    num_inference_steps,
                    batch_generators,
                    progress_bar,
                    callback_on_step_end,
                    callback_on_step_end_tensor_inputs,
                )

                # 5. Decode
                if output_type != "latent":
                    normalized = self.vae.decode(batch.to(self.vae.dtype), return_dict=False)[0]
                    if parameter_noise:
                        normalized = normalized + parameter_noise * randn_tensor(
                            normalized.shape, batch_generators, normalized.device, normalized.dtype
                        )
                    batch = self.layout(normalized, return_dict=False)[0]
                batches.append(batch if output_type in ("pt", "latent") else batch.cpu())

        # 6. Give them the form that was asked for
        networks: Any = torch.cat(batches)
        if output_type == "np":
            networks = networks.numpy()
        elif output_type == "state_dict":
            networks = self.layout.unflatten(networks)

        self.maybe_free_model_hooks()

        return NeuralNetworkDiffusionPipelineOutput(state_dicts=networks) if return_dict else (networks,)

    def _denoise(
        self, latents, num_inference_steps, generators, progress_bar, callback, tensor_inputs
    ) -> torch.Tensor:
        self.scheduler.set_timesteps(num_inference_steps, device=latents.device)
        extra_step_kwargs = self.prepare_extra_step_kwargs(generators)
        latents = latents * self.scheduler.init_noise_sigma
        timesteps = self.scheduler.timesteps
        self._num_timesteps = len(timesteps)
        for step, timestep in enumerate(timesteps):
            # predict, then take one step back
            model_input = self.scheduler.scale_model_input(latents, timestep)
            prediction = self.unet(model_input, timestep, return_dict=False)[0]
            latents = self.scheduler.step(prediction, timestep, latents, **extra_step_kwargs, return_dict=False)[0]

            if callback is not None:
                tensors = {"latents": latents} if "latents" in tensor_inputs else {}
                latents = (callback(self, step, timestep, tensors) or {}).get("latents", latents)

            # Second-order schedulers visit a timestep twice.
            if (step + 1) * num_inference_steps // len(timesteps) > step * num_inference_steps // len(timesteps):
                progress_bar.update()
        return latents

    @property
    def num_timesteps(self) -> int:
        """Denoising steps of the present or latest call, for callbacks."""
        return self._num_timesteps

    @classmethod
    def from_pipe(cls, pipeline, **kwargs):
        # The models are taken over whatever their classes; annotations cannot name them (their code travels apart).
        models = {name: part for name, part in pipeline.components.items() if isinstance(part, ModelMixin)}
        return super().from_pipe(pipeline, **(models | kwargs))

    def register_to_config(self, **kwargs):
        # Custom components are named by the file that travels with them, wherever their code was loaded from.
        for name, value in kwargs.items():
            if isinstance(value, tuple) and value[0] is not None and _is_custom(value[0]):
                if value[0] == "__main__":
                    raise ValueError(f"{value[1]} is defined in a script: put it into a module, which can be saved.")
                kwargs[name] = (value[0].rpartition(".")[2], value[1])
        super().register_to_config(**kwargs)

    def save_config(self, save_directory, **kwargs):
        # Makes the folder complete: the pipeline's code and that of each custom component stand beside the weights,
        # and nothing in it tells where the parts were loaded from.
        super().save_config(save_directory, **kwargs)
        folder = Path(save_directory)
        _rewrite_json(folder / self.config_name, _class_name=[Path(__file__).stem, type(self).__name__])
        _copy_code(type(self), folder)
        for name, component in self.components.items():
            component_class = type(getattr(component, "_orig_mod", component))
            if (folder / name / component_class.config_name).exists():
                _rewrite_json(folder / name / component_class.config_name)
            if _is_custom(component_class.__module__):
                _copy_code(component_class, folder / name)

    def _upload_folder(
        self, working_dir, repo_id, token=None, commit_message=None, create_pr=False, subfolder=None
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
    def load_config(cls, *args, **kwargs):
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


def _draw_seed(generator: torch.Generator | None) -> int:
    device = "cpu" if generator is None else generator.device
    return int(torch.randint(2**63 - 1, (), generator=generator, device=device))


def _is_custom(module: str) -> bool:
    return module.partition(".")[0] != "diffusers"


def _rewrite_json(file: Path, **changes: Any) -> None:
    content = json.loads(file.read_text(encoding="utf-8")) | changes
    content.pop("_name_or_path", None)
    file.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _copy_code(code_of: type, folder: Path) -> None:
    source = Path(inspect.getfile(code_of))
    if source.parent.resolve() != folder.resolve():
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, folder / source.name)
