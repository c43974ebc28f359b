"""What one generated network knows, and what 16 of them know together.

python examples/ensemble.py runs/quickstart/pipeline digits-convnet
"""

import sys

import torch

from pdiff_hf import load_pipeline, load_task


pipe, task = load_pipeline(sys.argv[1]), load_task(sys.argv[2])
inputs, targets = task.data("test")
network = task.build_network()
predictions = []
for state_dict in pipe(num_networks=16, generator=torch.Generator().manual_seed(0)).state_dicts:
    network.load_state_dict(state_dict)
    predictions.append(task.predict(network, inputs))

single = [100 * task.correct(one, targets).float().mean().item() for one in predictions]
together = 100 * task.correct(torch.stack(predictions).mean(0), targets).float().mean().item()
print(f"one network: {sum(single) / 16:.2f} % on average, {min(single):.2f} % at least; all 16: {together:.2f} %")
