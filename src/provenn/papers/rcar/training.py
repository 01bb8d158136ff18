"""What training takes from a file of words: the numbers of the tokens that it masks by and never touches."""

from pathlib import Path

from provenn.data.vocabulary import read_vocabulary


def special_of(file: str, words: int) -> tuple[int, int, int]:
    """The numbers of `<mask>`, `<start>` and `<end>` in a file of words.

    Args:
        file: as `provenn.data.vocabulary.read_vocabulary` takes it.
        words: how many the embedding has.

    Raises:
        UserError: the file cannot be read, or has another number of words.
    """
    vocabulary = read_vocabulary(Path(file), words)
    return vocabulary.mask, vocabulary.start, vocabulary.end
