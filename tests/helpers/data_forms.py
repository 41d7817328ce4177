"""Forms that training data comes in, each written by the library that defines it, with its twin in LLaVA's JSON.

``FORMS`` maps a name, which docs/data-forms.md lists, to a function that writes the form into a folder.
"""

import base64
import bz2
import gzip
import io
import json
import lzma
import tarfile
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import datasets
import pandas
import pyarrow as pa
import webdataset
import yaml
import zstandard
from PIL import Image

from tests.helpers.videos import write_video

COLORS = {"red": (220, 30, 30), "green": (30, 200, 40), "blue": (20, 40, 230)}
ASK = "What color is it?"
Rows = list[dict[str, Any]]


@dataclass
class Made:
    """A form that was written.

    Args:
        given: What ``data.train`` is set to.
        twin: The same rows in LLaVA's JSON.
    """

    given: Any
    twin: Rows = field(default_factory=list)


Form = Callable[[Path], Made]
FORMS: dict[str, Form] = {}


def form(name: str) -> Callable[[Form], Form]:
    def register(write: Form) -> Form:
        assert name not in FORMS
        FORMS[name] = write
        return write

    return register


def picture(color: str) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (24, 16), COLORS[color]).save(file, "PNG")
    return file.getvalue()


def pictures(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for color in COLORS:
        (folder / f"{color}.png").write_bytes(picture(color))


def llava(before: str = "<image>\n", ask: str = ASK, system: str = "", image: bool = True) -> Rows:
    """The rows, one per color, in LLaVA's form."""
    first = [{"from": "system", "value": system}] if system else []
    return [
        {
            "id": color,
            **({"image": f"{color}.png"} if image else {}),
            "conversations": [
                *first,
                {"from": "human", "value": before + ask},
                {"from": "gpt", "value": color},
            ],
        }
        for color in COLORS
    ]


def chat(color: str, **more: Any) -> list[dict[str, Any]]:
    return [{"role": "user", "content": ASK}, {"role": "assistant", "content": color, **more}]


def write_json(folder: Path, rows: Any, name: str = "train.json", **options: Any) -> str:
    pictures(folder)
    (folder / name).write_text(json.dumps(rows, **options), encoding="utf-8")
    return str(folder / name)


def write_lines(folder: Path, rows: Rows, name: str = "train.jsonl") -> str:
    pictures(folder)
    (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(folder / name)


def each(make: Callable[[str], dict[str, Any]]) -> Rows:
    return [make(color) for color in COLORS]


# Files


@form("JSON list")
def _(folder: Path) -> Made:
    return Made(write_json(folder, llava(), indent=1), llava())


@form("JSON list with a byte order mark")
def _(folder: Path) -> Made:
    path = write_json(folder, llava())
    Path(path).write_bytes(b"\xef\xbb\xbf" + Path(path).read_bytes())
    return Made(path, llava())


@form("JSONL")
def _(folder: Path) -> Made:
    return Made(write_lines(folder, llava()), llava())


@form("JSONL named .csv")
def _(folder: Path) -> Made:
    return Made(write_lines(folder, llava(), "train.csv"), llava())


@form("JSONL named .json")
def _(folder: Path) -> Made:
    return Made(write_lines(folder, llava(), "train.json"), llava())


@form("JSON objects of several lines, one after the other")
def _(folder: Path) -> Made:
    pictures(folder)
    (folder / "train.json").write_text("\n".join(json.dumps(row, indent=2) for row in llava()))
    return Made(str(folder / "train.json"), llava())


@form("JSON object with a list under a key")
def _(folder: Path) -> Made:
    return Made(write_json(folder, {"version": "1.0", "info": {"by": "us"}, "data": llava()}), llava())


@form("JSON object with splits")
def _(folder: Path) -> Made:
    return Made(write_json(folder, {"train": llava(), "test": llava()[:1]}), llava())


@form("JSON object of rows by id")
def _(folder: Path) -> Made:
    return Made(
        write_json(folder, {row["id"]: {k: v for k, v in row.items() if k != "id"} for row in llava()}), llava()
    )


@form("JSON of columns (DataFrame.to_json)")
def _(folder: Path) -> Made:
    pictures(folder)
    pandas.DataFrame(llava()).to_json(folder / "train.json")
    return Made(str(folder / "train.json"), llava())


@form("JSON object that is one row")
def _(folder: Path) -> Made:
    return Made(write_json(folder, llava()[0], indent=2), llava()[:1])


def _packed(name: str, pack: Callable[[bytes], bytes]) -> None:
    @form(name)
    def _(folder: Path) -> Made:
        pictures(folder)
        lines = name.startswith("JSONL")
        text = "".join(json.dumps(row) + "\n" for row in llava()) if lines else json.dumps(llava())
        path = folder / ("train.jsonl" if lines else "train.json")
        path = path.with_name(path.name + "." + name.rpartition(".")[2])
        path.write_bytes(pack(text.encode()))
        return Made(str(path), llava())


_packed("JSON, .gz", gzip.compress)
_packed("JSONL, .gz", gzip.compress)
_packed("JSON, .zst", zstandard.ZstdCompressor().compress)
_packed("JSONL, .zst", zstandard.ZstdCompressor().compress)
_packed("JSONL, .bz2", bz2.compress)
_packed("JSONL, .xz", lzma.compress)


def questions() -> pandas.DataFrame:
    return pandas.DataFrame(each(lambda color: {"image": f"{color}.png", "question": ASK, "answer": color}))


@form("CSV")
def _(folder: Path) -> Made:
    pictures(folder)
    questions().to_csv(folder / "train.csv", index=False)
    return Made(str(folder / "train.csv"), llava())


@form("CSV, .gz")
def _(folder: Path) -> Made:
    pictures(folder)
    questions().to_csv(folder / "train.csv.gz")
    return Made(str(folder / "train.csv.gz"), llava())


@form("TSV")
def _(folder: Path) -> Made:
    pictures(folder)
    questions().to_csv(folder / "train.tsv", index=False, sep="\t")
    return Made(str(folder / "train.tsv"), llava())


@form("TSV of VLMEvalKit, pictures in base64")
def _(folder: Path) -> Made:
    rows = [
        {
            "index": number,
            "image": base64.b64encode(noise(color)).decode(),
            "question": ASK,
            **dict(zip("ABC", COLORS, strict=True)),
            "answer": "ABC"[number],
        }
        for number, color in enumerate(COLORS)
    ]
    pictures(folder)
    for color in COLORS:
        (folder / f"{color}.png").write_bytes(noise(color))
    pandas.DataFrame(rows).to_csv(folder / "train.tsv", index=False, sep="\t")
    return Made(str(folder / "train.tsv"), choices())


@cache
def noise(color: str) -> bytes:
    """A picture whose file is longer than a name could be."""
    file = io.BytesIO()
    image = Image.effect_noise((64, 64), 90)
    Image.merge("RGB", [image if part > 100 else Image.new("L", (64, 64)) for part in COLORS[color]]).save(file, "PNG")
    return file.getvalue()


def choices() -> Rows:
    rows = llava()
    for row, letter in zip(rows, "ABC", strict=True):
        row["conversations"][0]["value"] = (
            f"<image>\n{ASK}\nA. red\nB. green\nC. blue\n"
            "Answer with the option's letter from the given choices directly."
        )
        row["conversations"][1]["value"] = letter
    return rows


def with_bytes() -> datasets.Dataset:
    """A table with pictures inside, as ``push_to_hub`` uploads it."""
    rows = each(
        lambda color: {"image": {"bytes": picture(color), "path": f"{color}.png"}, "question": ASK, "answer": color}
    )
    return datasets.Dataset.from_list(rows).cast_column("image", datasets.Image())


@form("parquet of datasets, pictures inside")
def _(folder: Path) -> Made:
    pictures(folder)
    with_bytes().to_parquet(folder / "train.parquet")
    return Made(str(folder / "train.parquet"), llava())


@form("parquet of pandas, pictures as bytes")
def _(folder: Path) -> Made:
    pictures(folder)
    frame = questions()
    frame["image"] = [picture(color) for color in COLORS]
    frame.to_parquet(folder / "train.parquet")
    return Made(str(folder / "train.parquet"), llava())


@form("parquet named .json")
def _(folder: Path) -> Made:
    pictures(folder)
    with_bytes().to_parquet(folder / "train.json")
    return Made(str(folder / "train.json"), llava())


@form("parquet, conversations as a list of structs")
def _(folder: Path) -> Made:
    pictures(folder)
    datasets.Dataset.from_list(llava()).to_parquet(folder / "train.parquet")
    return Made(str(folder / "train.parquet"), llava())


@form("parquet, conversations as JSON text")
def _(folder: Path) -> Made:
    pictures(folder)
    rows = [{**row, "conversations": json.dumps(row["conversations"])} for row in llava()]
    pandas.DataFrame(rows).to_parquet(folder / "train.parquet")
    return Made(str(folder / "train.parquet"), llava())


@form("parquet, an answer that is a class (ClassLabel)")
def _(folder: Path) -> Made:
    pictures(folder)
    features = datasets.Features(
        image=datasets.Value("string"),
        question=datasets.Value("string"),
        answer=datasets.ClassLabel(names=list(COLORS)),
    )
    datasets.Dataset.from_list(questions().to_dict("records"), features=features).to_parquet(folder / "train.parquet")
    return Made(str(folder / "train.parquet"), llava())


@form("Arrow, file format (Feather)")
def _(folder: Path) -> Made:
    pictures(folder)
    questions().to_feather(folder / "train.feather")
    return Made(str(folder / "train.feather"), llava())


@form("Arrow, stream format")
def _(folder: Path) -> Made:
    pictures(folder)
    table = pa.Table.from_pandas(questions())
    with pa.OSFile(str(folder / "train.arrow"), "wb") as file, pa.ipc.new_stream(file, table.schema) as writer:
        writer.write_table(table)
    return Made(str(folder / "train.arrow"), llava())


@form("save_to_disk of a Dataset")
def _(folder: Path) -> Made:
    pictures(folder)
    with_bytes().save_to_disk(folder / "saved", num_shards=2)
    return Made(str(folder / "saved"), llava())


@form("save_to_disk of a DatasetDict")
def _(folder: Path) -> Made:
    pictures(folder)
    datasets.DatasetDict(train=with_bytes(), test=with_bytes().select([0])).save_to_disk(folder / "saved")
    return Made(str(folder / "saved"), llava())


@form("folder as on the hub, split by file names")
def _(folder: Path) -> Made:
    pictures(folder)
    (folder / "repo" / "data").mkdir(parents=True)
    for number in range(3):
        with_bytes().select([number]).to_parquet(folder / f"repo/data/train-{number:05d}-of-00003.parquet")
    with_bytes().select([0]).to_parquet(folder / "repo/data/test-00000-of-00001.parquet")
    return Made(str(folder / "repo"), llava())


@form("folder as on the hub, configured in its README")
def _(folder: Path) -> Made:
    pictures(folder)
    (folder / "repo" / "main").mkdir(parents=True)
    with_bytes().to_parquet(folder / "repo/main/part.parquet")
    with_bytes().select([0]).to_parquet(folder / "repo/other.parquet")
    configs = [
        {"config_name": "main", "data_files": [{"split": "train", "path": "main/*.parquet"}]},
        {"config_name": "other", "data_files": "other.parquet"},
    ]
    (folder / "repo" / "README.md").write_text(f"---\n{yaml.safe_dump({'configs': configs})}---\n# About\n")
    return Made({"path": str(folder / "repo"), "subset": "main"}, llava())


@form("folder of files of rows beside a folder of pictures")
def _(folder: Path) -> Made:
    pictures(folder)
    pictures(folder / "set" / "images")
    rows = [{**row, "image": f"images/{row['image']}"} for row in llava()]
    (folder / "set" / "train.json").write_text(json.dumps(rows))
    (folder / "set" / "val.json").write_text(json.dumps(rows[:1]))
    return Made(str(folder / "set"), llava())


def _imagefolder(ending: str) -> None:
    @form(f"imagefolder with metadata.{ending}")
    def _(folder: Path) -> Made:
        pictures(folder)
        pictures(folder / "set")
        frame = questions().rename(columns={"image": "file_name"})
        if ending == "jsonl":
            frame.to_json(folder / "set/metadata.jsonl", orient="records", lines=True)
        else:
            getattr(frame, f"to_{ending}")(folder / f"set/metadata.{ending}", index=False)
        return Made(str(folder / "set"), llava())


for _ending in ("jsonl", "csv", "parquet"):
    _imagefolder(_ending)


@form("imagefolder with splits")
def _(folder: Path) -> Made:
    pictures(folder)
    for split in ("train", "test"):
        pictures(folder / "set" / split)
        frame = questions().rename(columns={"image": "file_name"})
        frame.to_json(folder / f"set/{split}/metadata.jsonl", orient="records", lines=True)
    return Made(str(folder / "set"), llava())


def _tar(folder: Path, row: Callable[[str], dict[str, Any]], name: str = "train-000000.tar") -> str:
    pictures(folder)
    with webdataset.TarWriter(str(folder / name)) as tar:
        for color in COLORS:
            tar.write({"__key__": color, "png": picture(color), **row(color)})
    return str(folder / name)


def _caption_twin() -> Rows:
    return llava(ask="Provide a one-sentence caption for the provided image.")


@form("WebDataset: picture and txt")
def _(folder: Path) -> Made:
    return Made(_tar(folder, lambda color: {"txt": color}), _caption_twin())


@form("WebDataset: picture and json with a conversation")
def _(folder: Path) -> Made:
    rows = {row["id"]: row for row in llava()}
    return Made(_tar(folder, lambda color: {"json": rows[color]}), llava())


@form("WebDataset: .tar.gz")
def _(folder: Path) -> Made:
    path = _tar(folder, lambda color: {"json": {"question": ASK, "answer": color}}, "train.tar.gz")
    return Made(path, llava())


@form("WebDataset: several tars by a pattern")
def _(folder: Path) -> Made:
    whole = _tar(folder, lambda color: {"json": {"question": ASK, "answer": color}}, "all.tar")
    with tarfile.open(whole) as tar:
        for number, color in enumerate(COLORS):
            with tarfile.open(folder / f"shard-{number}.tar", "w") as shard:
                for member in tar.getmembers():
                    if member.name.startswith(color):
                        shard.addfile(member, tar.extractfile(member))
    return Made(str(folder / "shard-*.tar"), llava())


@form("list of files")
def _(folder: Path) -> Made:
    rows = llava()
    return Made([write_json(folder, rows[:1], "a.json"), write_lines(folder, rows[1:], "b.jsonl")], rows)


@form("pattern of files")
def _(folder: Path) -> Made:
    for number, row in enumerate(llava()):
        write_json(folder, [row], f"part-{number}.json")
    return Made(str(folder / "part-*.json"), llava())


# Lists of sources


@form("LLaMA-Factory: dataset_info.json")
def _(folder: Path) -> Made:
    write_json(folder, each(lambda color: {"messages": chat(color), "images": [f"{color}.png"]}), "rows.json")
    entry = {
        "file_name": "rows.json",
        "formatting": "sharegpt",
        "columns": {"messages": "messages", "images": "images"},
        "tags": {"role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "assistant"},
    }
    return Made(
        write_json(folder, {"mine": entry, "other": {"script_url": "x"}}, "dataset_info.json") + "#mine", llava()
    )


@form("LLaMA-Factory: an entry with renamed columns")
def _(folder: Path) -> Made:
    write_json(folder, each(lambda color: {"do": ASK, "with": "", "say": color, "pic": f"{color}.png"}), "rows.json")
    columns = {"prompt": "do", "query": "with", "response": "say", "images": "pic"}
    info = {"mine": {"file_name": "rows.json", "columns": columns}}
    return Made(write_json(folder, info, "dataset_info.json"), llava())


@form("InternVL: meta JSON")
def _(folder: Path) -> Made:
    pictures(folder / "pics")
    write_lines(folder, llava(), "rows.jsonl")
    entry = {"root": "pics", "annotation": "rows.jsonl", "data_augment": False, "repeat_time": 1, "length": 3}
    return Made(write_json(folder, {"colors": entry}, "meta.json"), llava())


@form("LLaVA-OneVision: YAML of sources")
def _(folder: Path) -> Made:
    write_json(folder, llava(), "rows.json")
    entry = {"json_path": "rows.json", "sampling_strategy": "all"}
    (folder / "data.yaml").write_text(yaml.safe_dump({"datasets": [entry]}))
    return Made(str(folder / "data.yaml"), llava())


# Shapes


@form("LLaVA")
def _(folder: Path) -> Made:
    return Made(write_json(folder, llava()), llava())


@form("LLaVA, text only")
def _(folder: Path) -> Made:
    return Made(write_json(folder, [{**row, "image": ""} for row in llava("", image=False)]), llava("", image=False))


@form("ShareGPT with renamed columns and tags")
def _(folder: Path) -> Made:
    rows = each(
        lambda color: {
            "talk": [{"who": "Q", "says": f"<image>\n{ASK}"}, {"who": "R", "says": color}],
            "photo_of_it": f"{color}.png",
        }
    )
    given = {
        "path": write_json(folder, rows),
        "columns": {"messages": "talk", "images": "photo_of_it"},
        "tags": {"role_tag": "who", "content_tag": "says", "user_tag": "Q", "assistant_tag": "R"},
    }
    return Made(given, llava())


@form("messages with text")
def _(folder: Path) -> Made:
    return Made(write_json(folder, each(lambda color: {"messages": chat(color), "images": [f"{color}.png"]})), llava())


def _parts(folder: Path, part: Callable[[str], dict[str, Any]], before: str = "<image>", **row: Any) -> Made:
    rows = each(
        lambda color: {
            "messages": [
                {"role": "user", "content": [part(color), {"type": "text", "text": ASK}]},
                {"role": "assistant", "content": [{"type": "text", "text": color}]},
            ],
            **{key: value(color) for key, value in row.items()},
        }
    )
    return Made(write_lines(folder, rows), llava(before))


def _uri(color: str) -> str:
    return "data:image/png;base64," + base64.b64encode(picture(color)).decode()


@form("messages with parts, pictures in their own column (TRL)")
def _(folder: Path) -> Made:
    return _parts(folder, lambda color: {"type": "image"}, images=lambda color: [f"{color}.png"])


@form("messages with parts and indices of pictures (llava-instruct-mix-vsft)")
def _(folder: Path) -> Made:
    return _parts(
        folder, lambda color: {"type": "image", "index": 0, "text": None}, images=lambda color: [f"{color}.png"]
    )


@form("messages of OpenAI, image_url with a data URI")
def _(folder: Path) -> Made:
    return _parts(folder, lambda color: {"type": "image_url", "image_url": {"url": _uri(color)}})


@form("messages of OpenAI's Responses API, input_image")
def _(folder: Path) -> Made:
    return _parts(folder, lambda color: {"type": "input_image", "image_url": _uri(color)})


@form("messages of Anthropic, source in base64")
def _(folder: Path) -> Made:
    data = {color: base64.b64encode(picture(color)).decode() for color in COLORS}
    return _parts(
        folder,
        lambda color: {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": data[color]}},
    )


@form("messages of Qwen, {type: image, image: path}")
def _(folder: Path) -> Made:
    return _parts(folder, lambda color: {"type": "image", "image": f"{color}.png"})


@form("messages of Qwen, {image: path}")
def _(folder: Path) -> Made:
    rows = each(
        lambda color: {
            "messages": [
                {"role": "user", "content": [{"image": f"file://{folder / color}.png"}, {"text": ASK}]},
                {"role": "assistant", "content": [{"text": color}]},
            ]
        }
    )
    return Made(write_json(folder, rows), llava("<image>"))


@form("messages of Gemini, contents with parts")
def _(folder: Path) -> Made:
    def row(color: str) -> dict[str, Any]:
        data = {"mimeType": "image/png", "data": base64.b64encode(picture(color)).decode()}
        return {
            "systemInstruction": {"role": "system", "parts": [{"text": "Be brief."}]},
            "contents": [
                {"role": "user", "parts": [{"inlineData": data}, {"text": ASK}]},
                {"role": "model", "parts": [{"text": color}]},
            ],
        }

    return Made(write_lines(folder, each(row)), llava("<image>", system="Be brief."))


@form("messages in a Dataset with pictures inside")
def _(folder: Path) -> Made:
    pictures(folder)
    rows = each(
        lambda color: {
            "images": [{"bytes": picture(color), "path": None}],
            "messages": [
                {"role": "user", "content": [{"type": "image", "text": None}, {"type": "text", "text": ASK}]},
                {"role": "assistant", "content": [{"type": "text", "text": color}]},
            ],
        }
    )
    table = datasets.Dataset.from_list(rows).cast_column("images", datasets.List(datasets.Image()))
    table.to_parquet(folder / "train.parquet")
    return Made(str(folder / "train.parquet"), llava("<image>"))


@form("messages whose content is sometimes text and sometimes parts, in a Dataset")
def _(folder: Path) -> Made:
    pictures(folder)
    rows = each(
        lambda color: {
            "images": [f"{color}.png"],
            "messages": [
                {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": ASK}]},
                {"role": "assistant", "content": color},
            ],
        }
    )
    features = datasets.Features(
        images=datasets.List(datasets.Value("string")), messages=datasets.List(datasets.Json())
    )
    datasets.Dataset.from_list(rows, features=features).save_to_disk(folder / "saved")
    return Made({"path": str(folder / "saved"), "image_root": str(folder)}, llava("<image>"))


@form("ms-swift: messages and images")
def _(folder: Path) -> Made:
    rows = each(
        lambda color: {
            "messages": [{"role": "user", "content": f"<image>{ASK}"}, {"role": "assistant", "content": color}],
            "images": [str(folder / f"{color}.png")],
        }
    )
    return Made(write_lines(folder, rows), llava("<image>"))


@form("ms-swift: query and response with history")
def _(folder: Path) -> Made:
    rows = each(
        lambda color: {
            "system": "Be brief.",
            "query": ASK,
            "response": color,
            "history": [["Hello.", "Hi."]],
            "images": [f"{color}.png"],
        }
    )
    twin = llava("", system="Be brief.")
    for row in twin:
        row["conversations"][1:1] = [
            {"from": "human", "value": "<image>\nHello."},
            {"from": "gpt", "value": "Hi."},
        ]
    return Made(write_lines(folder, rows), twin)


@form("ms-swift: pairs in a conversation column")
def _(folder: Path) -> Made:
    rows = each(lambda color: {"conversation": [{"human": ASK, "assistant": color}], "image": f"{color}.png"})
    return Made(write_lines(folder, rows), llava())


@form("ms-swift and OpenAI: a turn that is not learned")
def _(folder: Path) -> Made:
    rows = each(
        lambda color: {
            "messages": [
                *chat("It is.", loss=False),
                *chat("Sure.", weight=0),
                *chat(color, loss=True, weight=1),
            ],
            "images": [f"{color}.png"],
        }
    )
    twin = llava("")
    for row in twin:
        first = {"from": "human", "value": f"<image>\n{ASK}"}
        second = {"from": "human", "value": ASK}
        unlearned = [{"from": "gpt", "value": text, "train": False} for text in ("It is.", "Sure.")]
        row["conversations"][:1] = [first, unlearned[0], second, unlearned[1], second]
    return Made(write_lines(folder, rows), twin)


@form("Qwen-VL: <img>path</img> in the text")
def _(folder: Path) -> Made:
    rows = each(
        lambda color: {
            "conversations": [
                {"from": "user", "value": f"Picture 1: <img>{color}.png</img>\n{ASK}"},
                {"from": "assistant", "value": color},
            ]
        }
    )
    return Made(write_json(folder, rows), llava("<image>"))


@form("prompt and completion")
def _(folder: Path) -> Made:
    return Made(
        write_lines(folder, each(lambda color: {"prompt": ASK, "completion": color, "image": f"{color}.png"})), llava()
    )


@form("prompt and completion, each of messages (TRL)")
def _(folder: Path) -> Made:
    rows = each(lambda color: {"prompt": chat(color)[:1], "completion": chat(color)[1:], "images": [f"{color}.png"]})
    return Made(write_lines(folder, rows), llava())


@form("alpaca")
def _(folder: Path) -> Made:
    rows = each(
        lambda color: {
            "instruction": ASK,
            "input": "Look closely.",
            "output": color,
            "system": "Be brief.",
            "history": [],
            "images": [f"{color}.png"],
        }
    )
    return Made(write_json(folder, rows), llava(ask=f"{ASK}\nLook closely.", system="Be brief."))


@form("The Cauldron, FineVision: images and texts")
def _(folder: Path) -> Made:
    pictures(folder)
    rows = each(
        lambda color: {
            "images": [{"bytes": picture(color), "path": None}],
            "texts": [{"user": ASK, "assistant": color, "source": "colors"}],
            "relevance_ratings": [5],
        }
    )
    table = datasets.Dataset.from_list(rows).cast_column("images", datasets.List(datasets.Image()))
    table.to_parquet(folder / "train-00000-of-00001.parquet")
    return Made(str(folder / "train-00000-of-00001.parquet"), llava())


@form("question and answer columns")
def _(folder: Path) -> Made:
    return Made(write_json(folder, questions().to_dict("records")), llava())


@form("question and answer columns under other names")
def _(folder: Path) -> Made:
    rows = each(lambda color: {"Q": ASK, "A1": color, "shown": f"{color}.png"})
    given = {"path": write_json(folder, rows), "columns": {"question": "Q", "answer": "A1", "images": "shown"}}
    return Made(given, llava())


@form("multiple choice, index of the answer (ScienceQA)")
def _(folder: Path) -> Made:
    rows = [
        {
            "image": f"{color}.png",
            "question": ASK,
            "choices": list(COLORS),
            "answer": index,
            "hint": "",
            "solution": ".",
        }
        for index, color in enumerate(COLORS)
    ]
    return Made(write_json(folder, rows), choices())


@form("multiple choice, letter of the answer (ARC)")
def _(folder: Path) -> Made:
    rows = [
        {
            "image": f"{color}.png",
            "question": ASK,
            "choices": {"text": list(COLORS), "label": ["A", "B", "C"]},
            "answerKey": letter,
        }
        for letter, color in zip("ABC", COLORS, strict=True)
    ]
    return Made(write_lines(folder, rows), choices())


@form("multiple choice, text of the answer")
def _(folder: Path) -> Made:
    rows = each(lambda color: {"image": f"{color}.png", "question": ASK, "options": list(COLORS), "answer": color})
    return Made(write_lines(folder, rows), choices())


@form("A-OKVQA")
def _(folder: Path) -> Made:
    pictures(folder)
    for number, color in enumerate(COLORS):
        (folder / f"{number + 1:012d}.jpg").write_bytes(picture(color))
    rows = [
        {
            "image_id": number + 1,
            "question_id": color,
            "question": ASK,
            "choices": list(COLORS),
            "correct_choice_idx": number,
            "direct_answers": [color] * 10,
        }
        for number, color in enumerate(COLORS)
    ]
    return Made(write_json(folder, rows), choices())


def _coco_pictures(folder: Path, name: str) -> None:
    pictures(folder)
    for number, color in enumerate(COLORS):
        (folder / name.format(number + 7)).write_bytes(picture(color))


def _vqa(folder: Path, questions: str, annotations: str) -> tuple[str, str, Rows]:
    _coco_pictures(folder, "COCO_train2014_{:012d}.jpg")
    asked = [
        {"image_id": number + 7, "question": ASK, "question_id": (number + 7) * 1000} for number in range(len(COLORS))
    ]
    answered = [
        {
            "question_type": "what color",
            "multiple_choice_answer": color,
            "answers": [{"answer": color, "answer_confidence": "yes", "answer_id": i} for i in range(10)],
            "image_id": number + 7,
            "answer_type": "other",
            "question_id": (number + 7) * 1000,
        }
        for number, color in enumerate(COLORS)
    ]
    kind = {"data_type": "mscoco", "data_subtype": "train2014"}
    twin = [{**row, "question_type": "other"} for row in llava()]
    return (
        write_json(folder, {**kind, "task_type": "Open-Ended", "questions": asked}, questions),
        write_json(folder, {**kind, "annotations": answered[::-1]}, annotations),
        twin,
    )


@form("VQAv2: questions and annotations")
def _(folder: Path) -> Made:
    names = "v2_OpenEnded_mscoco_train2014_questions.json", "v2_mscoco_train2014_annotations.json"
    path, _, twin = _vqa(folder, *names)
    return Made(path, twin)


@form("OK-VQA: annotations and questions")
def _(folder: Path) -> Made:
    names = "OpenEnded_mscoco_train2014_questions.json", "mscoco_train2014_annotations.json"
    _, path, twin = _vqa(folder, *names)
    return Made(path, twin)


@form("GQA")
def _(folder: Path) -> Made:
    pictures(folder)
    rows = {
        f"0{number}": {
            "imageId": color,
            "question": ASK,
            "answer": color,
            "fullAnswer": f"It is {color}.",
            "isBalanced": True,
        }
        for number, color in enumerate(COLORS)
    }
    return Made(write_json(folder, rows), llava())


@form("TextVQA")
def _(folder: Path) -> Made:
    _coco_pictures(folder, "{:016x}.jpg")
    rows = [
        {
            "question": ASK,
            "image_id": f"{number + 7:016x}",
            "image_width": 24,
            "flickr_original_url": "https://example.org/a.jpg",
            "answers": [color] * 6 + ["other"] * 4,
            "question_id": number,
            "set_name": "train",
        }
        for number, color in enumerate(COLORS)
    ]
    return Made(write_json(folder, {"dataset_type": "train", "dataset_version": "0.5.1", "data": rows}), llava())


@form("DocVQA")
def _(folder: Path) -> Made:
    pictures(folder / "documents")
    rows = each(
        lambda color: {
            "questionId": 1,
            "question": ASK,
            "image": f"documents/{color}.png",
            "docId": 14,
            "answers": [color, color.title()],
            "data_split": "train",
        }
    )
    return Made(write_json(folder, {"dataset_name": "SP-DocVQA", "dataset_split": "train", "data": rows}), llava())


@form("ChartQA")
def _(folder: Path) -> Made:
    return Made(
        write_json(folder, each(lambda color: {"imgname": f"{color}.png", "query": ASK, "label": color})), llava()
    )


@form("ChartQA on the hub, label in a list")
def _(folder: Path) -> Made:
    pictures(folder)
    rows = each(lambda color: {"image": picture(color), "query": ASK, "label": [color], "human_or_machine": 0})
    pandas.DataFrame(rows).to_parquet(folder / "train.parquet")
    return Made(str(folder / "train.parquet"), llava())


@form("COCO captions")
def _(folder: Path) -> Made:
    pictures(folder)
    content = {
        "images": [{"id": n, "file_name": f"{color}.png", "height": 16, "width": 24} for n, color in enumerate(COLORS)],
        "annotations": [{"id": n + 50, "image_id": n, "caption": color} for n, color in enumerate(COLORS)],
    }
    return Made(write_json(folder, content, "captions_train2017.json"), _caption_twin())


@form("picture and caption")
def _(folder: Path) -> Made:
    return Made(write_json(folder, each(lambda color: {"image": f"{color}.png", "caption": color})), _caption_twin())


def _numbered(ask: str = ASK) -> Rows:
    """The rows as a choice between options with numbers from 0."""
    lines = "\n".join(f"{number}. {color}" for number, color in enumerate(COLORS))
    rows = llava(ask=f"{ask}\n{lines}\nAnswer with the option's number from the given choices directly.")
    for number, row in enumerate(rows):
        row["conversations"][1]["value"] = str(number)
    return rows


@form("multiple choice, one column per option (SEED-Bench, MMBench)")
def _(folder: Path) -> Made:
    pictures(folder)
    rows = [
        {
            "image": picture(color),
            "question": ASK,
            "choice_a": "red",
            "choice_b": "green",
            "choice_c": "blue",
            "choice_d": "nan",
            "answer": letter,
        }
        for letter, color in zip("ABC", COLORS, strict=True)
    ]
    pandas.DataFrame(rows).to_parquet(folder / "train.parquet")
    return Made(str(folder / "train.parquet"), choices())


@form("multiple choice, numbered columns (NExT-QA)")
def _(folder: Path) -> Made:
    rows = [
        {
            "image": f"{color}.png",
            "question": ASK,
            "answer": number,
            **{f"a{index}": option for index, option in enumerate(COLORS)},
        }
        for number, color in enumerate(COLORS)
    ]
    return Made(write_json(folder, rows), _numbered())


@form("multiple choice of a CSV, Choice A and Figure_path (PMC-VQA)")
def _(folder: Path) -> Made:
    pictures(folder)
    rows = [
        {
            "Figure_path": f"{color}.png",
            "Question": ASK,
            "Answer": color,
            **{f"Choice {label}": f"{label}:{option}" for label, option in zip("ABC", COLORS, strict=True)},
            "Answer_label": letter,
        }
        for letter, color in zip("ABC", COLORS, strict=True)
    ]
    pandas.DataFrame(rows).to_csv(folder / "train.csv", index=False)
    return Made(str(folder / "train.csv"), choices())


@form("answers as text in a CSV")
def _(folder: Path) -> Made:
    pictures(folder)
    rows = each(lambda color: {"image": f"{color}.png", "question": ASK, "answers": [color, "x", color]})
    pandas.DataFrame(rows).to_csv(folder / "train.csv", index=False)
    return Made(str(folder / "train.csv"), llava())


@form("messages with parts, text under content (torchtune)")
def _(folder: Path) -> Made:
    rows = each(
        lambda color: {
            "messages": [
                {
                    "role": "user",
                    "content": [{"type": "image", "content": f"{color}.png"}, {"type": "text", "content": ASK}],
                },
                {"role": "assistant", "content": [{"type": "text", "content": color}]},
            ]
        }
    )
    return Made(write_lines(folder, rows), llava("<image>"))


@form("messages behind an empty system prompt")
def _(folder: Path) -> Made:
    rows = each(lambda color: {"messages": [{"role": "System ", "content": ""}, *chat(color)], "image": f"{color}.png"})
    return Made(write_json(folder, rows), llava())


@form("marks of other models in the text")
def _(folder: Path) -> Made:
    marks = ("<|image|>", "<start_of_image>", "<|vision_start|><|image_pad|><|vision_end|>")
    rows = llava()
    for row, mark in zip(rows, marks, strict=True):
        row["conversations"][0]["value"] = f"{mark}\n{ASK}"
    return Made(write_json(folder, rows), llava())


# Pictures, system prompts, tools, reasoning, boxes


def _pictured(name: str, value: Callable[[str], Any]) -> None:
    @form(f"picture as {name}")
    def _(folder: Path) -> Made:
        rows = each(lambda color: {"question": ASK, "answer": color, "image": value(color)})
        return Made(write_json(folder, rows), llava())


_pictured("data URI", _uri)
_pictured("{path}", lambda color: {"path": f"{color}.png", "bytes": None})
_pictured("base64 of URLs without padding", lambda color: base64.urlsafe_b64encode(picture(color)).decode().rstrip("="))
_pictured("{bytes} in base64", lambda color: {"bytes": base64.b64encode(picture(color)).decode()})


@form("several pictures in numbered columns (MMMU)")
def _(folder: Path) -> Made:
    rows = each(
        lambda color: {
            "question": ASK,
            "answer": color,
            "image_1": f"{color}.png",
            "image_2": "red.png",
            "image_3": None,
        }
    )
    twin = [{**row, "image": [row["image"], "red.png"]} for row in llava("<image>\n<image>\n")]
    return Made(write_json(folder, rows), twin)


@form("picture in a column of another name, with its content")
def _(folder: Path) -> Made:
    pictures(folder)
    rows = each(lambda color: {"screenshot": {"bytes": picture(color), "path": None}, "question": ASK, "answer": color})
    datasets.Dataset.from_list(rows).cast_column("screenshot", datasets.Image()).to_parquet(folder / "train.parquet")
    return Made(str(folder / "train.parquet"), llava())


@form("system prompt in a column")
def _(folder: Path) -> Made:
    rows = each(lambda color: {"system": "Be brief.", "messages": chat(color), "images": [f"{color}.png"]})
    return Made(write_json(folder, rows), llava(system="Be brief."))


@form("system prompt of the source")
def _(folder: Path) -> Made:
    return Made({"path": write_json(folder, llava()), "system": "Be brief."}, llava(system="Be brief."))


TOOL = {"name": "look", "description": "Looks.", "parameters": {"type": "object", "properties": {}}}
CALL = {"type": "function", "function": {"name": "look", "arguments": {"at": "it"}}}


def _tool_twin(tools: bool = True) -> Rows:
    return each(
        lambda color: {
            "image": f"{color}.png",
            **({"tools": [{"type": "function", "function": TOOL}]} if tools else {}),
            "messages": [
                {"role": "user", "content": f"<image>\n{ASK}"},
                {"role": "assistant", "content": "", "tool_calls": [CALL]},
                {"role": "tool", "content": color},
                {"role": "assistant", "content": color},
            ],
        }
    )


@form("tools of OpenAI: tool_calls")
def _(folder: Path) -> Made:
    text = {"type": "function", "function": {"name": "look", "arguments": json.dumps({"at": "it"})}}
    rows = each(
        lambda color: {
            "images": [f"{color}.png"],
            "tools": [{"type": "function", "function": TOOL}],
            "messages": [
                {"role": "user", "content": f"<image>\n{ASK}"},
                {"role": "assistant", "content": None, "tool_calls": [text]},
                {"role": "tool", "content": color},
                {"role": "assistant", "content": color},
            ],
        }
    )
    return Made(write_lines(folder, rows), _tool_twin())


@form("tools of OpenAI's older form: function_call of a turn")
def _(folder: Path) -> Made:
    rows = each(
        lambda color: {
            "images": [f"{color}.png"],
            "functions": [TOOL],
            "messages": [
                {"role": "user", "content": f"<image>\n{ASK}"},
                {
                    "role": "assistant",
                    "content": None,
                    "function_call": {"name": "look", "arguments": json.dumps({"at": "it"})},
                },
                {"role": "function", "name": "look", "content": color},
                {"role": "assistant", "content": color},
            ],
        }
    )
    return Made(write_lines(folder, rows), _tool_twin())


@form("tools of LLaMA-Factory: function_call and observation")
def _(folder: Path) -> Made:
    rows = each(
        lambda color: {
            "images": [f"{color}.png"],
            "tools": json.dumps([TOOL]),
            "conversations": [
                {"from": "human", "value": f"<image>\n{ASK}"},
                {"from": "function_call", "value": json.dumps({"name": "look", "arguments": {"at": "it"}})},
                {"from": "observation", "value": color},
                {"from": "gpt", "value": color},
            ],
        }
    )
    return Made(write_json(folder, rows), _tool_twin())


@form("tools of Anthropic: tool_use and tool_result")
def _(folder: Path) -> Made:
    rows = each(
        lambda color: {
            "image": f"{color}.png",
            "messages": [
                {"role": "user", "content": f"<image>\n{ASK}"},
                {"role": "assistant", "content": [{"type": "tool_use", "name": "look", "input": {"at": "it"}}]},
                {"role": "user", "content": [{"type": "tool_result", "content": color}]},
                {"role": "assistant", "content": color},
            ],
        }
    )
    return Made(write_json(folder, rows), _tool_twin(tools=False))


@form("reasoning content")
def _(folder: Path) -> Made:
    rows = each(
        lambda color: {
            "image": f"{color}.png",
            "messages": [
                {"role": "user", "content": f"<image>\n{ASK}"},
                {
                    "role": "assistant",
                    "content": [{"type": "thinking", "thinking": "I look."}, {"type": "text", "text": color}],
                },
            ],
        }
    )
    twin = llava()
    for row in twin:
        row["conversations"][1]["reasoning_content"] = "I look."
    return Made(write_json(folder, rows), twin)


@form("grounding with boxes in the text, and objects beside it")
def _(folder: Path) -> Made:
    rows = [{**row, "objects": {"ref": ["it"], "bbox": [[1, 2, 3, 4]]}} for row in llava()]
    for row in rows:
        row["conversations"][1]["value"] = "<|box_start|>(1,2),(3,4)<|box_end|>"
    return Made(write_json(folder, rows), [{k: v for k, v in row.items() if k != "objects"} for row in rows])


@form("video")
def _(folder: Path) -> Made:
    pictures(folder)
    write_video(folder / "a.mp4", 12)
    rows = [
        {
            "messages": [
                {"role": "user", "content": [{"type": "video", "video": "a.mp4"}, {"type": "text", "text": ASK}]},
                {"role": "assistant", "content": "red"},
            ]
        }
    ]
    twin = [
        {
            "video": "a.mp4",
            "conversations": [{"from": "human", "value": f"<video>{ASK}"}, {"from": "gpt", "value": "red"}],
        }
    ]
    return Made(write_json(folder, rows), twin)


@form("video marked by <image> (LLaVA-Video)")
def _(folder: Path) -> Made:
    pictures(folder)
    write_video(folder / "a.mp4", 12)
    talk = [{"from": "human", "value": f"<image>\n{ASK}"}, {"from": "gpt", "value": "red"}]
    twin = [{"from": "human", "value": f"<video>\n{ASK}"}, {"from": "gpt", "value": "red"}]
    rows = [{"id": "a", "data_source": "0_30_s", "video": "a.mp4", "conversations": talk}]
    return Made(write_json(folder, rows), [{"id": "a", "video": "a.mp4", "conversations": twin}])
