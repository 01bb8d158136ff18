"""The prompt of RC-MLLM: the authors' README to the character, round trips of any text, orders, controls, formats."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from provenn.core.errors import UserError
from provenn.papers.rc_mllm import (
    Entry,
    RegionContext,
    Sample,
    build_prompt,
    by_place,
    citations,
    parse_prompt,
    reorder,
    to_messages,
    to_sharegpt,
    with_permuted_boxes,
    without_boxes,
)
from provenn.papers.rc_mllm.protocol import CITE, escape, statements, unescape, without_citations

LILY = "Lily, a 34-year-old marketing executive, resides in downtown Chicago."
BELLA = "Bella's preferred activities include watching birds from the window."
# source: README.md of hongliang-wei/RC-MLLM@8ef30be, its two texts shortened to a sentence each
README = (
    "[1]: The information of the man located at <|box_start|>(755,417),(991,885)<|box_end|> in the image: "
    f"{LILY}\n"
    "[2]: The information of the dog located at <|box_start|>(214,424),(583 884)<|box_end|> in the image: "
    f"{BELLA}\n"
    "Answer the following question based on the information above and the given image, and provide citations for your "
    "response.\n"
    "Describe the image."
)
ENTRIES = (Entry("man", (755, 417, 991, 885), LILY), Entry("dog", (214, 424, 583, 884), BELLA))

edges = st.integers(0, 999)
texts = st.text(alphabet=st.sampled_from(list("ab n\\\n[]12<|>{}é image_start")), min_size=1).filter(str.strip)


@st.composite
def entries(draw):
    found = []
    for _ in range(draw(st.integers(1, 4))):
        left, top = draw(edges), draw(edges)
        box = (left, top, draw(st.integers(left + 1, 1000)), draw(st.integers(top + 1, 1000)))
        found.append(Entry(draw(texts), box, draw(texts)))
    return found


def test_the_readme_is_read_and_written_again_to_the_character():
    read = parse_prompt(README)
    assert read.entries == ENTRIES and read.question == "Describe the image." and read.cite
    # The README's own slip, a comma that lacks in the second box, is read and not written.
    assert build_prompt(read.entries, read.question) == README.replace("(583 884)", "(583,884)")


@settings(max_examples=60, deadline=None)
@given(found=entries(), question=texts, cite=st.booleans())
def test_what_is_built_is_read_back_whatever_the_texts(found, question, cite):
    question = "Who?" + question
    read = parse_prompt(build_prompt(found, question, cite=cite))
    assert read == (tuple(found), question, cite)


@settings(max_examples=200, deadline=None)
@given(text=st.text(alphabet=st.sampled_from(list("n\\\n[]12<|>imagex"))))
def test_escaping_hides_all_marks_and_is_undone(text):
    hidden = escape(text)
    assert unescape(hidden) == text
    assert "\n" not in hidden and "<|" not in hidden and "<image>" not in hidden and not citations(hidden)


def test_texts_with_numbers_in_brackets_and_braces_survive():
    text = "see [2], {category_1} and <|im_end|>\n[3]: The information of the cat"
    prompt = build_prompt([Entry("dog", (0, 0, 9, 9), text)], "Who?")
    assert parse_prompt(prompt).entries[0].text == text and len(prompt.split("\n")) == 3
    assert citations(prompt.split("\n")[0].partition("image: ")[2]) == []


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (README.replace("[2]:", "[1]:"), r"two entries have the number \[1\]"),
        (README.replace("[2]:", "[4]:"), r"entry \[4\] stands where \[2\]"),
        ("Describe the image.", "no entry"),
        ("", "no entry"),
        (README.partition("\nAnswer")[0], "no question after"),
        (README.replace("(755,417)", "(991,417)"), "no area"),
        (README.replace("(755,417)", "(1755,417)"), "qwen2-vl has 0 to 1000"),
        (README.replace("(755,417),(991,885)", "here"), "no box"),
        (README.replace("(755,417),(991,885)", "(755.1,417),(755.4,885)"), r"in whole thousandths .* no area"),
        (README.replace("[2]:", f"[{'9' * 5000}]:"), r"stands where \[2\]"),
    ],
)
def test_bad_prompts_are_refused_in_a_line(text, said):
    with pytest.raises(UserError, match=said) as caught:
        parse_prompt(text)
    assert "\n" not in str(caught.value)


def test_prompts_that_cannot_be_built_are_refused():
    with pytest.raises(UserError, match="at least one entry"):
        build_prompt([], "Who?")
    with pytest.raises(UserError, match="question is empty"):
        build_prompt(ENTRIES, " ")
    with pytest.raises(UserError, match="entry 1 has no category or no text"):
        build_prompt([Entry("dog", (0, 0, 5, 5), "")], "Who?")
    with pytest.raises(UserError, match=r"entry 1 .* no area"):
        build_prompt([Entry("dog", (5, 0, 5, 5), "x")], "Who?")
    for question, said in (
        ("<image> who?", "leave it out"),
        (f"{CITE}\nWho?", "begins with a line of the prompt"),
        (README.partition("\n")[0] + "\nWho?", "begins with a line of the prompt"),
    ):
        with pytest.raises(UserError, match=said):
            build_prompt(ENTRIES, question)
    with pytest.raises(UserError, match="outside"):
        RegionContext((100, 50)).add((0, 0, 101, 5), "dog", "x")


def sample() -> Sample:
    found = tuple(Entry("dog", (100 * k, 0, 100 * k + 50, 50), f"dog {k}") for k in (3, 1, 2))
    return Sample("a.jpg", found, "Whose? [2]", "dog 3 [1] and dog 2 [3], not [9]", about=1, looks=((), (), ()))


@given(order=st.permutations(range(3)))
def test_entries_in_another_order_are_cited_as_before(order):
    first, second = sample(), reorder(sample(), order)
    for answer, entries_ in ((first.answer, first.entries), (second.answer, second.entries)):
        named = [entries_[number - 1].text for number in citations(answer) if number <= 3]
        assert named == ["dog 3", "dog 2"]
    assert second.entries[second.about - 1].text == "dog 3" and citations(second.answer)[-1] == 9
    assert second.entries[citations(second.question)[0] - 1].text == "dog 1"  # the question names entries too
    back = reorder(second, [list(order).index(k) for k in range(3)])
    assert back == first


def test_an_order_names_each_entry_once():
    with pytest.raises(UserError, match="each number below 3 once"):
        reorder(sample(), [0, 0, 1])


def test_controls_change_boxes_alone():
    one = sample()
    bare = without_boxes(one.prompt)
    assert "box_start" not in bare and all(entry.text in bare for entry in one.entries)
    moved = with_permuted_boxes(one)
    assert [entry.box for entry in moved.entries] == [one.entries[k].box for k in (1, 2, 0)]
    assert [entry.text for entry in moved.entries] == [entry.text for entry in one.entries]
    assert (moved.about, moved.answer, moved.question) == (one.about, one.answer, one.question)
    assert [entry.text for entry in by_place(one).entries] == ["dog 1", "dog 2", "dog 3"]
    assert citations(by_place(one).answer)[:2] == [3, 2]


def test_statements_and_words_of_an_answer():
    said = "Mira owns it [2][1], and Leo \\[3] saw it. Nobody [12]."
    assert citations(said) == [2, 1, 12]
    assert statements("Mira owns it [2][1]. It is red") == [("Mira owns it", (2, 1)), ("It is red", ())]
    assert without_citations(said) == "Mira owns it, and Leo \\[3] saw it. Nobody."


@pytest.mark.parametrize(
    ("said", "found"),
    [
        ("It cost 3.5 coins [1]", [("It cost 3.5 coins", (1,))]),
        ("Mira owns it. [2] It is red.", [("Mira owns it", (2,)), ("It is red", ())]),
        ("Mira owns it.[2]\nLeo too [1].", [("Mira owns it", (2,)), ("Leo too", (1,))]),
        ("- Mira [1]\n- Leo [2]", [("- Mira", (1,)), ("- Leo", (2,))]),
        ("see \\[3] and {a} [b] [1]", [("see \\[3] and {a} [b]", (1,))]),
        ("[2]", [("", (2,))]),
        ("", []),
    ],
)
def test_statements_end_where_sentences_do(said, found):
    assert statements(said) == found


def test_a_number_of_any_length_is_one_that_is_not_there():
    said = f"ada [{'9' * 5000}] [1]"
    assert len(citations(said)) == 2 and citations(said)[1] == 1 and citations(said)[0] > 10**17
    answer = RegionContext((9, 9)).add((0, 0, 9, 9), "dog", "x").ask(lambda prompt: said, "who?")
    assert len(answer.unknown) == 1 and len(answer.cited) == 1
    assert reorder(sample(), [1, 0, 2]).answer == "dog 3 [2] and dog 2 [3], not [9]"


def test_boxes_are_left_out_of_entries_alone():
    entry = Entry("dog", (0, 0, 9, 9), "it is located at home")
    asked = "what is located at <|box_start|>(1,2),(3,4)<|box_end|> ?"
    bare = without_boxes(build_prompt([entry, entry], asked))
    assert bare.endswith(asked) and bare.count("<|box_start|>") == 1 and bare.count("located at home") == 2


def test_a_question_about_the_picture_alone_is_a_message_too():
    one = Sample("a.jpg", (), "What is there?", "a dog")
    assert to_messages(one)[0]["content"][1]["text"] == "What is there?"
    assert to_sharegpt([one])[0]["conversations"][0]["value"] == "<image>\nWhat is there?"


def test_formats_hold_the_prompt():
    one = Sample("a.jpg", ENTRIES, "Describe the image.", "Lily [1] sits with Bella [2].")
    (exported,) = to_sharegpt([one])
    asked = exported["conversations"][0]["value"]
    assert exported["images"] == ["a.jpg"] and asked.startswith("<image>\n[1]:") and CITE in asked
    assert parse_prompt(asked).entries == ENTRIES
    image, text = to_messages(one)[0]["content"]
    assert image == {"type": "image", "image": "a.jpg"} and parse_prompt(text["text"]).entries == ENTRIES


def test_any_chat_back_end_is_asked_and_unknown_citations_are_named():
    context = RegionContext((1000, 500)).add((755, 208, 991, 442), "man", LILY).add((0, 0, 10, 10), "dog", BELLA)
    seen = []

    def chat(prompt: str) -> str:
        seen.append(prompt)
        return "Bella [2], and a cat [7]."

    answer = context.ask(chat, "Who is there?")
    assert parse_prompt(seen[0]).entries == tuple(context.entries)
    assert [entry.category for entry in answer.cited] == ["dog"] and answer.unknown == (7,)
    assert CITE not in context.prompt("Who?", cite=False)
