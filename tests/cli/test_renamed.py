"""Names of the version before still work, and each use says the new one."""

import pytest

from provenn.cli import main
from provenn.cli.renamed import modern


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("reproduce craft --claim a --claim=b", "reproduce craft --experiment a --experiment=b"),
        ("serve --port 80", "web serve --port 80"),
        ("serve --url http://a --export site --home h", "web export site --url http://a --home h"),
        ("serve --export=site", "web export site"),
        ("serve --export", "web export"),
        ("digest --send", "web mail --send"),
        ("page hide 17", "web admin hide 17"),
        (
            "predict p a.png --set least=0.5 --set=least=0.4",
            "predict p a.png --set score_threshold=0.5 --set=score_threshold=0.4",
        ),
    ],
)
def test_old_names_become_new_ones_and_are_named_once(old, new):
    words, lines = modern(old.split())
    assert words == new.split()
    assert len(lines) == 1 and lines[0].endswith("drops the old name")


@pytest.mark.parametrize(
    "line", ["show craft", "train craft --set least=1", "predict craft least=1.png", "list serve", "web serve --port 1"]
)
def test_what_was_not_renamed_stays(line):
    assert modern(line.split()) == (line.split(), [])


def test_the_line_goes_to_stderr_and_the_verb_runs(capsys):
    assert main(["reproduce", "eca_net", "--claim", "nothing_of_that_name"]) == 2
    said = capsys.readouterr().err.splitlines()
    assert said[0] == "provenn: `--claim` is now `--experiment`; 0.3 drops the old name"
    assert "nothing_of_that_name" in said[1] and len(said) == 2


def test_a_usage_error_of_a_verb_within_a_group_names_its_help(capsys):
    assert main(["serve", "--export"]) == 2
    assert capsys.readouterr().err.splitlines()[-1].endswith("(see: provenn web export --help)")
