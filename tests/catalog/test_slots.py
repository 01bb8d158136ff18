"""The table of slots is data: it reads without torch, and each contract is complete."""

import subprocess
import sys

import pytest

from provenn.catalog.slots import SLOTS, Slot, slot
from provenn.core.errors import UserError


def test_the_table_reads_without_torch():
    script = "import sys, provenn; provenn.slots.SLOTS; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", script], check=True, env={"PYTHONPATH": ":".join(sys.path)})


@pytest.mark.parametrize("of", SLOTS.values(), ids=SLOTS)
def test_every_slot_gives_the_shape_of_each_input_at_all_its_sizes(of: Slot):
    everything = {"batch": 2, "dim": 8, "channels": 8, "tokens": 3, "other": 4, "height": 5, "width": 6}
    for sizes in of.sizes:
        shapes = of.shapes(**{**everything, **sizes})
        assert len(shapes) == len(of.inputs) and everything[of.width] in shapes[0]


def test_an_unknown_slot_names_those_there_are():
    assert slot("residual") is SLOTS["residual"]
    with pytest.raises(UserError, match="no slot is called 'gate'; there are: token-mixer, channel-gate"):
        slot("gate")
