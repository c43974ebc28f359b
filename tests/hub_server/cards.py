"""The metadata at the top of `README.md`: whether it is valid, and the tags by which repositories are found."""

import re

import yaml


FRONT_MATTER = re.compile(r"\A\ufeff?---[ \t]*\r?\n(.*?)\r?\n?^---[ \t]*$", re.DOTALL | re.MULTILINE)
LISTS_OF_STRINGS = ("tags", "datasets", "metrics")
# Of the Hub's, those that anyone is likely to choose.
LICENSES = (
    *("apache-2.0", "mit", "openrail", "bigscience-openrail-m", "creativeml-openrail-m", "bigcode-openrail-m"),
    *("afl-3.0", "artistic-2.0", "bsl-1.0", "bsd", "bsd-2-clause", "bsd-3-clause", "bsd-3-clause-clear", "c-uda"),
    *("cc", "cc0-1.0", "cc-by-3.0", "cc-by-4.0", "cc-by-sa-3.0", "cc-by-sa-4.0", "cc-by-nc-4.0", "cc-by-nc-sa-4.0"),
    *("ecl-2.0", "epl-2.0", "eupl-1.1", "agpl-3.0", "gpl", "gpl-2.0", "gpl-3.0", "lgpl", "lgpl-3.0", "isc", "mpl-2.0"),
    *("ms-pl", "ncsa", "ofl-1.1", "pddl", "postgresql", "unlicense", "wtfpl", "zlib", "llama2", "gemma", "other"),
    "unknown",
)
TAG_PREFIXES = {
    "license": "license",
    "datasets": "dataset",
    "base_model": "base_model",
    "language": "language",
    "task_categories": "task_categories",
    "size_categories": "size_categories",
}


class InvalidCardError(ValueError):
    """Metadata that the Hub would refuse."""


def card_metadata(card: str) -> dict | None:
    """The metadata of a card, or None if it has none."""
    block = FRONT_MATTER.match(card)
    if block is None:
        return None
    try:
        metadata = yaml.safe_load(block[1])
    except yaml.YAMLError as error:
        raise InvalidCardError(f"Invalid YAML: {error}") from error
    if metadata is None:
        return None
    if not isinstance(metadata, dict):
        raise InvalidCardError("YAML metadata should be an object")
    for key in LISTS_OF_STRINGS:
        if not all(isinstance(value, str) for value in as_list(metadata.get(key))):
            raise InvalidCardError(f'"{key}" must be a string or a list of strings')
    if any(one not in LICENSES for one in as_list(metadata.get("license"))):
        raise InvalidCardError(f'"license" must be one of [{", ".join(LICENSES)}]')
    for model in as_list(metadata.get("model-index")):
        if not isinstance(model, dict) or not isinstance(model.get("results"), list) or "name" not in model:
            raise InvalidCardError('"model-index" must be a list of models with "name" and "results"')
    return metadata


def card_tags(metadata: dict) -> list[str]:
    """The tags that the Hub derives from metadata."""
    tags = [*as_list(metadata.get("tags"))]
    tags += [metadata[key] for key in ("library_name", "pipeline_tag") if metadata.get(key)]
    for key, prefix in TAG_PREFIXES.items():
        tags += [f"{prefix}:{value}" for value in as_list(metadata.get(key))]
    return list(dict.fromkeys(tags))


def as_list(value) -> list:
    if value is None:
        return []
    return value if isinstance(value, list) else [value]
