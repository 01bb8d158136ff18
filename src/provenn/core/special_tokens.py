"""Special tokens of the closed vocabularies here, in their order: those of texts, and those of conversations."""

PAD, START, END, MASK, UNKNOWN, IMAGE = SPECIAL = ("<pad>", "<start>", "<end>", "<mask>", "<unk>", "<image>")
USER, ASSISTANT = "<user>", "<assistant>"
MARKS = (*SPECIAL, USER, ASSISTANT)
