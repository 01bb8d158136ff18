import pytest
import torch

from provenn.nn.attention import SlidingWindowAttention, SoftmaxAttention
from provenn.nn.positions import rotate
from provenn.nn.streaming import state_bytes
from provenn.testing import check_mechanism


@pytest.fixture
def draw():
    generator = torch.Generator().manual_seed(0)
    return lambda *shape: torch.randn(shape, generator=generator, dtype=torch.float64)


def masked_attention(layer: SoftmaxAttention, x, may):
    """Attention with an explicit table of who sees whom."""
    q, k, v = layer._project(x)
    scores = (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).masked_fill(~may, -torch.inf)
    return layer.out((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))


@pytest.mark.parametrize("window", [1, 2, 5, 16, 40])
@pytest.mark.parametrize("tokens", [1, 4, 5, 17, 33])
def test_a_window_is_attention_with_a_band(draw, window, tokens):
    layer = SlidingWindowAttention(8, 2, window=window, rotary=True).double()
    x = draw(2, tokens, 8)
    distance = torch.arange(tokens)[:, None] - torch.arange(tokens)
    band = (distance >= 0) & (distance < window)
    torch.testing.assert_close(layer(x), masked_attention(layer, x, band))


def test_a_window_heeds_the_mask(draw):
    layer = SlidingWindowAttention(8, 2, window=3).double()
    x, mask = draw(2, 10, 8), torch.ones(2, 10, dtype=torch.bool)
    mask[:, 4] = False
    other = x.clone()
    other[:, 4] += 1
    rest = torch.arange(10) != 4
    torch.testing.assert_close(layer(x, mask=mask)[:, rest], layer(other, mask=mask)[:, rest])
    assert not torch.allclose(layer(x)[:, rest], layer(other)[:, rest])


@pytest.mark.parametrize("cut", [0, 1, 6, 7, 20, 33])
@pytest.mark.parametrize("rotary", [False, True])
def test_a_window_streams_from_any_split_with_a_state_that_does_not_grow(draw, cut, rotary):
    layer = SlidingWindowAttention(8, 2, window=7, rotary=rotary).double()
    x = draw(2, 33, 8)
    expected = layer(x)
    parts, state = [], layer.init_state(2)
    size = state_bytes(state)
    if cut:
        y, state = layer.prefill(x[:, :cut], state)
        parts.append(y)
    for t in range(cut, 33):
        y, state = layer.step(x[:, t], state)
        parts.append(y[:, None])
    torch.testing.assert_close(torch.cat(parts, dim=1), expected)
    assert state_bytes(state) == size


@pytest.mark.parametrize("pieces", [(3, 1, 5, 1, 1, 12, 2, 8), (8, 1, 8, 1, 7, 8), (1, 2, 30)])
@pytest.mark.parametrize("window", [1, 3, 8])
def test_a_window_reads_pieces_of_any_length_and_tokens_between(draw, window, pieces):
    layer = SlidingWindowAttention(8, 2, window=window, rotary=True).double()
    x = draw(2, sum(pieces), 8)
    parts, state = [], layer.init_state(2)
    for piece in x.split(pieces, dim=1):
        if piece.shape[1] == 1:
            y, state = layer.step(piece[:, 0], state)
            y = y[:, None]
        else:
            y, state = layer.prefill(piece, state)
        parts.append(y)
    torch.testing.assert_close(torch.cat(parts, dim=1), layer(x))


def test_rotary_attention_streams(draw):
    layer = SoftmaxAttention(8, 2, rotary=True, bias=False).double()
    x = draw(2, 9, 8)
    first, state = layer.prefill(x[:, :5])
    second, state = layer.prefill(x[:, 5:8], state)
    last, state = layer.step(x[:, 8], state)
    torch.testing.assert_close(torch.cat([first, second, last[:, None]], dim=1), layer(x))


@pytest.mark.parametrize("factory", [SoftmaxAttention, SlidingWindowAttention])
def test_baselines_keep_the_slots_promises(factory):
    def made(dim, **options):
        return factory(dim, **{"heads": 4, "rotary": True, **options})

    expected_failures = {"see-both-ways": "a window looks back alone"} if factory is SlidingWindowAttention else {}
    check_mechanism(made, "token-mixer", expected_failures=expected_failures)


def test_rotation_keeps_lengths_and_shows_differences_alone(draw):
    q, k = draw(6, 8), draw(6, 8)
    here, there = torch.arange(6), torch.arange(6) + 1000
    torch.testing.assert_close(rotate(q, here).norm(dim=-1), q.norm(dim=-1))
    torch.testing.assert_close(rotate(q, here) @ rotate(k, here).T, rotate(q, there) @ rotate(k, there).T)
    assert not torch.allclose(rotate(q, here) @ rotate(k, here).T, q @ k.T)


def test_rotation_is_the_complex_one(draw):
    x = draw(5, 6)
    rates = 100.0 ** (-torch.arange(3, dtype=torch.float64) / 3)
    turned = torch.complex(x[:, :3], x[:, 3:]) * torch.exp(1j * torch.arange(5)[:, None] * rates)
    torch.testing.assert_close(rotate(x, torch.arange(5), base=100), torch.cat([turned.real, turned.imag], -1))


@pytest.mark.parametrize(
    ("attempt", "message"),
    [
        (lambda: SoftmaxAttention(9, 3, rotary=True), "even head width"),
        (lambda: SlidingWindowAttention(8, 2, window=0), "window must be at least 1, got 0"),
        (lambda: SlidingWindowAttention(8, 2, causal=False), "looks back alone"),
        (lambda: rotate(torch.zeros(2, 3), torch.arange(2)), "even head width, got 3"),
    ],
)
def test_bad_arguments_are_refused(attempt, message):
    with pytest.raises(ValueError, match=message):
        attempt()
