"""The data sets of `provenn data` in miniature: the same layout, as small as it can be."""

import json
from pathlib import Path

import numpy as np
import pytest
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
    """Write a set below `folder` under its name; returns its path."""
    root = folder / name
    root.mkdir(parents=True)
    WRITERS[name](root)
    return root


def photo(file: Path, side: int, level: int = 128) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    # Smooth, as photographs are: what is reduced can be enlarged again.
    coarse = rng().integers(max(0, level - 40), min(255, level + 40), (side // 8, side // 8, 3), dtype=np.uint8)
    Image.fromarray(coarse).resize((side, side), Image.Resampling.BICUBIC).save(file)


def imagenet(root: Path) -> None:
    for split, count in (("train", 3), ("val", 2)):
        for number, name in enumerate(("n01440764", "n01443537", "n01484850")):
            for i in range(count):
                photo(root / split / name / f"{name}_{i}.JPEG", 40 + 8 * i, level=50 + 70 * number)


def coco(root: Path) -> None:
    """Bright squares of two kinds, ids with a gap as COCO's have; one crowd, and a picture with nothing."""
    number = 0
    for split, count in (("train2017", 6), ("val2017", 3)):
        images, notes = [], []
        for i in range(count):
            photo(root / split / f"{i:012}.jpg", 48, level=60)
            images.append({"id": i, "file_name": f"{i:012}.jpg", "width": 48, "height": 48})
            for category in (1, 90) if i else ():
                number += 1
                box = [4.0 + i, 6.0, 20.0, 20.0 + category // 10]
                note = {"id": number, "image_id": i, "category_id": category, "bbox": box, "area": box[2] * box[3]}
                notes.append({**note, "iscrowd": int(i == 1 and category == 90)})
        file = root / "annotations" / f"instances_{split}.json"
        file.parent.mkdir(exist_ok=True)
        categories = [{"id": 1, "name": "person"}, {"id": 90, "name": "toothbrush"}]
        file.write_text(json.dumps({"images": images, "categories": categories, "annotations": notes}))


def boxed(root: Path, folder: str, file: str) -> None:
    """Bright squares of two kinds in the pictures of one folder, and COCO JSON of them."""
    for i in range(3):
        photo(root / folder / f"{i:012}.jpg", 48, level=60)
    notes = [
        {"id": i, "image_id": i, "category_id": 1 + i % 2, "bbox": [4.0 + i, 6.0, 20.0, 20.0], "area": 400.0}
        for i in range(3)
    ]
    categories = [{"id": 1, "name": "aerosol_can"}, {"id": 2, "name": "stroller"}]
    images = [{"id": i, "file_name": f"{i:012}.jpg", "width": 48, "height": 48} for i in range(3)]
    (root / file).parent.mkdir(exist_ok=True)
    (root / file).write_text(json.dumps({"images": images, "categories": categories, "annotations": notes}))


def mask(file: Path, numbers: np.ndarray) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(numbers.astype(np.uint8)).save(file)


def halves(left: int, right: int, side: int) -> np.ndarray:
    return np.where(np.arange(side) < side // 2, left, right)[None].repeat(side, 0)


def ade20k(root: Path) -> None:
    """0 is no class, and so is left out."""
    for split, count in (("training", 4), ("validation", 2)):
        for i in range(count):
            photo(root / "images" / split / f"ADE_{split[:5]}_{i:08}.jpg", 64)
            numbers = halves(1 + i % 2, 3, 64)
            numbers[:8] = 0
            mask(root / "annotations" / split / f"ADE_{split[:5]}_{i:08}.png", numbers)


def cityscapes(root: Path) -> None:
    """Roads (label 7, class 0) and cars (26, class 13), and what is not judged (1)."""
    for split, city, count in (("train", "aachen", 4), ("val", "munster", 2)):
        for i in range(count):
            name = f"{city}_{i:06}_000019"
            photo(root / "leftImg8bit" / split / city / f"{name}_leftImg8bit.png", 64)
            numbers = halves(7, 26, 64)
            numbers[:8] = 1
            mask(root / "gtFine" / split / city / f"{name}_gtFine_labelIds.png", numbers)
            mask(root / "gtFine" / split / city / f"{name}_gtFine_instanceIds.png", numbers)


def volume(file: Path, array: np.ndarray, turned: tuple[int, int, int] = (-1, -1, 1)) -> None:
    """A NIfTI file of 1 mm, its axes pointing left, back and up as in the public sets."""
    nibabel = pytest.importorskip("nibabel")
    file.parent.mkdir(parents=True, exist_ok=True)
    nibabel.save(nibabel.Nifti1Image(array, np.diag([*turned, 1]).astype(float)), file)


def dicom_slice(file: Path, pixels: np.ndarray, *, height: float, series: str, echo: float = 4.6) -> None:
    """A grey slice of 256 kinds and more, axial, at a height in millimetres."""
    pydicom = pytest.importorskip("pydicom")
    file.parent.mkdir(parents=True, exist_ok=True)
    part = pydicom.Dataset()
    part.file_meta = pydicom.dataset.FileMetaDataset()
    part.file_meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
    part.file_meta.MediaStorageSOPClassUID = part.SOPClassUID = pydicom.uid.MRImageStorage
    instance = f"{series}.{int(file.stem.rpartition('-')[2])}"
    part.file_meta.MediaStorageSOPInstanceUID = part.SOPInstanceUID = instance
    part.SeriesInstanceUID, part.Modality, part.EchoTime = series, "MR", echo
    part.Rows, part.Columns = pixels.shape
    part.ImageOrientationPatient, part.ImagePositionPatient = [1, 0, 0, 0, 1, 0], [-9.0, -8.0, height]
    part.PixelSpacing, part.SliceThickness = [1.5, 1.5], 5.5
    part.BitsAllocated = part.BitsStored = 16
    part.HighBit, part.PixelRepresentation, part.SamplesPerPixel = 15, 0, 1
    part.PhotometricInterpretation = "MONOCHROME2"
    part.PixelData = pixels.astype(np.uint16).tobytes()
    part.save_as(file, enforce_file_format=True)


def organs(side: int, values: tuple[int, ...]) -> np.ndarray:
    """A square of numbers, one in each quarter but for the first of them, which is around."""
    numbers = np.full((side, side), values[0])
    for place, value in enumerate(values[1:]):
        row, column = 2 + (place // 2) * (side // 2), 2 + (place % 2) * (side // 2)
        numbers[row : row + side // 3, column : column + side // 3] = value
    return numbers


def chaos(root: Path) -> None:
    """Four subjects; each slice a series of its own, as in the set, and pictures of labels called as the slices."""
    numbers = organs(24, (0, 63, 126, 189, 252))
    for subject in (1, 2, 3, 13):
        base = root / "MR" / str(subject)
        for level in range(4):
            pixels = 4 * numbers + rng().integers(0, 60, numbers.shape) + subject
            # In phase the even numbers of files, out of phase the odd ones; names run against the heights.
            for phase, echo, number in (("InPhase", 4.6, 2 * level + 2), ("OutPhase", 2.3, 2 * level + 1)):
                name = f"IMG-0004-{number:05d}"
                at = 5.5 * (4 - level)
                file = base / "T1DUAL" / "DICOM_anon" / phase / f"{name}.dcm"
                dicom_slice(file, pixels, height=at, series=f"1.2.{subject}.{number}", echo=echo)
                if phase == "InPhase":
                    mask(base / "T1DUAL" / "Ground" / f"{name}.png", numbers * (level > 0))
            dicom_slice(
                base / "T2SPIR" / "DICOM_anon" / f"IMG-0002-{level + 1:05d}.dcm",
                pixels,
                height=7.0 * level,
                series="1.9",
            )
            mask(base / "T2SPIR" / "Ground" / f"IMG-0002-{level + 1:05d}.png", numbers)


def hvsmr(root: Path) -> None:
    numbers = np.stack(5 * [organs(20, (0, 1, 2))], 2)
    for subject in range(4):
        image = 300.0 * numbers + rng().normal(0, 20, numbers.shape) + subject
        name = f"training_axial_crop_pat{subject}"
        volume(root / "Training dataset" / f"{name}.nii.gz", image.astype(np.int16))
        volume(root / "Ground truth" / f"{name}-label.nii.gz", numbers.astype(np.uint8))


def tumour(subject: int, values: tuple[int, ...]) -> tuple[list[np.ndarray], np.ndarray]:
    """Four sequences and labels of a few slices."""
    numbers = np.stack(3 * [organs(24, values)], 2)
    return [(90.0 * numbers + 10 * k + rng().normal(0, 9, numbers.shape) + subject) for k in range(4)], numbers


def msd_brain(root: Path) -> None:
    """With the hidden files that the archive brings."""
    for subject in (1, 2, 3, 457):
        parts, numbers = tumour(subject, (0, 1, 2, 3))
        volume(root / "imagesTr" / f"BRATS_{subject:03d}.nii.gz", np.stack(parts, 3).astype(np.float32), (1, 1, 1))
        volume(root / "labelsTr" / f"BRATS_{subject:03d}.nii.gz", numbers.astype(np.uint8), (1, 1, 1))
        for folder in ("imagesTr", "labelsTr"):
            (root / folder / f"._BRATS_{subject:03d}.nii.gz").write_bytes(b"no volume")
    labels = {"0": "background", "1": "edema", "2": "non-enhancing tumor", "3": "enhancing tumour"}
    (root / "dataset.json").write_text(json.dumps({"name": "BRATS", "labels": labels}))


def brats_2018(root: Path) -> None:
    for grade, subjects in (("HGG", (1, 2)), ("LGG", (3, 4))):
        for subject in subjects:
            name = f"Brats18_TCIA0{subject}_1"
            parts, numbers = tumour(subject, (0, 1, 2, 4))
            for part, sequence in zip(parts, ("flair", "t1", "t1ce", "t2"), strict=True):
                volume(root / grade / name / f"{name}_{sequence}.nii.gz", part.astype(np.int16))
            volume(root / grade / name / f"{name}_seg.nii.gz", numbers.astype(np.uint8))


def camvid(root: Path) -> None:
    """Colours; black is not judged."""
    for split, count in (("train", 4), ("val", 2)):
        for i in range(count):
            photo(root / "images" / split / f"0001TP_{i:06}.png", 64)
            colours = np.array([(0, 0, 0), (128, 64, 128), (128, 128, 128)])[halves(1, 2, 64)]
            colours[:8] = 0
            mask(root / "labels" / split / f"0001TP_{i:06}_L.png", colours)


def cnfood(root: Path) -> None:
    for split, count in (("train", 3), ("val", 2), ("test", 2)):
        for number, name in enumerate(("000", "001", "240")):
            for i in range(count):
                photo(root / split / name / f"{number:03}{i:03}.jpg", 40 + 8 * i, level=50 + 70 * number)


def cifar(root: Path, files: dict[str, int], labels: int, classes: int, names: str) -> None:
    for file, count in files.items():
        rows = rng().integers(0, 256, (count, labels + 3072), dtype=np.uint8)
        rows[:, labels - 1] = np.arange(count) % classes
        rows[:, labels:] = rows[:, labels - 1 : labels] * (200 // classes) + rows[:, labels:] // 8
        rows.tofile(root / file)
    (root / names).write_text("\n".join(f"class_{i}" for i in range(classes)) + "\n")


def cifar10(root: Path) -> None:
    files = {f"data_batch_{i}.bin": 20 for i in range(1, 6)} | {"test_batch.bin": 20}
    cifar(root, files, 1, 10, "batches.meta.txt")


def div2k(root: Path) -> None:
    for split, count in (("train", 2), ("valid", 2)):
        for i in range(count):
            photo(root / f"DIV2K_{split}_HR" / f"{i:04}.png", 80)
            photo(root / f"DIV2K_{split}_LR_bicubic" / "X2" / f"{i:04}x2.png", 40)


def benchmark(root: Path) -> None:
    for name in ("baby", "bird"):
        photo(root / "HR" / f"{name}.png", 64)
        photo(root / "LR_bicubic" / "X2" / f"{name}x2.png", 32)


def prose(lines: int) -> str:
    drawn = np.random.default_rng(lines)
    return "".join(" " + " ".join(drawn.permutation(WORDS)[: 4 + i % 7]) + " \n" for i in range(lines))


def wikitext(root: Path, ending: str = "tokens") -> None:
    for split, lines in (("train", 200), ("valid", 40), ("test", 50)):
        (root / f"wiki.{split}.{ending}").write_text(prose(lines))


def wikitext_raw(root: Path) -> None:
    wikitext(root, "raw")
    byte_pairs(root)


def byte_pairs(root: Path) -> None:
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
    inner.save(str(root / "tokenizer.json"))


def jsonl(root: Path) -> None:
    for split in ("train", "val", "test"):
        (root / f"{split}.jsonl").write_text("".join(json.dumps({"text": prose(9)}) + "\n" for _ in range(4)))


def fineweb(root: Path) -> None:
    jsonl(root)
    byte_pairs(root)


def table(file: Path, rows: int, columns: int = 1) -> None:
    steps = np.arange(rows)[:, None]
    values = np.sin(steps / (5 + np.arange(columns))) + 0.1 * rng().normal(size=(rows, columns))
    header = ",".join(["date", *(f"c{i}" for i in range(columns))])
    dates = np.datetime64("2016-07-01T00:00") + 15 * np.arange(rows).astype("timedelta64[m]")
    lines = (
        f"{date.replace('T', ' ')}," + ",".join(f"{v:.3f}" for v in row) for date, row in zip(dates.astype(str), values)
    )
    file.write_text("\n".join([header, *lines]) + "\n")


def ett(root: Path) -> None:
    for name, rows in (("ETTh1", 14_500), ("ETTh2", 14_500), ("ETTm1", 57_700), ("ETTm2", 57_700)):
        table(root / f"{name}.csv", rows)


def forecasting(root: Path) -> None:
    for name in ("weather", "exchange_rate", "traffic", "electricity"):
        table(root / f"{name}.csv", 400, 3)


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


def uea(root: Path) -> None:
    for name in UEA:
        (root / name).mkdir()
        for split in ("TRAIN", "TEST"):
            lines = ["@problemName x", "@timeStamps false", "@univariate false", "@classLabel true a b", "@data"]
            for i in range(20):
                channels = rng().normal(size=(2, 8)) + 3 * (i % 2)
                lines.append(":".join([*(",".join(f"{v:.3f}" for v in channel) for channel in channels), "ab"[i % 2]]))
            (root / name / f"{name}_{split}.ts").write_text("\n".join(lines) + "\n")


def events(root: Path) -> None:
    for name in ("mimic", "wiki", "reddit", "mooc", "stackoverflow", "sin", "uber", "taxi"):
        rows = ["sequence,time,mark"]
        for sequence in range(12):
            times = rng().exponential(size=8).cumsum()
            rows += [f"{sequence},{time:.4f},{'ab'[(i + sequence) % 2]}" for i, time in enumerate(times)]
        (root / f"{name}.csv").write_text("\n".join(rows) + "\n")


def d4rl(root: Path, width: int = 3, actions: int = 1) -> None:
    """Three episodes of ten steps each: one that ends, two that are cut off."""
    import h5py

    for body in ("halfcheetah", "ant", "hopper", "walker2d"):
        for quality in ("medium", "medium_replay", "medium_expert"):
            with h5py.File(root / f"{body}_{quality}-v2.hdf5", "w") as file:
                file["observations"] = rng().normal(size=(30, width)).astype(np.float32)
                file["actions"] = rng().uniform(-1, 1, size=(30, actions)).astype(np.float32)
                file["rewards"] = rng().normal(size=30).astype(np.float32)
                file["terminals"] = np.arange(30) == 9
                file["timeouts"] = np.isin(np.arange(30), (19, 29))
                file["metadata/algorithm"] = np.bytes_("SAC")


def iwslt14(root: Path) -> None:
    words = {"de": ("eins", "zw@@ ei", "drei"), "fr": ("un", "d@@ eux", "trois"), "en": ("one", "tw@@ o", "three")}
    for folder in ("de-en", "en-de", "fr-en", "en-fr"):
        (root / folder).mkdir()
        for split, count in (("train", 40), ("valid", 6), ("test", 8)):
            drawn = np.random.default_rng(count).integers(0, 3, (count, 4))
            for language in folder.split("-"):
                lines = "".join(" ".join(words[language][i] for i in row) + " .\n" for row in drawn)
                (root / folder / f"{split}.{language}").write_text(lines)


def labelled_texts(root: Path, kinds: dict[str, str]) -> None:
    for split, count in (("train", 6), ("test", 2)):
        for label, alphabet in kinds.items():
            (root / split / label).mkdir(parents=True)
            for i in range(count):
                text = "".join(np.random.default_rng(i).choice(list(alphabet), 12 + i))
                (root / split / label / f"{i}_7.txt").write_text(text)


def lra(root: Path) -> None:
    listops, image, pathfinder, retrieval = (root / name for name in ("listops", "image", "pathfinder", "retrieval"))
    listops.mkdir()
    for split, count in (("train", 12), ("val", 4), ("test", 4)):
        rows = "".join(f"( ( ( [MAX {i % 3} ) {i % 2} ) ] )\t{max(i % 3, i % 2)}\n" for i in range(count))
        (listops / f"basic_{split}.tsv").write_text("Source\tTarget\n" + rows)
    labelled_texts(root / "text", {"pos": "good ", "neg": "bad "})
    (root / "text" / "train" / "unsup").mkdir()
    (root / "text" / "train" / "unsup" / "0_0.txt").write_text("neither")
    retrieval.mkdir()
    for split, count in (("train", 12), ("eval", 4), ("test", 4)):
        words = [("attention is", "recurrence was")[i % 2] for i in range(count)]
        rows = (f"{i % 2}.0\tP{i}\tQ{i}\t{word} all\tneed {word}\n" for i, word in enumerate(words))
        (retrieval / f"new_aan_pairs.{split}.tsv").write_text("".join(rows))
    image.mkdir()
    cifar10(image)
    (pathfinder / "metadata").mkdir(parents=True)
    for i in range(20):
        photo(pathfinder / "imgs" / "0" / f"sample_{i}.png", 8, level=60 + 100 * (i % 2))
    lines = "".join(f"imgs/0 sample_{i}.png {i} {i % 2} 0 0\n" for i in range(20))
    (pathfinder / "metadata" / "0.npy").write_text(lines)


def tsv(file: Path, rows: list) -> None:
    file.parent.mkdir(exist_ok=True)
    file.write_text("".join("\t".join(map(str, row)) + "\n" for row in rows))


def glue(root: Path) -> None:
    """The columns of each task as they are published; a class is told by one word, a score by how many words agree."""
    same, other = "the cat sat on a mat", "which was good"
    for split, count in (("train", 24), ("dev", 12)):
        kinds = [i % 2 for i in range(count)]
        tsv(
            root / "CoLA" / f"{split}.tsv",
            [["gj04", k, "*" if k else "", f"{[other, same][k]} {i}"] for i, k in enumerate(kinds)],
        )
        tsv(root / "SST-2" / f"{split}.tsv", [["sentence", "label"], *([f"{[other, same][k]} ", k] for k in kinds)])
        head = ["\ufeffQuality", "#1 ID", "#2 ID", "#1 String", "#2 String"]
        tsv(root / "MRPC" / f"{split}.tsv", [head, *([k, 70, 71, f'"{same}', [other, same][k]] for k in kinds)])
        head = ["id", "qid1", "qid2", "question1", "question2", "is_duplicate"]
        rows = [[i, 1, 2, same, [other, same][k], k] for i, k in enumerate(kinds)]
        tsv(root / "QQP" / f"{split}.tsv", [head, *rows, [99, 1, 2, "a line that ends early"]])
        head = [
            "index",
            "genre",
            "filename",
            "year",
            "old_index",
            "source1",
            "source2",
            "sentence1",
            "sentence2",
            "score",
        ]
        rows = [
            [i, "g", "f", 2012, 1, "n", "n", same, " ".join(["cat"] * (i % 6)), f"{i % 6}.000"] for i in range(count)
        ]
        tsv(root / "STS-B" / f"{split}.tsv", [head, *rows])
        head = ["index", "promptID", "pairID", "genre", "sentence1_binary_parse", "sentence2_binary_parse"]
        head += ["sentence1_parse", "sentence2_parse", "sentence1", "sentence2"]
        labels, three = (
            ["label1"] if split == "train" else [f"label{i}" for i in range(1, 6)],
            ["entailment", "neutral", "contradiction"],
        )
        rows = [
            [i, *"pqgabcd", same, ["cat", "mat", "sat"][i % 3], *[three[i % 3]] * (len(labels) + 1)]
            for i in range(count)
        ]
        tsv(
            root / "MNLI" / f"{'dev_matched' if split == 'dev' else split}.tsv",
            [[*head, *labels, "gold_label"], *rows],
        )
        two = ["not_entailment", "entailment"]
        for name, columns in (("QNLI", ["question", "sentence"]), ("RTE", ["sentence1", "sentence2"])):
            rows = [[i, same, [other, same][k], two[k]] for i, k in enumerate(kinds)]
            tsv(root / name / f"{split}.tsv", [["index", *columns, "label"], *rows])


def ag_news(root: Path) -> None:
    for split, count in (("train", 40), ("test", 12)):
        rows = [f'"{1 + k % 4}","{WORDS[k % 4]}","{WORDS[k % 4]} it is, {k}"\n' for k in range(count)]
        (root / f"{split}.csv").write_text("".join(rows))


def iemocap(root: Path) -> None:
    from scipy.io import wavfile

    for session in range(1, 6):
        for kind, name in enumerate(("angry", "happy", "neutral", "sad")):
            (root / f"Session{session}" / name).mkdir(parents=True)
            for k in range(2):
                wave = np.sin(np.arange(1600) * (0.05 + 0.1 * kind + 0.01 * k)).astype(np.float32)
                wavfile.write(root / f"Session{session}" / name / f"{k}.wav", 16_000, wave)


def samsum(root: Path) -> None:
    """Dialogues of a few words; a summary says again who is met."""
    for name, count in (("train", 24), ("val", 4), ("test", 6)):
        people = [["Anna", "Ben", "Carl"][i % 3] for i in range(count)]
        entries = [
            {"id": str(i), "dialogue": f"{who}: hello\r\nDora: hi {who}", "summary": f"Dora meets {who}."}
            for i, who in enumerate(people)
        ]
        root.mkdir(exist_ok=True)
        (root / f"{name}.json").write_text(json.dumps(entries))


def jsonlines(file: Path, entries: list) -> None:
    file.parent.mkdir(exist_ok=True)
    file.write_text("".join(json.dumps(entry) + "\n" for entry in entries))


def questions(root: Path) -> None:
    """Two questions a set, with the keys that each has as published."""
    choice = lambda texts: [{"text": text, "label": letter} for text, letter in zip(texts, "ABCD")]  # noqa: E731
    stems = [
        {
            "id": "1",
            "question": {"stem": "The cat sat on", "choices": choice(["a mat", "the title"])},
            "answerKey": "A",
        },
        {
            "id": "2",
            "question": {"stem": "It was", "choices": choice(["which", "as", "a cat", "good"])},
            "answerKey": "D",
        },
    ]
    jsonlines(root / "arc_easy" / "ARC-Easy-Test.jsonl", stems)
    jsonlines(root / "arc_challenge" / "ARC-Challenge-Test.jsonl", stems)
    jsonlines(root / "openbookqa" / "test.jsonl", stems)
    jsonlines(
        root / "piqa" / "valid.jsonl",
        [{"goal": "sit", "sol1": "a mat", "sol2": "a cat"}, {"goal": "see", "sol1": "as", "sol2": "saw"}],
    )
    (root / "piqa" / "valid-labels.lst").write_text("0\n1\n")
    ending = {"activity_label": "Cat", "ctx_a": "The cat sat.", "ctx_b": "it", "ctx": "", "split": "val"}
    endings = ["saw [title] a mat.", "was [step] good", "and", "which"]
    jsonlines(root / "hellaswag" / "hellaswag_val.jsonl", [{**ending, "endings": endings, "label": k} for k in (0, 1)])
    sentence = {"sentence": "The cat saw the mat and _ was good.", "option1": "the cat", "option2": "the mat"}
    jsonlines(root / "winogrande" / "dev.jsonl", [{**sentence, "answer": answer} for answer in "12"])
    jsonlines(
        root / "lambada" / "lambada_test_en.jsonl", [{"text": "the cat sat on a mat"}, {"text": "which was good"}]
    )
    for folder in ("sciq", "logiqa", "truthfulqa"):
        (root / folder).mkdir()
    sciq = {f"distractor{i}": f"{word}" for i, word in enumerate(("as", "and", "which"), 1)}
    sciq |= {"question": "Where?", "correct_answer": "on a mat", "support": " The cat sat."}
    (root / "sciq" / "test.json").write_text(json.dumps([sciq, sciq]))
    block = "\nb\nThe cat sat.On a mat.\nWhere?\nA.a cat\nB.a mat\nC.as\nD.and\n"
    (root / "logiqa" / "Test.txt").write_text(block + block)
    truth = {"question": "Where?", "mc1_targets": {"a mat": 1, "a cat": 0}, "mc2_targets": {"a mat": 1, "a cat": 0}}
    (root / "truthfulqa" / "mc_task.json").write_text(json.dumps([truth]))
    byte_pairs(root)


def longbench(root: Path) -> None:
    keys = {"length": 9, "dataset": "lcc", "language": "python", "all_classes": None, "_id": "0"}
    entries = [{**keys, "input": "", "context": f"{prose(9)} x = {i}\n", "answers": [f"x = {i}"]} for i in range(2)]
    jsonlines(root / "lcc.jsonl", entries)
    jsonlines(root / "repobench-p.jsonl", [{**entry, "input": "y = 1\n"} for entry in entries])
    byte_pairs(root)


def qmsum(root: Path) -> None:
    """A meeting with three queries to learn from, one with two in the other splits."""
    for split, count in (("train", 2), ("val", 1), ("test", 1)):
        turns = [{"speaker": "Anna", "content": prose(20)}, {"speaker": "Ben", "content": "a mat , which was good"}]
        general = [{"query": "Summarize the whole meeting.", "answer": "The cat saw a mat ."}]
        span = {"relevant_text_span": [["0", "1"]]}
        specific = [{"query": f"What saw {i}?", "answer": f"a mat {i}", **span} for i in range(count)]
        queries = {"general_query_list": general, "specific_query_list": specific}
        jsonlines(root / f"{split}.jsonl", [{"topic_list": [], **queries, "meeting_transcripts": turns}])
    byte_pairs(root)


def ruler(root: Path) -> None:
    text = "A special magic word is hidden within the following text.\n{}\nWhat is the special magic word for cat?"
    needle = "One of the special magic words for cat is: mat."
    entry = {"outputs": ["mat"], "length": 90, "answer_prefix": " The special magic word for cat is"}
    entries = [{"index": i, "input": text.format(prose(5) + needle + prose(i + 1)), **entry} for i in range(2)]
    jsonlines(root / "niah_word_16k" / "validation.jsonl", entries)


def genomics(root: Path) -> None:
    labelled_texts(root / "human_nontata_promoters", {"positive": "ACG", "negative": "GTN"})


def reid(root: Path, folders: tuple[str, str, str], name: str) -> None:
    """Four identities to train on and two to search for, by two cameras; a box that shows nobody."""
    train, query, gallery = folders
    for identity in range(1, 7):
        for camera in (1, 2):
            for shot in range(2):
                part = train if identity < 5 else query if shot == 0 else gallery
                photo(root / part / name.format(identity, camera, shot), 16, level=30 + 30 * identity)
    photo(root / gallery / ("-1" + name.removeprefix("{:04}")).format(1, 0), 16)


def market(root: Path) -> None:
    reid(root, ("bounding_box_train", "query", "bounding_box_test"), "{:04}_c{}s1_00045{}_03.jpg")


def duke(root: Path) -> None:
    reid(root, ("bounding_box_train", "query", "bounding_box_test"), "{:04}_c{}_f004618{}.jpg")


def veri(root: Path) -> None:
    reid(root, ("image_train", "image_query", "image_test"), "{:04}_c{:03}_0003060{}_0.jpg")


def msmt17(root: Path) -> None:
    name = "{0:04}/{0:04}_000_{1:02}_0303morning_0008_{2}.jpg"
    rows = {"train": (0, 3), "val": (3, 5), "query": (0, 2), "gallery": (0, 2)}
    for part, (first, last) in rows.items():
        lines = []
        for identity in range(first, last):
            for camera in (1, 2):
                for shot in (0,) if part == "query" else (1, 2):
                    file = name.format(identity, camera, shot)
                    photo(root / ("train" if part in ("train", "val") else "test") / file, 16, level=60 + 30 * identity)
                    lines.append(f"{file} {identity}\n")
        (root / f"list_{part}.txt").write_text("".join(lines))


def birds(root: Path, names: dict[int, str], file: str) -> None:
    """The lists of CUB-200-2011 and of NABirds: six images of each class, four to train on."""
    files, labels, training = [], [], []
    for number, name in names.items():
        for i in range(6):
            image = f"{len(files) + 1}"
            path = file.format(number=number, name=name, i=i)
            photo(root / "images" / path, 24, level=60 + 60 * (number % 3))
            files.append(f"{image} {path}\n")
            labels.append(f"{image} {number}\n")
            training.append(f"{image} {int(i < 4)}\n")
    (root / "images.txt").write_text("".join(files))
    (root / "image_class_labels.txt").write_text("".join(labels))
    (root / "train_test_split.txt").write_text("".join(training))
    (root / "classes.txt").write_text("".join(f"{number} {name}\n" for number, name in {0: "Birds", **names}.items()))


def cub(root: Path) -> None:
    birds(root, {1: "001.Black_footed_Albatross", 2: "002.Laysan_Albatross"}, "{name}/{name}_{i}.jpg")


def nabirds(root: Path) -> None:
    birds(root, {817: "Common Eider (Adult male)", 9: "Wood Duck", 1010: "Wood Duck"}, "{number:04}/{number}{i}a.jpg")


def dogs(root: Path) -> None:
    from scipy.io import savemat

    listed: dict[str, list[str]] = {"train": [], "test": []}
    for number, name in enumerate(("n02085620-Chihuahua", "n02085782-Japanese_spaniel")):
        for i in range(6):
            photo(root / "Images" / name / f"{name[:9]}_{i}.jpg", 24, level=80 + 80 * number)
            listed["train" if i < 4 else "test"].append(f"{name}/{name[:9]}_{i}.jpg")
    (root / "lists").mkdir()
    for split, names in listed.items():
        column = np.empty((len(names), 1), dtype=object)
        column[:, 0] = names
        savemat(root / "lists" / f"{split}_list.mat", {"file_list": column})


def tiny_imagenet(root: Path) -> None:
    numbers, rows = ("n01443537", "n01629819"), []
    for number, name in enumerate(numbers):
        for i in range(4):
            photo(root / "train" / name / "images" / f"{name}_{i}.JPEG", 64, level=80 + 80 * number)
        for i in range(2):
            photo(root / "val" / "images" / f"val_{2 * number + i}.JPEG", 64, level=80 + 80 * number)
            rows.append(f"val_{2 * number + i}.JPEG\t{name}\t0\t32\t44\t62\n")
    (root / "val" / "val_annotations.txt").write_text("".join(rows))
    (root / "wnids.txt").write_text("\n".join(numbers))
    (root / "words.txt").write_text("n01443537\tgoldfish, Carassius auratus\nn01629819\tEuropean fire salamander\n")


def karpathy(root: Path, name: str, folder: str) -> None:
    """A JSON of images with sentences and splits, beside the images."""
    images = []
    for number, split in enumerate(("train",) * 4 + ("val",) * 2 + ("test",) * 2):
        photo(root / folder / f"{number}.jpg", 16)
        sentences = [{"raw": f"The {WORDS[number]} sat on a mat."}, {"raw": "A cat."}]
        images.append({"filename": f"{number}.jpg", "filepath": folder, "split": split, "sentences": sentences})
    (root / f"dataset_{name}.json").write_text(json.dumps({"images": images}))


def region_features(root: Path, last: str) -> None:
    """Features of 3 regions by 4 numbers, and five captions of each image, a line each."""
    for name, count in (("train", 4), ("dev", 2), (last, 2)):
        np.save(root / f"{name}_ims.npy", rng().random((count, 3, 4), dtype=np.float32))
        (root / f"{name}_caps.txt").write_text("a cat sat on a mat\n" * (5 * count))


def defective(root: Path, good: str, bad: str, categories: tuple[str, ...], masks: str = "{}_mask.png") -> None:
    """Folders as MVTec-AD has them."""
    for name in categories:
        for i in range(4):
            photo(root / name / "train" / good / f"{i}.png", 32)
            photo(root / name / "test" / good / f"{i}.png", 32)
            photo(root / name / "test" / bad / f"{i}.png", 32, level=180)
            mask(root / name / "ground_truth" / bad / masks.format(i), halves(0, 255, 32))


def visa(root: Path) -> None:
    lines = ["object,split,label,image,mask"]
    for i in range(6):
        photo(root / f"candle/Data/Images/Normal/{i:04}.JPG", 32)
        photo(root / f"candle/Data/Images/Anomaly/{i:03}.JPG", 32, level=180)
        mask(root / f"candle/Data/Masks/Anomaly/{i:03}.png", halves(0, 3, 32))
        split = "train" if i < 4 else "test"
        lines.append(f"candle,{split},normal,candle/Data/Images/Normal/{i:04}.JPG,")
        lines.append(f"candle,test,anomaly,candle/Data/Images/Anomaly/{i:03}.JPG,candle/Data/Masks/Anomaly/{i:03}.png")
    (root / "split_csv").mkdir()
    (root / "split_csv" / "1cls.csv").write_text("\n".join(lines))


def talks(root: Path, name: str) -> None:
    """Conversations about photographs, as LLaVA and ShareGPT4V have them."""
    told = []
    for i in range(12):
        photo(root / f"coco/train2017/{i:012}.jpg", 32, level=100 + 10 * i)
        asked = {"from": "human", "value": f"<image>\nWhat is in picture {i % 3}?"}
        answer = {"from": "gpt", "value": f"A {WORDS[i % len(WORDS)]} on a mat."}
        told.append({"id": str(i), "image": f"coco/train2017/{i:012}.jpg", "conversations": [asked, answer]})
    (root / name).write_text(json.dumps(told))


def asked(root: Path, splits: dict[str, int], **more: list[str]) -> None:
    """Questions about photographs, a line each."""
    for split, count in splits.items():
        lines = []
        for i in range(count):
            photo(root / f"{split}/{i}.jpg", 32, level=100 + 10 * i)
            answers = {"answers": ["red", "red", "blue"]} if not more else {"answer": more["choices"][i % 2]}
            question = f"what colour is the {WORDS[i % len(WORDS)]} ?"
            lines.append(json.dumps({"image": f"{split}/{i}.jpg", "question": question, **answers, **more}))
        (root / f"{split}.jsonl").write_text("\n".join(lines))


def rooms(root: Path, splits: dict[str, int]) -> None:
    """Questions about clouds of points, a line each."""
    for split, count in splits.items():
        lines = []
        for i in range(count):
            points = np.column_stack([rng().uniform(0, 3, (60, 3)).round(3), rng().integers(0, 256, (60, 3))])
            header = ["ply", "format ascii 1.0", "element vertex 60", *(f"property float {axis}" for axis in "xyz")]
            header += [*(f"property uchar {name}" for name in ("red", "green", "blue")), "end_header"]
            rows = [f"{x} {y} {z} {int(r)} {int(g)} {int(b)}" for x, y, z, r, g, b in points]
            (root / split).mkdir(exist_ok=True)
            (root / split / f"{i}.ply").write_text("\n".join([*header, *rows]) + "\n")
            question = f"what colour is the {WORDS[i % len(WORDS)]} ?"
            lines.append(
                json.dumps({"scene": f"{split}/{i}.ply", "question": question, "answers": ["red", "dark red"]})
            )
        (root / f"{split}.jsonl").write_text("\n".join(lines))


WRITERS = {
    "xr-scene": lambda root: rooms(root, {"train": 6, "val": 3, "test": 3}),
    "scanqa": lambda root: rooms(root, {"train": 6, "val": 3, "test": 3}),
    "llava-instruct": lambda root: talks(root, "llava_instruct_150k.json"),
    "sharegpt4v": lambda root: talks(root, "sharegpt4v_instruct.json"),
    "vqa-v2": lambda root: asked(root, {"train": 8, "val": 4}),
    "scienceqa": lambda root: asked(root, {"train": 6, "val": 3, "test": 3}, choices=["red", "blue"]),
    "flickr30k": lambda root: karpathy(root, "flickr30k", "flickr30k-images"),
    "coco-captions": lambda root: karpathy(root, "coco", "val2014"),
    "flickr30k-precomp": lambda root: region_features(root, "test"),
    "coco-precomp": lambda root: region_features(root, "testall"),
    "mvtec-ad": lambda root: defective(root, "good", "broken", ("bottle", "cable")),
    "visa": visa,
    "btad": lambda root: defective(root, "ok", "ko", ("01", "02"), "{}.png"),
    "imagenet-1k": imagenet,
    "cnfood-241": cnfood,
    "coco-2017": coco,
    "lvis-minival": lambda root: boxed(root, "val2017", "annotations/lvis_v1_minival.json"),
    "coda": lambda root: boxed(root, "images", "annotations.json"),
    "cifar-10": cifar10,
    "cifar-100": lambda root: cifar(root, {"train.bin": 200, "test.bin": 100}, 2, 100, "fine_label_names.txt"),
    "cityscapes": cityscapes,
    "camvid": camvid,
    "chaos": chaos,
    "hvsmr": hvsmr,
    "msd-brain": msd_brain,
    "brats-2018": brats_2018,
    "ade20k": ade20k,
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
    "glue": glue,
    "ag-news": ag_news,
    "iemocap": iemocap,
    "samsum": samsum,
    "questions": questions,
    "longbench": longbench,
    "ruler": ruler,
    "qmsum": qmsum,
    "genomics": genomics,
    "market-1501": market,
    "dukemtmc-reid": duke,
    "msmt17": msmt17,
    "veri-776": veri,
    "cub-200-2011": cub,
    "nabirds": nabirds,
    "stanford-dogs": dogs,
    "tiny-imagenet": tiny_imagenet,
}
