"""Counts are held to what can be worked out by hand; nothing here looks at a clock."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from provenn.core.cost import (
    Comparison,
    compare,
    count_parameters,
    flops,
    growth,
    interleaved,
    macs,
    peak_activation_bytes,
)

times = st.lists(st.tuples(st.floats(1e-6, 1e3), st.floats(1e-6, 1e3)), min_size=1, max_size=40)


def test_a_matrix_product_counts_two_for_each_multiply_add():
    a, b = torch.randn(3, 5), torch.randn(5, 7)
    assert flops(lambda: a @ b) == 2 * 3 * 5 * 7
    assert macs(lambda: a @ b) == 3 * 5 * 7


def test_a_convolution_counts_its_kernel_at_every_place():
    conv, x = nn.Conv2d(4, 6, 3, padding=1, bias=False), torch.randn(2, 4, 8, 8)
    assert macs(lambda: conv(x)) == 2 * 8 * 8 * 6 * 4 * 9


def test_attention_is_counted_on_this_device_too():
    q = torch.randn(2, 4, 16, 8, requires_grad=True)
    attend = nn.functional.scaled_dot_product_attention
    forward = 2 * 2 * (2 * 4) * 16 * 16 * 8
    assert flops(lambda: attend(q, q, q)) == forward
    # The backward pass has four products, and attention kernels compute the scores once more.
    assert flops(lambda: attend(q, q, q).sum().backward()) == forward + forward // 2 * 5


def test_an_encoder_in_eval_mode_is_counted_as_in_training():
    encoder, x = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True), torch.randn(2, 5, 16)
    training = flops(lambda: encoder(x))
    with torch.no_grad():
        assert flops(lambda: encoder.eval()(x)) == training > 0
    assert torch.backends.mha.get_fastpath_enabled()


def test_a_parameter_given_to_a_module_is_counted_without_gradients():
    layer, tokens = nn.Linear(3, 5), nn.Parameter(torch.zeros(7, 3))
    with torch.no_grad():
        assert flops(lambda: layer(tokens)) == 2 * 7 * 3 * 5


def test_elementwise_work_is_counted_when_asked_for():
    x = torch.randn(10, 10)
    assert flops(lambda: x.exp() + x) == 0
    assert flops(lambda: x.exp() + x, elementwise=True) == 200
    assert flops(lambda: x.cumsum(0).sum(), elementwise=True) == 200
    assert flops(lambda: torch.maximum(x, x), elementwise=True) == flops(lambda: x.amax(0), elementwise=True) == 100
    assert flops(lambda: x @ x, elementwise=True) == 2000


def test_one_result_is_held_and_a_chain_holds_two():
    x = torch.randn(1000)

    def chain():
        y = x
        for _ in range(10):
            y = y.exp()
        return y

    assert peak_activation_bytes(lambda: x.relu()) == 4000
    assert peak_activation_bytes(chain) == 8000


def test_working_in_place_and_viewing_hold_nothing_more():
    x = torch.randn(10, 100)
    assert peak_activation_bytes(lambda: x.relu().relu_().view(-1)) == 4000
    assert peak_activation_bytes(lambda: x.t()[3].unsqueeze(0).zero_()) == 0


def test_what_autograd_saves_is_held():
    weight = torch.randn(1000, requires_grad=True)

    def chain():
        y = weight
        for _ in range(10):
            y = y.exp()
        return y

    assert peak_activation_bytes(chain) == 40_000
    with torch.no_grad():
        assert peak_activation_bytes(chain) == 8000
    assert peak_activation_bytes(lambda: torch.utils.checkpoint.checkpoint(chain, use_reentrant=False)) == 8000


def test_what_was_freed_before_the_call_does_not_count():
    x = torch.randn(1000)
    assert peak_activation_bytes(lambda: (x.exp().sum(), x.exp().sum())) == 4000 + 2 * 4


@pytest.mark.parametrize("exponent", [0.5, 1, 2, 3])
def test_growth_finds_the_exponent_of_a_power(exponent: float):
    sizes = [64, 128, 256, 512, 1024]
    fit = growth(sizes, [5 * size**exponent for size in sizes])
    assert fit.exponent == pytest.approx(exponent)
    assert fit.interval == pytest.approx((exponent, exponent), abs=1e-6)


def test_the_interval_of_growth_widens_with_scatter_and_holds_the_exponent():
    sizes = [2**k for k in range(4, 12)]
    noise = [1.1, 0.9, 1.05, 0.95, 1.0, 1.1, 0.9, 1.0]
    fit = growth(sizes, [size**2 * n for size, n in zip(sizes, noise)])
    assert fit.interval[0] < 2 < fit.interval[1]
    assert fit.interval[1] - fit.interval[0] > 0.01


@pytest.mark.parametrize("sizes, values", [([1, 2], [1, 2]), ([1, 2, 3], [1, 2]), ([1, 1, 1], [1, 2, 3])])
def test_growth_wants_three_sizes(sizes: list[float], values: list[float]):
    with pytest.raises(ValueError, match="at least 3 different sizes"):
        growth(sizes, values)


def test_what_stays_the_same_grows_by_exactly_nothing():
    fit = growth([1, 10, 100, 1000], [288] * 4)
    assert fit.exponent == 0 and fit.interval == (0, 0)


def test_growth_wants_positive_numbers():
    with pytest.raises(ValueError, match="positive"):
        growth([1, 2, 3], [1, 0, 3])


@given(times)
def test_exchanging_the_sides_inverts_ratio_and_interval(pairs: list[tuple[float, float]]):
    a, b = zip(*pairs)
    forward, back = Comparison.of(a, b), Comparison.of(b, a)
    assert forward.ratio * back.ratio == pytest.approx(1)
    assert forward.interval[0] * back.interval[1] == pytest.approx(1)
    assert forward.interval[1] * back.interval[0] == pytest.approx(1)
    assert forward.interval[0] <= forward.ratio * (1 + 1e-12) and forward.ratio <= forward.interval[1] * (1 + 1e-12)


def test_the_interval_of_fifteen_rounds_leaves_out_three_at_each_end():
    result = Comparison.of([math.exp(k) for k in range(15)], [1.0] * 15)
    assert result.ratio == pytest.approx(math.exp(7))
    assert result.interval == pytest.approx((math.exp(3), math.exp(11)))
    assert "96.5 %" in result.method


def test_few_rounds_say_how_little_they_are_worth():
    assert "75.0 %" in Comparison.of([1.0, 2.0, 3.0], [1.0, 1.0, 1.0]).method


def test_compare_calls_the_two_in_turns():
    calls: list[str] = []
    result = compare(lambda: calls.append("a"), lambda: calls.append("b"), rounds=4, min_time=1e-9)
    assert "".join(calls) == "ba" + "ab" + "ba" + "ab" + "ba"  # the first to calibrate
    assert len(result.a) == len(result.b) == 4


def test_a_quick_function_is_called_until_the_clock_can_see_it(monkeypatch):
    """Each call takes a tick of a clock of our own; a measurement lasts five."""
    clock = iter(range(10**6))
    monkeypatch.setattr("provenn.core.cost.time.process_time", lambda: next(clock))
    calls: list[int] = []
    times = interleaved({"a": lambda: calls.append(next(clock))}, rounds=2, min_time=10.0)
    assert len(calls) == 1 + 5 + 5 and [round(t, 1) for t in times["a"]] == [1.2, 1.2]


def test_compare_refuses_to_measure_nothing():
    with pytest.raises(ValueError, match="rounds=0"):
        compare(lambda: None, lambda: None, rounds=0)
    with pytest.raises(ValueError, match="equally many"):
        Comparison.of([1.0], [1.0, 2.0])


def test_parameters_are_counted_once_however_often_used():
    linear = nn.Linear(4, 4, bias=False)
    assert count_parameters(nn.Sequential(linear, linear, nn.BatchNorm1d(4))) == 16 + 8


def test_interleaved_turns_the_order_of_every_other_round_on_one_thread():
    called: list[tuple[str, int]] = []
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        functions = {name: (lambda name=name: called.append((name, torch.get_num_threads()))) for name in "ab"}
        times = interleaved(functions, rounds=3)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)
    assert "".join(name for name, _ in called) == "ba" + "ab" + "ba" + "ab"
    assert {count for _, count in called} == {1}
    assert [len(own) for own in times.values()] == [3, 3] and min(min(own) for own in times.values()) >= 0


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("groups", [1, 2, 8])
def test_a_convolution_s_backward_pass_has_two_as_many_operations_in_groups_too(groups, transposed):
    kind = nn.ConvTranspose2d if transposed else nn.Conv2d
    conv, x = kind(8, 16, 3, stride=2, groups=groups), torch.randn(2, 8, 10, 9)
    forward = flops(lambda: conv(x))
    assert forward == 2 * 2 * (8 * 16 // groups) * 9 * (90 if transposed else 4 * 4)
    assert flops(lambda: conv(x).sum().backward()) == 2 * forward  # of the weight alone
    assert flops(lambda: conv(x.requires_grad_()).sum().backward()) == 3 * forward
