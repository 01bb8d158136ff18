"""Write README's table of papers, from their `paper.toml`.

python scripts/papers_table.py
"""

from pathlib import Path

from provenn import catalog

README = Path(__file__).resolve().parents[1] / "README.md"
BEGIN, END = "<!-- papers -->\n", "<!-- /papers -->"


def papers_table() -> str:
    """A row for each paper of this package, the newest first."""
    cards = [card for card in catalog.cards().values() if card.built_in]
    rows = [
        f"| [{card.slug}](src/provenn/papers/{card.slug}/README.md) | {card.title} | {card.date:%Y} |"
        for card in sorted(cards, key=lambda card: card.date, reverse=True)
    ]
    return "\n".join(["| name | paper | year |", "| --- | --- | --- |", *rows, ""])


def with_table(text: str) -> str:
    """The README with the table of today between its markers."""
    before, _, rest = text.partition(BEGIN)
    return before + BEGIN + papers_table() + END + rest.partition(END)[2]


if __name__ == "__main__":
    README.write_text(with_table(README.read_text()))
