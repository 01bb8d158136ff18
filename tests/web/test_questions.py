"""A form with a line for a question beside its file: what is typed, what belongs to a sample, and what is refused."""

import io

import pytest
from PIL import Image
from starlette.datastructures import FormData, UploadFile

from provenn.tasks import face_of
from provenn.tasks.faces import Demo, Sample
from provenn.web import tries, uploads
from provenn.web.offers import LONGEST_PROMPT, Offer


def picture():
    content = io.BytesIO()
    Image.new("RGB", (8, 8)).save(content, "PNG")
    return content.getvalue()


PNG = picture()
DEMO = Demo(
    takes="picture", asks="a picture", question="a question about it", does="Ask", answer="demos:write",
    samples={"digits": (Sample(name="digit-1.png", about="a one", question="which digit is it ?"),)},
)  # fmt: skip
OFFER = Offer("paper", "preset", DEMO, "", {}, DEMO.samples["digits"])


def job(**fields):
    file = fields.pop("file", None)
    given = {"file": UploadFile(io.BytesIO(file), filename="a.png")} if file else {}
    return tries._job(OFFER, FormData({**fields, **given}))


def test_the_question_is_typed_or_belongs_to_the_sample_that_was_picked():
    assert job(file=PNG, question="  what\n is it ? ").options == {"question": "what is it ?"}
    assert job(sample="digit-1.png").options == {"question": "which digit is it ?"}
    assert job(sample="digit-1.png", question="why ?").options == {"question": "why ?"}
    # A sample stays marked while a file is chosen: its question is not of the file.
    for fields in ({"file": PNG, "sample": "digit-1.png"}, {"file": PNG}, {"question": " "}):
        with pytest.raises(uploads.Refused, match="there is no question: type a question about it"):
            job(**fields)
    with pytest.raises(uploads.Refused, match="the question has 2,001 characters: at most 2,000"):
        job(file=PNG, question="a" * (LONGEST_PROMPT + 1))


@pytest.mark.parametrize("task", ["visual-question-answering", "multimodal-chat"])
def test_tasks_that_are_asked_have_a_line_for_the_question(task):
    demo = face_of(task).demo
    assert demo is not None and demo.takes == "picture" and demo.question
    assert callable(face_of(task).resolve(demo.answer))
