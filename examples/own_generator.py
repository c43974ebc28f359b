"""A generator of one's own in the audit: a Gaussian on the principal components of a zoo.

python examples/own_generator.py runs/quickstart/zoo
"""

import sys
from types import SimpleNamespace

import torch

import pdiff_hf


class GaussianOfComponents:
    def __init__(self, zoo, count=10):
        vectors = zoo.vectors()
        self.mean = vectors.mean(0)
        _, spread, self.components = torch.pca_lowrank(vectors - self.mean, count)
        self.spread = spread / len(vectors) ** 0.5

    def __call__(self, num_networks, generator, output_type):
        normal = torch.stack([torch.randn(len(self.spread), generator=one) for one in generator])
        return SimpleNamespace(state_dicts=self.mean + (normal * self.spread) @ self.components.T)


zoo = pdiff_hf.WeightZoo.from_pretrained(sys.argv[1])
report = pdiff_hf.evaluate(trained=zoo, generated=GaussianOfComponents(zoo))
print(report["verdict"]["sentence"])
