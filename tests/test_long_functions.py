"""Functions take few arguments: more than eight go to a typed object."""

from plugins import script

ALLOWED = 9  # of at most 10; lower it when one of them goes


def test_functions_that_declare_no_options_take_at_most_eight_arguments(tmp_path):
    counter = script("count_arguments")
    others = [f"{place} takes {count}" for place, count, options in counter.long_functions() if not options]
    assert len(others) <= ALLOWED, "\n".join(others)
    (tmp_path / "module.py").write_text("def long(a, b, c, d, e, /, f, *g, h, **i): ...\ndef short(a, b=1): ...\n")
    assert list(counter.long_functions(tmp_path)) == [("module.py:long", 9, False)]
