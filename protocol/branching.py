"""A job that begins with a checkpoint of another one: its config, made of that one's."""

from collections.abc import Mapping
from typing import Any

from protocol.jobspec import BadSpec


def branched(
    config: Mapping[str, Any], adjustments: Mapping[str, Any], job_id: str, checkpoint: str
) -> dict[str, Any]:
    """Return the config of a job that begins with ``checkpoint`` of ``job_id``, whose own config is ``config``.

    An object is laid over an object key by key, null takes a key away, and anything else takes its place. Raises
    BadSpec.
    """
    if "branch" in adjustments:
        raise BadSpec(
            "branch", "the job and the checkpoint that are branched from are said beside the config."
        )
    return _laid_over(config, adjustments) | {"branch": {"job_id": job_id, "checkpoint": checkpoint}}


def _laid_over(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    result = dict(below)
    for key, value in above.items():
        under = result.get(key)
        if value is None:
            result.pop(key, None)
        elif isinstance(value, Mapping) and isinstance(under, Mapping):
            result[key] = _laid_over(under, value)
        else:
            result[key] = value
    return result


def dotted(pairs: Mapping[str, Any]) -> dict[str, Any]:
    """Return ``{"training.seed": 1}`` as ``{"training": {"seed": 1}}``."""
    tree: dict[str, Any] = {}
    for path, value in pairs.items():
        *above, last = path.split(".")
        place = tree
        for name in above:
            place = place.setdefault(name, {})
            if not isinstance(place, dict):
                raise BadSpec(path, "a key above it was given a value of its own.")
        place[last] = value
    return tree
