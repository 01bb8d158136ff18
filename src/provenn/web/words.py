"""Figures as people read them."""

import re

from markupsafe import Markup, escape

from provenn.evidence.interval import Number

SMALL = re.compile(r"×(\d+(?:\.\d+)?e-\d+)(?! ?\[)")
POWER = re.compile(r"(?<![\w.])(\d+(?:\.\d+)?)e([+-]?\d+)\b")
RAISED = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹", "+")


def plainly(text: str) -> str:
    """Powers of ten as such, and a tiny ratio as a part.

    >>> plainly("×3.18e-05"), plainly("below 1e-12"), plainly("+3.01e-05 [-8.1e-05, 2.0e+06]")
    ('1/31,400', 'below 10⁻¹²', '+3.01×10⁻⁵ [-8.1×10⁻⁵, 2.0×10⁶]')
    """
    text = SMALL.sub(lambda found: f"1/{float(f'{1 / float(found[1]):.3g}'):,.0f}", str(text))
    return POWER.sub(_power, text)


def _power(found: re.Match[str]) -> str:
    mantissa, exponent = found.groups()
    power = "10" + str(int(exponent)).translate(RAISED)
    return power if mantissa == "1" else f"{mantissa}×{power}"


def coded(text: str) -> Markup:
    """Plain text whose words in backticks are code.

    >>> str(coded("`variant` < 3"))
    '<code>variant</code> &lt; 3'
    """
    return Markup(re.sub(r"`([^`]+)`", r"<code>\1</code>", str(escape(text))))


def amount(count: Number | None, unit: str = "", step: int = 1000) -> str:
    """Three digits with the usual prefix, of 1000 or of 1024.

    >>> amount(25557112), amount(170_000_000_000, "FLOP"), amount(278528, "B", 1024), amount(272), amount(None)
    ('25.6 M', '170 GFLOP', '272 KiB', '272', '')
    """
    if count is None:
        return ""
    prefixes = ("", "K", "M", "G", "T", "P") if step == 1024 else ("", "k", "M", "G", "T", "P")
    power = 0
    while power < len(prefixes) - 1 and float(f"{count / step**power:.3g}") >= step:
        power += 1
    prefix = prefixes[power] + ("i" if step == 1024 and power else "")
    value = count / step**power
    return f"{value:.0f} {prefix}{unit}".strip() if value >= 100 else f"{value:.3g} {prefix}{unit}".strip()
