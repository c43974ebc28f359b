"""What goes to the Hub and comes from it: pipelines, zoos and their cards."""

from ..errors import HubError, PipelineError
from .cards import merge_cards, write_evaluation, write_pipeline_card, write_zoo_card
from .client import download, download_file, explained, is_repository, matching_models
from .pipelines import load_pipeline, pipeline_folder
from .push import push, push_evaluation


__all__ = [
    "HubError",
    "PipelineError",
    "download",
    "download_file",
    "explained",
    "is_repository",
    "load_pipeline",
    "matching_models",
    "merge_cards",
    "pipeline_folder",
    "push",
    "push_evaluation",
    "write_evaluation",
    "write_pipeline_card",
    "write_zoo_card",
]
