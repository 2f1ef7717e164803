"""Stage folders: complete or absent shards, one run per folder, readable by ``load_dataset``."""

from __future__ import annotations

import gzip
import json
import threading

import datasets
import pytest

from ctrl_dpo.data.folders import (
    StageFolder,
    content_hash,
    read_record,
    read_rows,
    read_shards,
    run_once,
)
from ctrl_dpo.data.hashes import model_hash
from ctrl_dpo.engine.models import load_model, load_policy, load_tokenizer
from ctrl_dpo.score import load_reward


def rows(*values: int) -> datasets.Dataset:
    return datasets.Dataset.from_dict({"x": list(values)})


def stage(path, **changes) -> StageFolder:
    fields = {"settings": {"seed": 1}, "inputs": {"data": "a"}, "n_shards": 2} | changes
    return StageFolder(path, "sample", **fields)


def test_shards_in_any_order_read_back_in_row_order(tmp_path):
    folder = stage(tmp_path / "out").open()
    folder.write_shard(1, rows(3, 4))
    assert folder.missing_shards() == [0]
    folder.write_shard(0, rows(1, 2))
    folder.finish({"rows": 4})
    assert read_rows(folder.path)["x"] == [1, 2, 3, 4]
    assert read_record(folder.path)["summary"] == {"rows": 4}


def test_load_dataset_reads_a_stage_folder_as_it_is(tmp_path):
    folder = stage(tmp_path / "out").open()
    for index in range(2):
        folder.write_shard(index, rows(10 + index))
    folder.finish({})
    assert datasets.load_dataset(str(folder.path), split="train")["x"] == [10, 11]


def test_opening_again_continues_the_same_run(tmp_path):
    stage(tmp_path / "out").open().write_shard(0, rows(1))
    again = stage(tmp_path / "out").open()
    assert again.missing_shards() == [1]
    assert not again.is_complete


def test_a_setting_that_the_record_does_not_know_must_not_be_set(tmp_path):
    stage(tmp_path / "out").open().write_shard(0, rows(1))
    again = stage(tmp_path / "out", settings={"seed": 1, "attention": None}).open()
    assert again.missing_shards() == [1]
    with pytest.raises(ValueError, match=r"where settings\.attention is None, not 'eager'"):
        stage(tmp_path / "out", settings={"seed": 1, "attention": "eager"}).open()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"settings": {"seed": 2}}, r"where settings\.seed is 1, not 2\. Name another folder"),
        ({"inputs": {"data": "b"}}, r"where inputs\.data is 'a', not 'b'"),
        ({"n_shards": 3}, r"where n_shards is 2, not 3"),
    ],
)
def test_the_folder_of_another_run_is_refused(tmp_path, changes, message):
    started = stage(tmp_path / "out").open()
    started.shard_path(0).write_bytes(b"work")
    with pytest.raises(ValueError, match=message):
        stage(tmp_path / "out", **changes).open()


def test_a_folder_with_foreign_files_is_refused(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"holds files but no stage\.json"):
        stage(tmp_path).open()


def test_an_interrupted_stage_cannot_be_read_as_complete(tmp_path):
    folder = stage(tmp_path / "out").open()
    folder.write_shard(0, rows(5))
    with pytest.raises(ValueError, match="got an interrupted 'sample'"):
        read_rows(folder.path)
    assert read_shards(folder.path)["x"] == [5]


def test_a_failed_write_leaves_no_shard(tmp_path):
    folder = stage(tmp_path / "out").open()

    class Broken:
        def to_parquet(self, path: str) -> None:
            with open(path, "wb") as file:  # noqa: PTH123
                file.write(b"half")
            raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        folder.write_shard(0, Broken())
    assert folder.missing_shards() == [0, 1]


@pytest.mark.parametrize("name", ["d.jsonl", "d.jsonl.gz", "d.json", "d.csv", "d.parquet"])
def test_data_files_of_every_supported_kind_are_read(tmp_path, name):
    path = tmp_path / name
    text = '{"x": 1}\n{"x": 2}\n'
    if name.endswith(".gz"):
        path.write_bytes(gzip.compress(text.encode()))
    elif name.endswith(".csv"):
        path.write_text("x\n1\n2\n")
    elif name.endswith(".parquet"):
        rows(1, 2).to_parquet(str(path))
    else:
        path.write_text(text)
    assert read_rows(path)["x"] == [1, 2]


def test_unknown_and_absent_sources_are_named(tmp_path):
    (tmp_path / "d.txt").write_text("x")
    with pytest.raises(ValueError, match=r"must end in one of .* got 'd\.txt'"):
        read_rows(tmp_path / "d.txt")
    with pytest.raises(ValueError, match=r"absent\.jsonl'?: no such file"):
        read_rows(tmp_path / "absent.jsonl")


def test_content_hash_follows_the_content_not_the_name(tmp_path):
    for name, value in (("a", 1), ("b", 1), ("c", 2)):
        folder = stage(tmp_path / name, n_shards=1).open()
        folder.write_shard(0, rows(value))
        folder.finish({})
        (tmp_path / f"{name}.jsonl").write_text(json.dumps({"x": value}))
    assert (
        content_hash(tmp_path / "a") == content_hash(tmp_path / "b") != content_hash(tmp_path / "c")
    )
    files = [content_hash(tmp_path / f"{name}.jsonl") for name in "abc"]
    assert files[0] == files[1] != files[2]
    assert content_hash("owner/name") == "hub:owner/name"


def test_a_stage_that_failed_at_once_leaves_its_folder_free(tmp_path):
    stage(tmp_path / "out").open()
    other = stage(tmp_path / "out", settings={"seed": 7}).open()
    assert read_record(other.path)["settings"] == {"seed": 7}


def test_a_change_is_continued_where_it_is_allowed(tmp_path):
    started = stage(tmp_path / "out").open()
    started.write_shard(0, rows(1))
    changed = stage(tmp_path / "out", settings={"seed": 2}).open(allow_changed=True)
    assert changed.missing_shards() == [1]
    assert read_record(tmp_path / "out")["settings"] == {"seed": 2}
    with pytest.raises(ValueError, match="where settings.seed is 2, not 1"):
        stage(tmp_path / "out").open()


def test_a_folder_that_another_call_writes_is_refused_and_a_finished_one_is_read(tmp_path):
    """The first call is in the middle of its work when the second one comes."""
    inside, go_on = threading.Event(), threading.Event()

    def slow_rows():
        inside.set()
        assert go_on.wait(60)
        return rows(1), {}

    first = stage(tmp_path / "out", n_shards=1)
    thread = threading.Thread(target=run_once, args=(first, slow_rows))
    thread.start()
    assert inside.wait(60)
    second = stage(tmp_path / "out", n_shards=1, settings={"seed": 2})
    try:
        with pytest.raises(ValueError, match=r"must not be in use; got .*out.*Wait for it"):
            run_once(second, lambda: (rows(2), {}))
    finally:
        go_on.set()
        thread.join()
    assert read_record(tmp_path / "out")["settings"] == {"seed": 1}
    assert read_rows(tmp_path / "out")["x"] == [1]
    with pytest.raises(ValueError, match=r"where settings\.seed is 1, not 2"):
        run_once(second, lambda: (rows(2), {}))
    with first.held():  # any number of readers at once
        again = []
        reader = threading.Thread(target=lambda: again.append(run_once(first, slow_rows)))
        reader.start()
        reader.join()
    assert again == [False]


def test_locks_and_parts_of_files_are_no_work(tmp_path):
    for name in (".lock", ".train-00000-of-00002.parquet.77"):
        (tmp_path / name).write_text("")
    stage(tmp_path).open()
    stage(tmp_path, settings={"seed": 2}).open()
    assert read_record(tmp_path)["settings"] == {"seed": 2}


@pytest.mark.parametrize("read", [read_rows, content_hash, model_hash, load_policy])
def test_an_empty_name_is_not_the_working_directory(read):
    with pytest.raises(ValueError, match="must be a file, a folder or a hub name; got ''"):
        read("")


@pytest.mark.parametrize("source", ["runs/absent/model", "./model", "~/model", "/absent"])
@pytest.mark.parametrize(
    "read",
    [read_rows, content_hash, model_hash, load_model, load_policy, load_tokenizer, load_reward],
)
def test_a_path_that_is_not_there_is_not_asked_of_the_hub(read, source):
    with pytest.raises(ValueError, match=rf"got '{source}': no such file or folder"):
        read(source)


def test_a_name_without_an_owner_is_no_data_set():
    with pytest.raises(ValueError, match=r"got 'train\.jsonl': no such file or folder"):
        read_rows("train.jsonl")
