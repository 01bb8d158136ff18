"""Put layers into a model that already exists, take its layers' place, or take them out."""

from provenn.surgery.edit import Change, Changes, insert_after, remove, swap

__all__ = ["Change", "Changes", "insert_after", "remove", "swap"]
