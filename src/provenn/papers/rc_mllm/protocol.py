"""The prompt of region-level context (arXiv:2508.12263 and the README of hongliang-wei/RC-MLLM), written and read back.

    [1]: The information of the dog located at <|box_start|>(214,424),(583,884)<|box_end|> in the image: Bella is two.
    Answer the following question based on the information above and the given image. (The line is longer: `CITE`.)
    How old is the dog?

Boxes are whole thousandths of the picture, as Qwen2-VL has them. An answer cites entry k as `[k]`.

A text may hold anything. What the protocol would take for its own marks is written with a backslash before it: `[2]` as
`\\[2]`, `<|im_end|>` as `<\\|im_end|>`, `<image>` as `<\\image>`, and the end of a line as `\\n`. Reading undoes it.
"""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from provenn.core.box_text import THOUSAND, Box, Number, check_box, read_box, write_box
from provenn.core.errors import UserError

CONVENTION = "qwen2-vl"
CITE = (
    "Answer the following question based on the information above and the given image, and provide citations for your "
    "response."
)
PLACEHOLDER = "<image>"
WHOLE = (THOUSAND, THOUSAND)  # a picture measured in its own thousandths
LINE = re.compile(
    r"\[(\d+)\]: The information of the (.*?) located at (<\|box_start\|>.*?<\|box_end\|>) in the image: (.*)",
    re.DOTALL,
)
LOCATED = re.compile(r"^(\[\d+\]: The information of the .*?) located at <\|box_start\|>.*?<\|box_end\|>", re.MULTILINE)
GROUNDED = re.compile(r"(<\|object_ref_start\|>.*?<\|object_ref_end\|>|<\|box_start\|>.*?<\|box_end\|>)\s*")
REFERENCE = re.compile(r"<\|object_ref_start\|>(.*?)<\|object_ref_end\|>", re.DOTALL)
MARK = re.compile(r"<\|(?:object_ref|box)_(?:start|end)\|>")  # one that lacks its other, as where an answer is cut
BOXED = re.compile(r"<\|box_start\|>.*?<\|box_end\|>", re.DOTALL)
POINTED = re.compile(  # what an object is called, its box, or both
    r"<\|object_ref_start\|>(.*?)<\|object_ref_end\|>\s*(<\|box_start\|>.*?<\|box_end\|>)?"
    r"|(<\|box_start\|>.*?<\|box_end\|>)",
    re.DOTALL,
)
CITATION = re.compile(r"(?<!\\)\[(\d+)\]")
STATEMENT = re.compile(r"((?:\\\[|[^\[.;]|(?<=\d)\.(?=\d)|\[(?!\d+\]))*)((?:[.;,]?(?:\s*(?<!\\)\[\d+\])+)?)[.;,]?")
KINDS = ("V2C", "C2V", "V2C-none", "C2V-none", "RCID", "MCCG")
UNANSWERABLE = ("V2C-none", "C2V-none")
REFUSALS = ("cannot be answered", "not in the image", "not enough information")


class Entry(NamedTuple):
    """What is known of an object.

    Args:
        category: what it is called in a word or two.
        box: left, top, right and bottom in thousandths of the picture.
        text: what is known of it.
        facts: the same as keys and values, where somebody has them.
    """

    category: str
    box: tuple[int, int, int, int]
    text: str
    facts: tuple[tuple[str, str], ...] = ()


class Prompt(NamedTuple):
    """What a prompt says: entries in their order, the question, and whether citations are asked for."""

    entries: tuple[Entry, ...]
    question: str
    cite: bool = True


@dataclass(frozen=True)
class Sample:
    """A question about a picture with entries, and its answer.

    Args:
        image: a file, or the number of a picture in memory.
        entries: in the order of the prompt; none for a question about the picture alone.
        question, answer: the answer with its citations.
        kind: one of `KINDS`, or one of the single steps; empty where nobody says it.
        looks: of each object what is seen of it, as keys and values; empty where nobody says it.
        about: the entry that the question is about, counted from 1; 0 where it is about none.
        cite: whether citations are asked for.
    """

    image: Any
    entries: tuple[Entry, ...]
    question: str
    answer: str
    kind: str = ""
    looks: tuple[tuple[tuple[str, str], ...], ...] = ()
    about: int = 0
    cite: bool = True

    @property
    def prompt(self) -> str:
        """The whole text that a user sends, with the place of the picture; without entries the question alone."""
        said = build_prompt(self.entries, self.question, cite=self.cite) if self.entries else self.question
        return f"{PLACEHOLDER}\n{said}"


# Writing and reading


def escape(text: str) -> str:
    """A text in which nothing can be taken for a mark of the protocol.

    >>> escape("see [2] and <image>")
    'see \\\\[2] and <\\\\image>'
    """
    text = re.sub(r"(\\*)\[(?=\d+\])", lambda found: found[1] + "\\[", text)
    text = re.sub(r"<(\\*)(?=\||image>)", lambda found: "<" + found[1] + "\\", text)
    text = re.sub(r"(\\+)n", lambda found: found[1] * 2 + "n", text)
    return re.sub(r"(\\*)\n", lambda found: found[1] * 2 + "\\n", text)


def unescape(text: str) -> str:
    """What `escape` was given.

    >>> unescape(escape("a\\n[2]<|x|>")) == "a\\n[2]<|x|>"
    True
    """

    def line_end(found: re.Match[str]) -> str:
        count = len(found[1])
        return "\\" * (count // 2) + ("\n" if count % 2 else "n")

    text = re.sub(r"(\\+)n", line_end, text)
    text = re.sub(r"<(\\+)(?=\||image>)", lambda found: "<" + found[1][1:], text)
    return re.sub(r"(\\+)\[(?=\d+\])", lambda found: found[1][1:] + "[", text)


def build_prompt(entries: Sequence[Entry], question: str, *, cite: bool = True) -> str:
    """The text of a prompt, without the picture's place.

    Args:
        entries: at least one.
        question: what is asked.
        cite: whether the line that asks for citations stands before the question.

    Raises:
        UserError: no entry, no question or one that begins like the prompt's own lines, an entry without text, or a box
            that is none.

    >>> print(build_prompt([Entry("dog", (214, 424, 583, 884), "Bella is two.")], "How old is it?", cite=False))
    [1]: The information of the dog located at <|box_start|>(214,424),(583,884)<|box_end|> in the image: Bella is two.
    How old is it?
    """
    if not entries:
        raise UserError("a prompt needs at least one entry: add an object with its box and text")
    if not question.strip():
        raise UserError("the question is empty: expected words")
    if PLACEHOLDER in question:
        raise UserError(f"the question {question[:60]!r} has {PLACEHOLDER}: leave it out, one picture stands before it")
    first = question.partition("\n")[0]
    if first == CITE or LINE.fullmatch(first):
        raise UserError(f"the question begins with a line of the prompt, {first[:60]!r}: leave that line out")
    lines = []
    for number, entry in enumerate(entries, 1):
        if not entry.category.strip() or not entry.text.strip():
            raise UserError(f"entry {number} has no category or no text: expected words for both")
        box = write_box(check_box(entry.box, WHOLE, f"the box of entry {number}"), WHOLE, CONVENTION)
        lines.append(
            f"[{number}]: The information of the {escape(entry.category)} located at {box} in the image: "
            f"{escape(entry.text)}"
        )
    return "\n".join([*lines, *([CITE] if cite else []), question])


def parse_prompt(text: str) -> Prompt:
    """What a prompt says; a box without its comma, as in the authors' README, is read.

    Raises:
        UserError: no entry, two of one number, a number left out, or a box that is none.
    """
    lines = text.removeprefix(PLACEHOLDER).lstrip("\n").split("\n")
    entries: list[Entry] = []
    while lines and (found := LINE.fullmatch(lines[0])) is not None:
        number, category, box, said = _number(found[1]), found[2], found[3], found[4]
        if number <= len(entries):
            raise UserError(f"two entries have the number [{number}]: number them from 1, each once")
        if number != len(entries) + 1:
            raise UserError(f"entry [{number}] stands where [{len(entries) + 1}] was expected: number them from 1")
        edges = _thousandths(read_box(box, WHOLE, CONVENTION), f"the box of entry {number}")
        entries.append(Entry(unescape(category), edges, unescape(said)))
        lines = lines[1:]
    if not entries:
        raise UserError(
            f"no entry in {text[:60]!r}: expected lines such as [1]: The information of the dog located at "
            "<|box_start|>(214,424),(583,884)<|box_end|> in the image: …"
        )
    cite = bool(lines) and lines[0] == CITE
    question = "\n".join(lines[1:] if cite else lines)
    if not question.strip():
        raise UserError("there is no question after the entries: expected one on the last line")
    return Prompt(tuple(entries), question, cite)


def _number(digits: str) -> int:
    """The number of an entry; one of more digits than any has is cut, and stays one that no entry has."""
    return int(digits[:18])


def citations(answer: str) -> list[int]:
    """Numbers of the entries that an answer cites, in its order; `\\[2]` is text.

    >>> citations("Bella [2] is with Lily [1][2], see \\\\[9]")
    [2, 1, 2]
    """
    return [_number(digits) for digits in CITATION.findall(answer)]


def statements(answer: str) -> list[tuple[str, tuple[int, ...]]]:
    """An answer's statements, each with what it cites: the words before a run of citations, or up to a full stop.

    Citations that come after the stop are of the sentence before it. A point within a number ends nothing.

    >>> statements("Mira owns it [2] [1]. It is red. [3]")
    [('Mira owns it', (2, 1)), ('It is red', (3,))]
    >>> statements("It cost 3.5 coins [1]")
    [('It cost 3.5 coins', (1,))]
    """
    found = []
    for part in STATEMENT.finditer(answer):
        words = part[1].strip(" ,\n")
        if words or part[2]:
            found.append((words, tuple(citations(part[2]))))
    return found


def without_citations(answer: str) -> str:
    """The words of an answer.

    >>> without_citations("Mira [2].")
    'Mira.'
    """
    return re.sub(r"\s*(?<!\\)\[\d+\]", "", answer).strip()


def what_is_said(answer: str) -> str:
    """An answer without citations, boxes and what these are boxes of: what is compared with the right one.

    >>> what_is_said("<|object_ref_start|>red disc<|object_ref_end|><|box_start|>(1,2),(3,4)<|box_end|> Mira [2]")
    'Mira'
    """
    return GROUNDED.sub("", without_citations(answer)).strip()


def without_places(answer: str) -> str:
    """An answer whose marks and boxes are taken out; what is called something stays.

    >>> without_places("<|object_ref_start|>red disc<|object_ref_end|><|box_start|>(1,2),(3,4)<|box_end|> [2] Mira")
    'red disc [2] Mira'
    """
    bare = MARK.sub(" ", BOXED.sub(" ", REFERENCE.sub(r"\1 ", answer)))
    return re.sub(r" {2,}", " ", bare).strip()


def readable(answer: str, size: tuple[int, int]) -> tuple[str, list[str]]:
    """An answer for people: its words and citations, and what it points at, with boxes in pixels.

    Args:
        answer: as a model wrote it.
        size: width and height of the picture.

    Returns:
        The words, in which no marks are left, and a line for each object that is named or boxed in it.

    >>> said = "<|object_ref_start|>red disc<|object_ref_end|><|box_start|>(0,0),(500,250)<|box_end|> [2] Mira"
    >>> readable(said, (64, 64))
    ('Mira [2]', ['red disc at (0, 0, 32, 16)'])
    """
    pointed = [_pointed(found[1] or "", found[2] or found[3] or "", size) for found in POINTED.finditer(answer)]
    shown = [line for line in pointed if line]
    begins = POINTED.match(answer.lstrip())
    rest = without_places(answer.lstrip()[begins.end() :]) if begins else ""
    cited = re.fullmatch(r"((?:\[\d+\]\s*)+)(\S.*)", rest, re.DOTALL)
    if cited:  # an object, its entry, and then what was asked
        return f"{cited[2]} {cited[1].strip()}", shown
    return rest if refuses(rest) else without_places(answer), shown


def _pointed(named: str, box: str, size: tuple[int, int]) -> str:
    """What is called something, and where it is."""
    if not box:
        return f"{named.strip()}, without a place" if named.strip() else ""
    try:
        edges = ", ".join(f"{edge:.0f}" for edge in read_box(box, size, CONVENTION))
        return f"{named.strip() or 'something'} at ({edges})"
    except UserError:
        shown = box.removeprefix("<|box_start|>").removesuffix("<|box_end|>")
        return f"{named.strip() or 'something'} at {shown!r}, which is no box in the picture"


def refuses(answer: str) -> bool:
    """Whether an answer says that there is none."""
    return any(words in answer.lower() for words in REFUSALS)


def reorder(sample: Sample, order: Sequence[int]) -> Sample:
    """The same sample with its entries in another order, and citations that follow them.

    Args:
        sample: of n entries.
        order: numbers from 0 to n − 1, the entry that stands first, second, ….

    Raises:
        UserError: an order that names an entry twice or leaves one out.
    """
    count = len(sample.entries)
    if sorted(order) != list(range(count)):
        raise UserError(f"an order of {count} entries must name each number below {count} once, got {list(order)}")
    place = {old + 1: new + 1 for new, old in enumerate(order)}
    return replace(
        sample,
        entries=tuple(sample.entries[old] for old in order),
        looks=tuple(sample.looks[old] for old in order) if sample.looks else (),
        answer=_renumbered(sample.answer, place),
        question=_renumbered(sample.question, place),
        about=place.get(sample.about, 0),
    )


def _renumbered(text: str, place: Mapping[int, int]) -> str:
    return CITATION.sub(lambda found: f"[{place[n]}]" if (n := _number(found[1])) in place else found[0], text)


def without_boxes(prompt: str) -> str:
    """The control of a prompt whose entries say nothing of where.

    >>> without_boxes("[1]: The information of the dog located at <|box_start|>(1,2),(3,4)<|box_end|> in the image: x")
    '[1]: The information of the dog in the image: x'
    """
    return LOCATED.sub(r"\1", prompt)


def with_permuted_boxes(sample: Sample, shift: int = 1) -> Sample:
    """The control whose boxes have moved on to the next entries, so that an answer that follows them is wrong."""
    boxes = [entry.box for entry in sample.entries]
    moved = [entry._replace(box=boxes[(k + shift) % len(boxes)]) for k, entry in enumerate(sample.entries)]
    return replace(sample, entries=tuple(moved))


def by_place(sample: Sample) -> Sample:
    """The control in which order alone says where: entries from left to right, to be asked without boxes."""
    order = sorted(range(len(sample.entries)), key=lambda k: sample.entries[k].box)
    return reorder(sample, order)


def _thousandths(box: Box, what: str) -> tuple[int, int, int, int]:
    """A box in whole thousandths that has an area still."""
    left, top, right, bottom = (round(edge) for edge in check_box(box, WHOLE, what))
    check_box((left, top, right, bottom), WHOLE, f"{what}, in whole thousandths")
    return left, top, right, bottom


# Formats and back ends


def to_sharegpt(samples: Iterable[Sample]) -> list[dict[str, Any]]:
    """Samples in the form of ShareGPT, which common trainers read; the task `multimodal-chat` does too.

    >>> entry = Entry("dog", (0, 0, 500, 500), "Bella")
    >>> to_sharegpt([Sample("a.jpg", (entry,), "Who is it?", "Bella [1]")])[0]["conversations"][1]
    {'from': 'gpt', 'value': 'Bella [1]'}
    """
    return [
        {
            "images": [str(sample.image)],
            "conversations": [
                {"from": "human", "value": sample.prompt},
                {"from": "gpt", "value": sample.answer},
            ],
        }
        for sample in samples
    ]


def to_messages(sample: Sample) -> list[dict[str, Any]]:
    """A sample as messages of a chat template, as in the authors' README."""
    content = [
        {"type": "image", "image": str(sample.image)},
        {"type": "text", "text": sample.prompt.removeprefix(f"{PLACEHOLDER}\n")},
    ]
    return [{"role": "user", "content": content}]


class Answer(NamedTuple):
    """What a model answered.

    Args:
        text: with its citations.
        cited: entries that it cites, each once.
        unknown: numbers that it cites and that no entry has.
    """

    text: str
    cited: tuple[Entry, ...]
    unknown: tuple[int, ...] = ()


@dataclass
class RegionContext:
    """Objects of one picture and what is known of them, for any chat model.

    Args:
        size: width and height of the picture, in pixels.

    >>> context = RegionContext((640, 480)).add((64, 48, 320, 240), "dog", "Bella is two.")
    >>> context.ask(lambda prompt: "Two [1].", "How old is the dog?").cited[0].box
    (100, 100, 500, 500)
    """

    size: tuple[int, int]
    entries: list[Entry] = field(default_factory=list)

    def add(
        self, box: Sequence[Number], category: str, text: str, facts: Mapping[str, str] | None = None
    ) -> "RegionContext":
        """Add an object by its box in pixels: left, top, right, bottom.

        Raises:
            UserError: a box without area or outside of the picture.
        """
        written = write_box(
            check_box(box, self.size, f"the box of entry {len(self.entries) + 1}"), self.size, CONVENTION
        )
        edges = _thousandths(read_box(written, WHOLE, CONVENTION), f"the box of entry {len(self.entries) + 1}")
        self.entries.append(Entry(category, edges, text, tuple((facts or {}).items())))
        return self

    def prompt(self, question: str, *, cite: bool = True) -> str:
        """The text to send with the picture."""
        return build_prompt(self.entries, question, cite=cite)

    def ask(self, chat: Callable[[str], str], question: str, *, cite: bool = True) -> Answer:
        """Ask a model, and look up what it cites.

        Args:
            chat: from a prompt to an answer; it knows the picture.
            question: what is asked.
            cite: whether citations are asked for.
        """
        said = chat(self.prompt(question, cite=cite))
        named = list(dict.fromkeys(citations(said)))
        known = [number for number in named if 1 <= number <= len(self.entries)]
        unknown = tuple(number for number in named if number not in known)
        return Answer(said, tuple(self.entries[number - 1] for number in known), unknown)


def pixels_of(entry: Entry, size: tuple[int, int]) -> Box:
    """An entry's box in pixels of its picture."""
    left, top, right, bottom = entry.box
    across, down = size[0] / THOUSAND, size[1] / THOUSAND
    return Box(left * across, top * down, right * across, bottom * down)
