"""Data files of users: JSON lines, CSV and Parquet."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from datasets import Dataset

_BUILDERS = {".parquet": "parquet", ".jsonl": "json", ".json": "json", ".csv": "csv"}


def read_file(path: Path) -> Dataset:
    """Read a data file, naming it where it is empty or broken."""
    import datasets
    from datasets.exceptions import DatasetGenerationError
    from pyarrow import ArrowInvalid

    suffix = next((s for s in reversed(path.suffixes) if s in _BUILDERS), None)
    if suffix is None:
        raise ValueError(
            f"data file must end in one of {sorted(_BUILDERS)}; got {path.name!r}. Convert it."
        )
    form = _BUILDERS[suffix]
    try:
        return datasets.load_dataset(form, data_files=str(path), split="train")
    except (DatasetGenerationError, ArrowInvalid) as error:
        cause = error.__cause__ or error
        if "No columns to parse" not in str(cause):  # what the reader of CSV says of nothing
            raise ValueError(
                f"data file must be {form}; got {path.name!r}, of which: {cause}. Mend it."
            ) from error
    except StopIteration:
        pass
    raise ValueError(
        f"dataset must have at least one row; got 0 in {path.name!r}. Check how it was written."
    )


def read_folder(path: Path) -> Dataset:
    """Read a folder of data files, naming the one whose columns differ from the others'."""
    import datasets
    from datasets.exceptions import DatasetGenerationError

    try:
        return datasets.load_dataset(str(path), split="train")
    except DatasetGenerationError as error:
        files = sorted(p for p in path.rglob("*") if p.is_file() and p.suffix in _BUILDERS)
        types = {file: read_file(file).features for file in files}
        for file, features in types.items():
            for name, first in types[files[0]].items():
                if features.get(name) != first:
                    raise ValueError(
                        f"column {name!r} must be of one type in all files; got {first} in "
                        f"{files[0].name!r} and {features.get(name)} in {file.name!r}. Convert one."
                    ) from error
        raise
