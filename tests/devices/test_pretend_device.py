"""The pretend device itself: right programs run as on the CPU, wrong ones are refused, and their cost is counted."""

import pytest
import torch
from device_counts import counting
from device_rules import DeviceMismatchError
from placed_models import placed
from pretend_device import PretendTensor, pretend_devices
from torch import nn
from torch.nn import functional

from moe_lens.architecture.quantized import is_plain
from moe_lens.architecture.tiny import tiny_model

RIGHT = {
    "a number in a CPU tensor joins": lambda a: a * torch.tensor(2.0),
    "CPU places index": lambda a: a[torch.tensor([0, 1])],
    "own places index": lambda a: a[torch.arange(2, device=a.device)],
    "own mask indexes": lambda a: a[a > 0],
    "a number is written by a mask": lambda a: a.clone().masked_fill_(a > 0, 0.0),
    "values are written": lambda a: a.clone().index_put_((torch.tensor([0]),), a[1]),
    "back on the CPU": lambda a: a.cpu() + torch.ones(4, 3),
    "moved": lambda a: a.to("pretend:1") + torch.ones(4, 3, device="pretend:1"),
    "in place": lambda a: a.clone().add_(1).mul_(a),
    "a view is written through": lambda a: _with_first_row(a, 5.0),
    "membership": lambda a: torch.isin(a, a[0]),
    "chosen": lambda a: torch.where(a > 0, a, torch.zeros_like(a)),
    "largest": lambda a: a.topk(2).values,
    "attention": lambda a: functional.scaled_dot_product_attention(a[None], a[None], a[None]),
    "made from a list": lambda a: a + torch.tensor([1.0, 2.0, 3.0], device=a.device),
    "like another": lambda a: a.new_tensor([1.0, 2.0, 3.0]) + torch.full_like(a, 2.0),
}
WRONG = {
    "a CPU tensor joins": lambda a: a + torch.ones(4, 3),
    "a CPU mask": lambda a: a.masked_fill(torch.ones(4, 3, dtype=torch.bool), 0),
    "CPU members": lambda a: torch.isin(a, torch.tensor([1.0])),
    "CPU places gather": lambda a: a.gather(1, torch.zeros(4, 1, dtype=torch.int64)),
    "CPU places select": lambda a: a.index_select(0, torch.tensor([0])),
    "own places index the CPU's": lambda a: torch.ones(4)[torch.arange(2, device=a.device)],
    "CPU values are written": lambda a: a.clone().index_put_((torch.tensor([0, 1]),), torch.ones(2, 3)),
    "another device joins": lambda a: a + torch.ones(4, 3, device="pretend:1"),
    "another device's number joins": lambda a: a + torch.tensor(1.0, device="pretend:1"),
    "another device's places index": lambda a: a[torch.arange(2, device="pretend:1")],
    "added into the CPU's": lambda a: torch.zeros(4).index_add_(0, torch.arange(4), a[:, 0]),
    "added into a CPU number": lambda a: torch.tensor(0.0).add_(a.sum()),
    "CPU weights": lambda a: functional.linear(a, torch.ones(2, 3)),
    "CPU values are searched": lambda a: torch.searchsorted(a[:, 0].contiguous(), torch.tensor([1.0])),
    "put together": lambda a: torch.cat([a, torch.ones(4, 3)]),
    "CPU data are set": lambda a: setattr(a.clone(), "data", torch.ones(4, 3)),
}
#: The reasons for which the host waits.
WAITING = {
    "item": lambda a: a.sum().item(),
    "as a condition": lambda a: bool((a > 0).any()),
    "tolist": lambda a: a.tolist(),
    "to the CPU": lambda a: a.cpu(),
    "from the CPU": lambda a: torch.ones(3).to(a.device),
    "made from a list": lambda a: torch.tensor([1.0, 2.0], device=a.device),
    "mask as index": lambda a: a[a > 0],
    "CPU places": lambda a: a[torch.tensor([0])],
    "nonzero": lambda a: a.nonzero(),
    "equal": lambda a: torch.equal(a, a),
    "bincount": lambda a: torch.bincount((a[:, 0] > 0).long()),
    "unique": lambda a: a.unique(),
    "repeated by a tensor": lambda a: a.repeat_interleave((a[:, 0] > 0).long(), dim=0),
}
GOING_ON = {
    "pointwise": lambda a: a * 2 + 1,
    "own places": lambda a: a[torch.arange(2, device=a.device)],
    "masked": lambda a: a.masked_fill(a > 0, 0.0),
    "a number by a mask": lambda a: a.clone().__setitem__(a > 0, 0.0),
    "to another device": lambda a: a.to("pretend:1"),
    "sent on": lambda a: torch.ones(3).to(a.device, non_blocking=True),
    "repeated": lambda a: a.repeat_interleave(2, dim=0),
    "sorted": lambda a: a.sort(dim=0),
}


def _with_first_row(a: torch.Tensor, value: float) -> torch.Tensor:
    changed = a.clone()
    changed[0].fill_(value)
    return changed


def matrix() -> torch.Tensor:
    return torch.randn(4, 3, generator=torch.Generator().manual_seed(0))


def test_the_devices_are_there_in_the_block_only():
    with pretend_devices():
        made = matrix().to("pretend:0")
        assert (torch.accelerator.device_count(), torch.accelerator.is_available(), is_plain(made)) == (2, True, True)
    assert (torch.accelerator.is_available(), is_plain(made)) == (False, False)


@pytest.fixture
def there():
    """The matrix on the first of the devices, which are there for the test."""
    with pretend_devices():
        yield matrix().to("pretend:0")


@pytest.mark.parametrize("name", RIGHT)
def test_a_right_program_gives_what_the_cpu_gives(there, name):
    torch.testing.assert_close(RIGHT[name](there).cpu(), RIGHT[name](matrix()).cpu())


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_program_is_refused(there, name):
    with pytest.raises(DeviceMismatchError):
        WRONG[name](there)


def test_whole_numbers_are_counted_in_bins_as_on_a_gpu(there):
    assert torch.histc((there > 0).int(), bins=2, min=0, max=1).tolist() == [(there <= 0).sum(), (there > 0).sum()]


def test_numpy_takes_no_device_tensor(there):
    with pytest.raises(TypeError, match="can't convert a tensor on pretend:0 to numpy"):
        there.numpy()


@pytest.mark.parametrize("name", WAITING)
def test_where_the_host_waits_is_counted_with_its_line(there, name):
    with counting() as cost:
        WAITING[name](there)
    assert cost.n_waits == 1, cost.waits
    assert {line.rpartition(":")[0] for _, line in cost.waits} == {"devices/test_pretend_device.py"}


@pytest.mark.parametrize("name", GOING_ON)
def test_where_the_host_goes_on_nothing_is_counted(there, name):
    with counting() as cost:
        GOING_ON[name](there)
    assert cost.waits == {}


def test_kernels_are_counted_and_views_are_none(there):
    with counting() as cost:
        (there[1:] + 1).mul_(2).reshape(-1)[None]
    assert cost.n_kernels == 2


def test_a_device_without_float64_refuses_it():
    with pretend_devices(float64=False):
        a = matrix().to("pretend:0")
        assert a.cpu().double().dtype == torch.float64
        for wrong in (
            a.double,
            lambda: a.sum(dtype=torch.float64),
            lambda: a.to("cpu", torch.float64),
            lambda: matrix().double().to("pretend:0"),
        ):
            with pytest.raises(TypeError, match="no float64 on pretend:0"):
                wrong()


def test_gradients_lie_on_the_device_and_equal_the_cpus(there):
    weight, moved = nn.Parameter(torch.eye(3)), nn.Parameter(torch.eye(3).to(there.device))
    (matrix() @ weight).square().sum().backward()
    (there @ moved).square().sum().backward()
    assert moved.grad.device == there.device
    torch.testing.assert_close(moved.grad.cpu(), weight.grad)


def test_values_that_are_set_are_those_of_the_parameter(there):
    moved = nn.Parameter(there)
    moved.data = there * 2
    assert isinstance(moved, PretendTensor)
    assert isinstance(moved, nn.Parameter)
    torch.testing.assert_close(moved.detach().cpu(), matrix() * 2)


@pytest.mark.parametrize("place", ["one", "two"])
@pytest.mark.parametrize("family", ["olmoe", "gemma4_text"])  # the second shares its head's weights with its embedding
@pytest.mark.usefixtures("there")
def test_a_placed_model_gives_what_it_gives_on_the_cpu(family, place):
    ids = torch.tensor([[5, 9, 200, 3], [7, 7, 7, 1]])
    with torch.no_grad():
        expected = tiny_model(family)(input_ids=ids).logits
        model = placed(tiny_model(family), place)
        found = model(input_ids=ids.to("pretend:0")).logits
    devices = {str(parameter.device) for parameter in model.parameters()}
    assert devices == ({"pretend:0"} if place == "one" else {"pretend:0", "pretend:1"})
    torch.testing.assert_close(found.cpu(), expected, rtol=1e-4, atol=1e-4)
    tied = tiny_model(family).config.tie_word_embeddings
    assert (model.get_output_embeddings().weight is model.get_input_embeddings().weight) == tied
