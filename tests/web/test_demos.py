"""Papers are tried: every kind of work by a file and by a sample; a demo that goes wrong costs one answer."""

import asyncio
import io
import json
import os
import re
import resource
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from fastapi.testclient import TestClient
from PIL import Image

from provenn import catalog
from provenn.web import Settings, create_app, demos, tries, uploads
from provenn.web.demos import Demos, Full, Job, State, TooOften
from provenn.web.limits import MINUTE, Rate
from provenn.web.offers import offers_of

ENOUGH = 120.0  # seconds for a demo on a busy machine

# A worker that does what its job's options say, without torch.
OBEDIENT = """
import json, os, sys, time
os.chdir(sys.argv[1])
def send(answer): print(json.dumps(answer), flush=True)
send({"ready": True})
for line in sys.stdin:
    job = json.loads(line)
    do = job["options"]
    if do.get("read"): send({"done": {"read": open(job["file"]).read(), "name": job["file"], "there": os.listdir()}})
    elif do.get("secrets"): send({"done": {"names": sorted(os.environ)}})
    elif do.get("eat"):
        eaten = bytearray(do["eat"] * 2**20)
        eaten[::4096] = b"x" * len(eaten[::4096])
        time.sleep(60)
    elif do.get("exit"): os._exit(do["exit"])
    elif do.get("say"): print(do["say"], flush=True)
    elif do.get("link"):
        os.symlink(do["link"], "after.png"); open("before.png", "w").close()
        send({"done": {}})
    else:
        send({"piece": "begun"})
        while not os.path.exists(do.get("until", "never")): time.sleep(0.01)
        send({"done": {"pid": os.getpid()}})
"""


@pytest.fixture(scope="module")
def client(tmp_path_factory) -> Iterator[TestClient]:
    """A catalogue with one worker, which all tests that look at what models predict share."""
    home = tmp_path_factory.mktemp("home")
    app = create_app(Settings(home=home, secret="of the tests", demo_workers=1, demo_seconds=ENOUGH))
    app.state.demos.rate = Rate(1000, MINUTE)
    with TestClient(app) as client:
        yield client
    home = app.state.demos.home
    assert home is None or not home.exists()


@pytest.fixture
def pool(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Demos]:
    """Demos by one obedient worker."""
    worker = tmp_path / "obedient.py"
    worker.write_text(OBEDIENT)
    monkeypatch.setattr(demos, "WORKER", worker)
    pool = Demos(Settings(home=tmp_path, demo_workers=1, demo_seconds=30))
    yield pool
    pool.close()


def post(client: TestClient, paper: str, content: bytes | None = None, name: str = "a", **fields: str | list[str]):
    """Send a paper's form as a browser does."""
    pairs = ((k, v) for k, given in fields.items() for v in ([given] if isinstance(given, str) else given))
    form: list = [(name_of_field, (None, value)) for name_of_field, value in pairs]
    if content is not None:
        form.append(("file", (name, content, "application/octet-stream")))
    return client.post(f"/papers/{paper}/try", files=form or [("x", (None, ""))], follow_redirects=False)


def answer(client: TestClient, paper: str, content: bytes | None = None, **fields) -> tuple[dict, str, str]:
    """What came of a demo: as JSON, as a page, and where."""
    posted = post(client, paper, content, **fields)
    assert posted.status_code == 303, posted.text
    at = posted.headers["location"]
    pool = client.app.state.demos
    demo = pool.find(at.rpartition("/")[2])
    assert pool.wait(demo, ENOUGH)
    page = client.get(at)
    assert page.status_code == 200 and "no-store" in page.headers["cache-control"]
    return client.get(f"/api{at}").json(), page.text, at


def picture(width: int, height: int, form: str = "PNG", mode: str = "RGB") -> bytes:
    pixels = np.random.default_rng(0).integers(0, 255, (height, width, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(file, form)
    return file.getvalue()


def header(width: int, height: int) -> bytes:
    """The beginning of a PNG that says to be so large."""
    content = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + content + struct.pack(">I", zlib.crc32(content))


def sized(client: TestClient, at: str) -> tuple[int, int]:
    return Image.open(io.BytesIO(client.get(at).content)).size


def test_every_paper_with_weights_can_be_tried(client):
    for card in catalog.cards().values():
        assert [offer.preset for offer in offers_of(card)] == list(card.shipped)
        for offer in offers_of(card):
            assert offer.samples or offer.demo.takes == "classes"
            assert all(offer.content(sample)[0] for sample in offer.samples)


def test_without_demos_there_is_no_form_and_nothing_to_ask(tmp_path):
    with TestClient(create_app(Settings(home=tmp_path, secret="s", demos=False))) as client:
        assert "data-try" not in client.get("/papers/craft").text
        assert post(client, "craft", sample="cat.png").status_code == 404
        assert client.get("/api/tries/x").status_code == 404


def test_a_picture_is_enlarged_whatever_its_file_is_called(client):
    outcome, page, _ = answer(client, "craft", picture(11, 7), name="../../../etc/passwd.png", preset="craft_small")
    assert (outcome["state"], outcome["result"]["size"]) == ("done", [22, 14])
    assert {sized(client, file) for file in outcome["files"]} == {(22, 14)}
    assert "data-compare" in page and "passwd" not in page
    pool = client.app.state.demos
    assert not any("passwd" in str(file) for file in pool.home.rglob("*"))


@pytest.mark.parametrize("form, mode", [("JPEG", "RGB"), ("WEBP", "RGBA"), ("BMP", "L"), ("PNG", "P"), ("PNG", "LA")])
def test_pictures_of_every_type_are_enlarged(client, form, mode):
    outcome, _, _ = answer(client, "craft", picture(8, 6, form, mode))
    assert (outcome["words"], outcome["result"]["size"]) == ("", [16, 12])


@pytest.mark.parametrize("paper", ["moh", "shvit"])
def test_a_sample_is_classified(client, paper):
    outcome, page, _ = answer(client, paper, sample="digit-4.png")
    shares = outcome["result"]["shares"]
    assert shares[0][0] == "4" and sum(share for _, share in shares) == pytest.approx(1, abs=1e-4)
    assert page.count('class="share-bar"') == 10
    assert ("inside" in outcome["result"]) == catalog.card(paper).has("inspection")


def test_what_is_unlike_all_that_was_learned_from_is_said_to_be(client):
    outcome, page, _ = answer(client, "shvit", white())
    assert "brighter" in outcome["result"]["notes"][0] and "brighter" in page


def white() -> bytes:
    file = io.BytesIO()
    Image.new("L", (8, 8), 255).save(file, "PNG")
    return file.getvalue()


def test_what_is_in_a_picture_is_found_and_drawn(client):
    outcome, page, at = answer(client, "relationnet_pp", sample="scene-1.png")
    found = {box["class"] for box in outcome["result"]["boxes"]}
    assert found == {"coin", "digit", "face"} and page.count('class="case"') == len(outcome["result"]["boxes"])
    assert f'href="{at}/shown.png"' in page


def test_a_question_about_a_picture_is_answered_the_samples_own_where_none_is_typed(client):
    asked, page, at = answer(client, "falcon", sample="composed-1.png")
    assert asked["result"]["text"].startswith("what is behind ?\n") and len(asked["result"]["text"]) > 18
    assert "what is behind ?" in page and sized(client, f"{at}/shown.png") == (64, 64)
    typed, _, _ = answer(client, "falcon", picture(80, 60), question="how many objects are there ?")
    assert typed["result"]["text"].startswith("how many objects are there ?\n")
    refused = post(client, "falcon", picture(80, 60), question=" ")
    assert refused.status_code == 422 and "There is no question" in refused.text


def test_a_picture_is_divided(client):
    outcome, _, at = answer(client, "bevanet", picture(64, 40, "JPEG"))
    assert sum(share for _, share, _ in outcome["result"]["shares"]) == pytest.approx(1)
    assert sized(client, f"{at}/overlay.png") == sized(client, f"{at}/shown.png") == (64, 40)


def test_text_is_gone_on_with_as_it_comes(client):
    posted = post(client, "rat", words="import os\n", tokens="40")
    at = posted.headers["location"]
    outcome = re.findall(r"event: (\w+)\ndata: (.*)\n\n", client.get(f"{at}/events").text)
    pieces = [json.loads(data) for name, data in outcome if name == "text"]
    result = client.get(f"/api{at}").json()["result"]
    assert pieces and "".join(pieces) == result["text"] and outcome[-1] == ("end", '"done"')
    assert result["text"].startswith("import os\n") and len(result["text"]) > 20
    assert client.get(at).text.count("import os") == 1


class Written:
    """A demo that has one word more each time that somebody looks."""

    def __init__(self, *words: str):
        self.text, self.words, self.state = "", list(words), "done"

    @property
    def over(self) -> bool:
        self.text += self.words.pop(0) if self.words else ""
        return not self.words


def test_what_is_new_is_told_each_time(monkeypatch):
    monkeypatch.setattr(tries, "LOOK", 0)

    async def listen() -> list[str]:
        queue = SimpleNamespace(place=lambda demo: 0)
        return [event async for event in tries._events(queue, Written("def ", "f", "(x)"))]

    outcome = [re.match(r"event: (\w+)\ndata: (.*)\n\n", event).groups() for event in asyncio.run(listen())]
    assert [json.loads(data) for name, data in outcome if name == "text"] == ["def ", "f", "(x)"]
    assert outcome[-1][0] == "end"


def test_words_that_name_a_file_are_words(client):
    outcome, _, _ = answer(client, "titans", words="/etc/hostname", tokens="2")
    assert outcome["result"]["text"].startswith("/etc/hostname")


def test_a_forecast_is_drawn(client):
    rows = "\n".join(f"{2 * k % 7}" for k in range(30))
    outcome, page, _ = answer(client, "aaren", f"sold <b>\n{rows}\n".encode(), name="s.csv")
    assert len(outcome["result"]["columns"][0]["ahead"]) == 12
    assert page.count("<polyline") == 2 and "sold <b>" not in page and "sold &lt;b&gt;" in page
    short, page, _ = answer(client, "aaren", b"sold\n1\n2\n")
    assert short["state"] == "failed" and "Your file has 2 rows" in page
    large, page, _ = answer(client, "aaren", b"sold\n" + 50 * b"1e308\n-1e308\n")
    assert large["words"].startswith("your file: what the model is given holds values that are no finite numbers")


def test_a_sound_is_classified(client):
    outcome, page, _ = answer(client, "gaam", sample="heed.wav")
    shares = outcome["result"]["shares"]
    assert shares[0][0] == "heed" and sum(share for _, share in shares) == pytest.approx(1, abs=1e-4)
    assert page.count('class="share-bar"') == 10 and "shown.png" not in page and "inside" in outcome["result"]
    cut = b"RIFF\x24\0\0\0WAVEfmt "
    failed, page, _ = answer(client, "gaam", cut, name="a.wav")
    assert failed["state"] == "failed" and "cannot be read as a WAV file" in page


def test_numbers_are_told_of_graphs(client):
    lines = '{"name": "a <b>", "nodes": ["node", "node"], "edges": [[0, 1]]}\n{"nodes": ["node"], "edges": []}\n'
    outcome, page, _ = answer(client, "urpe", lines.encode(), name="graphs.csv", preset="urpe_graph_tiny")
    assert [row[:3] for row in outcome["result"]["rows"]] == [["a <b>", 2, 1], ["graph 2", 1, 0]]
    assert "mean path" in page and "a <b>" not in page and "a &lt;b&gt;" in page
    refused, page, _ = answer(client, "urpe", b'{"nodes": ["gold"], "edges": []}', preset="urpe_graph_tiny")
    assert refused["state"] == "failed" and "knows no nodes called" in page


def test_what_is_named_is_drawn(client):
    outcome, _, at = answer(client, "emov2", preset="emov2_diffusion_digits", **{"class": ["3", "7"]}, seed="5")
    assert outcome["result"]["classes"] == ["3", "7"] and sized(client, f"{at}/drawing.png") == (128, 64)
    refused = post(client, "emov2", preset="emov2_diffusion_digits", **{"class": "x"})
    assert refused.status_code == 422 and "there are: 0, 1" in refused.text


def test_damaged_pictures_fail_in_one_line_and_the_worker_goes_on(client):
    before = client.app.state.demos.keepers[0].worker.pid if client.app.state.demos.keepers else None
    for content in (picture(30, 20)[:200], header(5, 5), picture(30, 20, "JPEG")[:600], picture(30, 20, "WEBP")[:60]):
        outcome, page, _ = answer(client, "craft", content)
        assert outcome["state"] == "failed" and 'role="alert"' in page and "Traceback" not in outcome["words"]
        assert str(client.app.state.demos.home) not in outcome["words"] and "\n" not in outcome["words"]
    assert before in (None, client.app.state.demos.keepers[0].worker.pid)


@pytest.mark.parametrize(
    "paper, content, status, words",
    [
        ("craft", header(30_000, 30_000), 413, "pixels"),
        ("craft", header(2001, 2000), 413, "at most 4 million"),
        ("craft", header(1, 50), 415, "or more a side"),
        ("craft", b"\xff\xd8\xff\xe0\0\x04ab\xff\xc2\0\x11\x08\x23\x28\x23\x28\3\1\x22\0", 413, "9,000"),
        ("craft", b"RIFF\0\0\0\0WEBPVP8X\n\0\0\0\0\0\0\0\xff\x3f\0\xff\x3f\0", 413, "16,384"),
        ("craft", b"BM" + b"\0" * 16 + struct.pack("<ii", 70_000, -70_000) + b"\0" * 9, 413, "70,000"),
        ("craft", b"\x89PNG\r\n\x1a\n", 415, "damaged"),
        ("craft", b"GIF89a\1\0\1\0", 415, "no picture that can be read"),
        ("craft", b"<svg xmlns='http://www.w3.org/2000/svg'/>", 415, "no picture that can be read"),
        ("craft", b"Passengers\n1\n2\n", 415, "no picture"),
        ("craft", b"", 422, "empty"),
        ("craft", None, 422, "nothing was given"),
        ("aaren", picture(9, 9), 415, "no table"),
        ("aaren", b"a\n" + b"1\n" * 20_000, 413, "rows"),
        ("aaren", b"," * 100, 413, "columns"),
        ("gaam", b"RIFF\0\0\0\0WEBPVP8X", 415, "no sound that can be read"),
        ("rat", None, 422, "no words"),
    ],
)  # fmt: skip
def test_what_a_paper_does_not_take_is_refused_before_anything_decodes_it(client, paper, content, status, words):
    asked = len(client.app.state.demos.demos)
    refused = post(client, paper, content, name="x.png")
    assert refused.status_code == status and words.lower() in refused.text.lower()
    assert len(client.app.state.demos.demos) == asked


def test_forms_with_odd_values_are_refused(client):
    for fields in ({"tokens": "100000"}, {"tokens": "-1"}, {"tokens": "٣"}, {"seed": "x"}, {"preset": "none"}):
        assert post(client, "rat", words="a", **fields).status_code == 422
    assert post(client, "rat", words="a" * 3000).status_code == 413
    assert post(client, "rat", sample="../../app.py").status_code == 422
    assert post(client, "x" * 50, sample="main").status_code == 404
    assert client.post("/papers/rat/try", data={"words": "a"}).status_code == 415
    headers = {"content-type": "multipart/form-data"}
    assert client.post("/papers/rat/try", content=b"--", headers=headers).status_code == 400
    foreign = {"sec-fetch-site": "cross-site"}
    assert client.post("/papers/rat/try", files=[("words", (None, "a"))], headers=foreign).status_code == 403


def test_a_file_that_is_too_large_is_not_read_to_its_end(client):
    sent = []

    def endless():
        yield b'--b\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\n'
        for _ in range(100):
            sent.append(1)
            yield b"x" * 2**20

    headers = {"content-type": "multipart/form-data; boundary=b"}
    assert client.post("/papers/craft/try", content=endless(), headers=headers).status_code == 413
    large = post(client, "craft", b"x" * (11 * 2**20))
    assert large.status_code == 413 and "10 MB" in large.text


def test_results_are_nobody_elses(client):
    at = answer(client, "craft", picture(4, 4))[2]
    for path in (
        at[:-1],
        f"{at}/input.png",
        f"{at}/..%2f..%2fafter.png",
        "/tries/x",
        "/api/tries/x",
        "/tries/x/events",
    ):
        assert client.get(path).status_code == 404
    assert len(at.rpartition("/")[2]) >= 32


def test_a_killed_worker_costs_one_answer_and_is_replaced(pool, tmp_path):
    first = pool.ask(Job("p", "q", {"until": str(tmp_path / "never")}), "a")
    wait_until(lambda: first.text == "begun")
    lost = pool.keepers[0].worker.pid
    second = pool.ask(Job("p", "q", {"until": str(tmp_path)}), "a")
    os.kill(lost, signal.SIGKILL)
    assert pool.wait(first, ENOUGH) and first.state is State.FAILED and "was lost" in first.words
    assert pool.wait(second, ENOUGH) and second.state is State.DONE and second.result["pid"] != lost


def test_a_demo_that_takes_too_long_is_ended(pool, tmp_path):
    pool.settings = pool.settings.model_copy(update={"demo_seconds": 0.3})
    demo = pool.ask(Job("p", "q", {"until": str(tmp_path / "never")}), "a")
    assert pool.wait(demo, ENOUGH) and "longer than 0.3 seconds" in demo.words
    assert pool.keepers[0].worker is None


@pytest.mark.parametrize("job", [{"eat": 300}, {"exit": demos.SPENT}])
def test_a_demo_that_takes_too_much_memory_is_ended(pool, job):
    pool.settings = pool.settings.model_copy(update={"demo_megabytes": 120})
    demo = pool.ask(Job("p", "q", job), "a")
    assert pool.wait(demo, ENOUGH) and demo.words == "the demo needed more than its 120 MB of memory: give it less"


@pytest.mark.parametrize("said", ["no JSON", "[1]", "3", "[" * 100_000])
def test_a_worker_that_says_nonsense_is_ended(pool, said):
    demo = pool.ask(Job("p", "q", {"say": said}), "a")
    assert pool.wait(demo, ENOUGH) and demo.state is State.FAILED


def test_the_place_in_the_queue_is_told_and_the_queue_is_bounded(pool, tmp_path):
    gate = tmp_path / "gate"
    running = pool.ask(Job("p", "q", {"until": str(gate)}), "first")
    wait_until(lambda: running.state is State.RUNNING)
    waiting = [pool.ask(Job("p", "q", {"until": str(gate)}), f"{k}") for k in range(demos.WAITING)]
    assert [pool.place(demo) for demo in waiting] == list(range(1, demos.WAITING + 1)) and pool.place(running) == 0
    with pytest.raises(Full, match="wait already"):
        pool.ask(Job("p", "q", {}), "last")
    gate.touch()
    assert all(pool.wait(demo, ENOUGH) and demo.state is State.DONE for demo in waiting)
    assert [demo.ended for demo in waiting] == sorted(demo.ended for demo in waiting)


def test_one_reader_does_not_take_all(pool, tmp_path):
    pool.rate = Rate(demos.EACH + 1, MINUTE)
    gate = tmp_path / "gate"
    running = pool.ask(Job("p", "q", {"until": str(gate)}), "a")
    wait_until(lambda: running.state is State.RUNNING)
    for _ in range(demos.EACH):
        pool.ask(Job("p", "q", {"until": str(gate)}), "a")
    with pytest.raises(TooOften):
        pool.ask(Job("p", "q", {}), "a")
    pool.ask(Job("p", "q", {"until": str(gate)}), "b")
    gate.touch()
    wait_until(lambda: not pool.queue)
    with pytest.raises(TooOften, match="a minute"):
        pool.ask(Job("p", "q", {}), "a")


def test_pages_say_that_the_queue_is_full_and_where_one_is_in_it(tmp_path, pool):
    app = create_app(Settings(home=tmp_path, secret="s", demo_workers=1))
    app.state.demos = pool
    client = TestClient(app)
    ats = [post(client, "rat", words="a").headers["location"] for _ in range(2)]
    page = client.get(ats[1])
    assert 'http-equiv="refresh"' in page.text and "Place " in page.text
    for _ in range(demos.EACH):
        last = post(client, "rat", words="a")
    assert last.status_code == 429 and "Retry-After" in last.headers
    pool.queue.extend([pool.queue[-1]] * demos.WAITING)
    full = post(client, "rat", words="a")
    assert full.status_code == 503 and "wait already" in full.text
    pool.queue.clear()


def test_a_picture_that_has_just_gone_is_not_found(tmp_path, pool, monkeypatch):
    app = create_app(Settings(home=tmp_path, secret="s"))
    app.state.demos = pool
    demo = pool.ask(Job("eca_net", "q", {"read": True}, b"words", ".txt"), "a")
    assert pool.wait(demo, ENOUGH)
    monkeypatch.setattr(demos.Demo, "file", lambda self, name: tmp_path / name)
    assert TestClient(app).get(f"/tries/{demo.token}/before.png").status_code == 404
    app.state.site.database.close()


def test_demos_run_beside_more_than_a_thousand_connections(pool):
    """`select` refuses a descriptor above 1023."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    if before[1] != resource.RLIM_INFINITY and before[1] < 2000:
        pytest.skip("a process may open fewer files here")
    resource.setrlimit(resource.RLIMIT_NOFILE, (2000, before[1]))
    held = []
    try:
        while not held or held[-1] < 1023:
            held.append(os.open(os.devnull, os.O_RDONLY))
        demo = pool.ask(Job("p", "q", {"read": True}, b"words", ".txt"), "a")
        assert pool.wait(demo, ENOUGH) and demo.state is State.DONE, demo.words
    finally:
        for number in held:
            os.close(number)
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


def test_what_comes_of_a_demo_vanishes(pool, monkeypatch):
    demo = pool.ask(Job("p", "q", {"read": True}, b"words", ".txt"), "a")
    assert pool.wait(demo, ENOUGH) and demo.result == {"read": "words", "name": "input.txt", "there": ["input.txt"]}
    assert pool.find(demo.token) is demo and demo.job.content is None and demo.folder.is_dir()
    other = pool.ask(Job("p", "q", {"read": True}, b"1", ".csv"), "b")
    assert pool.wait(other, ENOUGH) and other.result["there"] == ["input.csv"], "what somebody else gave is still there"
    monkeypatch.setattr(demos, "KEPT", -1.0)
    assert pool.find(demo.token) is None and not demo.folder.exists()


def test_a_worker_knows_no_secrets_and_can_lead_nobody_elsewhere(pool, tmp_path, monkeypatch):
    for name in ("DATABASE_URL", "PROVENN_SECRET", "PROVENN_SMTP"):
        monkeypatch.setenv(name, "secret")
    (tmp_path / "secret").write_text("secret")
    demo = pool.ask(Job("p", "q", {"secrets": True}), "a")
    assert pool.wait(demo, ENOUGH) and not any("PROVENN" in name or "DATABASE" in name for name in demo.result["names"])
    demo = pool.ask(Job("p", "q", {"link": str(tmp_path / "secret")}), "a")
    assert pool.wait(demo, ENOUGH) and [file.name for file in demo.files()] == ["before.png"]


CONFINED = """
import os, runpy, sys, ctypes, socket, subprocess
from pathlib import Path
from types import SimpleNamespace
own, other = Path(sys.argv[1]), Path(sys.argv[2])
worker = runpy.run_path(sys.argv[3])
os.chdir(own)
import brought, alone
places = worker["_readable"]([])
if sys.argv[4] == "kernel": worker["_confine"](places, own)
else: worker["_watch"](places, own)
Path("mine").write_text("a"); assert Path("mine").read_text() == "a"
import fractions, provenn.catalog, brought.later
assert brought.later.DATA == "b"
open(fractions.__file__).close()
def refused(act):
    try: act()
    except (PermissionError, OSError) as error: return True
    return False
print([name for name, act in {
    "read": lambda: (other / "secret").read_text(),
    "system": lambda: open("/etc/passwd").read(),
    "beside": lambda: Path(brought.__file__).parents[1].joinpath("secret").read_text(),
    "not imported": lambda: Path(brought.__file__).parents[1].joinpath("other", "__init__.py").read_text(),
    "sources": lambda: Path(provenn.__file__).parents[2].joinpath("pyproject.toml").read_text(),
    "parent": lambda: open(f"/proc/{os.getppid()}/environ").read(),
    "write": lambda: (other / "new").write_text("a"),
    "package": lambda: Path(provenn.catalog.__file__).with_name("new").write_text("a"),
    "list": lambda: os.listdir(other),
    "remove": lambda: os.remove(other / "secret"),
    "rename": lambda: os.rename("mine", other / "mine"),
    "run": lambda: subprocess.run(["/bin/cat", str(other / "secret")], check=True),
    "call": lambda: socket.create_connection(("127.0.0.1", int(sys.argv[5]))),
}.items() if not refused(act)])
"""


@pytest.mark.parametrize("by", ["hook", "kernel"])
def test_a_demo_reaches_nothing_outside_its_folder(tmp_path, by):
    """Python's audit hook alone, and Linux's Landlock alone where the kernel has it.

    On the path of imports lies a folder of sources too: what is imported from there is read, and nothing beside it.
    """
    if by == "kernel" and not has_landlock():
        pytest.skip("this kernel has no Landlock")
    own, other = tmp_path / "own", tmp_path / "other"
    own.mkdir()
    other.mkdir()
    (other / "secret").write_text("secret")
    sources = tmp_path / "sources"
    for name, text in {
        "brought/__init__": "",
        "brought/later": "from pathlib import Path\nDATA = Path(__file__).with_name('data').read_text()",
        "other/__init__": "",
        "alone": "",
    }.items():
        (sources / name).parent.mkdir(parents=True, exist_ok=True)
        (sources / f"{name}.py").write_text(text)
    (sources / "secret").write_text("secret")
    (sources / "brought" / "data").write_text("b")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(sources), os.environ.get("PYTHONPATH", "")])}
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        command = [sys.executable, "-B", "-c", CONFINED, own, other, demos.WORKER, by, port]
        done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=60, env=environment)
    assert done.stdout == "[]\n", done.stdout + done.stderr
    assert os.listdir(other) == ["secret"]


def has_landlock() -> bool:
    import ctypes

    return sys.platform == "linux" and ctypes.CDLL(None).syscall(444, None, ctypes.c_size_t(0), 1) >= 4


@pytest.mark.skipif(sys.platform != "linux", reason="limits of a process are looked at as Linux shows them")
def test_a_worker_that_runs_has_closed_its_doors(client):
    """Both of them, and its limits: all that is tested above is of no use where nobody calls it."""
    outcome, _, _ = answer(client, "titans", words="a", tokens="1")
    assert outcome["state"] == "done"
    pool = client.app.state.demos
    keeper = pool.keepers[0]
    limits, status = (Path(f"/proc/{keeper.worker.pid}/{name}").read_text() for name in ("limits", "status"))
    assert re.search(rf"Max data size\s+{pool.settings.demo_megabytes * 2**20}\b", limits)
    assert re.search(r"Max core file size\s+0\b", limits) and re.search(r"Max open files\s+256\b", limits)
    assert os.getpriority(os.PRIO_PROCESS, keeper.worker.pid) > min(18, os.getpriority(os.PRIO_PROCESS, 0))
    if has_landlock():
        assert "NoNewPrivs:\t1" in status
    keeper._send(
        {
            "paper": "titans",
            "preset": next(iter(catalog.card("titans").shipped)),
            "file": "/etc/passwd",
            "options": {"tokens": 1},
        }
    )
    refused = next(keeper._answers(time.monotonic() + ENOUGH, "late"))
    assert "a demo may not read /etc/passwd" in refused["failed"]


SERVER = """
import sys, time
from provenn.web.demos import Demos, Job
from provenn.web.settings import Settings
pool = Demos(Settings(demo_workers=2))
for k in range(2): pool.ask(Job("rat", "rat_small", {}, b"a", ".txt"), str(k))
while not all(keeper.worker for keeper in pool.keepers): time.sleep(0.01)
print(*(keeper.worker.pid for keeper in pool.keepers), pool.home, flush=True)
time.sleep(60)
"""


def test_a_server_that_is_killed_leaves_no_worker_behind(tmp_path, monkeypatch):
    """The real workers, while they are still importing; the next server removes the folder."""
    with subprocess.Popen([sys.executable, "-c", SERVER], stdout=subprocess.PIPE, text=True) as server:
        first, second, home = server.stdout.readline().split()
        server.kill()
    wait_until(lambda: not any(alive(int(pid)) for pid in (first, second)))
    assert Path(home).is_dir()
    pool = Demos(Settings(home=tmp_path))
    with pool.changed:
        assert pool._home().is_dir() and not Path(home).exists()
    other = Demos(Settings(home=tmp_path))
    with other.changed:
        assert other._home().is_dir() and pool._home().is_dir(), "a folder of a server that lives is left alone"
    for each in (pool, other):
        each.close()
        assert not each.home.exists()


def alive(pid: int) -> bool:
    """Whether a process runs; one that nobody has waited for yet does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def wait_until(condition, seconds: float = 30.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it never came"
        time.sleep(0.01)


def test_no_upload_is_kept_where_others_read_it(pool):
    pool.ask(Job("p", "q", {"read": True}, b"words", ".txt"), "a")
    assert pool.home.parent == Path(tempfile.gettempdir()) and pool.home.stat().st_mode & 0o077 == 0


def test_a_header_without_an_end_is_not_read_to_its_end():
    """A megabyte of it would take the server's one core for a while."""
    size = b"\xff\xc2\0\x11\x08\x23\x28\x23\x28\3\1\x22\0"
    for filling in (b"\xff", b"\xff\xe1\0\2"):
        assert uploads._picture(b"\xff\xd8\xff\xe0\0\2" + 100 * filling + size)[1] == (9000, 9000)
        assert uploads._picture(b"\xff\xd8\xff\xe0\0\2" + 100_000 * filling + size) == (".jpg", None)


def test_sizes_are_told_from_headers_as_pillow_tells_them():
    for form, mode in (("PNG", "RGB"), ("JPEG", "L"), ("BMP", "RGB"), ("WEBP", "RGB"), ("WEBP", "RGBA")):
        assert uploads._picture(picture(31, 17, form, mode))[1] == (31, 17)
    file = io.BytesIO()
    Image.new("RGB", (31, 17)).save(file, "WEBP", lossless=True)
    assert uploads._picture(file.getvalue())[1] == (31, 17)
    for cut in range(60):
        uploads._picture(picture(31, 17, "JPEG")[:cut]), uploads._picture(file.getvalue()[:cut])
