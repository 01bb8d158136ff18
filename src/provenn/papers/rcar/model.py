"""Systems of image–text retrieval: encoders, a similarity of token sets, and the hinge that they learn by."""

from collections.abc import Sequence
from functools import cached_property
from typing import Any, TypedDict, Unpack

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from provenn.core.errors import UserError
from provenn.core.special_tokens import END, MASK, SPECIAL, START
from provenn.nn.arguments import check_finite
from provenn.papers.rcar.encoders import WORD_DIM, PictureEncoder, RegionEncoder, WordEncoder, augment_words, hinge
from provenn.papers.rcar.hosts import OF_SGRAF, RCAR, Host, Regulators, Similarity
from provenn.papers.rcar.layers import Mode, check_sizes, check_steps
from provenn.papers.rcar.training import special_of

F30K, COCO = 8482, 11354  # words of the authors' vocabularies, `<mask>` among them
MARGIN = 0.2
# Batches of 128 in an epoch, the last one left out; the authors sum negatives up for 3 epochs, and for 5 of COCO.
WARM_UP_F30K, WARM_UP_COCO = 3 * (145_000 // 128), 5 * (566_435 // 128)
TOUCHED = 0.2  # of the words in training
REGIONS = 36


class Matching(nn.Module):
    """Encoders of images and words, and a similarity of their tokens.

    Its loss is the bidirectional hinge of a batch's table of scores: of all negatives for the first `warm_up` batches,
    then of the hardest. Hardest negatives from the start pull all scores together, and the loss then stays at
    2 · batch · margin.

    Args:
        image: of features `RegionEncoder`, of pictures any module that gives tokens.
        text: `WordEncoder`, or any module of (tokens, words).
        similarity: see `provenn.papers.rcar.hosts`.
        margin: of the hinge.
        warm_up: batches.
        touched: share of the words that training masks, replaces or removes.
        vocabulary: a file of words, in which `<mask>`, `<start>` and `<end>` have numbers of their own. It is read when
            training begins. Default: the numbers of `provenn.data.vocabulary`.

    Shapes: features (images, regions, numbers) or pictures (images, 3, height, width), and tokens (texts, length) to
    scores (images, texts).
    """

    steps_done: Tensor

    def __init__(
        self,
        image: nn.Module,
        text: nn.Module,
        similarity: Similarity,
        *,
        margin: float = MARGIN,
        warm_up: int = 0,
        touched: float = TOUCHED,
        vocabulary: str | None = None,
    ):
        super().__init__()
        check_steps(warm_up=warm_up)
        check_finite(margin=margin, touched=touched)
        if not 0 <= touched <= 1:
            raise ValueError(f"touched must be a share from 0 to 1, got {touched}")
        self.image, self.text, self.matcher = image, text, similarity
        self.margin, self.warm_up, self.touched, self.vocabulary = margin, warm_up, touched, vocabulary
        self.register_buffer("steps_done", torch.zeros((), dtype=torch.long))

    def encode_images(
        self, images: Float[Tensor, "images ..."], regions: Bool[Tensor, "images regions"] | None = None
    ) -> tuple[Float[Tensor, "sets tokens dim"], Bool[Tensor, "sets tokens"]]:
        """Tokens of images, and which are real."""
        if isinstance(self.image, RegionEncoder):
            if images.ndim != 3:
                raise UserError(f"this network takes features of regions, got pictures of shape {tuple(images.shape)}")
            real = torch.ones_like(images[..., 0], dtype=torch.bool) if regions is None else regions
            return self.image(images, real), real
        tokens = self.image(images)
        return tokens, torch.ones_like(tokens[..., 0], dtype=torch.bool)

    def encode_texts(
        self, tokens: Int[Tensor, "texts length"], words: Bool[Tensor, "texts length"] | None = None
    ) -> tuple[Float[Tensor, "sets tokens dim"], Bool[Tensor, "sets tokens"]]:
        """Tokens of texts, and which are real."""
        real = torch.ones_like(tokens, dtype=torch.bool) if words is None else words
        return self.text(tokens, real), real

    def similarity(
        self,
        images: tuple[Float[Tensor, "images regions dim"], Bool[Tensor, "images regions"]],
        texts: tuple[Float[Tensor, "texts words dim"], Bool[Tensor, "texts words"]],
    ) -> Float[Tensor, "images texts"]:
        """Scores of what was encoded."""
        return self.matcher(images[0], texts[0], images[1], texts[1])

    def forward(
        self,
        images: Float[Tensor, "images ..."],
        tokens: Int[Tensor, "texts length"],
        regions: Bool[Tensor, "images regions"] | None = None,
        words: Bool[Tensor, "texts length"] | None = None,
    ) -> Float[Tensor, "images texts"]:
        return self.similarity(self.encode_images(images, regions), self.encode_texts(tokens, words))

    def training_loss(self, batch: Any) -> Float[Tensor, ""]:
        """The hinge of a batch of as many images and texts, which belong together in order.

        Args:
            batch: see `provenn.tasks.image_text_retrieval.Pairs`.
        """
        tokens, words = batch.tokens, batch.words
        if self.training and self.touched:
            mask, *kept = self.special
            tokens, words = augment_words(
                tokens, words, vocab_size=self.vocab_size, mask=mask, kept=tuple(kept), share=self.touched
            )
        scores = self(batch.images, tokens, batch.regions, words)
        loss = hinge(scores, self.margin, hardest=int(self.steps_done) >= self.warm_up)
        if self.training:
            self.steps_done += 1
        return loss

    @cached_property
    def special(self) -> tuple[int, int, int]:
        """The numbers of `<mask>`, `<start>` and `<end>`.

        Raises:
            UserError: the file of words cannot be read.
        """
        if self.vocabulary is None:
            return SPECIAL.index(MASK), SPECIAL.index(START), SPECIAL.index(END)
        return special_of(self.vocabulary, self.vocab_size)

    @property
    def vocab_size(self) -> int:
        """How many words the text encoder knows."""
        embed = getattr(self.text, "embed", None)
        if not isinstance(embed, nn.Embedding):
            raise ValueError(f"{type(self.text).__name__} has no embedding of words: set touched=0")
        return embed.num_embeddings


class Ensemble(nn.Module):
    """Several systems whose tables of scores are averaged: the paper's ALL, of a t2i and an i2t model.

    They share nothing and are trained side by side; each learns by its own loss.

    Args:
        parts: systems for the same kind of images.
    """

    def __init__(self, parts: Sequence[Matching]):
        super().__init__()
        if not parts:
            raise ValueError("an ensemble needs at least one system, got none")
        self.parts: Any = nn.ModuleList(parts)  # torch types what a list holds as modules alone

    def encode_images(self, images: Tensor, regions: Tensor | None = None) -> tuple[Tensor, ...]:
        """Tokens and masks of every part, one after the other."""
        return tuple(tensor for part in self.parts for tensor in part.encode_images(images, regions))

    def encode_texts(self, tokens: Tensor, words: Tensor | None = None) -> tuple[Tensor, ...]:
        """As `encode_images`, of texts."""
        return tuple(tensor for part in self.parts for tensor in part.encode_texts(tokens, words))

    def similarity(self, images: tuple[Tensor, ...], texts: tuple[Tensor, ...]) -> Float[Tensor, "images texts"]:
        """The mean of all tables."""
        return mean_table(
            [part.similarity(images[2 * k : 2 * k + 2], texts[2 * k : 2 * k + 2]) for k, part in enumerate(self.parts)]
        )

    def forward(
        self,
        images: Float[Tensor, "images ..."],
        tokens: Int[Tensor, "texts length"],
        regions: Bool[Tensor, "images regions"] | None = None,
        words: Bool[Tensor, "texts length"] | None = None,
    ) -> Float[Tensor, "images texts"]:
        return self.similarity(self.encode_images(images, regions), self.encode_texts(tokens, words))

    def training_loss(self, batch: Any) -> Float[Tensor, ""]:
        """The sum of the losses of all parts."""
        losses = [part.training_loss(batch) for part in self.parts]
        return torch.stack(losses).sum()


def mean_table(tables: Sequence[Float[Tensor, "images texts"]]) -> Float[Tensor, "images texts"]:
    """The mean of tables of scores, such as those of a t2i and an i2t model.

    Raises:
        UserError: none, or tables of different sizes.
    """
    sizes = {tuple(table.shape) for table in tables}
    if len(sizes) != 1:
        said = " and ".join(f"{rows}×{columns}" for rows, columns in sorted(sizes)) or "none"
        raise UserError(f"tables of scores are averaged that have one size, images × texts, got {said}")
    return torch.stack(list(tables)).mean(0)


# Presets


class SystemOptions(TypedDict, total=False):
    """What every preset of the paper's size takes.

    Args:
        features: numbers of a region, 2048.
        embed_dim, align_dim, word_dim: d = 1024, m = 256, and 300 of the embedding of words.
        margin, warm_up, touched: see `Matching`. Defaults: 0.2; 3 epochs of Flickr30K; 0.2 of the words.
        vocabulary: a file of the authors' words, which names the rows of the embedding: the task reads it, and training
            takes from it which words it masks by.
    """

    features: int
    embed_dim: int
    align_dim: int
    word_dim: int
    margin: float
    warm_up: int
    touched: float
    vocabulary: str | None


def rcar(vocab_size: int = F30K, *, mode: Mode = "t2i", steps: int = 2, **options: Unpack[SystemOptions]) -> Matching:
    """RCAR: RCR and RAR together; 2 steps, as the authors have in both directions and for both sets."""
    return _of_paper(mode, "rcar", vocab_size, steps, options)


def rar(
    vocab_size: int = F30K, *, mode: Mode = "t2i", steps: int | None = None, **options: Unpack[SystemOptions]
) -> Matching:
    """RAR alone: 3 steps where words look at regions, 2 the other way round."""
    return _of_paper(mode, "rar", vocab_size, {"i2t": 2}.get(mode, 3) if steps is None else steps, options)


def rcr(
    vocab_size: int = F30K, *, mode: Mode = "t2i", steps: int | None = None, **options: Unpack[SystemOptions]
) -> Matching:
    """RCR alone: 2 steps where words look at regions, 3 the other way round."""
    return _of_paper(mode, "rcr", vocab_size, {"i2t": 3}.get(mode, 2) if steps is None else steps, options)


def base(vocab_size: int = F30K, *, mode: Mode = "t2i", **options: Unpack[SystemOptions]) -> Matching:
    """The authors' host without regulators: one attention, and the mean of cosines."""
    return matching(vocab_size, Similarity(mode, **_sizes(options)), options)


def rcar_all(vocab_size: int = F30K, *, steps: int = 2, **options: Unpack[SystemOptions]) -> Ensemble:
    """The paper's ALL: RCAR in both directions, whose tables are averaged."""
    return Ensemble([_of_paper(mode, "rcar", vocab_size, steps, options) for mode in ("t2i", "i2t")])


def scan(
    vocab_size: int = F30K,
    *,
    mode: Mode = "t2i",
    host: Host = "mean",
    temperature: float | None = None,
    lse: float | None = None,
    rcr: int = 0,
    rar: int = 0,
    **options: Unpack[SystemOptions],
) -> Matching:
    """SCAN (Lee et al., 2018), with regulators by `rcr` and `rar`. It has no warm-up, and touches no words.

    Args:
        vocab_size: how many words there are.
        mode: "t2i" or "i2t".
        host: mean, max, sum or lse.
        temperature: λ. Default: 9 of t2i, 4 of i2t.
        lse: λ_lse. Default: 6 of t2i, 5 of i2t; 20 of i2t on COCO.
        rcr, rar: steps of each; none is SCAN itself.
        options: see `SystemOptions`.
    """
    similarity = Similarity(
        mode,
        host=host,
        rcr=rcr,
        rar=rar,
        temperature={"i2t": 4.0}.get(mode, 9.0) if temperature is None else temperature,
        lse={"i2t": 5.0}.get(mode, 6.0) if lse is None else lse,
        **_sizes(options),
    )
    return matching(vocab_size, similarity, {"warm_up": 0, "touched": 0.0, **options}, mlp=False, dropout=0.0)


def sgraf(
    vocab_size: int = F30K,
    *,
    host: Host = "saf",
    rcr: int = 0,
    rar: int = 0,
    regions: int = REGIONS,
    **options: Unpack[SystemOptions],
) -> Matching:
    """SGRAF (Diao et al., 2021), SGR or SAF, with regulators by `rcr` and `rar`. That RAR replaces SAF is inferred.

    It has no warm-up, and touches no words.

    Args:
        vocab_size: how many words there are.
        host: sgr or saf.
        rcr, rar: steps of each; none is SGRAF itself.
        regions: of each image.
        options: see `SystemOptions`.
    """
    if host not in ("sgr", "saf"):
        raise ValueError(f"host must be sgr or saf, got {host!r}")
    similarity = Similarity(
        "t2i", host=host, rcr=rcr, rar=rar, temperature=OF_SGRAF, regions=regions, **_sizes(options)
    )
    return matching(vocab_size, similarity, {"warm_up": 0, "touched": 0.0, **options}, mlp=False)


def matching(
    vocab_size: int, similarity: Similarity, options: SystemOptions, *, mlp: bool = True, dropout: float = 0.4
) -> Matching:
    """A system of features of regions around a similarity, whose d it has.

    Args:
        vocab_size: how many words there are.
        similarity: of tokens.
        options: see `SystemOptions`.
        mlp: whether regions go through an MLP besides a linear layer; SCAN and SGRAF have none.
        dropout: of the embedding of words.
    """
    dim = similarity.embed_dim
    return Matching(
        RegionEncoder(options.get("features", 2048), dim, dim // 2 if mlp else None),
        WordEncoder(vocab_size, dim, options.get("word_dim", WORD_DIM), dropout),
        similarity,
        warm_up=options.get("warm_up", WARM_UP_F30K),
        margin=options.get("margin", MARGIN),
        touched=options.get("touched", TOUCHED),
        vocabulary=options.get("vocabulary"),
    )


def _sizes(options: SystemOptions) -> dict[str, Any]:
    return {"embed_dim": options.get("embed_dim", 1024), "align_dim": options.get("align_dim", 256)}


def _of_paper(mode: Mode, regulators: Regulators, vocab_size: int, steps: int, options: SystemOptions) -> Matching:
    return matching(vocab_size, RCAR(mode, steps, regulators=regulators, **_sizes(options)), options)


def rcar_small(
    vocab_size: int = 72,
    *,
    image_size: int | None = None,
    features: int | None = None,
    mode: Mode = "t2i",
    steps: int = 2,
    regulators: Regulators = "rcar",
    embed_dim: int = 48,
    align_dim: int = 24,
    warm_up: int = 900,
    touched: float = 0.1,
) -> Matching:
    """Ours, what trains in minutes: pictures by a grid of 6×6 cells, or features of regions.

    Args:
        vocab_size: how many words there are.
        image_size: side of a picture; any, as it is convolutional. It follows from the data, and features have none.
        features: numbers of a region, of data that are features; there are no pictures then.
        mode, steps, regulators: see `RCAR`.
        embed_dim, align_dim: d and m.
        warm_up, touched: see `Matching`.
    """
    check_sizes(image_size=image_size, features=features)
    similarity = RCAR(mode, steps, regulators=regulators, embed_dim=embed_dim, align_dim=align_dim)
    image = PictureEncoder(embed_dim) if features is None else RegionEncoder(features, embed_dim, embed_dim // 2)
    text = WordEncoder(vocab_size, embed_dim, word_dim=48, dropout=0.1)
    return Matching(image, text, similarity, warm_up=warm_up, touched=touched)
