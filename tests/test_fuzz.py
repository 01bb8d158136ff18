"""Whatever lies in a file, a reader reads it or refuses it in one line that says what was wrong.

Files are made from whole ones by damaging them, from the format's own tokens in any order, and from any bytes at all.
"""

import csv
import io
import json
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import save_file

import provenn
from plugins import FIXTURES
from provenn import catalog
from provenn.core.errors import UserError
from provenn.data import coco, images, series, tables, text, trajectories
from provenn.data.captions import read_captions
from provenn.data.conversations import read_conversations
from provenn.data.edits import read_edits
from provenn.data.events import read_histories
from provenn.data.scene_questions import read_scene_questions
from provenn.evidence.record import Evidence, Ledger, read_or_set_aside
from provenn.papers.rc_mllm.task import read_samples
from provenn.papers.rc_mllm.task.library import read_library
from provenn.tasks import get_task, translation
from provenn.tasks.discovery import SHARED
from provenn.training import checkpoints, weights

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")  # what is said of a file's holes and encoding
EXAMPLES = settings(max_examples=40, suppress_health_check=list(HealthCheck), database=None)


def read_or_refused(reader: Callable[[Path], object], name: str, content: bytes) -> None:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / name
        PHOTO.save(file.with_name("b.png"))  # what lists may name
        file.write_bytes(content)
        try:
            reader(file)
        except UserError as error:
            assert str(error) and "\n" not in str(error), repr(str(error))


def encoded(image: Image.Image, kind: str, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def saved(**arrays) -> bytes:
    file = io.BytesIO()
    np.savez(file, **arrays)
    return file.getvalue()


def _numbers(file: Path) -> np.ndarray:
    table = tables.read_table(file)
    return table.filled(table.columns[:1])


def framed(writer: str) -> list[bytes]:
    """A small table as pandas writes it, where it can here."""
    file = io.BytesIO()
    try:
        import pandas

        getattr(pandas.DataFrame({"x": [1.5, None, 2], "when": pandas.to_datetime(["2024-01-01"] * 3)}), writer)(file)
    except ImportError:
        return []
    return [file.getvalue()]


PHOTO = Image.fromarray(np.random.default_rng(0).integers(0, 256, (9, 7, 3), dtype=np.uint8))
EPISODE = {"observations": [[0.5, 1], [2, 3]], "actions": [0, 1], "rewards": [1, 1], "environment": "CartPole-v1"}
ARRAYS = {
    "observations": np.ones((4, 2)), "actions": np.zeros(4, np.int64), "rewards": np.ones(4),
    "terminals": np.array([0, 1, 0, 1], bool), "environment": np.array("CartPole-v1"),
}  # fmt: skip
TALKS = [
    {"image": "b.png", "conversations": [{"from": "human", "value": "<image>\na ?"}, {"from": "gpt", "value": "b"}]},
    {"messages": [{"role": "user", "content": "a ?"}, {"role": "assistant", "content": "b"}]},
]
REGION = {
    "image": "b.png", "question": "how old ?", "answer": "old [1]",
    "entries": [{"category": "dog", "box": [1, 1, 5, 6], "text": "it is old"}],
}  # fmt: skip
OBJECTS = {
    "images": [{"id": 1, "file_name": "b.png", "width": 7, "height": 9}], "categories": [{"id": 1, "name": "dog"}],
    "annotations": [{"id": 1, "image_id": 1, "category_id": 1, "bbox": [1, 1, 4, 5], "area": 20, "iscrowd": 0}],
}  # fmt: skip
TS = "@problemName a\n@timeStamps false\n@classLabel true x y\n@data\n1,2,3:4,5,6:x\n1,?,3:4,5,6:y\n"

# What reads, the name of the file, and whole files of its kind.
READERS: dict[str, tuple[Callable[[Path], object], str, list[str | bytes]]] = {
    "table": (_numbers, "a.csv", ["x,y\n1,2\n", '"x"\n1e308\n']),
    "table, of semicolons": (_numbers, "a.csv", ["x;y\n1,5;2\n", "x;y\n1.234,5;\n2;3\n"]),
    "table, of tabs": (_numbers, "a.tsv",
                       ["x\ty\n1\t2\n", "größe\n1\n".encode("utf-16"), "größe\n1\n".encode("cp1252")]),
    "table, .xlsx": (_numbers, "a.xlsx", framed("to_excel")),
    "table, .parquet": (_numbers, "a.parquet", framed("to_parquet")),
    "forecast": (get_task("series-forecasting").load, "a.csv",
                 ["date,x\n" + "".join(f"2024-01-{d:02d},{d}\n" for d in range(1, 29))]),
    "series, wide": (series.read_series, "a.csv", ["label,1,2\na,1,2\nb,3,4\n"]),
    "series, long": (series.read_series, "a.csv", ["series,time,x,label\ns,1,2,a\ns,2,3,a\n"]),
    "series, .tsv": (series.read_series, "a.tsv", ["1\t0.5\t2\n-1\t3\t4\n"]),
    "series, .ts": (series.read_series, "a.ts", [TS]),
    "events": (read_histories, "a.csv", ["sequence,time,mark\na,1,x\na,2,y\n"]),
    "text": (lambda f: [text.Bytes().encode(d.text) for d in text.read_documents(f)], "a.txt", ["some words\n"]),
    "text, .jsonl": (lambda f: [text.Bytes().encode(d.text) for d in text.read_documents(f)], "a.jsonl",
                     ['{"text": "words \\ud83d\\ude00"}\n{"text": "\\u00e9"}\n']),
    "translation": (translation._read, "a.tsv", ["one\teins\ntwo\tzwei\n"]),
    "translation, .jsonl": (translation._read, "a.jsonl", ['{"source": "one", "target": "eins"}\n']),
    "trajectories, .jsonl": (trajectories.read_trajectories, "a.jsonl", [json.dumps(EPISODE) + "\n"]),
    "trajectories, .npz": (trajectories.read_trajectories, "a.npz", [saved(**ARRAYS)]),
    "scene questions": (read_scene_questions, "a.jsonl", ['{"scene": "a.ply", "question": "b ?", "answer": "c"}\n']),
    "captions": (lambda f: read_captions(f.parent), "captions.csv", ["image,caption\nb.png,a dog\nb.png,a cat\n"]),
    "conversations": (read_conversations, "a.jsonl", [json.dumps(talk) + "\n" for talk in TALKS]),
    "questions on regions": (read_samples, "a.jsonl", [json.dumps(REGION) + "\n"]),
    "things to look up": (read_library, "a.json", ['[{"name": "a", "picture": "b.png", "text": "c"}]']),
    "edits": (read_edits, "edits.jsonl", ['{"source": "b.png", "target": "b.png", "instruction": "add it"}\n']),
    "objects": (coco.read_coco, "a.json", [json.dumps(OBJECTS)]),
    "tokenizer": (lambda f: text.read_tokenizer(text.read_text(f)), "a.json", ["bytes", '{"version": "1.0"}']),
    "image, .png": (lambda f: (images.size_of(f), images.read_image(f)), "a.png",
                    [encoded(PHOTO, "PNG"), encoded(PHOTO.convert("P"), "PNG", transparency=0)]),
    "image, .jpg": (lambda f: (images.size_of(f), images.read_image(f)), "a.jpg", [encoded(PHOTO, "JPEG")]),
    "image, .tif": (lambda f: (images.size_of(f), images.read_image(f)), "a.tif", [encoded(PHOTO, "TIFF")]),
    "image, .webp": (lambda f: (images.size_of(f), images.read_image(f)), "a.webp", [encoded(PHOTO, "WEBP")]),
    "image, .bmp": (lambda f: (images.size_of(f), images.read_image(f)), "a.bmp", [encoded(PHOTO, "BMP")]),
    "facts": (lambda f: catalog.read_card(f.parent, "x", "some_paper"), "paper.toml",
              [(FIXTURES / "tiny_gate" / "paper.toml").read_bytes()]),
    "evidence": (lambda f: read_or_set_aside(Evidence, f, "eca_net"), "evidence.json",
                 [(Path(catalog.__file__).parents[1] / "papers" / "eca_net" / "evidence.json").read_bytes()[:4000]]),
    "ledger": (lambda f: read_or_set_aside(Ledger, f, "a"), "ledger.json",
               ['{"paper": "a", "trials": [{"key": "k", "value": 1, "seconds": 2}]}']),
    "checkpoint": (lambda f: checkpoints.read(f), "last.ckpt", []),
}  # fmt: skip

PIECES = [
    "1", "-1", "1e999", "nan", "", "x", "=1+1", "é", "\ufeff", "\\ud800", '"', "'", ",", ";", "\t", ":", "?", "{", "}",
    "[", "]", "[[", "null", "true", "1" * 5000, "[" * 3000, '{"text": "', '"}', "\n", "\r\n", "\r", "\u2028", "\0",
    "2024-01-01", "9999-12-31", "0000-00-00", "24:00", "@data", "@classLabel true x", "text", "label",
    "source", "target",
    "series", "time", "image", "b.png", "entries", "box", "conversations", "messages", "instruction", "observations",
    "actions", "rewards", "sequence", "mark", "[[experiments]]", "id = ", "= {}",
]  # fmt: skip


@pytest.mark.parametrize("kind", READERS)
@EXAMPLES
@given(data=st.data())
def test_a_reader_reads_or_refuses_in_one_line(kind, data):
    reader, name, whole = READERS[kind]
    damaged = st.nothing()
    if whole:
        damaged = st.sampled_from(whole).flatmap(lambda one: spoiled(one.encode() if isinstance(one, str) else one))
    pieces = st.lists(st.sampled_from(PIECES), max_size=12).map(lambda some: "".join(some).encode())
    read_or_refused(reader, name, data.draw(st.one_of(damaged, pieces, st.binary(max_size=80))))


@pytest.mark.parametrize(
    "kind", [kind for kind, (_, _, whole) in READERS.items() if any("b.png" in str(w) for w in whole)]
)
@pytest.mark.parametrize("named", ["none.png", "..", "\0.png"], ids=range(3))
def test_a_list_may_name_what_no_file_is_called(kind, named):
    reader, name, (whole, *_) = READERS[kind]
    assert isinstance(whole, str)
    read_or_refused(reader, name, whole.encode())
    with pytest.raises(UserError), tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / name
        PHOTO.save(file.with_name("b.png"))
        file.write_text(whole.replace("b.png", named if name.endswith("csv") else json.dumps(named)[1:-1]))
        reader(file)


SPELLED = st.sampled_from(["{}", "{:.2f}", "{:,.2f}", "{:,.0f}", "{:.3f}", "{:e}"])
NUMBERS = st.lists(st.lists(st.integers(-(10**9), 10**9).map(lambda i: i / 1000), min_size=2, max_size=2), min_size=1,
                   max_size=5)  # fmt: skip


@EXAMPLES
@given(
    NUMBERS, SPELLED, st.sampled_from(";,\t|"), st.sampled_from(".,"), st.sampled_from(["utf-8", "utf-8-sig", "utf-16"])
)
def test_numbers_are_read_as_they_were_meant_or_refused(rows, spelled, separator, decimal, encoding):
    """However a file is dressed, no number is taken for another: where two readings fit, it is refused.

    Commas that separate say that points are decimal: who writes 1.000 for a thousand there has to say so.
    """
    assume(separator != decimal)
    cells = [[spelled.format(value) for value in row] for row in rows]
    meant = [[float(cell.replace(",", "")) for cell in row] for row in cells]
    if decimal == ",":
        cells = [[cell.translate(str.maketrans(",.", ".,")) for cell in row] for row in cells]
    written = io.StringIO()
    csv.writer(written, delimiter=separator).writerows([["größe", "y"], *cells])
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "a.csv"
        file.write_bytes(written.getvalue().encode(encoding))
        kinds = {} if separator == "\t" else {"separator": separator}
        told = tables.read_table(file, decimal=decimal, **kinds)
        np.testing.assert_array_equal(told.numbers(told.columns), meant)
        try:
            table = tables.read_table(file)
            values = table.numbers(table.columns)
        except UserError as error:
            assert "may be" in str(error) and "\n" not in str(error)
        else:
            np.testing.assert_array_equal(values, meant)


def spoiled(content: bytes) -> st.SearchStrategy[bytes]:
    """The file cut, with a piece of it taken out, doubled or replaced."""

    def spoil(start: int, stop: int, instead: bytes) -> bytes:
        low, high = sorted((start % (len(content) + 1), stop % (len(content) + 1)))
        return content[:low] + instead + content[high:]

    other = st.one_of(st.binary(max_size=6), st.sampled_from(PIECES).map(str.encode), st.just(b""))
    places = st.integers(0, len(content))
    near = st.tuples(places, st.integers(0, 8)).map(lambda pair: (pair[0], pair[0] + pair[1]))
    return st.one_of(st.tuples(places, places), near).flatmap(lambda pair: other.map(lambda new: spoil(*pair, new)))


VALUES = st.recursive(
    st.one_of(
        st.none(), st.booleans(), st.integers(-2, 9), st.just(10**12), st.floats(), st.text(max_size=4),
        st.sampled_from(["bytes", "tiny_small", "tiny_talk", "image-classification", "language-modelling", "nobody"]),
    ),
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(st.text(max_size=3), inner, max_size=3)),
    max_leaves=6,
)  # fmt: skip
SEEN = {"classes": ["a", "b"], "size": 8, "channels": 3, "mean": [0.0] * 3, "std": [1.0] * 3}
PAST = {"columns": ["a"], "context": 12, "horizon": 2, "mean": [0.0], "std": [1.0]}
LABELS = {
    "tiny_small": ("image-classification", {"num_classes": 2}, SEEN, "a.png"),
    "tiny_forecast": ("series-forecasting", {"channels": 1, "context": 12, "horizon": 2}, PAST, "a.csv"),
    "tiny_talk": ("language-modelling", {"vocab": 256}, {"tokenizer": "bytes", "length": 8}, "some words"),
}


@pytest.mark.usefixtures("third_party", "untyped")
@pytest.mark.parametrize("preset", LABELS)
@EXAMPLES
@given(data=st.data())
def test_a_forged_label_is_refused_in_one_line(preset, data):
    """One value of the label of good weights, at any depth, becomes another; prediction works or is refused."""
    task, options, meta, given_file = LABELS[preset]
    state = {k: v.contiguous() for k, v in provenn.paper("tiny_gate").build(preset, **options).state_dict().items()}
    label = {"paper": "tiny_gate", "preset": preset, "task": task, "options": options, "meta": meta, "version": "1"}
    label = json.loads(json.dumps(label))
    place = data.draw(st.sampled_from([("options",), ("meta",), *((key,) for key in label)]))
    inside: dict = label
    if place[0] in ("options", "meta") and data.draw(st.booleans()):
        inside, place = label[place[0]], (data.draw(st.sampled_from(sorted(label[place[0]]))),)
    if data.draw(st.booleans()):
        inside[place[0]] = data.draw(VALUES)
    else:
        del inside[place[0]]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        PHOTO.save(folder / "a.png")
        (folder / "a.csv").write_text("a\n" + "1\n2\n" * 12)
        save_file(state, folder / "weights.safetensors", {weights.KEY: json.dumps(label)})
        given_one = given_file if " " in given_file else folder / given_file
        overrides = {"tokens": 2} if task == "language-modelling" else {}
        try:
            provenn.predict("tiny_gate", [given_one], weights=folder, overrides=overrides)
        except UserError as error:
            assert str(error) and "\n" not in str(error), repr(str(error))


@EXAMPLES
@given(text_of_label=st.one_of(st.text(max_size=20), VALUES.map(json.dumps), st.just("[" * 100_000)))
def test_a_label_that_is_none_is_refused_in_one_line(text_of_label):
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "a.safetensors"
        save_file({"a": torch.ones(1)}, file, {weights.KEY: text_of_label})
        try:
            weights.read(file)
        except UserError as error:
            assert "\n" not in str(error)


@pytest.mark.parametrize("task", SHARED)
@EXAMPLES
@given(meta=st.dictionaries(st.sampled_from([*SEEN, *PAST, "tokenizer", "length", "blank", "marks"]), VALUES))
def test_any_meta_is_held_to_its_task_s_schema(task, meta):
    try:
        get_task(task).check_meta(meta, "a file")
    except UserError as error:
        assert str(error).startswith("a file: its label cannot be read: meta") and "\n" not in str(error)


@pytest.mark.parametrize("task", SHARED)
def test_what_a_task_writes_it_reads(task):
    """`default_meta` keeps the schema, so that an author's weights and a schema never disagree."""
    options = {"channels": 2, "context": 4, "horizon": 2, "num_classes": 3, "length": 9, "marks": 2, "state_dim": 3,
               "actions": 2, "max_length": 9, "in_channels": 1}  # fmt: skip
    kind = get_task(task)
    if kind.name != "masked-language-modelling":  # whose blank follows from the tokenizer
        kind.check_meta(kind.default_meta(options), "a file")
