"""The Hugging Face Hub: files of data sets and of models, each checked against its SHA-256."""

from __future__ import annotations

import contextlib
import functools
import itertools
import os
import re
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from common.files import sha256
from common.script import DataError, escape

MODEL_FILES = ["config.json", "model*.safetensors", "vocab.json", "merges.txt", "tokenizer.json", "added_tokens.json"]
LOCAL_FILES = "give local files with --input"
RETRY_SECONDS = (10, 60, 300)  # pauses after which a download that failed is tried again


def list_train_files(dataset: str, name: str, revision: str, suffixes: tuple[str, ...]) -> list[str]:
    """The paths of a data set's train files at one of its commits; raises DataError for another suffix than these."""
    import datasets
    import huggingface_hub

    # a failure is to be one line, and fineweb.py has a progress bar of its own
    datasets.utils.logging.set_verbosity_error()
    huggingface_hub.utils.logging.set_verbosity_error()
    huggingface_hub.utils.disable_progress_bars()
    with explain_errors(f"list the train files of --dataset {dataset} --name {name}", LOCAL_FILES):
        builder = datasets.load_dataset_builder(dataset, name, revision=revision)
        if builder.config.data_files is None:  # offline, of a data set that is in the library's cache
            raise ValueError("the Hub cannot be reached")
        urls = builder.config.data_files["train"]
    paths = [str(url).partition(f"@{revision}/")[2] for url in urls]
    for path in paths:
        if not path.endswith(suffixes):
            raise DataError(f"--dataset {dataset} has {path}: convert it to {', '.join(suffixes)}, for --input")
    return paths


def fetch_file(dataset: str, path: str, revision: str, directory: Path | None) -> Path:
    """Download a file into a directory, or, if that is None, into the library's cache, unless it is there."""
    print(f"fetching {escape(path)}", flush=True)
    with explain_errors(f"download {path} of --dataset {dataset}", LOCAL_FILES):
        for pause in RETRY_SECONDS:
            try:
                return try_to_fetch(dataset, path, revision, directory)
            except Exception as error:
                failure = f"{path} could not be had: {reason(error.__cause__ or error)}"
                print(f"trying again in {pause} s: {escape(failure)}", flush=True)
                time.sleep(pause)
        return try_to_fetch(dataset, path, revision, directory)


def try_to_fetch(dataset: str, path: str, revision: str, directory: Path | None) -> Path:
    from huggingface_hub import HfFileSystem, hf_hub_download

    file = Path(hf_hub_download(dataset, path, repo_type="dataset", revision=revision, local_dir=directory))
    listed = HfFileSystem().info(f"datasets/{dataset}@{revision}/{path}").get("lfs")
    if listed and sha256(file) != listed["sha256"]:
        file.resolve().unlink()  # in the cache it is a link
        raise ValueError("SHA-256 mismatch")
    return file


@functools.cache
def fetch_model(name: str) -> Path:
    """The directory of a model in the library's cache, once it is there; raises DataError if it cannot be had."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.utils import disable_progress_bars, logging

    logging.set_verbosity_error()  # a failure is to be one line
    if not sys.stderr.isatty():
        disable_progress_bars()
    with explain_errors(f"find {name} on the Hub, nor a local directory", "name a local checkpoint"):
        directory = Path(snapshot_download(name, allow_patterns=MODEL_FILES))
        for path in itertools.chain.from_iterable(map(directory.glob, MODEL_FILES)):
            # a link named by its SHA-256, which may itself link to a file that is named by Xet's hash
            digest = Path(os.readlink(path)).name if path.is_symlink() else ""
            if re.fullmatch("[0-9a-f]{64}", digest) and sha256(path) != digest:
                path.resolve().unlink(missing_ok=True)
                raise ValueError(f"SHA-256 mismatch of {path.name}")
    return directory


@contextlib.contextmanager
def explain_errors(attempt: str, remedy: str) -> Iterator[None]:
    """Turn any error, since the libraries promise no particular ones, into a DataError of one line."""
    try:
        yield
    except Exception as error:
        raise DataError(f"cannot {attempt}: {reason(error)}; run the same command again, or {remedy}") from None


def reason(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
