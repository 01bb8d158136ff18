"""How often somebody may do something; kept in memory, and bounded."""

import time
from collections import OrderedDict, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from threading import Lock

from provenn.core.errors import UserError

MOST_NAMES = 20_000  # that a rate remembers; those that did nothing for longest are forgotten first
MINUTE, HOUR, DAY = 60.0, 3600.0, 86_400.0


class TooOften(UserError):
    """Somebody did something more often than they may."""


class Rate:
    """At most `count` times within `seconds`, for each name by itself.

    >>> moments = iter([0.0, 1.0, 2.0, 61.0])
    >>> rate = Rate(2, 60.0, clock=lambda: next(moments))
    >>> [rate.allows("a") for _ in range(4)]
    [True, True, False, True]
    """

    def __init__(self, count: int, seconds: float, clock: Callable[[], float] = time.monotonic):
        self.count, self.seconds, self.clock = count, seconds, clock
        self._moments: OrderedDict[object, deque[float]] = OrderedDict()
        self._lock = Lock()

    def allows(self, name: object) -> bool:
        """Whether it may be done once more; counted where it may."""
        with self._lock:
            moment = self.clock()
            moments = self._moments.setdefault(name, deque(maxlen=self.count))
            self._moments.move_to_end(name)
            while len(self._moments) > MOST_NAMES:
                self._moments.popitem(last=False)
            if len(moments) == self.count and moment - moments[0] < self.seconds:
                return False
            moments.append(moment)
            return True

    def spend(self, name: object, what: str) -> None:
        """Count it.

        Raises:
            TooOften: it was done `count` times already.
        """
        if not self.allows(name):
            span = next(words for seconds, words in SPANS if self.seconds <= seconds)
            raise TooOften(f"{what}: at most {self.count} within {span}, so wait a little and send it again")


SPANS = ((MINUTE, "a minute"), (10 * MINUTE, "ten minutes"), (HOUR, "an hour"), (DAY, "a day"))


@dataclass(frozen=True)
class Limits:
    """What is limited: links by who asks for them, all else by person.

    Many may ask from one network. Beyond `links_for` those who have an account still get their links, up to
    `links_known`. How many links one address gets is up to `accounts.link_lasts`.
    """

    links_for: Rate = field(default_factory=lambda: Rate(20, HOUR))
    links_known: Rate = field(default_factory=lambda: Rate(200, HOUR))
    votes: Rate = field(default_factory=lambda: Rate(100, MINUTE))
    comments: Rate = field(default_factory=lambda: Rate(6, 10 * MINUTE))
    reports: Rate = field(default_factory=lambda: Rate(20, HOUR))
    suggestions: Rate = field(default_factory=lambda: Rate(20, DAY))
    names: Rate = field(default_factory=lambda: Rate(10, HOUR))
