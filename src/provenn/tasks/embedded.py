"""Embedded material that studies draw data of their own from: scenes, patches, photographs, defects and words.

Only tasks read data (`provenn.data`); what a study of a paper draws its examples from comes through here.
"""

from provenn.data.composed import composed_scenes
from provenn.data.defects import CATEGORIES, COUNTS, SIDE, Drawn, composed_defects
from provenn.data.patches import SOURCES, wide_patches
from provenn.data.photographs import GREY, grey_photograph, photograph
from provenn.data.vocabulary import SPECIAL, Vocabulary, words_of

__all__ = [
    "CATEGORIES",
    "COUNTS",
    "GREY",
    "SIDE",
    "SOURCES",
    "SPECIAL",
    "Drawn",
    "Vocabulary",
    "composed_defects",
    "composed_scenes",
    "grey_photograph",
    "photograph",
    "wide_patches",
    "words_of",
]
