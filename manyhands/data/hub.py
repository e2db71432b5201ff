"""Hugging Face data sets by path: ``hf:PATH[:SPLIT]``, through the optional `datasets` package."""

from __future__ import annotations

import os
from typing import Any

from manyhands.core.errors import DataError, UsageError
from manyhands.data.source import SourceFile


def describe(name: str) -> SourceFile:
    """The data set as one source. Raises `DataError`, or `UsageError` where `datasets` is not installed."""
    data = load(name)
    size = int(getattr(data, "size_in_bytes", None) or 0) or len(data) * 256
    return SourceFile(name, "hf", None, size, str(data._fingerprint))


def load(name: str) -> Any:
    """The map-style data set."""
    try:
        import datasets
    except ImportError:
        raise UsageError(
            f"data = 'hf:{name}'", "it needs the datasets package", "pip install 'manyhands[datasets]'"
        ) from None
    path, split = name, "train"
    if not os.path.exists(name) and ":" in name:
        path, _, split = name.rpartition(":")
        if not os.path.exists(path):
            path, _, split = name.partition(":")  # a split may hold one: train[:10%]
    try:
        if os.path.isfile(os.path.join(path, "state.json")) or os.path.isfile(
            os.path.join(path, "dataset_dict.json")
        ):
            found = datasets.load_from_disk(path)
            if isinstance(found, datasets.DatasetDict):
                if split not in found:
                    raise DataError(
                        f"hf:{name}: no split {split!r}",
                        f"it has {', '.join(found)}",
                        f"give hf:{path}:SPLIT",
                    )
                found = found[split]
            elif path != name and split != "train":  # as it is called where there is but one
                raise DataError(
                    f"hf:{name}: {path} is one data set without splits",
                    "all of it is read",
                    f"give hf:{path}",
                )
            return found
        return datasets.load_dataset(path, split=split)
    except DataError:
        raise
    except Exception as error:  # datasets raises a dozen unrelated types
        raise DataError(
            f"hf:{name}: {str(error).splitlines()[0]}", "it must be a data set", "check path and split"
        ) from error
