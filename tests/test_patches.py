"""`Patches` as torch.nn.Conv2d has its arguments, and what `kron_factor_` and its siblings say of others."""

import re
from pathlib import Path

import numpy
import pytest
import torch
from cases import DEVICE
from spectra import UNIT
from test_kron_factor import assert_factor, every_backend, kron_factor_
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.functional import conv1d, conv2d, pad, unfold

from fastcurv import ops
from fastcurv.ops import Patches

DOCS = (Path(__file__).parents[1] / "docs/kronecker.md").read_text()


def seen_by(convolve, channels, kernel):
    """The rows a convolution sees, in float64: what filters with a single one give, one for each column."""
    columns = channels * torch.Size(kernel).numel()
    filters = torch.eye(columns, dtype=torch.float64, device=DEVICE).view(columns, channels, *kernel)
    return convolve(filters).flatten(2).mT.flatten(0, 1)


def images_of(generator, *shape):
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(DEVICE, torch.float32)


@every_backend
@pytest.mark.parametrize("has_ones", [False, True])
@pytest.mark.parametrize("padding", ["same", "valid"])
@pytest.mark.parametrize("kernel, dilation", [(3, 1), (2, 1), ((4, 3), 1), ((2, 4), (1, 3)), ((1, 2), 2), (1, 1)])
def test_padding_by_name_is_that_of_conv2d(backend, has_ones, padding, kernel, dilation, generator):
    images = images_of(generator, 2, 3, 9, 11)
    kernels = (kernel, kernel) if isinstance(kernel, int) else kernel
    x = seen_by(lambda w: conv2d(images.double(), w, padding=padding, dilation=dilation), 3, kernels)
    factor = torch.zeros(x.shape[1] + has_ones, x.shape[1] + has_ones, device=DEVICE)
    before = images.clone()
    patches = [Patches(kernel, padding=padding, dilation=dilation)]
    kron_factor_([factor], [images], has_ones=has_ones, patches=patches, backend=backend)
    assert_factor(factor, factor, x, x, 0.0, 1 / len(x), UNIT[torch.float32], has_ones)
    assert torch.equal(images, before)


@every_backend
def test_same_padding_of_an_even_kernel_is_larger_below_and_on_the_right(backend, generator):
    first, second = (images_of(generator, 3, c, 7, 6) for c in (2, 5))
    x, y = (unfold(pad(z.double(), (0, 1, 1, 2)), (4, 2)).mT.flatten(0, 1) for z in (first, second))
    factor = torch.empty(16, 40, device=DEVICE)
    kron_factor_([factor], [first], others=[second], patches=[Patches((4, 2), padding="same")], backend=backend)
    assert_factor(factor, factor, x, y, 0.0, 1 / len(x), UNIT[torch.float32])


def test_numbers_of_any_whole_kind():
    images, expected = [torch.randn(2, 1, 6, 6)], torch.empty(9, 9)
    ops.kron_factor_([expected], images, patches=[Patches(3, 2, 1)])
    for three, two, one in (
        ([3, 3], [2, 2], [1, 1]),
        ((3, 3), (2, 2), (1, 1)),
        (torch.Size([3, 3]), numpy.int64(2), numpy.int32(1)),
    ):
        for patches in ([Patches(three, two, one, one)], (Patches(three, two, one, one),)):
            factor = torch.empty(9, 9)
            ops.kron_factor_([factor], images, patches=patches)
            assert torch.equal(factor, expected)


PAIR = r"a whole number of at least {}, or two of them \(height, width\), got {}"
ONE, NONE = (lambda got, least=least: PAIR.format(least, re.escape(got)) for least in (1, 0))


@pytest.mark.parametrize("patch, error, match", [
    (Patches((3,)), ValueError, r"patches\[1\].kernel_size: expected " + ONE("(3,)")),
    (Patches((3, 3, 3)), ValueError, r"patches\[1\].kernel_size: expected " + ONE("(3, 3, 3)")),
    (Patches(3.0), TypeError, r"patches\[1\].kernel_size: expected " + ONE("3.0")),
    (Patches((3, 3.0)), TypeError, r"patches\[1\].kernel_size: expected " + ONE("(3, 3.0)")),
    (Patches("same"), TypeError, r"patches\[1\].kernel_size: expected " + ONE("'same'")),
    (Patches(None), TypeError, r"patches\[1\].kernel_size: expected " + ONE("None")),
    (Patches(True), TypeError, r"patches\[1\].kernel_size: expected " + ONE("True")),
    (Patches(torch.tensor(3.0)), TypeError, r"patches\[1\].kernel_size: expected " + ONE("tensor(3.)")),
    (Patches(0), ValueError, r"patches\[1\].kernel_size: expected " + ONE("0")),
    (Patches(3, stride=(1, 0)), ValueError, r"patches\[1\].stride: expected " + ONE("(1, 0)")),
    (Patches(3, dilation="2"), TypeError, r"patches\[1\].dilation: expected " + ONE("'2'")),
    (Patches(3, padding=-1), ValueError, r"patches\[1\].padding: expected 'same', 'valid', " + NONE("-1")),
    (Patches(3, padding="full"), ValueError, r"patches\[1\].padding: expected 'same', 'valid', " + NONE("'full'")),
    (Patches(3, padding=1.5), TypeError, r"patches\[1\].padding: expected 'same', 'valid', " + NONE("1.5")),
    (Patches(3, 2, "same"), ValueError, r"patches\[1\].padding: expected numbers with stride 2, got 'same'"),
    (Patches(5), ValueError, r"patches\[1\]: expected a kernel that fits into padded images of 4 x 4, got kernel_size \(5, 5\)"),
    (Patches(5, 1, 0, 2), ValueError, r"fits into padded images of 4 x 4, got kernel_size \(5, 5\) with dilation \(2, 2\)"),
    (Patches(2**31 - 1), ValueError, r"patches\[1\]: expected a kernel that fits into padded images of 4 x 4"),
    *((Patches(**{"kernel_size": 3, name: 2**power}), ValueError, rf"patches\[1\].{name}: expected at most 2147483647, got")
      for name in Patches._fields for power in (31, 62, 63, 70)),
    (Patches(3, padding=2**30), ValueError, r"patches\[1\].padding: expected padded images of at most 2147483647 rows"),
    ({}, TypeError, r"patches\[1\]: expected a fastcurv.ops.Patches or None, got {}"),
    ((3, 1, 0, 1), TypeError, r"patches\[1\]: expected a fastcurv.ops.Patches or None, got \(3, 1, 0, 1\)"),
    (False, TypeError, r"patches\[1\]: expected a fastcurv.ops.Patches or None, got False"),
])  # fmt: skip
def test_wrong_patches_are_named_before_anything_is_written(patch, error, match):
    factors = [torch.zeros(3, 3), torch.zeros(9, 9)]
    for context in (torch.no_grad(), FakeTensorMode(allow_non_fake_inputs=True)):
        with context, pytest.raises(error, match=match):
            ops.kron_factor_(factors, [torch.ones(4, 3), torch.ones(1, 1, 4, 4)], patches=[None, patch])
    assert not any(factor.any() for factor in factors)


EXPECTED = "patches: expected a list with a Patches or None for each of inputs, got"


@pytest.mark.parametrize("patches, error, match", [
    (Patches(3), TypeError, EXPECTED + r" one Patches; for one input, give \[patches\]"),
    (3, TypeError, EXPECTED + " int"),
    ("same", TypeError, EXPECTED + " str"),
    ({0: Patches(3)}, TypeError, EXPECTED + " dict"),
    ([], ValueError, "patches: expected 1 entries, one for each of inputs, got 0"),
    ([Patches(3)] * 2, ValueError, "patches: expected 1 entries, one for each of inputs, got 2"),
])  # fmt: skip
def test_what_is_no_list_of_patches(patches, error, match):
    with pytest.raises(error, match=match):
        ops.kron_factor_([torch.eye(9)], [torch.ones(1, 1, 4, 4)], patches=patches)


def test_same_padding_is_compiled_and_faked(generator):
    images, factor, twin = images_of(generator, 2, 1, 5, 5), torch.empty(4, 4), torch.empty(4, 4)
    images, patches = images.cpu(), [Patches([2, 2], padding="same")]

    @torch.compile(fullgraph=True, backend="aot_eager")
    def update(factor, images):
        return ops.kron_factor_([factor], [images], patches=patches)

    update(factor, images)
    ops.kron_factor_([twin], [images], patches=patches)
    assert torch.equal(factor, twin)
    for context in (torch.device("meta"), FakeTensorMode()):
        with context:
            traces, _ = ops.kron_factor_([torch.empty(4, 4)], [torch.ones(2, 1, 5, 5)], patches=patches)
            assert traces.shape == (1,)


def documented(comment, **names):
    """Runs the example of the documentation whose first line ends with a comment; returns its names."""
    blocks = re.findall(r"```python\n(.*?)```", DOCS, re.S)
    (code,) = [block for block in blocks if comment in block.splitlines()[0]]
    names = {"torch": torch, "Patches": Patches, "kron_factor_": ops.kron_factor_, **names}
    exec(code, names)
    return names


def assert_seen(factor, rows):
    assert_factor(factor, factor, rows, rows, 0.0, 1 / len(rows), UNIT[torch.float32])


@pytest.mark.skipif(DEVICE.type != "cpu", reason="the documentation's tensors are on the CPU")
def test_documented_groups():
    ran = documented("# Conv2d(8, 12, 3, groups=4)")
    assert nn.Conv2d(8, 12, 3, groups=4).weight.flatten(1).shape[1] == len(ran["factors"][0])
    for group, factor in enumerate(ran["factors"]):
        part = ran["images"][:, 2 * group : 2 * group + 2].double()
        assert_seen(factor, seen_by(lambda w, part=part: conv2d(part, w), 2, (3, 3)))


@pytest.mark.skipif(DEVICE.type != "cpu", reason="the documentation's tensors are on the CPU")
def test_documented_conv1d():
    ran = documented("# Conv1d(3, 7, 5, stride=2, padding=2)")
    signals = ran["signals"].double()
    assert_seen(ran["factor"], seen_by(lambda w: conv1d(signals, w, stride=2, padding=2), 3, (5,)))


@pytest.mark.skipif(DEVICE.type != "cpu", reason="the documentation's tensors are on the CPU")
def test_documented_circular_padding():
    ran = documented('# Conv2d(3, 7, 3, padding=1, padding_mode="circular")')
    layer = nn.Conv2d(3, 27, 3, padding=1, padding_mode="circular", bias=False, dtype=torch.float64)

    def convolve(filters):
        layer.weight.data = filters
        return layer(ran["images"].double()).detach()

    assert_seen(ran["factor"], seen_by(convolve, 3, (3, 3)))


def eye():
    return [torch.eye(3)]


@pytest.mark.parametrize("call, error, match", [
    (lambda: ops.kron_factor_(3, eye()), TypeError, "factors: expected a list of tensors, got int"),
    (lambda: ops.kron_factor_(eye(), None), TypeError, "inputs: expected a list of tensors, got NoneType"),
    (lambda: ops.kron_factor_(eye(), eye(), others=3), TypeError, "others: expected a list of tensors, got int"),
    (lambda: ops.kron_factor_(eye(), eye(), others=[torch.eye(3).double()]), ValueError,
     r"others\[0\]: expected torch.float32 on cpu like inputs\[0\], got torch.float64"),
    (lambda: ops.kron_factor_(eye(), eye(), backend=[]), TypeError, "backend: expected one of .*, or None, got"),
    (lambda: ops.kron_inverse(None), TypeError, "factors: expected a list of tensors, got NoneType"),
    (lambda: ops.kron_inverse(eye(), previous=3), TypeError, "previous: expected a list of tensors, got int"),
    (lambda: ops.kron_inverse(eye(), backend={}), TypeError, "backend: expected one of"),
    (lambda: ops.kron_root(3), TypeError, "factors: expected a list of tensors, got int"),
    (lambda: ops.kron_root(eye(), previous=3, method="eigh"), TypeError, "previous: expected a list of tensors, got int"),
    (lambda: ops.kron_root(eye(), backend=[]), TypeError, "backend: expected one of"),
    (lambda: ops.kron_eigh(3), TypeError, "factors: expected a list of tensors, got int"),
    (lambda: ops.kron_apply(None, eye(), eye()), TypeError, "grads: expected a list, got NoneType"),
    (lambda: ops.kron_apply(eye(), 3, eye()), TypeError, "lefts: expected a list, got int"),
    (lambda: ops.kron_apply(eye(), eye(), 3), TypeError, "rights: expected a list, got int"),
    (lambda: ops.kron_apply(eye(), eye(), eye(), inputs=3), TypeError, "inputs: expected a list, got int"),
    (lambda: ops.kron_apply(eye(), eye(), eye(), backend=[]), TypeError, "backend: expected one of"),
    (lambda: ops.stein(1.0, 1.0, *eye(), *eye(), sign=torch.ones(2)), ValueError, "sign: expected 1 or -1"),
    (lambda: ops.orthogonalize(3), TypeError, "matrices: expected a list of tensors, got int"),
])  # fmt: skip
def test_arguments_of_the_other_ops_are_named_too(call, error, match):
    with pytest.raises(error, match=match):
        call()


def test_info_of_orthogonalize_is_checked_for_fake_tensors_too():
    with FakeTensorMode(), pytest.raises(ValueError, match="info: expected 1 int32 elements"):
        ops.orthogonalize([torch.eye(3)], info=3)
