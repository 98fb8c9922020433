"""Launches that overlap, asked of kernels by the tests of each."""

import torch


def gives_what_launches_apart_give(run, fresh, residual):
    """On Hopper a kernel starts while the one before it runs: a wait forgotten would show here, eager or replayed.

    run(x, residual, between=function that is called after each launch) → tensors.  fresh(seed) → an x.
    """
    x = fresh(5)
    expected = run(x, residual, between=torch.cuda.synchronize)
    assert all(torch.isfinite(each).all() for each in expected)
    for _ in range(30):
        assert all(torch.equal(one, other) for one, other in zip(run(x, residual), expected, strict=True))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = run(x, residual)
    for seed in range(10):
        x.copy_(fresh(10 + seed))
        expected = run(x, residual, between=torch.cuda.synchronize)
        for each in found:
            each.fill_(torch.nan)
        graph.replay()
        assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
