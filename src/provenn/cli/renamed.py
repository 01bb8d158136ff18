"""Names of provenn 0.1 that still work in 0.2: each use says the new one."""

from collections.abc import Sequence

GONE_IN = "0.3"
VERBS = {"serve": "web serve", "digest": "web mail", "page": "web admin"}
OPTIONS = {("reproduce", "--claim"): "--experiment"}
SETTINGS = {("predict", "least"): "score_threshold"}  # of `--set`


def modern(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """The command line in the names of today, and a line for each name that has changed.

    >>> modern(["reproduce", "craft", "--claim", "set5_x2"])
    (['reproduce', 'craft', '--experiment', 'set5_x2'], ['`--claim` is now `--experiment`; 0.3 drops the old name'])
    """
    verb, rest = words[0], list(words[1:])
    changed: list[tuple[str, str]] = []
    first = VERBS.get(verb, verb)
    if verb == "serve" and any(word.partition("=")[0] == "--export" for word in rest):
        first, rest = "web export", _without_option(rest, "--export")
        changed.append(("serve --export", first))
    elif first != verb:
        changed.append((verb, first))
    for index, word in enumerate(rest):
        name, equals, value = word.partition("=")
        if (verb, name) in OPTIONS:
            rest[index] = OPTIONS[verb, name] + equals + value
            changed.append((name, OPTIONS[verb, name]))
        setting = value if name == "--set" else word if index and rest[index - 1] == "--set" else ""
        key = setting.partition("=")[0]
        if (verb, key) in SETTINGS:
            rest[index] = word.replace(key, SETTINGS[verb, key], 1)
            changed.append((f"--set {key}", f"--set {SETTINGS[verb, key]}"))
    lines = [f"`{old}` is now `{new}`; {GONE_IN} drops the old name" for old, new in dict.fromkeys(changed)]
    return [*first.split(), *rest], lines


def _without_option(words: list[str], option: str) -> list[str]:
    """The words with an option's value in front, as an argument."""
    index = next(i for i, word in enumerate(words) if word.partition("=")[0] == option)
    _, equals, value = words[index].partition("=")
    values, after = ([value], index + 1) if equals else (words[index + 1 : index + 2], index + 2)
    return [*values, *words[:index], *words[after:]]
