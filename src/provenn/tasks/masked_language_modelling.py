"""Masked language modelling: the tokens that a text leaves blank (Devlin et al., 2018, arXiv:1810.04805)."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Dataset

from provenn.core.errors import UserError
from provenn.core.files import atomic_write
from provenn.data.text import read_tokenizer, text_of
from provenn.tasks.base import Scores, TaskData, batches, count_examples, device_of, join_scores
from provenn.tasks.language_modelling import LOGITS, LanguageModelling, Windows
from provenn.tasks.meta import Blanked
from provenn.tasks.recall import IGNORED

BLANK = "[MASK]"
SHARE, BLANKED, REPLACED = 0.15, 0.8, 0.1  # of all tokens; of those the blank ones, and those with another in place


class Blanks(Dataset):
    """Windows of which 15 % of the tokens are targets: of these 80 % are blank, 10 % others, 10 % left as they are.

    What is blank is drawn once for each window, from its number.
    """

    def __init__(self, windows: Windows, vocab: int):
        self.windows, self.vocab = windows, vocab

    def __len__(self) -> int:
        return len(self.windows)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        tokens, _ = self.windows[index]
        generator = torch.Generator().manual_seed(index)
        lot, kind = torch.rand(2, len(tokens), generator=generator)
        asked = lot < SHARE
        asked[lot.argmin()] = True  # at least one
        other = torch.randint(self.vocab, tokens.shape, generator=generator)
        hidden = torch.where(kind < BLANKED, self.vocab, torch.where(kind < BLANKED + REPLACED, other, tokens))
        return torch.where(asked, hidden, tokens), torch.where(asked, tokens, IGNORED)


class MaskedLanguageModelling(LanguageModelling):
    """Models take tokens (batch, tokens), one kind of them blank, and give logits (batch, tokens, vocab)."""

    name = "masked-language-modelling"
    meta_schema = Blanked  # type: ignore[assignment]  # of other keys than the parent's
    metric = "accuracy"
    higher_is_better = True
    asks = False

    def load(  # type: ignore[override]  # names its options
        self,
        source: str | Path,
        *,
        seed: int = 0,
        length: int = 256,
        tokenizer: str = "bytes",
        vocab_size: int | None = None,
        eval_tokens: int = 65_536,
    ) -> TaskData:
        """Text as in language modelling; the last of the vocabulary's tokens is the blank."""
        data = super().load(
            source, seed=seed, length=length, tokenizer=tokenizer, vocab_size=vocab_size, eval_tokens=eval_tokens
        )
        vocab = data.options["vocab"]
        train, val, test = (Blanks(part, vocab) for part in (data.train, data.val, data.test))  # type: ignore[arg-type]  # of windows
        meta = {**data.meta, "blank": vocab}
        return TaskData(
            data.name, train, val, test, data.fingerprint, {"vocab": vocab + 1}, meta, about=f"{data.about}; 15 % blank"
        )

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        """Cross-entropy of the tokens that were blanked, in nats, the mean over these."""
        tokens, targets = batch
        return F.cross_entropy(model(tokens).flatten(0, 1).float(), targets.flatten(), ignore_index=IGNORED)

    def scores(self, model: nn.Module, dataset: Dataset, batch_size: int = 256) -> Scores:
        """Of each window: asked tokens that are predicted right, nats, and how many are asked for."""
        first, _ = dataset[0]
        rows = []
        size = max(1, min(batch_size, LOGITS // (256 * len(first))))
        for tokens, targets in batches(dataset, size, device_of(model)):
            logits = model(tokens).float()
            nats = F.cross_entropy(logits.transpose(1, 2), targets, ignore_index=IGNORED, reduction="none")
            parts = (logits.argmax(-1) == targets, nats, targets != IGNORED)
            rows.append([part.double().sum(1) for part in parts])
        names = ("right", "nats", "asked")
        return join_scores(names, rows)

    def summary(self, scores: Scores) -> dict[str, float]:
        """The share of tokens predicted right of those asked for, and nats a token."""
        right, nats, asked = (float(scores[name].sum()) for name in ("right", "nats", "asked"))
        return {"accuracy": right / asked, "nll": nats / asked}

    def asked(self, windows: Windows) -> Dataset:
        """The tokens that are left blank."""
        return Blanks(windows, len(windows.bytes_of))

    def default_meta(self, options: dict[str, Any]) -> dict[str, Any]:
        meta = super().default_meta(options)
        return {**meta, "blank": meta["vocab"] - 1} if "vocab" in meta else meta

    def dummy_baseline(self, data: TaskData) -> float:
        """Accuracy of always saying the commonest token of the training text."""
        train: Any = data.train
        commonest = train.windows.stream.bincount(minlength=train.vocab).argmax()
        targets_of_blanks = [
            targets[targets != IGNORED] for _, targets in (data.test[i] for i in range(count_examples(data.test)))
        ]
        return (torch.cat(targets_of_blanks) == commonest).double().mean().item()

    def predict(  # type: ignore[override]  # names its options
        self, model: nn.Module, meta: dict[str, Any], inputs: Sequence[Any], output: Path | None
    ) -> str:
        """Fills every [MASK] of each text, or of each file, with one token."""
        tokenizer, texts = read_tokenizer(meta["tokenizer"]), []
        for text in map(text_of, inputs):
            parts = [tokenizer.encode(part) for part in text.split(BLANK)]
            if len(parts) == 1:
                raise UserError(f"{text[:40]!r} has no blank to fill: write {BLANK} where a token is missing")
            tokens = [int(token) for part in parts for token in (*part, meta["blank"])][:-1]
            x = torch.tensor([tokens], device=device_of(model))
            predicted = model(x)[0, :, : meta["blank"]].argmax(-1)
            texts.append(tokenizer.decode(torch.where(x[0] == meta["blank"], predicted, x[0]).tolist()))
        joined = "\n".join(texts)
        if output is not None:
            with atomic_write(output) as temporary:
                temporary.write_text(joined + "\n", "utf-8")
            return f"{joined}\nwrote {output}"
        return joined

    def picture(self, model: nn.Module, data: TaskData) -> None:  # type: ignore[override]  # names its options
        return None


TASK = MaskedLanguageModelling()
