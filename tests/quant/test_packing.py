"""Packing: lossless, and equal to a packer written independently, bit by bit."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flexq_core.quant import pack_bit_planes, pack_codes, unpack_bit_planes, unpack_codes
from tests import reference


def random_codes(bits: int, *shape: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-(2 ** (bits - 1)), 2 ** (bits - 1), shape, generator=generator, dtype=torch.int8)


every_width = pytest.mark.parametrize("bits", range(2, 9))


@settings(max_examples=80)
@given(bits=st.integers(2, 8), rows=st.integers(0, 7), octets=st.integers(1, 35), seed=st.integers(0, 2**31))
def test_packing_equals_the_bitwise_packer(bits, rows, octets, seed):
    codes = random_codes(bits, rows, octets * 8, seed=seed)
    packed = pack_codes(codes, bits)
    assert packed.dtype == torch.uint8 and packed.shape == (rows, octets * bits)
    assert np.array_equal(packed.numpy(), reference.pack(codes.numpy().astype(np.int64), bits))
    assert torch.equal(unpack_codes(packed, bits), codes)


@every_width
def test_every_code_in_every_place_of_as_few_codes_as_fill_bytes(bits):
    codes = torch.arange(-(2 ** (bits - 1)), 2 ** (bits - 1)).to(torch.int8)
    together = math.lcm(bits, 8) // bits
    for place in range(together):
        row = torch.zeros(len(codes), together, dtype=torch.int8)
        row[:, place] = codes
        assert torch.equal(unpack_codes(pack_codes(row, bits), bits), row)


@every_width
def test_every_byte_unpacks_to_codes_in_range(bits):
    packed = torch.randint(0, 256, (64, 16 * bits), dtype=torch.uint8)
    codes = unpack_codes(packed, bits)
    assert codes.min() >= -(2 ** (bits - 1)) and codes.max() <= 2 ** (bits - 1) - 1
    assert torch.equal(pack_codes(codes, bits), packed)


def test_eight_bit_codes_are_stored_as_they_are():
    codes = torch.arange(-128, 128).to(torch.int8)[None]
    assert torch.equal(pack_codes(codes, 8).view(torch.int8), codes)
    assert torch.equal(unpack_codes(pack_codes(codes, 8), 8), codes)


def test_packing_takes_a_strided_view_and_any_leading_shape():
    codes = random_codes(6, 6, 3, 256)[::2, :, ::2]
    assert torch.equal(unpack_codes(pack_codes(codes, 6), 6), codes)


@settings(max_examples=40)
@given(bits=st.integers(2, 8), rows=st.integers(0, 5), words=st.integers(1, 9), seed=st.integers(0, 2**31))
def test_bit_planes_are_the_bits_of_the_codes(bits, rows, words, seed):
    codes = random_codes(bits, rows, words * 32, seed=seed)
    planes = pack_bit_planes(codes, bits)
    assert planes.dtype == torch.int32 and planes.shape == (bits, rows, words)
    unsigned = planes.numpy().view(np.uint32)
    for plane in range(bits):
        expected = (codes.numpy().astype(np.int64) >> plane) & 1
        bitwise = np.packbits(expected.astype(np.uint8), axis=-1, bitorder="little").view("<u4")
        assert np.array_equal(unsigned[plane], bitwise)
    assert torch.equal(unpack_bit_planes(planes), codes)


@pytest.mark.parametrize("plane", range(6))
def test_dropping_a_plane_is_noticed(plane):
    codes = random_codes(6, 4, 128)
    planes = pack_bit_planes(codes, 6)
    planes[plane] = 0
    assert not torch.equal(unpack_bit_planes(planes), codes)


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (
            lambda: pack_codes(torch.zeros(2, 6, dtype=torch.int8), 6),
            ValueError,
            "6 codes of 6 bits; accepted: a mult",
        ),
        (
            lambda: pack_codes(torch.full((2, 4), 32, dtype=torch.int8), 6),
            ValueError,
            "code 32 does not fit 6 bits",
        ),
        (lambda: pack_codes(torch.zeros(2, 4), 6), TypeError, "torch.float32; accepted: int8"),
        (
            lambda: pack_codes(torch.zeros(2, 4, dtype=torch.int8), 5),
            ValueError,
            "4 codes of 5 bits; accepted: a mult.* of 8",
        ),
        (
            lambda: pack_codes(torch.zeros(2, 8, dtype=torch.int8), 9),
            ValueError,
            "bits is 9; accepted: 2, 3, 4, 5, 6, 7, 8",
        ),
        (
            lambda: pack_codes(torch.full((2, 8), -3, dtype=torch.int8), 2),
            ValueError,
            "-3 does not fit 2 bits; accepted: -2 to 1",
        ),
        (
            lambda: unpack_codes(torch.zeros(2, 6, dtype=torch.uint8), 7),
            ValueError,
            "6 bytes of 7-bit codes; accepted: a mult.* of 7",
        ),
        (lambda: unpack_codes(torch.zeros(2, 4, dtype=torch.uint8), 6), ValueError, "4 bytes of 6-bit codes"),
        (
            lambda: unpack_codes(torch.zeros(2, 3, dtype=torch.int8), 6),
            TypeError,
            "torch.int8; accepted: uint8",
        ),
        (lambda: pack_bit_planes(torch.zeros(2, 33, dtype=torch.int8), 6), ValueError, "planes of 33 codes"),
        (
            lambda: pack_bit_planes(torch.zeros(2, 32, dtype=torch.int8), 9),
            ValueError,
            "bits is 9; accepted: 2, 3",
        ),
        (lambda: unpack_bit_planes(torch.zeros(6, 2)), TypeError, "torch.float32; accepted: int32"),
        (lambda: unpack_bit_planes(torch.zeros(1, 2, dtype=torch.int32)), ValueError, "bits is 1"),
    ],
)
def test_bad_input_names_what_is_accepted(call, error, text):
    with pytest.raises(error, match=text):
        call()
