"""What is computed from given tensors is found through views, writes and numbers read."""

from __future__ import annotations

import torch

from pyro_vae.programs.provenance import Descendants


def test_descendants_are_found_through_views_and_writes_to_them():
    z, data = torch.randn(3), torch.randn(3)
    with Descendants([z]) as found:
        written, untouched = torch.zeros(2, 3), torch.zeros(2, 3)
        written[0] = z.exp()
        of_data = (data > 0) & (data < 1)
        both = of_data & (z > 0)
    assert found.includes(written) and found.includes(both) and found.includes(z[1:])
    assert not found.includes(untouched) and not found.includes(of_data)
    assert not found.includes(None) and not found.read


def test_a_number_read_out_of_a_descendant_is_noted():
    z, data = torch.ones(3), torch.ones(3)
    with Descendants([z]) as found:
        assert bool((data > 0).all()) and not found.read
        assert bool((z.exp() > 0).all())
    assert found.read
