"""Conversations in the pieces of a tokenizer.json: the forms of families, marks that are written out, refusals."""

import json
from functools import cache

import pytest
from hypothesis import given
from hypothesis import strategies as st

from provenn.core.errors import UserError
from provenn.core.special_tokens import MARKS
from provenn.data.chat_pieces import FORMS, PieceTokens, placed_tokens_of, read_pieces, read_placed, tokens_of
from provenn.data.chat_tokens import NO_TARGET, ChatTokens
from provenn.data.conversations import Conversation, Exchange

tokenizers = pytest.importorskip("tokenizers")

# As transformers' templates of these models write them, but for the blank that Vicuna's tokenizer puts before words.
WRITTEN = {
    "ChatML": "<|im_start|>system\nBe kind<|im_end|>\n<|im_start|>user\n<image> what ?<|im_end|>\n"
    "<|im_start|>assistant\n[a red cat<|im_end|>]\n<|im_start|>user\nwhat ?<|im_end|>\n<|im_start|>assistant\n"
    "[red<|im_end|>]",
    "Llama 3": "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nBe kind<|eot_id|>"
    "<|start_header_id|>user<|end_header_id|>\n\n<image> what ?<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\n[a red cat<|eot_id|>]"
    "<|start_header_id|>user<|end_header_id|>\n\nwhat ?<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\n[red<|eot_id|>]",
    "ours": "<start>Be kind<user><image> what ?<assistant>[a red cat<end>]<user>what ?<assistant>[red<end>]",
    "Vicuna": "<s>Be kindUSER:<image> what ?ASSISTANT:[a red cat</s>]USER:what ?ASSISTANT:[red</s>]",
}
TALK = Conversation((Exchange("<image> what ?", ("a red cat",)), Exchange("what ?", ("red",))), (0,), "Be kind")


@cache
def written(*special, plain=()):
    """The text of a tokenizer of bytes with some merges."""
    inner = tokenizers.Tokenizer(tokenizers.models.BPE())
    inner.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=290, special_tokens=list(special), show_progress=False,
        initial_alphabet=sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()),
    )  # fmt: skip
    inner.train_from_iterator(["what red cat user assistant system Be kind"] * 9, trainer)
    inner.add_tokens(list(plain))
    inner.enable_truncation(3)
    inner.enable_padding()
    return inner.to_str()


@pytest.mark.parametrize("form", FORMS)
def test_a_conversation_is_written_as_its_family_does(form):
    text = written(*FORMS[form].marks, plain=("<image>",))
    tokens = PieceTokens(text)
    whole = tokenizers.Tokenizer.from_str(text)
    whole.no_truncation()
    whole.no_padding()
    parts = WRITTEN[form].replace("]", "[").split("[")
    wanted, targets = [], []
    for number, part in enumerate(parts):
        pieces = whole.encode(part, add_special_tokens=False).ids
        if number % 2:  # an answer: each piece is the target of the one before
            targets[-1:] = [*pieces, NO_TARGET]
        else:
            targets += [NO_TARGET] * len(pieces)
        wanted += pieces
    encoded = tokens.encode(TALK, 200)
    assert encoded.tokens == wanted and encoded.targets == targets and encoded.images == 1
    assert tokens.prompt(TALK, ["a red cat"]) == wanted[: len(wanted) - len(whole.encode("red").ids) - 1]
    assert tokens.decode([*tokens.text("a red cat"), tokens.end, 9]) == "a red cat"
    assert len(tokens) == whole.get_vocab_size()


def test_nothing_stands_for_a_system_that_says_nothing():
    tokens = PieceTokens(written(*FORMS["ChatML"].marks, plain=("<image>",)))
    asked = tokens.prompt(Conversation((Exchange("what ?", ("",)),)))
    assert asked[: len(tokens.turns.user)] == list(tokens.turns.user)


@given(st.text() | st.sampled_from(["<image>", "a <|im_end|> b", "<|im_start|>assistant\n"]))
def test_texts_come_back_and_marks_in_them_are_none(text):
    tokens = PieceTokens(written(*FORMS["ChatML"].marks, plain=("<image>",)))
    pieces = tokens.text(text)
    assert not {tokens.image, tokens.end, tokens.turns.user[0]} & set(pieces)
    assert tokens.decode(pieces) == text.encode("utf-8", "surrogatepass").decode("utf-8", "replace").strip()
    assert tokens.unknown_words([text]) == []


def test_words_that_no_piece_makes_up_are_named():
    inner = tokenizers.Tokenizer(tokenizers.models.WordLevel({"[UNK]": 0, "red": 1, "what": 2}, unk_token="[UNK]"))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    inner.add_special_tokens(["<image>", *FORMS["ours"].marks])
    tokens = PieceTokens(inner.to_str())
    assert tokens.unknown_words(["what <image> zebra red", "yak"]) == ["yak", "zebra"]


@pytest.mark.parametrize(
    ("special", "message"),
    [
        (FORMS["ChatML"].marks, "FILE has no token for images: expected one of <image>, <|image_pad|>, <|image|>; add"),
        (("<image>", "<|im_start|>"), r"FILE has no tokens for the turns of a conversation: .* <s>, </s> \(Vicuna\)"),
    ],
)
def test_a_tokenizer_without_special_tokens_is_refused_in_one_line(tmp_path, special, message):
    (tmp_path / "tokenizer.json").write_text(written(*special))
    with pytest.raises(UserError, match=message.replace("FILE", str(tmp_path / "tokenizer.json"))) as raised:
        read_pieces(str(tmp_path))
    assert "\n" not in str(raised.value)


def test_files_that_are_no_tokenizer_are_refused(tmp_path):
    with pytest.raises(UserError, match=r"tokenizer must be words, bytes, a tokenizer.json or a folder .*, got 'bpe'"):
        read_pieces("bpe", tmp_path)
    with pytest.raises(UserError, match=r"holds no tokenizer.json: expected a folder of Hugging Face that has one"):
        read_pieces(str(tmp_path))
    file = tmp_path / "tokenizer.json"
    for text, message in (
        ("{}", "no tokenizer that can be read"),
        ("bytes", "is no tokenizer.json"),
        (json.dumps({"words": ["<unk>", "<eos>"]}), "is no tokenizer.json"),
    ):
        file.write_text(text)
        with pytest.raises(UserError, match=message) as raised:
            read_pieces("tokenizer.json", tmp_path)
        assert str(file) in str(raised.value)


@pytest.mark.parametrize("plain", [(), ("<image>",)])
def test_a_model_with_a_placeholder_of_its_own_needs_no_token_for_images(tmp_path, plain):
    text = written(*FORMS["ChatML"].marks, plain=plain)
    (tmp_path / "tokenizer.json").write_text(text)
    tokens = read_placed(str(tmp_path), -200)
    own = PieceTokens(written(*FORMS["ChatML"].marks, plain=("<image>",)))
    expected = [-200 if token == own.image else token for token in own.encode(TALK, 200).tokens]
    assert tokens.encode(TALK, 200).tokens == expected and expected.count(-200) == 1
    assert len(tokens) == tokenizers.Tokenizer.from_str(text).get_vocab_size() and tokens.tokenizer == text
    assert tokens.decode([*tokens.text("a red cat"), tokens.end]) == "a red cat"
    assert placed_tokens_of({"tokenizer": text, "image": -200}).encode(TALK, 200).tokens == expected
    with pytest.raises(UserError, match=r"no tokenizer at .*gone: expected a tokenizer\.json, or a folder"):
        read_placed(str(tmp_path / "gone"), -200)


def test_weights_say_which_tokens_are_theirs():
    text = written(*FORMS["ChatML"].marks, plain=("<image>",))
    assert isinstance(tokens_of({"words": [], "tokenizer": text}), PieceTokens)
    assert tokens_of({"words": list(MARKS)}).words == list(MARKS) and type(tokens_of({"words": []})) is ChatTokens
