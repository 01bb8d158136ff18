"""Every task has a dummy baseline, and `fit` reports the test split."""

from collections import Counter
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import cache
from itertools import pairwise

import numpy as np
import pytest
import torch
from scipy.ndimage import uniform_filter
from skimage.feature import hog
from sklearn.feature_extraction.text import CountVectorizer
from sklearn.linear_model import Ridge
from sklearn.naive_bayes import MultinomialNB
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.svm import SVC
from torch import nn
from torch.utils.data import Dataset, Subset, TensorDataset

from provenn.data.caption_scores import cider
from provenn.data.defects import Drawn
from provenn.data.scenes import Scene
from provenn.nn.anomaly import Anomalies
from provenn.nn.detection import Detections
from provenn.nn.diffusion import noise_schedule
from provenn.nn.embedding import Identified
from provenn.tasks import TaskData, get_task
from provenn.tasks.anomaly_detection import Composed, join_named
from provenn.tasks.discovery import SHARED
from provenn.tasks.image_text_retrieval import CaptionPairs, Gallery, join_pairs
from provenn.tasks.language_modelling import Windows
from provenn.tasks.masked_language_modelling import Blanks
from provenn.tasks.multimodal_chat import Talks
from provenn.tasks.object_detection import Pictures, join
from provenn.tasks.open_ended_detection import Detected
from provenn.tasks.re_identification import Groups
from provenn.tasks.re_identification import Pictures as Sighted
from provenn.tasks.re_identification import join as join_groups
from provenn.tasks.recall import IGNORED
from provenn.tasks.super_resolution import Crops, Whole, enlarge
from provenn.training import Recipe, fit


class Constant(nn.Module):
    """Gives the same numbers whatever it is shown, for each example or each position."""

    def __init__(self, values, positions=False):
        super().__init__()
        self.values, self.positions = nn.Parameter(torch.as_tensor(values).float()), positions

    def forward(self, x, *_):
        return self.values.expand(*x.shape[: 1 + self.positions], *self.values.shape)


class Persistence(nn.Module):
    def __init__(self, horizon):
        super().__init__()
        self.weight, self.horizon = nn.Parameter(torch.ones(())), horizon

    def forward(self, past):
        return self.weight * past[:, -1:].expand(-1, self.horizon, -1)


@dataclass
class Prediction:
    rate: torch.Tensor
    mark_logits: torch.Tensor

    @property
    def expected_gap(self):
        return 1 / self.rate

    def log_prob_gap(self, gaps):
        return self.rate.log() - self.rate * gaps


class Poisson(nn.Module):
    def __init__(self, rate, shares):
        super().__init__()
        self.rate, self.shares = (nn.Parameter(torch.as_tensor(v).float()) for v in (rate, shares))

    def forward(self, gaps, marks, mask=None):
        return Prediction(self.rate.expand(gaps.shape), self.shares.log().expand(*gaps.shape, -1))


class Independent(nn.Module):
    """The regression of the noise on each pixel of the noisy image by itself: cov(ε, x_t) / var(x_t)."""

    num_classes = 10

    def __init__(self, images):
        super().__init__()
        self.mean, self.variance = images.mean(0), images.var(0)
        self.weight = nn.Parameter(torch.ones(()))

    def forward(self, x, t, y):
        level = noise_schedule()[t].float()[:, None, None, None]
        slope = (1 - level).sqrt() / (level * self.variance + 1 - level)
        return self.weight * slope * (x - level.sqrt() * self.mean)


class Bicubic(nn.Module):
    scale, multiple = 2, 1

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))

    def forward(self, x):
        return self.weight * enlarge(255 * x, 2) / 255


class Loudest(nn.Module):
    """Says at every position what stands in the sequence most often, of some tokens."""

    def __init__(self, vocab, first):
        super().__init__()
        self.vocab, self.first = vocab, first
        self.weight = nn.Parameter(torch.ones(()))

    def forward(self, tokens):
        counts = torch.stack([row[row >= self.first].bincount(minlength=self.vocab) for row in tokens])
        return self.weight * counts.float()[:, None].expand(-1, tokens.shape[1], -1)


def labels(dataset):
    return torch.tensor([int(dataset[i][-1]) for i in range(len(dataset))])


def shares(found, count):
    return (torch.as_tensor(found).bincount(minlength=count) + 1) / (len(found) + count)


def classification(name, source, classes):
    data = get_task(name).load(source)
    return data, [Constant(shares(labels(data.train), classes))], 1 / classes


class Deaf(nn.Module):
    """Predicts the classes by their shares, whatever text is read."""

    def __init__(self, shares):
        super().__init__()
        self.logits = nn.Parameter(shares.log())

    def forward(self, input_ids, attention_mask, token_type_ids):
        return self.logits.expand(len(input_ids), -1)


def texts():
    data = get_task("text-classification").load("stdlib-docstrings", length=32)
    return data, [Deaf(shares(data.train.labels, 2))], 1 / 2


def generation():
    data = get_task("image-generation").load("digits")
    return data, [Independent(torch.stack([image for image, _ in data.train]))], None


class Untouched(nn.Module):
    """Returns the source, whatever the instruction says."""

    def __init__(self):
        super().__init__()
        self.nothing = nn.Parameter(torch.zeros(1))

    def edit(self, source, *asked, **options):
        return source + 0 * self.nothing

    def training_loss(self, batch):
        return self.nothing.square().sum()


def edits():
    return get_task("image-editing").load("tiles", examples=200), [Untouched()], None


def forecasting():
    data = get_task("series-forecasting").load("airline", context=12, horizon=3)
    mean = torch.stack([future for _, future in data.train]).mean((0, 1))
    return data, [Constant(mean.repeat(3, 1)), Persistence(3)], None


def events():
    data = get_task("event-forecasting").load("hawkes")
    gaps, marks, _ = data.train.tensors
    return data, [Poisson(1 / gaps[:, 1:].mean(), shares(marks[:, 1:].flatten(), 2))], None


def decisions(source="cartpole-medium"):
    data = get_task("reinforcement-learning").load(source, episodes=3, validation=2, test=4)
    return data, [Constant(logits, positions=True) for logits in torch.eye(data.options["actions"])], None


def photographs():
    def photo(seed, side):
        smooth = np.random.default_rng(seed).integers(0, 256, (side // 4, side // 4, 3), dtype=np.uint8)
        return smooth.repeat(4, 0).repeat(4, 1)

    data = TaskData("noise", Crops([photo(0, 64)], 40, 4), Whole([photo(1, 48)]), Whole([photo(2, 48)]), "")
    return data, [Bicubic()], None


class AfterEach(nn.Module):
    """Tells each token from the one before it, by a table of shares."""

    def __init__(self, table):
        super().__init__()
        self.table = nn.Parameter(torch.as_tensor(table).log().float())

    def forward(self, tokens):
        return self.table[tokens]


def pair_shares(windows, vocab):
    """p(y|x) of counts of pairs that back off to counts of y by how many kinds were seen after x."""
    counts = np.zeros((vocab, vocab))
    for x, y in windows:
        np.add.at(counts, (x.numpy(), y.numpy()), 1)
    single = (counts.sum(0) + 1) / (counts.sum() + vocab)
    kinds = (counts > 0).sum(1, keepdims=True)
    total = counts.sum(1, keepdims=True) + kinds
    return np.where(total > 0, (counts + kinds * single) / np.maximum(total, 1), single)


def text():
    rng = np.random.default_rng(0)
    parts = [rng.choice(5, 401, p=p) for p in ([0.4, 0.3, 0.2, 0.1, 0], [0.2] * 5, [0.3, 0.4, 0.1, 0.1, 0.1])]
    train, val, test = (Windows(part, 8, np.array([1, 2, 1, 3, 1])) for part in parts)
    data = TaskData("dice", train, val, test, "", {"vocab": 5})
    return data, [AfterEach(pair_shares(train, 5))], None


def pairs():
    data = get_task("recall").load("mqar", length=40, pairs=4, keys=8, values=6, examples=64, test_examples=64)
    return data, [Loudest(data.options["vocab"], 6 + 8)], 1 / 6


def blanks():
    parts = [
        np.random.default_rng(seed).choice(5, size, p=[0.5, 0.2, 0.1, 0.1, 0.1])
        for seed, size in enumerate((801, 401, 403))
    ]
    train, val, test = (Blanks(Windows(part, 8, np.ones(5, dtype=np.int64)), 5) for part in parts)
    data = TaskData("dice", train, val, test, "", {"vocab": 6})
    return data, [Constant(shares(parts[0], 6).add(1e-9).log(), positions=True)], None


class Parrot(nn.Module):
    """Writes one sentence, whatever it is given."""

    def __init__(self, sentence):
        super().__init__()
        self.values = nn.Parameter(nn.functional.one_hot(sentence, 256).float())

    def forward(self, source, written, mask=None):
        return self.values[: written.shape[1]].expand(len(source), -1, -1)


def sentences():
    generator = torch.Generator().manual_seed(0)
    parts = []
    for count, often in ((40, 0.6), (40, 0.4), (40, 0.2)):
        targets = torch.randint(1, 256, (count, 5), generator=generator)
        targets[:, -1] = 0
        targets[: int(often * count)] = torch.tensor([7, 8, 9, 0, 0])
        parts.append(TensorDataset(torch.randint(1, 256, (count, 6), generator=generator), targets))
    return TaskData("parrot", *parts, "", {"vocab": 256}), [Parrot(torch.tensor([7, 8, 9, 0, 0]))], None


class Uniform(nn.Module):
    """Says the same of every position."""

    def __init__(self, shares):
        super().__init__()
        self.shares = nn.Parameter(shares)

    def forward(self, x):
        return self.shares[None, :, None, None].expand(len(x), -1, *x.shape[2:])


def mosaics():
    data = get_task("semantic-segmentation").load("textures", size=32)
    pixels = torch.stack([mask for _, mask in data.train]).flatten().long()
    return data, [Uniform(pixels.bincount(minlength=5).float())], None


class Expected(nn.Module):
    """Finds the same boxes in every picture, as shares of it."""

    def __init__(self, boxes, scores, labels):
        super().__init__()
        self.boxes, self.scores, self.labels = nn.Parameter(boxes), scores, labels
        self.num_classes = len(labels)

    def training_loss(self, batch):
        return self.boxes.square().mean()

    def detect(self, images, score_threshold=0.0):
        corner = torch.tensor([images.shape[3], images.shape[2]] * 2)
        return [Detections(self.boxes.detach() * corner, self.scores, self.labels) for _ in images]


def objects():
    """Two classes, each near a position of its own in pictures of two sizes, more or less often."""
    rng, parts = np.random.default_rng(0), []
    meta = {"classes": ["a", "b"], "ids": [1, 2], "size": 20, "mean": [0.5] * 3, "std": [0.5] * 3}
    for count, often in ((30, 0.8), (20, 0.6), (24, 0.4)):
        scenes = []
        for number in range(count):
            height, width = ((20, 30), (40, 20))[number % 2]
            there = np.flatnonzero([True, rng.random() < often])
            boxes = np.array([[0.1, 0.1, 0.5, 0.6], [0.5, 0.4, 0.9, 0.9]])[there] * [width, height, width, height]
            boxes = (boxes + rng.normal(0, 1, boxes.shape)).astype(np.float32)
            scenes.append(Scene(rng.integers(0, 255, (height, width, 3), dtype=np.uint8), boxes, there))
        parts.append(Pictures(scenes, meta))
    shares = [[], []]
    for scene in parts[0].sources:
        height, width = scene.pixels.shape[:2]
        for box, label in zip(scene.boxes, scene.labels):
            shares[label].append(torch.tensor(box / [width, height, width, height]).float())
    mean = torch.stack([torch.stack(boxes).mean(0) for boxes in shares])
    rates = torch.tensor([len(boxes) / 30 for boxes in shares])
    data = TaskData("places", *parts, "", {"num_classes": 2}, meta, collate=join)
    return data, [Expected(mean, rates, torch.tensor([0, 1]))], None


class OneRow(nn.Module):
    """Predicts one row of numbers for every graph."""

    def __init__(self, row):
        super().__init__()
        self.row = nn.Parameter(row)

    def forward(self, nodes, lengths, hops=None):
        return self.row.expand(len(nodes), -1)


def graphs():
    """Targets that depend on the size; the best row that is the same for all is the median."""
    data = get_task("graph-regression").load("distance-counts", seed=3, examples=61, test_examples=30)
    targets = torch.stack([item.target for item in data.train])
    return data, [OneRow(targets.median(dim=0).values)], None


def sounds():
    """Classes come in turn, so that splits differ by their ends alone."""
    data = get_task("audio-classification").load("vowels", examples=30, test_examples=23)
    data = replace(data, val=TensorDataset(*data.val[:7]))
    return data, [Constant(shares(labels(data.train), 10))], 1 / 10


META = {"mean": [0.4] * 3, "std": [0.2] * 3}


class Described(nn.Module):
    """Embeds pictures by their colour or by their pixels, colours and gradients; its logits are of no use."""

    def __init__(self, describe):
        super().__init__()
        self.describe, self.weight = describe, nn.Parameter(torch.ones(()))

    def forward(self, images):
        described = self.weight * self.describe(images * META["std"][0] + META["mean"][0])
        return Identified(described, described, described[:, :2])


def gradients_and_pixels(images):
    """Written out for 64×32 pixels: means of 4×4, roots of counts, scikit-image's HOG, a third each."""
    flat = images.flatten(2)
    standard = (flat - flat.mean(2, keepdim=True)) / (flat.std(2, keepdim=True) + 0.01)
    cells = standard.unflatten(2, (16, 4, 8, 4)).mean((3, 5)).flatten(1)
    counts = [[channel.histc(8, 0, 1).sqrt() for channel in image] for image in flat]
    shapes = [hog(image.permute(1, 2, 0).numpy(), 9, (8, 8), (2, 2), channel_axis=2) for image in images]
    parts = (cells, torch.stack([torch.cat(row) for row in counts]), torch.tensor(np.array(shapes)).float())
    return torch.cat([nn.functional.normalize(part) for part in parts], 1)


def sightings():
    """Pictures of two people to train on, others to search for, each by two cameras."""
    rng, parts = np.random.default_rng(0), []
    for count in (2, 4, 9):
        people = torch.arange(count).repeat_interleave(6)
        colours = rng.integers(0, 200, (count, 3, 16, 8))[people.numpy()].repeat(4, 2).repeat(4, 3)
        images = torch.from_numpy((colours + rng.integers(0, 56, colours.shape)).astype(np.uint8))
        cameras = torch.arange(6).remainder(2).repeat(count)
        parts.append(Sighted(images, people, cameras, torch.arange(6).eq(0).repeat(count), META | {"size": [64, 32]}))
    data = TaskData("noise", Groups(parts[0]), *parts[1:], "", {"num_classes": 2}, META, join_groups)
    return data, [Described(lambda x: x.mean((2, 3)) + 1e-3), Described(gradients_and_pixels)], None


class Fitted(nn.Module):
    """What scikit-learn makes of pixels."""

    def __init__(self, machine, images, labels):
        super().__init__()
        self.machine = machine.fit(images.flatten(1).numpy(), labels.numpy())
        self.weight = nn.Parameter(torch.ones(()))

    def forward(self, images):
        found = torch.from_numpy(self.machine.predict(images.flatten(1).detach().numpy()))
        return self.weight * nn.functional.one_hot(found, 3).float()


def details():
    generator, parts = torch.Generator().manual_seed(0), []
    for count in (60, 20, 40):
        truth = torch.randint(3, (count,), generator=generator)
        images = 0.7 * truth[:, None, None, None] + torch.randn(count, 3, 4, 4, generator=generator)
        parts.append(TensorDataset(images, truth))
    machines = (make_pipeline(StandardScaler(), SVC(C=10)), KNeighborsClassifier(1))
    train = torch.utils.data.default_collate(list(parts[0]))
    return TaskData("dots", *parts, "", {"num_classes": 3}), [Fitted(one, *train) for one in machines], 1 / 3


class Bilinear(nn.Module):
    """Scores pictures and texts by what scikit-learn makes of training pairs: words from the colours of 16 cells."""

    def __init__(self, images, bags):
        super().__init__()
        self.scale = StandardScaler().fit(self.cells(images))
        self.ridge = Ridge(alpha=10.0).fit(self.scale.transform(self.cells(images)), bags)
        self.centre, self.size = bags.mean(0), bags.shape[1]
        self.weight = nn.Parameter(torch.ones(()))

    @staticmethod
    def cells(images):
        return images.reshape(len(images), 3, 4, 4, 4, 4).mean((3, 5)).flatten(1).numpy()

    def encode_images(self, images, regions):
        predicted = self.ridge.predict(self.scale.transform(self.cells(images))) - self.centre
        return self.weight * torch.from_numpy(predicted).float()

    def encode_texts(self, tokens, words):
        bags = nn.functional.one_hot(tokens, self.size).amax(1).float()
        bags[:, 0] = 0
        return bags - torch.from_numpy(self.centre).float()

    def training_loss(self, batch):
        return self.weight.square()


def captioned():
    """Pictures whose brighter half is told."""
    rng, meta, parts = np.random.default_rng(0), META | {"words": list("pabcd"), "pad": 0, "longest": 4, "size": 16}, []
    meta["features"] = 0
    for count in (40, 8, 12):
        images = torch.from_numpy(rng.integers(0, 100, (count, 3, 16, 16), dtype=np.uint8))
        tokens = []
        for image in images:
            side = int(rng.integers(2))
            image[:, :, 8 * side : 8 * side + 8] += 120
            tokens.append([[1 + side, 3], [1 + side, 3 + int(rng.integers(2))]])
        parts.append(Gallery(images, tokens, meta))
    data = TaskData("halves", CaptionPairs(parts[0]), *parts[1:], "", {}, meta, join_pairs(0))
    bags = np.stack([np.mean([np.bincount(text, minlength=5) for text in texts], 0) for texts in parts[0].tokens])
    images = torch.stack([parts[0].image(i)[0] for i in range(40)])
    by_chance = 2 * (1 / 12 + 5 / 12 + 10 / 12) / 2
    for k in (1, 5, 10):
        by_chance += 1 - np.prod([(22 - j) / (24 - j) for j in range(k)])
    return data, [Bilinear(images, bags)], by_chance


class Blurred(nn.Module):
    """How far means over 3×3 and 15×15 pixels lie apart, by SciPy; or noise, which is the same for each image."""

    def __init__(self, blind=False):
        super().__init__()
        self.weight, self.blind = nn.Parameter(torch.ones(())), blind

    def forward(self, images):
        values, inside = images.numpy().astype(np.float64), np.ones((1, 1, *images.shape[2:]))
        near, far = (
            uniform_filter(values, (0, 0, side, side), mode="constant")
            / uniform_filter(inside, (0, 0, side, side), mode="constant")
            for side in (3, 15)
        )
        heat = torch.from_numpy(
            np.zeros_like(near)[:, 0] if self.blind else np.sqrt(((near - far) ** 2).sum(1))
        ).float()
        return Anomalies(self.weight * heat.amax((1, 2)), self.weight * heat)


def defects():
    """Noise with bright spots, of two categories."""
    rng, parts = np.random.default_rng(0), []
    for count in (6, 4, 8):
        images = rng.integers(0, 200, (count, 24, 24, 3), dtype=np.uint8)
        masks = np.zeros((count, 24, 24), bool)
        for k in range(0, count, 2):
            masks[k, 4 + k : 8 + k, 5:9] = True
            images[k][masks[k]] += 55
        names = tuple("ab"[k // 2 % 2] for k in range(count))
        parts.append(
            Composed(Drawn(images, masks, names, ("",) * count), META | {"size": 24, "categories": ["a", "b"]})
        )
    shares = [
        np.mean([m.mean() for m, n in zip(parts[2].drawn.masks, parts[2].drawn.categories) if n == c]) for c in "ab"
    ]
    data = TaskData("spots", *parts, "", {}, parts[0].meta, join_named(["a", "b"]))
    return data, [Blurred(), Blurred(blind=True)], float(np.mean(shares))


class Mimic(nn.Module):
    """It looks at nothing, prefers the words of one answer, and goes on after each as that answer does."""

    def __init__(self, words, size):
        super().__init__()
        self.after = nn.Parameter(torch.zeros(size, size))
        with torch.no_grad():
            for before, word in pairwise(words):
                self.after[before, word] = 2

    def forward(self, tokens, images=None, *, mask=None):
        return self.after[tokens]

    def generate(self, tokens, count, images=None, *, mask=None, ends=(), temperature=0.0):
        last = tokens[:, -1]
        for _ in range(count):
            last = self.after[last].argmax(1)
            yield last


def part_of(data, count=24):
    """The first conversations of each split."""
    parts = (Talks(part.conversations[:count], part.meta, part.pictures) for part in (data.train, data.val, data.test))
    train, val, test = parts
    return replace(data, train=train, val=val, test=test)


def mimic_of(data, answer):
    tokens = data.train.chat_tokens
    return Mimic([tokens.assistant, *tokens.text(answer), tokens.end], len(tokens))


def chats():
    """Conversations about scenes; counts of what follows up to four tokens, and the form of a question with two."""
    data = part_of(get_task("multimodal-chat").load("composed", examples=40))
    tokens = data.train.chat_tokens

    def targets(part):
        for read, wanted in ((list(one.tokens), list(one.targets)) for one in part.encoded):
            for place in (k for k, target in enumerate(wanted) if target >= 0):
                begin = max(k for k in range(place + 1) if read[k] == tokens.user)
                form = [word for word in read[begin + 1 : begin + 12] if word != tokens.image][:2]
                past = [str(read[max(0, place + 1 - n) : place + 1]) for n in range(1, 5)]
                yield [*past, f"{form}{read[place - 1 : place + 1]}"], wanted[place]

    seen = [("", target) for _, target in targets(data.train)]
    singles = Counter(target for _, target in seen)
    pairs = Counter((past, target) for pasts, target in targets(data.train) for past in pasts)
    follow = {past: [c for (p, _), c in pairs.items() if p == past] for past in {past for past, _ in pairs}}
    nats = []
    for pasts, target in targets(data.test):
        share = (singles[target] + 1) / (len(seen) + len(tokens))
        for past in pasts:
            kinds = len(follow.get(past, ()))
            if kinds:
                share = (pairs[past, target] + kinds * share) / (sum(follow[past]) + kinds)
        nats.append(-np.log(share))
    return data, [mimic_of(data, "yes")], float(np.exp(np.mean(nats)))


def asked():
    """Questions about scenes; answers by the words of a question and their pairs, by scikit-learn's naive Bayes."""
    data = part_of(get_task("visual-question-answering").load("composed", examples=60), 90)
    texts, answers = ([], []), ([], [])
    for part, (said, right) in zip((data.train, data.test), zip(texts, answers)):
        for talk in part.conversations:
            said.append(talk.exchanges[0].asked.replace("<image>", " "))
            right.append(talk.exchanges[0].answers[0])
    terms = CountVectorizer(token_pattern=r"\w+(?:['’]\w+)*|[^\w\s]", ngram_range=(1, 2))
    bayes = MultinomialNB().fit(terms.fit_transform(texts[0]), answers[0])
    told = [list(bayes.predict(terms.transform(texts[1])))]
    forms = {}
    for text, answer in zip(texts[0], answers[0]):
        forms.setdefault(tuple(text.lower().split()[:2]), Counter())[answer] += 1
    told.append([forms[tuple(text.lower().split()[:2])].most_common(1)[0][0] for text in texts[1]])
    return data, [mimic_of(data, "yes")], max(float(np.mean(np.array(some) == answers[1])) for some in told)


class Tiles(nn.Module):
    """A hundred boxes of one size and one name, wherever a picture has something."""

    def __init__(self, size, name):
        super().__init__()
        self.size, self.name, self.weight = size, name, nn.Parameter(torch.ones(()))

    def training_loss(self, batch):
        return self.weight.square() * len(batch)

    def detect(self, image):
        tall, wide = image.shape[1:]
        x, y = np.meshgrid((np.arange(10) + 0.5) * wide / 10, (np.arange(10) + 0.5) * tall / 10)
        boxes = [
            [max(0, a - self.size[0] / 2), max(0, b - self.size[1] / 2), min(wide, a + self.size[0] / 2),
             min(tall, b + self.size[1] / 2)] for b, a in zip(y.ravel(), x.ravel())
        ]  # fmt: skip
        masks = torch.zeros(100, tall, wide, dtype=torch.bool)
        return Detected(torch.tensor(boxes), masks, torch.ones(100), [self.name] * 100)


def unnamed():
    """Scenes whose objects nobody lists; boxes of the mean size everywhere, of the commonest name."""
    data = get_task("open-ended-detection").load("composed", examples=40)
    objects = [(box, label) for _, boxes, labels, *_ in data.train.sources for box, label in zip(boxes, labels)]
    size = np.mean([[box[2] - box[0], box[3] - box[1]] for box, _ in objects], axis=0)
    commonest = Counter(label for _, label in objects).most_common(1)[0][0]
    return data, [Tiles(size, data.train.classes[commonest])], None


class Mute(nn.Module):
    """Says one token of a vocabulary, whatever is asked."""

    def __init__(self, token, vocab):
        super().__init__()
        self.token, self.vocab, self.weight = token, vocab, nn.Parameter(torch.ones(()))

    def forward(self, tokens, scenes, mask=None):
        logits = torch.zeros(*tokens.shape, self.vocab)
        logits[..., self.token] = 5
        return logits * self.weight

    def generate(self, tokens, count, scenes, mask=None, ends=(), temperature=0.0):
        yield torch.full((len(tokens),), self.token)


def rooms():
    """Questions about rooms; answers by the words of a question and their pairs, by scikit-learn's naive Bayes."""
    data = get_task("scene-question-answering").load("rooms", examples=40, points=192)
    for part in (data.train, data.test):  # long answers come once each, and which of those is the likeliest is a toss
        kept = [row for row, talk in enumerate(part.conversations) if talk.exchanges[0].kind not in ("caption", "plan")]
        part.conversations = [part.conversations[row] for row in kept]
        part.encoded = [part.encoded[row] for row in kept]
    pairs = [[(talk.exchanges[0].asked, talk.exchanges[0].answers[0]) for talk in part.conversations]
             for part in (data.train, data.test)]  # fmt: skip
    terms = CountVectorizer(token_pattern=r"\w+(?:['’]\w+)*|[^\w\s]", ngram_range=(1, 2))
    bayes = MultinomialNB().fit(terms.fit_transform([asked for asked, _ in pairs[0]]), [right for _, right in pairs[0]])
    told = list(bayes.predict(terms.transform([asked for asked, _ in pairs[1]])))
    commonest = Counter(right for _, right in pairs[0]).most_common(1)[0][0]
    right = [[answer] for _, answer in pairs[1]]
    best = max(100 * float(cider(some, right).mean()) for some in (told, [commonest] * len(right)))
    tokens = data.test.chat_tokens
    return data, [Mute(tokens.text(commonest)[0], len(tokens))], best


CASES = {
    "scene-question-answering": rooms,
    "open-ended-detection": unnamed,
    "multimodal-chat": chats,
    "visual-question-answering": asked,
    "anomaly-detection": defects,
    "image-text-retrieval": captioned,
    "audio-classification": sounds,
    "graph-regression": graphs,
    "image-classification": lambda: classification("image-classification", "digits", 10),
    "image-generation": generation,
    "image-editing": edits,
    "object-detection": objects,
    "semantic-segmentation": mosaics,
    "series-classification": lambda: classification("series-classification", "arrow-head", 3),
    "series-forecasting": forecasting,
    "event-forecasting": events,
    "reinforcement-learning": decisions,
    "super-resolution": photographs,
    "language-modelling": text,
    "masked-language-modelling": blanks,
    "text-classification": texts,
    "translation": sentences,
    "recall": pairs,
    "re-identification": sightings,
    "fine-grained": details,
}
# A car stays in the valley whatever is done blindly, and a pole falls soonest under one action all the time.
UNMOVED = {"reinforcement-learning": lambda: decisions("mountaincar-medium")}
CASE = cache(lambda name: CASES[name]())


class Shut(Dataset):
    """A split that nobody may look at."""

    def __len__(self):
        raise AssertionError("looked at the wrong split")

    def __getitem__(self, index):
        raise AssertionError("looked at the wrong split")


def evaluated(task, model, dataset):
    with torch.no_grad():
        return task.evaluate(model.eval(), dataset)


@pytest.mark.parametrize("name", SHARED)
def test_the_dummy_baseline_is_a_model_that_sees_nothing_fitted_on_train_and_judged_on_test(name):
    """Models of this file's own, fitted to the training split by it, go through `evaluate`."""
    task, (data, models, guess) = get_task(name), UNMOVED.get(name, lambda: CASE(name))()
    scores = [evaluated(task, model, data.test)[task.metric] for model in models]
    best = (max if task.higher_is_better else min)([*scores, *([] if guess is None else [guess])])
    dummy_baseline = task.dummy_baseline(replace(data, val=Shut()))
    assert dummy_baseline == pytest.approx(best, rel=1e-4)
    assert dummy_baseline == task.dummy_baseline(data), "nothing of it is drawn anew"


@pytest.mark.parametrize("name", SHARED)
def test_fit_reports_the_metrics_of_the_test_split(name):
    task, (data, models, _) = get_task(name), CASE(name)
    recipe = Recipe(epochs=1, max_steps=1, batch_size=4, lr=1e-6)
    done = fit(lambda: deepcopy(models[0]), task, data, recipe)
    assert done.metrics == evaluated(task, done.model, data.test)
    assert done.curve[-1] == {**done.curve[-1], **evaluated(task, done.model, data.val)}
    for other in (data.train, data.val):
        # Of random crops, of groups, of pairs.
        if name not in ("super-resolution", "re-identification", "image-text-retrieval") or other is data.val:
            assert done.metrics != evaluated(task, done.model, other), "the splits would not be distinguished"


def test_what_is_rare_in_the_test_does_not_lower_the_bar_below_a_guess():
    task = get_task("image-classification")
    train = TensorDataset(torch.zeros(6, 1, 2, 2), torch.tensor([0, 0, 0, 1, 1, 2]))
    data = TaskData("odd", train, train, Subset(train, [3, 4, 5]), "")
    assert task.dummy_baseline(data) == pytest.approx(1 / 3)
    assert task.dummy_baseline(replace(data, test=Subset(train, [0, 1, 3]))) == pytest.approx(2 / 3)


@pytest.mark.parametrize(("kind", "guess"), [("needle", 1 / 6), ("selective-copy", None), ("lookup", None)])
def test_recall_is_more_than_to_know_which_answers_there_are(kind, guess):
    """One needle is not given away by being the only answer that stands there; of several the commonest is."""
    task = get_task("recall")
    options = {} if kind == "needle" else {"pairs": 4}
    data = task.load(kind, length=40, keys=8, values=6, examples=300, test_examples=200, **options)
    asked = [targets[targets != IGNORED] for targets in data.test.tensors[1]]
    loudest = float(np.mean([answers.bincount().max() / len(answers) for answers in asked]))
    if guess is None:
        assert task.dummy_baseline(data) == pytest.approx(loudest)
    else:
        assert guess <= task.dummy_baseline(data) < 2 * guess


def test_the_scale_of_photographs_is_that_of_their_meta():
    task, (data, _, _) = get_task("super-resolution"), CASE("super-resolution")
    assert task.dummy_baseline(replace(data, meta={"scale": 4})) < task.dummy_baseline(data) - 1


def test_random_actions_count_where_none_taken_all_the_time_does_better():
    task = get_task("reinforcement-learning")
    data = task.load("cartpole-medium", episodes=3, validation=1, test=8)
    constant = [evaluated(task, Constant(logits, positions=True), data.test)["return"] for logits in torch.eye(2)]
    assert task.dummy_baseline(data) > max(constant) + 5
