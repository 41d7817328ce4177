"""What a user names as data, and how it is to be read.

Data flow: options -> ``Source`` and ``ReadOptions`` -> ``source.open_source``.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True)
class Source:
    """One entry of ``data.train`` (or ``val``, ``test``, ``predict``).

    Args:
        path: A file, a folder, a pattern (``data/*.parquet``) or the name of a dataset on Hugging Face's hub.
        name: What it is called in metrics and reports; '' takes the path's stem.
        weight: Of its share when training sources are mixed, relative to the others (``data.mixture``); 0 for none.
        repeats: How often each training row is used in an epoch; below 1 for a part of the rows.
        first: Most rows that are in use, from the first on, of those that can be used; None for all.
        limit: Most rows that are in use, drawn at random with ``data.seed`` (from the ``first``); None for all.
        sampling: Which rows that can be used are in use, the same in every epoch, before ``first`` and ``limit``: all,
            first:N, end:N or random:N (drawn with ``data.seed``), where N is a number of rows, a percentage rounded up
            (10%), or a share rounded down (0.1); None for all.
        image_root: Folder that its picture names are relative to and may not leave; None for the data's own folder.
        columns: Our name -> the file's column, where it is not found: messages; prompt, query, response, history;
            question, answer, options; system, tools, images, videos, id, question_type.
        tags: Names within messages: role_tag, content_tag, user_tag, assistant_tag, observation_tag, function_tag,
            system_tag.
        split: Of a dataset with several: train, validation, ...; None takes the one that the option stands for.
        subset: Of a dataset with several configurations; None for the default.
        revision: Commit, tag or branch of a dataset on the hub.
        system: System prompt of rows without one; None for none.
    """

    path: str
    name: str = ""
    weight: float = 1.0
    repeats: float = 1.0
    first: int | None = None
    limit: int | None = None
    sampling: str | None = None
    image_root: str | None = None
    columns: Mapping[str, str] = field(default_factory=dict)
    tags: Mapping[str, str] = field(default_factory=dict)
    split: str | None = None
    subset: str | None = None
    revision: str | None = None
    system: str | None = None


COLUMNS = (
    "messages", "prompt", "query", "response", "history", "question", "answer", "options", "system", "tools", "images",
    "videos", "id", "question_type",
)  # fmt: skip
"""Keys of ``Source.columns``."""
TAGS = ("role_tag", "content_tag", "user_tag", "assistant_tag", "observation_tag", "function_tag", "system_tag")
"""Keys of ``Source.tags``."""


@dataclass(frozen=True)
class ReadOptions:
    """How all sources of an option are read.

    Args:
        answers_required: Whether a row without an answer is rejected; if not, an open question gets an empty answer.
        follow_links: Whether symbolic links may lead out of the image root.
        fetch: Whether pictures behind links are downloaded.
        cache: Folder for what is downloaded; needed with ``fetch``.
        split: Which split the option stands for, where a dataset has several: train, validation, test or predict.
        must_exist: Whether a row whose picture is no file is rejected; if not, pictures are looked for later.
    """

    answers_required: bool = True
    follow_links: bool = False
    fetch: bool = False
    cache: Path | None = None
    split: str = "train"
    must_exist: bool = True
