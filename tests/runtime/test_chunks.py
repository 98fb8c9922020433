"""Chunks are read back: compared with an order of bits written down independently, from kernels/cuda/layout.cuh."""

import numpy as np
import pytest
import torch
from torch import nn

from flexq_core.quant import pack_codes, unpack_codes
from flexq_core.quant.spec import WEIGHT_BITS
from flexq_core.runtime import cuda, ops
from flexq_core.runtime.chunks import unpack_chunks
from flexq_core.runtime.linear import FlexQLinear


def chunks_by_hand(codes: torch.Tensor, scales: torch.Tensor, planes: bool, bits: int = 6) -> torch.Tensor:
    """codes [N, G * 128] int8 and scales [N, G] float16 → chunks, lane by lane and word by word as the kernel fills them."""
    outputs, groups = scales.shape
    count = -(-outputs // 32)
    fields = np.zeros((count * 32, groups, 128), np.int64)
    fields[:outputs] = codes.numpy().astype(np.int64).reshape(outputs, groups, 128) & (1 << bits) - 1
    padded = np.zeros((count * 32, groups), np.float16)
    padded[:outputs] = scales.numpy()
    half_bytes = 16 * 128 * bits // 8
    chunks = np.zeros((count, groups, 2 * half_bytes + 64), np.uint8)
    for c in range(count):
        for group in range(groups):
            for half in range(2):
                for lane in range(32):
                    g, q = divmod(lane, 4)
                    rows = [fields[c * 32 + half * 16 + g + 8 * h, group] for h in range(2)]
                    words = _planes(rows, q, bits) if planes else _bytes(rows, q)
                    for word, value in enumerate(words):
                        in_vector = 4 if word // 4 < bits // 2 else 2  # words a lane
                        at = half * (half_bytes + 64) + word // 4 * 512 + 4 * in_vector * lane + 4 * (word % 4)
                        chunks[c, group, at : at + 4] = np.frombuffer(np.uint32(value).tobytes(), np.uint8)
            ordered = [padded[c * 32 + g + 8 * h, group] for g in range(8) for h in range(4)]
            chunks[c, group, half_bytes : half_bytes + 64] = np.array(ordered, np.float16).view(np.uint8)
    return torch.from_numpy(chunks)


def _bytes(rows, q):
    words = [0] * 12
    for s in range(4):
        for j in range(4):
            i = 2 * s + j // 2
            for b in range(4):
                code = int(rows[j & 1][64 * (i // 4) + 16 * q + 4 * (i % 4) + b])
                if j < 3:
                    words[3 * s + j] |= code << 8 * b + 2
                else:
                    for third, two_bits in enumerate((code >> 4, code >> 2 & 3, code & 3)):
                        words[3 * s + third] |= two_bits << 8 * b
    return words


def _planes(rows, q, bits):
    words = [0] * 2 * bits
    for p in range(bits):
        for h in range(2):
            for k in range(32):
                words[2 * p + h] |= ((int(rows[h][32 * q + k]) ^ 1 << bits - 1) >> p & 1) << k
    return words


def weights(outputs: int, groups: int, bits: int = 6):
    generator, half = torch.Generator().manual_seed(outputs), 1 << bits - 1
    codes = torch.randint(-half, half, (outputs, groups * 128), dtype=torch.int8, generator=generator)
    return codes, torch.rand(outputs, groups, generator=generator).half()


@pytest.mark.parametrize("planes", [False, True])
@pytest.mark.parametrize(("outputs", "groups"), [(1, 1), (32, 2), (45, 3)])
def test_chunks_are_read_back_bit_for_bit(planes, outputs, groups):
    codes, scales = weights(outputs, groups)
    weight, scale = unpack_chunks(chunks_by_hand(codes, scales, planes), outputs, planes=planes)
    assert torch.equal(weight, pack_codes(codes, 6)) and torch.equal(scale, scales)


@pytest.mark.parametrize("bits", WEIGHT_BITS)
def test_bit_planes_of_any_width_are_read_back(bits):
    codes, scales = weights(45, 2, bits)
    weight, scale = unpack_chunks(chunks_by_hand(codes, scales, True, bits), 45, planes=True)
    assert torch.equal(weight, pack_codes(codes, bits)) and torch.equal(scale, scales)


def test_weights_too_many_for_one_go_are_read_in_parts(monkeypatch):
    monkeypatch.setattr("flexq_core.runtime.chunks._PART_CODES", 1)
    codes, scales = weights(70, 2)
    weight, _ = unpack_chunks(chunks_by_hand(codes, scales, False), 70)
    assert torch.equal(weight, pack_codes(codes, 6))


@pytest.fixture
def repacked(monkeypatch):
    """Repacking as a GPU does it, on this processor; the layer's own product is the definition's."""

    def repack(weight, scale, backend):
        return chunks_by_hand(unpack_codes(weight, 6), scale.data, backend == "bmma")

    monkeypatch.setattr(cuda, "repack", repack)
    monkeypatch.setattr(ops, "resolve_backend", lambda backend, *_: backend)
    monkeypatch.setattr(cuda, "backend_for", lambda *_: "imma")


@pytest.mark.parametrize("backend", ["auto", "imma", "bmma"])
def test_a_prepared_layer_keeps_its_weights_once_and_gives_them_back(repacked, backend):
    layer = FlexQLinear.from_linear(nn.Linear(200, 45), backend=backend)
    stored = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    resolved, chunks = layer.prepare()
    assert resolved == backend and layer.prepare()[1] is chunks
    assert layer.weight.nbytes == layer.weight_scale.nbytes == 0
    assert layer.weight_bytes() == chunks.nbytes + 45
    found = layer.state_dict()
    assert list(found) == list(stored) and all(torch.equal(found[name], stored[name]) for name in stored)

    layer.backend = "reference"  # another backend takes them as they are stored
    assert layer.prepare() == ("reference", None) and torch.equal(layer.weight, stored["weight"])


def test_moving_casting_and_loading_a_prepared_layer(repacked):
    layer, other = (FlexQLinear.from_linear(nn.Linear(200, 45), backend="imma") for _ in range(2))
    stored = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    layer.prepare()
    other.prepare()
    other.load_state_dict(layer.state_dict())
    assert all(torch.equal(tensor, stored[name]) for name, tensor in other.state_dict().items())
    layer.half()
    assert layer.chunks is None and layer.bias.dtype == torch.float16
    assert torch.equal(layer.weight, stored["weight"]) and torch.equal(layer.weight_scale, stored["weight_scale"])
