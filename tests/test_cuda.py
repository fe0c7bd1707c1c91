"""What a GPU computes, beside exact arithmetic and the CPU. BCQ_CUDA=1 shows it to the tests."""

import itertools

import pytest
import torch

import bcq

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU, or no BCQ_CUDA=1")


def test_products_of_int8_matrices_of_all_sizes_are_exact():
    for m, k, n in itertools.product((1, 16, 17, 25, 961, 1922), (1, 7, 16, 27, 576), (1, 10, 32)):
        a = torch.randint(-128, 128, (m, k)).to(torch.int8)
        w = torch.randint(-128, 128, (n, k)).to(torch.int8)
        found = bcq.int_mm(a.cuda(), w.T.cuda())
        assert torch.equal(found.cpu(), (a.double() @ w.double().T).int()), (m, k, n)


@pytest.mark.parametrize("shape", [(8, 3, 31, 31), (2, 6, 9, 9)])
def test_sums_of_a_layer_in_integers_are_those_of_the_cpu(shape):
    q = torch.randint(0, 256, shape, dtype=torch.uint8)
    w = torch.randint(-127, 128, (32, shape[1], 2, 2)).to(torch.int8)
    found = bcq.integer_conv2d(q.cuda(), w.cuda(), 9, padding=(1, 1))
    assert torch.equal(found.cpu(), bcq.integer_conv2d(q, w, 9, padding=(1, 1)))
