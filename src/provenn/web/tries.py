"""Try it: forms that ask for a demo, and pages that show how far it is and what came of it."""

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Annotated, Any

from fastapi import APIRouter, Depends, HTTPException, Request, Response
from fastapi.responses import JSONResponse, RedirectResponse, StreamingResponse
from pydantic import BaseModel
from starlette.datastructures import FormData, UploadFile

from provenn.web import uploads
from provenn.web.demos import Demo, Demos, Full, Job, State, TooOften
from provenn.web.offers import LONGEST_PROMPT, MOST_CLASSES, Offer, offers_of
from provenn.web.pages import found
from provenn.web.rendering import page
from provenn.web.site import site_of
from provenn.web.visitors import check_origin, client_of

router = APIRouter(default_response_class=Response)
LOOK = 0.15  # seconds between two looks at a demo whose text is streamed
PRIVATE = {"Cache-Control": "private, no-store", "X-Robots-Tag": "noindex"}


class Progress(BaseModel):
    """How far a demo is.

    Args:
        state: waiting, running, done or failed.
        place: in the queue, 1 for the next; 0 once its turn has come.
        words: why it failed, in one line.
        text: what a language model wrote so far.
        result: what came of it, once it is done.
        files: pictures of the result, by address.
    """

    state: State
    place: int
    words: str
    text: str
    result: dict[str, Any]
    files: list[str]


def demos_of(request: Request) -> Demos:
    """The demos of this catalogue, or 404 where they are switched off."""
    demos: Demos | None = request.app.state.demos
    if demos is None:
        raise HTTPException(404, "Papers cannot be tried here: demos are switched off.")
    return demos


async def posted(request: Request) -> FormData:
    """A demo's form, read as far as its limits go. It needs no cookie, so it carries no token of one."""
    demos_of(request)
    check_origin(request)
    try:
        return await uploads.read_form(request, site_of(request).settings.upload_megabytes * 2**20)
    except uploads.Refused as refused:
        raise HTTPException(refused.status, _sentence(refused.words)) from None


@router.post("/papers/{name}/try", include_in_schema=False)
def ask(request: Request, name: str, form: Annotated[FormData, Depends(posted)]) -> Response:
    """Put a demo in the queue, and lead to its page."""
    entry, demos = found(request, name), demos_of(request)
    offers = offers_of(entry.card)
    offer = next((offer for offer in offers if offer.preset == form.get("preset", offer.preset)), None)
    if offer is None:
        there = ", ".join(offer.preset for offer in offers) or "nothing"
        raise HTTPException(422, f"{entry.card.title} has no such weights to try; there is: {there}.")
    try:
        demo = demos.ask(_job(offer, form), client_of(request))
    except uploads.Refused as refused:
        raise HTTPException(refused.status, _sentence(refused.words)) from None
    except Full as full:
        status = 429 if isinstance(full, TooOften) else 503
        raise HTTPException(status, _sentence(str(full)), {"Retry-After": "30"}) from None
    return RedirectResponse(f"/tries/{demo.token}", 303, PRIVATE)


@router.get("/tries/{token}", include_in_schema=False)
def show(request: Request, token: str) -> Response:
    """How far a demo is, or what came of it; without a script the page asks again by itself."""
    demo, demos = _demo(request, token), demos_of(request)
    entry = found(request, demo.job.paper)
    offer = next(offer for offer in offers_of(entry.card) if offer.preset == demo.job.preset)
    place = demos.place(demo)
    answer = page(request, "tried.html", entry=entry, offer=offer, demo=demo, place=place, result=demo.result)
    del answer.headers["ETag"]
    answer.headers.update(PRIVATE)
    return answer


@router.get("/api/tries/{token}", response_model=Progress, responses={404: {"description": "No such demo is kept."}})
def progress(request: Request, token: str) -> Response:
    """How far a demo is and what came of it."""
    return JSONResponse(_progress(request, _demo(request, token)).model_dump(mode="json"), headers=PRIVATE)


@router.get("/tries/{token}/events", include_in_schema=False)
def events(request: Request, token: str) -> Response:
    """The same as server-sent events, each time that something changed: `place`, `text` (what is new) and `end`."""
    events = _events(demos_of(request), _demo(request, token))
    headers = PRIVATE | {"X-Accel-Buffering": "no"}
    return StreamingResponse(events, headers=headers, media_type="text/event-stream")


async def _events(demos: Demos, demo: Demo) -> AsyncIterator[str]:
    place, length, over = -1, 0, False
    while not over:
        over = demo.over  # before the text is looked at, which is then the whole
        now, text = demos.place(demo), demo.text
        if now != place:
            place = now
            yield _event("place", place)
        if len(text) > length:
            yield _event("text", text[length:])
            length = len(text)
        if not over:
            await asyncio.sleep(LOOK)
    yield _event("end", str(demo.state))


def _event(name: str, value: Any) -> str:
    return f"event: {name}\ndata: {json.dumps(value)}\n\n"


@router.get("/tries/{token}/{name}", include_in_schema=False)
def picture(request: Request, token: str, name: str) -> Response:
    """A picture of a result."""
    file = _demo(request, token).file(name)
    try:
        content = file.read_bytes() if file is not None else b""
    except FileNotFoundError:  # what is kept for a while goes between two lines, too
        content = b""
    if not content:
        raise HTTPException(404, "There is no such picture.")
    return Response(content, media_type="image/png", headers=PRIVATE)


def _demo(request: Request, token: str) -> Demo:
    demo = demos_of(request).find(token)
    if demo is None:
        raise HTTPException(404, "This demo is no longer kept: try it again on the paper’s page.")
    return demo


def _progress(request: Request, demo: Demo) -> Progress:
    files = [f"/tries/{demo.token}/{file.name}" for file in demo.files()]
    place = demos_of(request).place(demo)
    return Progress(state=demo.state, place=place, words=demo.words, text=demo.text, result=demo.result, files=files)


def _sentence(words: str) -> str:
    return f"{words[:1].upper()}{words[1:].removesuffix('.')}."


def _job(offer: Offer, form: FormData) -> Job:
    """What a form asks for.

    Raises:
        Refused: the file is not what the weights take, or a value is out of its bounds.
    """
    takes = offer.demo.takes
    options: dict[str, Any] = {
        number.name: _number(form, number.name, number.default, number.least, number.most)
        for number in offer.demo.options
    }
    if takes == "classes":
        classes = [str(name) for name in form.getlist("class")][:MOST_CLASSES] or offer.classes
        unknown = next((name for name in classes if name not in offer.meta["classes"]), None)
        if unknown is not None:
            raise uploads.Refused(422, f"no class is called {unknown[:40]!r}; there are: {', '.join(offer.classes)}")
        return Job(offer.paper, offer.preset, {**options, "classes": classes})
    if offer.demo.question:
        options["question"] = _question(form, offer)
    given = form.get("file")
    content = given.file.read() if isinstance(given, UploadFile) else b""
    if isinstance(given, UploadFile):
        given.file.close()
    if takes == "words":
        words = _text(form, "words").replace("\r\n", "\n")
        sample = None if words.strip() else offer.sample(_text(form, "sample"))
        if sample is not None:
            words = sample.text
        if not words.strip():
            raise uploads.Refused(422, "there are no words to go on from: type some, or pick a sample")
        if len(words) > LONGEST_PROMPT:
            raise uploads.Refused(413, f"the text has {len(words):,} characters: at most {LONGEST_PROMPT:,} are read")
        return Job(offer.paper, offer.preset, options, words.encode(errors="replace"), uploads.TEXT)
    if isinstance(given, UploadFile) and (given.filename or content):
        if not content:
            raise uploads.Refused(422, "the file is empty: choose another")
        return Job(offer.paper, offer.preset, options, content, uploads.UPLOADS[takes].suffix(content))
    sample = offer.sample(_text(form, "sample"))
    if sample is None:
        raise uploads.Refused(422, f"nothing was given: choose {offer.demo.asks}, or pick a sample")
    return Job(offer.paper, offer.preset, options, *offer.content(sample))


def _question(form: FormData, offer: Offer) -> str:
    """What was typed beside a file, or belongs to the sample that was picked."""
    given, sample = form.get("file"), offer.sample(_text(form, "sample"))
    question = " ".join(_text(form, "question").split())
    picked = sample is not None and not (isinstance(given, UploadFile) and given.filename)
    question = question or (sample.question if picked and sample is not None else "")
    if not question:
        raise uploads.Refused(422, f"there is no question: type {offer.demo.question}")
    if len(question) > LONGEST_PROMPT:
        raise uploads.Refused(
            413, f"the question has {len(question):,} characters: at most {LONGEST_PROMPT:,} are read"
        )
    return question


def _text(form: FormData, name: str) -> str:
    value = form.get(name, "")
    return value if isinstance(value, str) else ""


def _number(form: FormData, name: str, usual: int, least: int, most: int) -> int:
    text = _text(form, name).strip() or str(usual)
    if not text.isascii() or not text.isdecimal() or len(text) > 9 or not least <= int(text) <= most:
        raise uploads.Refused(422, f"{name} must be a whole number from {least} to {most:,}, got {text[:40]!r}")
    return int(text)
