"""Checks of papers that passed are left out until something that they reach changes."""

import json
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from closure import Tree
from suite import FILE, read_entries, standing, summary, versions

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.timeout(300)

FILES = {
    "constraints.txt": "torch==2.13.0\n",
    "pytest.ini": "[pytest]\ntestpaths = tests\n",
    "src/provenn/__init__.py": """
from typing import TYPE_CHECKING
if TYPE_CHECKING:
    from provenn.inference import train
    from provenn.surgery import swap
def __getattr__(name):
    from provenn import inference, surgery
""",
    "src/provenn/inference.py": "def train(): ...\n",
    "src/provenn/surgery.py": "def swap(): ...\n",
    "src/provenn/nn/__init__.py": "",
    "src/provenn/nn/norms.py": "from provenn.ops.scan import fast\n",
    "src/provenn/nn/gates.py": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import provenn.nn.norms\n",
    "src/provenn/ops/__init__.py": "",
    "src/provenn/ops/scan/__init__.py": "from .fast import scan\n",
    "src/provenn/ops/scan/fast.py": "def scan(x, *, y=(1, 2)):\n    return x\n",
    "src/provenn/tasks/__init__.py": "",
    "src/provenn/tasks/image_classification.py": "import provenn.data.images as images\n",
    "src/provenn/data/__init__.py": "",
    "src/provenn/data/images.py": 'FILE = "list.txt"\n',
    "src/provenn/data/list.txt": "a cat\n",
    "src/provenn/papers/__init__.py": "",
    "src/provenn/papers/one/__init__.py": "",
    "src/provenn/papers/one/paper.toml": """
task = "image-classification"
mechanisms = [{ name = "uno", layer = "layers:Uno" }]
""",
    "src/provenn/papers/one/layers.py": "def use():\n    import provenn.nn.norms\n",
    "src/provenn/papers/one/README.md": "The story.\n",
    "src/provenn/papers/one/weights/small.safetensors": "0\n",
    "src/provenn/papers/two/__init__.py": "",
    "src/provenn/papers/two/paper.toml": 'task = "riddles"\n',
    "src/provenn/papers/two/task.py": "import provenn\nuse = provenn.swap\n",
    "src/provenn/papers/two/model.py": 'from provenn.nn import gates\nPATTERN = "softmax, uno"\n',
    "src/provenn/papers/three/__init__.py": "",
    "src/provenn/papers/three/paper.toml": 'task = ""\n',
    "src/provenn/papers/three/model.py": 'KIND = "riddles"\n',
    "tests/conftest.py": 'pytest_plugins = ["suite"]\n',
    "tests/shared.py": "",
    "tests/test_shared.py": "def test_all(): ...\n",
    "tests/papers/one/golden.json": "[1]\n",
    "tests/papers/one/test_one.py": "def test_one(): ...\n",
    "tests/papers/two/test_two.py": "import shared\ndef test_two(): ...\n",
    "tests/papers/three/test_three.py": "import pytest\n@pytest.mark.skip\ndef test_three(): ...\n",
    "tests/papers/test_checks.py": """
import pytest
SAMPLE = [pytest.param(f"one {x}", marks=pytest.mark.sample) for x in "bc"]
@pytest.mark.parametrize("name", ["one a", *SAMPLE, "two a"])
def test_checks(name): ...
""",
}


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    for name, text in FILES.items():
        file = tmp_path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    return tmp_path


def digests(root: Path) -> dict[str, str]:
    tree = Tree(root)
    return {slug: tree.digest(slug) for slug in tree.facts}


ALL = {"one", "two", "three"}


@pytest.mark.parametrize(
    "name, text, papers",
    [
        ("src/provenn/papers/one/layers.py", "x = 2\n", {"one", "two"}),  # two names its mechanism
        ("src/provenn/papers/one/weights/small.safetensors", "1\n", {"one"}),
        ("src/provenn/papers/one/README.md", "Another story.\n", set()),
        ("src/provenn/papers/two/task.py", "y = 2\n", {"two", "three"}),  # three names its task
        ("src/provenn/papers/two/model.py", "y = 2\n", {"two"}),
        ("src/provenn/nn/norms.py", "y = 2\n", {"one", "two"}),
        ("src/provenn/nn/gates.py", "y = 2\n", {"two"}),
        ("src/provenn/ops/scan/fast.py", "def scan(x, y=(1, 2)):\n    return x\n", {"one", "two"}),
        ("src/provenn/ops/scan/fast.py", "def scan(x, *, y=(1, 3)):\n    return x\n", {"one", "two"}),
        ("src/provenn/ops/scan/fast.py", '"""Scan."""\ndef scan(x,  # it\n\n *, y=(1, 2)):\n return x\n', set()),
        ("src/provenn/tasks/image_classification.py", "y = 2\n", {"one"}),
        ("src/provenn/data/images.py", "y = 2\n", {"one"}),
        ("src/provenn/data/list.txt", "a dog\n", {"one"}),
        ("src/provenn/surgery.py", "y = 2\n", {"two", "three"}),
        ("src/provenn/inference.py", "y = 2\n", set()),
        ("tests/papers/one/golden.json", "[2]\n", {"one"}),
        ("tests/papers/two/test_two.py", "def test_other(): ...\n", {"two"}),
        ("tests/shared.py", "y = 2\n", {"two"}),
        ("tests/test_shared.py", "y = 2\n", set()),
        ("tests/papers/test_checks.py", "y = 2\n", ALL),
        ("tests/conftest.py", "y = 2\n", ALL),
        ("constraints.txt", "torch==2.14.0\n", ALL),
    ],
)
def test_a_change_concerns_exactly_the_papers_that_reach_it(tree: Path, name: str, text: str, papers: set[str]):
    before = digests(tree)
    (tree / name).write_text(text)
    after = digests(tree)
    assert {slug for slug in ALL if before[slug] != after[slug]} == papers


def test_sets_and_places_do_not_count(tree: Path):
    """The order in which a set prints is another in every process, and a checkout may lie anywhere."""
    (tree / "src/provenn/papers/one/layers.py").write_text('def use(x):\n    return x in {"a", "b", "c", "d"}\n')
    code = f"from closure import Tree; from pathlib import Path; print(Tree(Path({str(tree)!r})).digest('one'))"
    outcomes = set()
    for seed in "123":
        environment = {"PYTHONHASHSEED": seed, "PYTHONPATH": f"{ROOT / 'tests'}"}
        done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
        outcomes.add(done.stdout)
    shutil.copytree(tree, tree / "elsewhere")
    assert outcomes == {f"{digests(tree / 'elsewhere')['one']}\n"}


@pytest.mark.parametrize("slug", ["relationnet_pp", "rat"])
def test_what_a_paper_imports_is_reached(slug: str):
    """Not by the syntax tree: the modules that Python has loaded after it loaded all of the paper's."""
    tree = Tree(ROOT)
    names = sorted(f"provenn.papers.{slug}.{file.stem}" for file in (tree.package / "papers" / slug).glob("[a-z]*.py"))
    code = (
        f"import sys, {', '.join(names)}; print(*(m.__file__ for n, m in sys.modules.items() if n[:8] == 'provenn.'))"
    )
    environment = {"PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    loaded = {Path(file) for file in done.stdout.split()}
    assert len(loaded) > 20 and loaded <= tree.reached(slug)


def test_every_paper_reaches_its_own_and_few_reach_all():
    tree = Tree(ROOT)
    reached = {slug: tree.reached(slug) for slug in tree.facts}
    scan = {slug for slug, files in reached.items() if tree.package / "ops/selective_scan/fast.py" in files}
    assert scan == {"res_vmamba"}
    assert all(tree.package / "testing/common.py" in files for files in reached.values())


def test_what_is_asked_of_every_paper_depends_on_no_paper_and_on_no_task():
    tree = Tree(ROOT)
    for file in tree.tests.glob("papers/test_*.py"):
        names = {module for module, _ in tree.source(file).imports}
        assert not {name for name in names if name.startswith(("provenn.papers.", "provenn.tasks."))}, file.name


def test_an_entry_counts_for_its_digest_and_versions_alone():
    entry = {"digest": "d", **versions(), "date": "2026-11-23"}
    assert standing({"one": entry}, {"one": "d", "two": "d"}) == {"one"}
    for change in ({"digest": "e"}, {"torch": "2.6.0"}, {"python": "3.12"}):
        assert not standing({"one": {**entry, **change}}, {"one": "d"})
    assert not standing({"one": {"digest": "d"}}, {"one": "d"})
    line = summary(["one", "two"], {"one"})
    assert line.startswith(f"checks of 1 of 2 papers stand in {FILE} (torch ") and line.endswith("whole: two")


@pytest.mark.parametrize("text", ["", "[]", '{"one": 3}', '{"one": {"dig', "\0"])
def test_a_corrupt_file_is_one_line(tmp_path: Path, text: str):
    file = tmp_path / "passed.json"
    assert read_entries(file) == {}
    file.write_text(text)
    with pytest.raises(ValueError, match="delete it, or write it anew by `make test-all`") as error:
        read_entries(file)
    assert "\n" not in str(error.value)


def run(tree: Path, *options: str) -> str:
    environment = {"PYTHONPATH": f"{ROOT / 'src'}:{ROOT / 'tests'}", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *options]
    done = subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True, timeout=250)
    assert not done.stderr.count("INTERNALERROR"), done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.mark.parametrize("workers", [(), ("-n", "2")], ids=["one process", "workers"])
def test_what_passed_is_recorded_and_left_out_until_it_changes(tree: Path, workers: tuple[str, ...]):
    (tree / "tests/papers/two/test_two.py").write_text("import shared\ndef test_two(): assert False\n")
    assert "all checks of 2 papers passed; 2 of 3 stand" in run(tree, "--record-passed", *workers)
    assert json.loads((tree / FILE).read_text()).keys() == {"one", "three"}  # a skip is no failure

    said = run(tree, "--skip-passed", *workers)
    assert "checks of 2 of 3 papers stand" in said and "checked whole: two" in said
    assert "1 failed, 3 passed" in said  # of two both, of one the first sample, and what is shared
    (tree / "src/provenn/papers/one/layers.py").write_text("x = 2\n")
    assert "1 failed, 6 passed" in run(tree, "--skip-passed", *workers)


def recorded(tree: Path) -> set[str]:
    return {*json.loads((tree / FILE).read_text())}


def test_a_run_in_part_records_no_paper_that_it_left_out(tree: Path):
    run(tree, "--record-passed", "--deselect", "tests/papers/test_checks.py::test_checks[two a]")
    assert recorded(tree) == {"one", "three"}
    (tree / FILE).write_text("{")
    run(tree, "--record-passed", "-x", "-k", "not three")
    assert recorded(tree) == {"one", "two"}
    (tree / "tests/papers/one/test_more.py").write_text("import nothing_of_this_name\n")
    (tree / FILE).unlink()
    run(tree, "--record-passed", "--continue-on-collection-errors")
    assert recorded(tree) == set()
    assert "without paths" in run(tree, "--record-passed", "tests")


@pytest.mark.parametrize("workers", [(), ("-n", "2")], ids=["one process", "workers"])
def test_a_suite_is_recorded_in_parts(tree: Path, workers: tuple[str, ...]):
    """What stands stays and may be left out; what has changed goes."""
    run(tree, "--record-passed", "-k", "one", *workers)
    assert recorded(tree) == {"one"}
    assert "all checks of 2 papers passed; 3 of 3 stand" in run(tree, "--skip-passed", "--record-passed", *workers)
    (tree / "src/provenn/papers/one/weights/small.safetensors").write_text("1\n")
    run(tree, "--record-passed", "-k", "three", *workers)
    assert recorded(tree) == {"two", "three"}


def test_checks_marked_exhaustive_are_no_part_of_an_entry(tree: Path):
    more = "import pytest\ndef test_one(): ...\n@pytest.mark.exhaustive\ndef test_more(): assert False\n"
    (tree / "tests/papers/one/test_one.py").write_text(more)
    run(tree, "--record-passed", "-m", "not exhaustive")
    assert recorded(tree) == ALL
    run(tree, "--record-passed")
    assert recorded(tree) == {"two", "three"}


def test_a_corrupt_file_stops_the_run_in_one_line(tree: Path):
    (tree / FILE).write_text("{")
    assert run(tree, "--skip-passed").startswith(f"ERROR: {FILE} cannot be read (")


def test_every_file_of_tests_has_a_name_of_its_own():
    """Tests are in no packages: pytest collects one of two files of the same name."""
    names = Counter(file.name for file in (ROOT / "tests").rglob("test_*.py") if "fixtures" not in file.parts)
    assert not {name for name, times in names.items() if times > 1}
