"""Files as strangers and instruments write them: each is read as it was meant, or refused in one line.

The tables hold what goes wrong silently elsewhere: holes, decimal commas, dates out of order, cut and empty files.
"""

import io
import struct
from pathlib import Path

import pytest
from PIL import Image

from provenn.core.errors import UserError
from provenn.data import audio, graphs, images, sentences, series, tables
from provenn.data.class_folders import given_splits
from provenn.data.events import read_histories
from test_fuzz import READERS

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")  # what is said of holes and encodings


def outcome(read, file: Path):
    """What a reader gives, or its refusal; whatever else it raises is a fault."""
    try:
        return read(file)
    except UserError as error:
        assert str(error) and "\n" not in str(error), repr(str(error))
        return error


SHELLS = {
    "nothing": b"", "blanks": b" \n\t\n", "Ctrl-Z": b"\x1a", "zeros": bytes(64), "mark alone": b"\xef\xbb\xbf",
    "UTF-16 mark alone": b"\xff\xfe", "half a character": b"\xf0\x9f\x98", "surrogates": b"\xed\xa0\x80",
    "one line end": b"\r",
}  # fmt: skip


@pytest.mark.parametrize("kind", [kind for kind in READERS if kind not in ("evidence", "ledger", "tokenizer", "facts")])
def test_empty_cut_and_marked_files(tmp_path, kind):
    reader, name, whole = READERS[kind]
    contents = dict(SHELLS)
    for number, one in enumerate(whole):
        content = one.encode() if isinstance(one, str) else one
        contents |= {
            f"cut {number}": content[: len(content) // 2],
            f"doubled {number}": content + content,
            f"with an end of DOS {number}": content + b"\x1a",
            f"after a zero {number}": b"\0" + content,
        }
    for what, content in contents.items():
        file = tmp_path / name
        file.write_bytes(content)
        given = outcome(reader, file)
        if what in ("nothing", "blanks", "zeros", "half a character", "surrogates") and kind != "checkpoint":
            assert isinstance(given, UserError), (kind, what, given)


NUMBERS = [
    ("x,y\n1,2\n3,4\n", [1, 3]),
    ("x,y\r\n1,2\r\n3,4\r\n", [1, 3]),
    ("\ufeffx,y\n1,2\n3,4\n", [1, 3]),
    ("x;y\n1,5;2\n2,5;4\n", [1.5, 2.5]),
    ("x\ty\n1\t2\n3\t4\n", [1, 3]),
    ("x,y\n1,2\n3,4\n\n", [1, 3]),
    ('"x","y"\n"1","2"\n"3","4"\n', [1, 3]),
    ("x , y\n 1 , 2 \n 3 , 4 \n", [1, 3]),
    ("x\n1\n\n3\n", None),
    ("x,y\n1,2\n,4\n3,5\n", [1, 2, 3]),
    ("x,y\n1,2\nNaN,4\n3,5\n", [1, 2, 3]),
    ("x,y\n1,2\nN/A,4\n3,5\n", [1, 2, 3]),
    ("x,y\n1,2\ninf,4\n", None),
    ("x,y\n1,2\n1e400,4\n", None),
    ("x,y\n1,2\n--,4\n", None),
    ("x,y\n1,2\n0x10,4\n", None),
    ("x,y\n1,2\n1_000,4\n", None),
    ("x,y\n1,2\n١,4\n", [1, 1]),
    ("x,y\n1,2\n3;4\n", None),
    ("x,y\n1,2,3\n", None),
    ("x,x\n1,2\n", None),
    ("x,\n1,2\n", [1]),
    ("1,2\n3,4\n", None),
    ("x,y\n", None),
    ("x,y\n1,\x1a\n", [1]),
    ('x,y\n"1,2\n', None),
    ("x,y\n1\x00,2\n", None),
    ("x,y\ntrue,2\n", None),
    ("x,y\n=1+1,2\n", None),
    ("x,y\n1 2,2\n", None),
    ("x,y\n50%,2\n", None),
    ("x,y\n$3,2\n", None),
    ("x,y\n(3),2\n", None),
]


@pytest.mark.parametrize(("text", "expected"), NUMBERS)
def test_numbers_of_a_table(tmp_path, text, expected):
    (tmp_path / "a.csv").write_bytes(text.encode())

    def read(file):
        table = tables.read_table(file)
        return table.filled(table.columns[:1])[:, 0].tolist()

    given = outcome(read, tmp_path / "a.csv")
    assert isinstance(given, UserError) if expected is None else given == expected, given


SERIES = [
    ("a.csv", "label,1,2\na ,1,2\n a,3,4\n", ["a", "a"]),
    ("a.csv", "label,1,2\na,1,2\nA,3,4\n", ["a", "A"]),
    ("a.csv", "label,1,2\n,1,2\nb,3,4\n", None),
    ("a.csv", "series,time,x,label\ns,2,1,a\ns,1,2,a\n", ["a"]),
    ("a.csv", "series,time,x,label\ns,1,1,a\ns,1,2,a\n", None),
    ("a.csv", "series,time,x,label\ns,1,1,a\ns,2,2,b\n", None),
    ("a.csv", "series,time,x,label\ns,nan,1,a\ns,2,2,a\n", None),
    ("a.csv", "series,time,x\ns,-1,1\ns,-2,2\n", None),
    ("a.tsv", "1\t0.5\t2\n-1\tx\t4\n", None),
    ("a.ts", "@classLabel true x y\n@data\n1,2:x\n1,2:z\n", None),
    ("a.ts", "@classLabel true x y\n@data\n1,2:3:x\n", None),
    ("a.ts", "@timeStamps true\n@data\n(1,2):x\n", None),
    ("a.ts", "@classLabel true x\n", None),
    ("a.ts", "@classLabel true x y\r\n@data\r\n1,2:x\r\n3,4:y\r\n", ["x", "y"]),
]


@pytest.mark.parametrize(("name", "text", "labels"), SERIES)
def test_labelled_series(tmp_path, name, text, labels):
    (tmp_path / name).write_text(text, newline="")
    given = outcome(series.read_series, tmp_path / name)
    if isinstance(given, UserError):
        assert labels is None, given
    else:
        assert given.labels == labels


EVENTS = [
    ("sequence,time,mark\na,2,x\na,1,y\n", ["y", "x"]),
    ("sequence,time,mark\na,-2,x\na,1,y\n", ["x", "y"]),
    ("mark,time,sequence\nx,1,a\ny,2,a\n", ["x", "y"]),
    ("sequence,time,mark\na,1,x\na,1,y\n", None),
    ("sequence,time,mark\na,1,\n", None),
    ("sequence,time,mark\na,2024-01-01,x\n", None),
    ("sequence,time,mark\na,nan,x\n", None),
    ("sequence,time\na,1\n", None),
    ("sequence,time,mark,mark\na,1,x,y\n", None),
]


@pytest.mark.parametrize(("text", "marks"), EVENTS)
def test_events(tmp_path, text, marks):
    (tmp_path / "a.csv").write_text(text)
    given = outcome(read_histories, tmp_path / "a.csv")
    assert isinstance(given, UserError) if marks is None else given[0].marks == marks, given


GRAPHS = [
    ('{"nodes": [1, 2], "edges": [[0, 1]], "target": 1}', 1),
    ('\ufeff{"nodes": [1, 2], "edges": [[0, 1]], "target": 1}\r\n\r\n', 1),
    ('{"nodes": [1, 2], "edges": [[0, 5]], "target": 1}', None),
    ('{"nodes": [1, 2], "edges": [[0, -1]], "target": 1}', None),
    ('{"nodes": [1, 2], "edges": [[0, 1]], "target": NaN}', None),
    ('{"nodes": [1, 2], "edges": [[0, 1]], "target": Infinity}', None),
    ('{"nodes": [1, 2], "edges": [[0, 1]], "target": 1' + "0" * 400 + "}", None),
    ('{"nodes": [1, 2], "edges": [[0, 1]], "target": true}', None),
    ('{"nodes": [1, 2], "edges": [[0, true]], "target": 1}', None),
    ('{"nodes": [1.5], "edges": [], "target": 1}', None),
    ('{"nodes": [], "edges": [], "target": 1}', None),
    ('{"nodes": ["\\ud800"], "edges": [], "target": 1}', None),
    ("[" * 5000, None),
    ("{}", None),
    ("null", None),
    ('{"nodes": [1], "edges": [], "target": 1}\n{"nodes": [1], "edges": [], "target": [1, 2]}', None),
]


@pytest.mark.parametrize(("text", "count"), GRAPHS)
def test_graphs(tmp_path, text, count):
    (tmp_path / "a.jsonl").write_bytes(text.encode())
    given = outcome(graphs.read_graphs, tmp_path / "a.jsonl")
    assert isinstance(given, UserError) if count is None else len(given.items) == count, given


def wav(rate=8000, width=2, channels=1, samples=b"\1\0" * 200, form=1) -> bytes:
    block = channels * width
    header = struct.pack("<4sI4s4sIHHIIHH", b"RIFF", 36 + len(samples), b"WAVE", b"fmt ", 16, form, channels,
                         rate, (rate * block) & 0xFFFFFFFF, block & 0xFFFF, (8 * width) & 0xFFFF)  # fmt: skip
    return header + struct.pack("<4sI", b"data", len(samples)) + samples


SOUNDS = [
    (wav(), 200),
    (wav(channels=2), 100),
    (wav(width=1), 400),
    (wav(rate=0), None),
    (wav(rate=1), None),
    (wav(rate=2**31), None),
    (wav(samples=b""), None),
    (wav(samples=b"\0\0"), None),
    (wav(channels=0), None),
    (wav(width=0), None),
    (wav(width=4, form=3, samples=struct.pack("<4f", 0, float("nan"), 0, 0)), None),
    (wav(width=4, form=3, samples=struct.pack("<4f", 0, float("inf"), 0, 0)), None),
    (wav(width=4, form=3, samples=struct.pack("<4f", 0, 0.5, 0, 0)), 4),
    (wav(form=6, width=1), None),
    (wav(form=85), None),
    (wav()[:30], None),
    (wav()[:100], None),
    (b"RIFF", None),
    (b"ID3\3" + bytes(50), None),
    (wav().replace(b"data", b"atad"), None),
]


@pytest.mark.parametrize("number", range(len(SOUNDS)))
def test_sounds(tmp_path, number):
    content, count = SOUNDS[number]
    (tmp_path / "a.wav").write_bytes(content)
    given = outcome(audio.read_sound, tmp_path / "a.wav")
    assert isinstance(given, UserError) if count is None else len(given[0]) == count, given


def picture(mode="RGB", kind="PNG", size=(8, 6), **options) -> bytes:
    file = io.BytesIO()
    Image.new(mode, size, 0).save(file, kind, **options)
    return file.getvalue()


def chunked(width: int, height: int, depth: int = 8, colour: int = 2) -> bytes:
    """A PNG that says it is so large, and holds nothing."""
    import zlib

    def chunk(name, content):
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def animated(kind: str) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (4, 4)).save(file, kind, save_all=True, append_images=[Image.new("RGB", (4, 4), "red")])
    return file.getvalue()


TURNED = Image.Exif()
TURNED[0x0112] = 6
PICTURES = [
    ("a.png", picture(), (6, 8)),
    ("a.png", picture("L"), (6, 8)),
    ("a.png", picture("1"), (6, 8)),
    ("a.png", picture("P"), (6, 8)),
    ("a.png", picture("LA"), (6, 8)),
    ("a.png", picture("RGBA"), (6, 8)),
    ("a.png", picture("I;16"), (6, 8)),
    ("a.jpg", picture("CMYK", "JPEG"), (6, 8)),
    ("a.jpg", picture("L", "JPEG"), (6, 8)),
    ("a.jpg", picture("RGB", "JPEG", exif=TURNED), (8, 6)),
    ("a.tif", picture("RGB", "TIFF"), (6, 8)),
    ("a.tif", picture("CMYK", "TIFF"), (6, 8)),
    ("a.tif", picture("F", "TIFF"), None),
    ("a.tif", picture("I", "TIFF"), None),
    ("a.png", picture("RGB", "JPEG"), (6, 8)),
    ("a.png", picture(size=(1, 1)), (1, 1)),
    ("a.png", animated("PNG"), None),
    ("a.webp", animated("WEBP"), None),
    ("a.tif", animated("TIFF"), None),
    ("a.png", chunked(60_000, 60_000), None),
    ("a.png", chunked(0, 5), None),
    ("a.png", chunked(5, 5), None),
    ("a.png", chunked(5, 5, depth=3), None),
    ("a.png", picture(size=(64, 64))[:-40], None),
    ("a.png", picture()[:20], None),
    ("a.jpg", picture("RGB", "JPEG", size=(64, 64))[:-40], None),
    ("a.jpg", b"\xff\xd8\xff\xe0", None),
    ("a.bmp", b"BM" + bytes(60), None),
    ("a.png", b"<svg xmlns='http://www.w3.org/2000/svg'/>", None),
    ("a.png", b"%!PS-Adobe-3.0 EPSF-3.0\n", None),
]


@pytest.mark.parametrize("number", range(len(PICTURES)))
def test_pictures(tmp_path, number):
    name, content, shape = PICTURES[number]
    (tmp_path / name).write_bytes(content)
    given = outcome(images.read_image, tmp_path / name)
    assert isinstance(given, UserError) if shape is None else given.colour.shape[:2] == shape, given
    if shape is not None:
        assert images.size_of(tmp_path / name) == shape


SENTENCES = [
    ("text,label\none,a\ntwo,b\n", ["a", "b"]),
    ("label,text\na ,one\nb,two\n", ["a", "b"]),
    ('label,text\na,"one, and\nmore"\nb,two\n', ["a", "b"]),
    ('1,"Title","What"\n2,"Other","Words"\n', ["1", "2"]),
    ("text,label\none,\n", None),
    ("text,label\none\n", None),
    ("text,label\n", None),
    ("text,text,label\none,two,a\n", None),
    ('text,label\n"one,a\n', None),
]


@pytest.mark.parametrize("names", [("cat", "Cat"), ("cat", "cat "), ("\u00e9", "e\u0301")])
def test_classes_whose_names_look_alike_are_said(tmp_path, names):
    for name in names:
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.png").write_bytes(picture())
    with pytest.warns(UserWarning, match="are two classes, whose names differ by case or blanks alone"):
        assert len(given_splits(tmp_path, images.images_in, "images")["train"]) == 2


@pytest.mark.parametrize(("text", "labels"), SENTENCES)
def test_sentences(tmp_path, text, labels):
    for name in ("train.csv", "test.csv"):
        (tmp_path / name).write_text(text)
    given = outcome(sentences.read_sentences, tmp_path)
    assert isinstance(given, UserError) if labels is None else [e.label for e in given.train] == labels, given
