"""The data sets of `provenn data` in miniature: the same layout, as small as it can be."""

import json
from pathlib import Path

import numpy as np
from PIL import Image

WORDS = [
    "the",
    "cat",
    "sat",
    "on",
    "a",
    "mat",
    "and",
    "saw",
    "<unk>",
    ",",
    "which",
    "was",
    "as",
    "@-@",
    "good",
    ".",
    "=",
    "Title",
    "=",
]


def rng() -> np.random.Generator:
    return np.random.default_rng(0)


def write(name: str, folder: Path) -> Path:
    """Write a set below `folder` under its name; returns its place."""
    place = folder / name
    place.mkdir(parents=True)
    WRITERS[name](place)
    return place


def photo(file: Path, side: int, level: int = 128) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    # Smooth, as photographs are: what is reduced can be enlarged again.
    coarse = rng().integers(max(0, level - 40), min(255, level + 40), (side // 8, side // 8, 3), dtype=np.uint8)
    Image.fromarray(coarse).resize((side, side), Image.Resampling.BICUBIC).save(file)


def imagenet(place: Path) -> None:
    for split, count in (("train", 3), ("val", 2)):
        for number, name in enumerate(("n01440764", "n01443537", "n01484850")):
            for i in range(count):
                photo(place / split / name / f"{name}_{i}.JPEG", 40 + 8 * i, level=50 + 70 * number)


def cifar(place: Path, files: dict[str, int], labels: int, classes: int, names: str) -> None:
    for file, count in files.items():
        rows = rng().integers(0, 256, (count, labels + 3072), dtype=np.uint8)
        rows[:, labels - 1] = np.arange(count) % classes
        rows[:, labels:] = rows[:, labels - 1 : labels] * (200 // classes) + rows[:, labels:] // 8
        rows.tofile(place / file)
    (place / names).write_text("\n".join(f"class_{i}" for i in range(classes)) + "\n")


def cifar10(place: Path) -> None:
    files = {f"data_batch_{i}.bin": 20 for i in range(1, 6)} | {"test_batch.bin": 20}
    cifar(place, files, 1, 10, "batches.meta.txt")


def div2k(place: Path) -> None:
    for split, count in (("train", 2), ("valid", 2)):
        for i in range(count):
            photo(place / f"DIV2K_{split}_HR" / f"{i:04}.png", 80)
            photo(place / f"DIV2K_{split}_LR_bicubic" / "X2" / f"{i:04}x2.png", 40)


def benchmark(place: Path) -> None:
    for name in ("baby", "bird"):
        photo(place / "HR" / f"{name}.png", 64)
        photo(place / "LR_bicubic" / "X2" / f"{name}x2.png", 32)


def prose(lines: int) -> str:
    drawn = np.random.default_rng(lines)
    return "".join(" " + " ".join(drawn.permutation(WORDS)[: 4 + i % 7]) + " \n" for i in range(lines))


def wikitext(place: Path, ending: str = "tokens") -> None:
    for split, lines in (("train", 200), ("valid", 40), ("test", 50)):
        (place / f"wiki.{split}.{ending}").write_text(prose(lines))


def wikitext_raw(place: Path) -> None:
    wikitext(place, "raw")
    byte_pairs(place)


def byte_pairs(place: Path) -> None:
    import tokenizers
    import tokenizers.models
    import tokenizers.pre_tokenizers
    import tokenizers.trainers

    inner = tokenizers.Tokenizer(tokenizers.models.BPE())
    level = tokenizers.pre_tokenizers.ByteLevel
    inner.pre_tokenizer = level(add_prefix_space=False)
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<|endoftext|>"], initial_alphabet=sorted(level.alphabet()), show_progress=False
    )
    inner.train_from_iterator([prose(200)], trainer)
    inner.save(str(place / "tokenizer.json"))


def jsonl(place: Path) -> None:
    for split in ("train", "val", "test"):
        (place / f"{split}.jsonl").write_text("".join(json.dumps({"text": prose(9)}) + "\n" for _ in range(4)))


def fineweb(place: Path) -> None:
    jsonl(place)
    byte_pairs(place)


def table(file: Path, rows: int, columns: int = 1) -> None:
    steps = np.arange(rows)[:, None]
    values = np.sin(steps / (5 + np.arange(columns))) + 0.1 * rng().normal(size=(rows, columns))
    header = ",".join(["date", *(f"c{i}" for i in range(columns))])
    dates = np.datetime64("2016-07-01T00:00") + 15 * np.arange(rows).astype("timedelta64[m]")
    lines = (
        f"{date.replace('T', ' ')}," + ",".join(f"{v:.3f}" for v in row) for date, row in zip(dates.astype(str), values)
    )
    file.write_text("\n".join([header, *lines]) + "\n")


def ett(place: Path) -> None:
    for name, rows in (("ETTh1", 14_500), ("ETTh2", 14_500), ("ETTm1", 57_700), ("ETTm2", 57_700)):
        table(place / f"{name}.csv", rows)


def forecasting(place: Path) -> None:
    for name in ("weather", "exchange_rate", "traffic", "electricity"):
        table(place / f"{name}.csv", 400, 3)


UEA = (
    "EthanolConcentration",
    "FaceDetection",
    "Handwriting",
    "Heartbeat",
    "JapaneseVowels",
    "PEMS-SF",
    "SelfRegulationSCP1",
    "SelfRegulationSCP2",
    "SpokenArabicDigits",
    "UWaveGestureLibrary",
)


def uea(place: Path) -> None:
    for name in UEA:
        (place / name).mkdir()
        for split in ("TRAIN", "TEST"):
            lines = ["@problemName x", "@timeStamps false", "@univariate false", "@classLabel true a b", "@data"]
            for i in range(20):
                channels = rng().normal(size=(2, 8)) + 3 * (i % 2)
                lines.append(":".join([*(",".join(f"{v:.3f}" for v in channel) for channel in channels), "ab"[i % 2]]))
            (place / name / f"{name}_{split}.ts").write_text("\n".join(lines) + "\n")


def events(place: Path) -> None:
    for name in ("mimic", "wiki", "reddit", "mooc", "stackoverflow", "sin", "uber", "taxi"):
        rows = ["sequence,time,mark"]
        for sequence in range(12):
            times = rng().exponential(size=8).cumsum()
            rows += [f"{sequence},{time:.4f},{'ab'[(i + sequence) % 2]}" for i, time in enumerate(times)]
        (place / f"{name}.csv").write_text("\n".join(rows) + "\n")


def d4rl(place: Path, width: int = 3, actions: int = 1) -> None:
    """Three episodes of ten steps each: one that ends, two that are cut off."""
    import h5py

    for body in ("halfcheetah", "ant", "hopper", "walker2d"):
        for quality in ("medium", "medium_replay", "medium_expert"):
            with h5py.File(place / f"{body}_{quality}-v2.hdf5", "w") as file:
                file["observations"] = rng().normal(size=(30, width)).astype(np.float32)
                file["actions"] = rng().uniform(-1, 1, size=(30, actions)).astype(np.float32)
                file["rewards"] = rng().normal(size=30).astype(np.float32)
                file["terminals"] = np.arange(30) == 9
                file["timeouts"] = np.isin(np.arange(30), (19, 29))
                file["metadata/algorithm"] = np.bytes_("SAC")


def iwslt14(place: Path) -> None:
    words = {"de": ("eins", "zw@@ ei", "drei"), "fr": ("un", "d@@ eux", "trois"), "en": ("one", "tw@@ o", "three")}
    for folder in ("de-en", "en-de", "fr-en", "en-fr"):
        (place / folder).mkdir()
        for split, count in (("train", 40), ("valid", 6), ("test", 8)):
            drawn = np.random.default_rng(count).integers(0, 3, (count, 4))
            for language in folder.split("-"):
                lines = "".join(" ".join(words[language][i] for i in row) + " .\n" for row in drawn)
                (place / folder / f"{split}.{language}").write_text(lines)


def labelled_texts(place: Path, kinds: dict[str, str]) -> None:
    for split, count in (("train", 6), ("test", 2)):
        for label, alphabet in kinds.items():
            (place / split / label).mkdir(parents=True)
            for i in range(count):
                text = "".join(np.random.default_rng(i).choice(list(alphabet), 12 + i))
                (place / split / label / f"{i}_7.txt").write_text(text)


def lra(place: Path) -> None:
    listops, image, pathfinder = (place / name for name in ("listops", "image", "pathfinder"))
    listops.mkdir()
    for split, count in (("train", 12), ("val", 4), ("test", 4)):
        rows = "".join(f"( ( ( [MAX {i % 3} ) {i % 2} ) ] )\t{max(i % 3, i % 2)}\n" for i in range(count))
        (listops / f"basic_{split}.tsv").write_text("Source\tTarget\n" + rows)
    labelled_texts(place / "text", {"pos": "good ", "neg": "bad "})
    (place / "text" / "train" / "unsup").mkdir()
    (place / "text" / "train" / "unsup" / "0_0.txt").write_text("neither")
    image.mkdir()
    cifar10(image)
    (pathfinder / "metadata").mkdir(parents=True)
    for i in range(20):
        photo(pathfinder / "imgs" / "0" / f"sample_{i}.png", 8, level=60 + 100 * (i % 2))
    lines = "".join(f"imgs/0 sample_{i}.png {i} {i % 2} 0 0\n" for i in range(20))
    (pathfinder / "metadata" / "0.npy").write_text(lines)


def genomics(place: Path) -> None:
    labelled_texts(place / "human_nontata_promoters", {"positive": "ACG", "negative": "GTN"})


WRITERS = {
    "imagenet-1k": imagenet,
    "cifar-10": cifar10,
    "cifar-100": lambda place: cifar(place, {"train.bin": 200, "test.bin": 100}, 2, 100, "fine_label_names.txt"),
    "div2k": div2k,
    **dict.fromkeys(("set5", "set14", "bsd100", "urban100", "manga109"), benchmark),
    "wikitext-103": wikitext,
    "wikitext-103-raw": wikitext_raw,
    **dict.fromkeys(("the-pile", "redpajama"), jsonl),
    "fineweb-edu": fineweb,
    "ett": ett,
    "forecasting": forecasting,
    "uea": uea,
    "events": events,
    "d4rl": d4rl,
    "iwslt14": iwslt14,
    "lra": lra,
    "genomics": genomics,
}
