"""The device that is emulated keeps the rules of CUDA, and its values are those of the CPU."""

import copy
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from provenn.testing.elsewhere import DEVICE, Away, elsewhere, move

MIXED = "Expected all tensors to be on the same device, but found at least two devices, meta and cpu"
INDICES = "indices should be either on cpu or on the same device as the indexed tensor"


@pytest.fixture(autouse=True)
def there() -> Iterator[None]:
    with elsewhere():
        yield


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def away(*shape: int, seed: int = 0) -> Tensor:
    return numbers(*shape, seed=seed).to(DEVICE)


def same(there: Tensor, here: Tensor) -> bool:
    """Whether a tensor lies there, and is what another is."""
    return isinstance(there, Away) and there.device == DEVICE and torch.equal(there.cpu(), here)


def hidden(tokens: int) -> Tensor:
    return torch.ones(tokens, tokens, dtype=torch.bool).tril()


@pytest.mark.parametrize(
    "mix",
    [
        lambda x: x + torch.ones(3),
        lambda x: torch.ones(3) + x[0],  # a number from there is none here
        lambda x: x @ torch.ones(3),
        lambda x: torch.cat([x, torch.ones(1)]),
        lambda x: torch.stack([x[0], torch.tensor(1.0)]),  # not pointwise: even a number has to lie there
        lambda x: torch.where(x > 0, torch.ones(3), x),
        lambda x: x.index_select(0, torch.tensor([0])),
        lambda x: x.gather(0, torch.tensor([0])),
        lambda x: x.masked_fill(torch.tensor([True, False, True]), 0.0),
        lambda x: torch.tensor(1.0).add_(x[0]),
        lambda x: torch.ones(3).masked_fill_(torch.tensor([True, False, True]), x[0]),
        lambda x: x.mul_(torch.ones(3)),
        lambda x: nn.functional.embedding(torch.tensor([0]), x[:, None]),
        lambda x: nn.functional.linear(x, torch.ones(2, 3)),
        lambda x: nn.functional.scaled_dot_product_attention(*[x.expand(1, 3, 3)] * 3, attn_mask=hidden(3)),
        lambda x: nn.functional.cross_entropy(x[None], torch.tensor([0])),
    ],
)
def test_tensors_of_two_devices_are_refused(mix: Callable[[Tensor], object]):
    with pytest.raises(RuntimeError, match=MIXED):
        mix(away(3))


def test_a_pointwise_operation_takes_a_number_from_here():
    x, here, one = away(3), numbers(3), torch.tensor(1.0)
    assert same(x + one, here + 1) and same(one - x, 1 - here)
    assert same(torch.where(x > 0, x, one), torch.where(here > 0, here, one))
    assert same(x.masked_fill(x > 0, one), here.masked_fill(here > 0, one))
    assert same(x.clone().fill_(one), torch.ones(3)) and torch.equal(torch.zeros(3).fill_(x[0]), here[0].expand(3))


@pytest.mark.parametrize("index", [[2, 0], np.array([2, 0]), torch.tensor([2, 0]), ([2, 0],), range(2)])
def test_indices_may_come_from_here(index: Any):
    x, here = away(3, 2), numbers(3, 2)
    assert same(x[index], here[index])
    x[index], here[index] = 5.0, 5.0
    assert same(x, here)
    x[index], here[index] = (torch.tensor(7.0),) * 2
    assert same(x, here)


def test_what_lies_here_takes_no_index_from_there():
    index = torch.tensor([2, 0], device=DEVICE)
    with pytest.raises(RuntimeError, match=INDICES):
        numbers(3)[index]
    with pytest.raises(RuntimeError, match=INDICES):
        numbers(3)[away(3) > 0]
    with pytest.raises(RuntimeError, match=INDICES):
        numbers(3)[index] = 0.0
    assert torch.equal(numbers(3)[index[0]], numbers(3)[2]), "one index is a number"
    assert same(away(3)[index], numbers(3)[[2, 0]])


def test_values_that_are_put_at_indices_have_to_lie_there():
    x, here = away(3), numbers(3)
    with pytest.raises(RuntimeError, match=MIXED):
        x[x < 9] = torch.ones(3)
    x[1:], here[1:] = (torch.tensor([4.0, 5.0]),) * 2  # a copy, which crosses over
    assert same(x, here)


@pytest.mark.parametrize("read", [Tensor.numpy, np.asarray, np.mean, lambda x: np.stack([x, x]), torch.from_numpy])
def test_numpy_takes_nothing_from_there(read: Callable[[Tensor], object]):
    with pytest.raises((TypeError, RuntimeError)):
        read(away(3))
    with pytest.raises(TypeError, match=r"can't convert meta device type tensor to numpy. Use Tensor.cpu\(\) first"):
        away(3).numpy()
    assert np.array_equal(away(3).cpu().numpy(), numbers(3).numpy())


def test_numbers_are_read_from_there():
    x, here = away(3), numbers(3)
    assert x.tolist() == here.tolist() == [float(value) for value in x] and x[0].item() == float(here[0])
    assert f"{x[0]:.2f} {x.sum():.3g}" == f"{here[0]:.2f} {here.sum():.3g}" and bool((x > 9).any()) is False
    assert [10, 20, 30][torch.tensor(1, device=DEVICE)] == 20 and not x.is_meta


@pytest.mark.parametrize(
    "make",
    [
        lambda device: torch.arange(4.0, device=device),
        lambda device: torch.full((2, 2), 3.0, device=device),
        lambda device: torch.eye(2, device=device),
        lambda device: torch.tensor([[1, 2], [3, 4]], device=device),
        lambda device: torch.tensor(numbers(2), device=device),
        lambda device: torch.as_tensor([1.0, 2.0], device=device),
        lambda device: torch.as_tensor(np.arange(3), device=device),
        lambda device: torch.as_tensor(numbers(2), device=device),
        lambda device: torch.asarray([True, False], device=device),
        lambda device: numbers(2).to(device).new_tensor([1, 2]),
        lambda device: numbers(2).to(device).new_zeros(2, 3),
        lambda device: numbers(2).new_tensor([1, 2], device=device),
        lambda device: torch.zeros_like(numbers(2), device=device),
        lambda device: torch.zeros_like(numbers(2).to(device)),
        lambda device: numbers(2).to(device, torch.float64),
        lambda device: numbers(2).to(torch.ones(1, device=device, dtype=torch.float64)),
    ],
)
def test_what_is_made_there_lies_there_and_has_values(make: Callable[[Any], Tensor]):
    assert same(make(DEVICE), make("cpu")) and make(DEVICE).dtype == make("cpu").dtype


def test_a_device_as_a_context_is_there_too():
    with torch.device(DEVICE):
        assert same(torch.ones(2), torch.ones(2, device="cpu")) and same(torch.tensor([3]), torch.tensor([3]).cpu())
        assert isinstance(nn.Linear(2, 2).weight, Away)


def test_a_generator_is_of_the_device_that_is_drawn_on():
    here, there = torch.Generator(), torch.Generator(DEVICE)
    assert (here.device.type, there.device) == ("cpu", DEVICE)
    for draw in (
        lambda: torch.randn(3, device=DEVICE, generator=here),
        lambda: torch.randperm(3, device=DEVICE, generator=here),
        lambda: away(3).normal_(generator=here),
        lambda: torch.multinomial(away(3).abs(), 2, generator=here),
    ):
        with pytest.raises(RuntimeError, match="Expected a 'meta' device type for generator but found 'cpu'"):
            draw()
    with pytest.raises(RuntimeError, match="Expected a 'cpu' device type for generator but found 'meta'"):
        torch.randn(3, generator=there)
    assert same(torch.randn(3, device=DEVICE, generator=there.manual_seed(0)), numbers(3))


def test_what_is_changed_in_place_stays_itself():
    x, here = away(3), numbers(3)
    for change in (lambda x: x.add_(1), lambda x: x.clamp_(min=0), lambda x: x.copy_(numbers(3, seed=1)), Tensor.zero_):
        assert change(x) is x and same(x, change(here))
    assert x.unsqueeze_(0) is x and x.shape == (1, 3) and same(x, here.unsqueeze_(0))
    x = away(2, 3)
    row = x[0]
    row += 1
    assert same(x, torch.stack([numbers(2, 3)[0] + 1, numbers(2, 3)[1]])), "a view shares its values"
    assert same(torch.add(x, 1, out=row.new_empty(2, 3)), x.cpu() + 1)


def test_copies_cross_over_and_share_nothing():
    here = numbers(3)
    there = here.to(DEVICE)
    there.zero_()
    assert torch.equal(here, numbers(3)) and there.to(DEVICE) is there
    assert torch.equal(here.copy_(there), torch.zeros(3)) and type(here) is Tensor


def test_complex_numbers_are_conjugated():
    x, here = away(4), numbers(4)
    for use in (
        lambda z: (z.conj() * z).real,
        lambda z: torch.fft.irfft(z.conj()),
        lambda z: z.clone().mul_(z.conj()).abs(),
        lambda z: z.conj().imag + 1,
    ):
        assert same(use(torch.fft.rfft(x)), use(torch.fft.rfft(here)))


class Doubled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return 2 * x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return 2 * grad + 0 * ctx.saved_tensors[0]


class Network(nn.Module):
    """Norms with buffers, a recurrent network, attention, shared weights, a function with its own backward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv1d(4, 8, 3, padding=1), nn.BatchNorm1d(8)
        self.gru, self.attention = nn.GRU(8, 8, batch_first=True), nn.MultiheadAttention(8, 2, batch_first=True)
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)
        self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        x = self.gru(self.norm(self.conv(x)).mT)[0]
        x = x + self.attention(x, x, x, need_weights=False)[0]
        x = torch.utils.checkpoint.checkpoint(self.first, x, use_reentrant=False)
        return Doubled.apply(self.second(x).relu())


def close(there: Tensor | None, here: Tensor | None) -> bool:
    """The same but for rounding: of attention and recurrent layers torch has another form for the CPU."""
    assert there is not None and here is not None
    return isinstance(there, Away) and torch.allclose(there.detach().cpu(), here.detach())


def test_a_network_gives_the_outputs_and_gradients_that_it_gives_here():
    torch.manual_seed(0)
    here = Network().double()
    there = move(copy.deepcopy(here))
    x = numbers(2, 4, 6).double().requires_grad_()
    moved = x.detach().to(DEVICE).requires_grad_()
    outputs = here(x), there(moved)
    for output in outputs:
        output.square().sum().backward()
    assert close(outputs[1], outputs[0]) and close(moved.grad, x.grad)
    assert there.first.weight is there.second.weight, "what was shared is shared"
    for (name, p), q in zip(here.named_parameters(), there.parameters(), strict=True):
        assert isinstance(q, nn.Parameter) and close(q.grad, p.grad), name
    assert close(there.norm.running_mean, here.norm.running_mean)
    for module in (here, there):
        torch.optim.AdamW(module.parameters()).step()
    assert close(there.first.weight, here.first.weight)
    with pytest.raises(RuntimeError):
        there(x)
    with torch.inference_mode():
        assert close(there.eval()(moved), here.eval()(x))


def test_a_module_is_copied_cast_and_brought_back():
    torch.manual_seed(0)
    module = nn.Linear(3, 2)
    weight = module.weight.detach().clone()
    twin = copy.deepcopy(move(module))
    module.weight.data.zero_()
    assert same(twin.weight.data, weight) and isinstance(twin.weight, nn.Parameter) and twin.weight.requires_grad
    assert same(twin.double().weight.data, weight.double())
    twin.weight.data = torch.ones(2, 3, device=DEVICE)
    assert same(twin.weight.data, torch.ones(2, 3))
    with pytest.raises(RuntimeError):
        twin.weight.data = torch.ones(2, 3)
    module.load_state_dict({"weight": weight, "bias": torch.zeros(2)})  # from here
    assert same(module.weight.data, weight)
    assert torch.equal(module.cpu().weight, weight) and type(module.weight) is nn.Parameter


def test_transforms_of_torch_func_go_through():
    x, here = away(3), numbers(3)
    assert same(torch.func.grad(lambda x: x.square().sum())(x), 2 * here)
    assert same(torch.func.vmap(lambda x: x + 1)(x), here + 1)
    assert same(torch.func.jvp(torch.sin, (x,), (x,))[1], here.cos() * here)
    module = nn.Linear(3, 1)
    weights = {name: p.detach().to(DEVICE) for name, p in module.named_parameters()}
    assert torch.allclose(torch.func.functional_call(module, weights, (x,)).cpu(), module(here))


def test_a_tensor_that_torch_made_without_values_is_named():
    with pytest.raises(NotImplementedError, match=r"torch made a tensor of \(2,\) by no operation"):
        away(2) + untold()


def untold() -> Tensor:
    """A tensor of the true meta device, as some constructors in C make it."""
    with torch._C._DisableTorchDispatch(), torch.overrides.BaseTorchFunctionMode():
        return torch.empty(2, device="meta")


def test_autocast_is_off_there():
    assert not torch.is_autocast_enabled("meta") and not torch.is_autocast_enabled("cpu")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.is_autocast_enabled("cpu") and not torch.is_autocast_enabled(DEVICE.type)


def test_after_so_many_operations_the_block_ends():
    done = []
    with elsewhere(operations=3):
        x = away(3)  # drawn here, and moved
        for _ in range(9):
            try:
                done.append(x + 1)
            except Exception:
                continue
    assert len(done) == 1 and same(done[0], numbers(3) + 1)


class Twice(Tensor):
    """A tensor that stands for two, as `torch.func` and others have them."""

    parts: list[Tensor]

    @staticmethod
    def __new__(cls, parts: list[Tensor]) -> "Twice":
        made = Tensor._make_wrapper_subclass(cls, parts[0].shape, dtype=parts[0].dtype, device=parts[0].device)
        made.parts = parts
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return cls([func(*(arg.parts[i] if isinstance(arg, Twice) else arg for arg in args)) for i in range(2)])


def test_another_subclass_comes_first():
    with torch.no_grad():
        both = move(nn.Linear(3, 2))(Twice([away(1, 3), away(1, 3, seed=1)]))
    assert all(part.device == DEVICE for part in both.parts) and not torch.equal(*(part.cpu() for part in both.parts))
