"""A walk from one generated network to another, through the noise that they are made of: do those between them work?

python examples/walk.py runs/quickstart/pipeline digits-convnet
"""

import math
import sys

import torch

from pdiff_hf import load_pipeline, load_task


pipe, task = load_pipeline(sys.argv[1]), load_task(sys.argv[2])
pipe.set_progress_bar_config(disable=True)
inputs, targets = task.data("test")
network = task.build_network()
# The noise at the ends, as pipe() draws it; along a circle its norm stays that of noise.
start, end = (torch.randn(1, *pipe.latent_shape, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1))
for step in range(9):
    angle = step / 8 * math.pi / 2
    latents = math.cos(angle) * start + math.sin(angle) * end
    network.load_state_dict(pipe(latents=latents, generator=torch.Generator().manual_seed(0)).state_dicts[0])
    accuracy = 100 * task.correct(task.predict(network, inputs), targets).float().mean().item()
    print(f"{step / 8:5.3f}  {accuracy:6.2f} %  {'#' * round(accuracy / 2)}")
