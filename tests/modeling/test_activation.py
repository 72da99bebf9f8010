from __future__ import annotations

import pytest
import torch
from transformers.activations import ACT2FN

from lorax_core.errors import CheckpointError
from lorax_core.modeling.activation import ACTIVATIONS, get_activation

# In order of size, so that saturation, the bend and both tails are all there.
X = torch.cat((torch.tensor([-1e4, -60.0]), torch.linspace(-12, 12, 2001), torch.tensor([60.0, 1e4])))


@pytest.mark.parametrize("name", sorted(ACTIVATIONS))
def test_an_activation_is_the_one_that_transformers_means(name):
    oracle = ACT2FN[name]

    ours = get_activation(name)(X)

    torch.testing.assert_close(ours, oracle(X), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", sorted(set(ACT2FN) - set(ACTIVATIONS)))
def test_an_activation_that_is_not_served_is_refused_with_those_that_are(name):
    with pytest.raises(CheckpointError) as caught:
        get_activation(name)

    assert repr(name) in caught.value.message
    assert "'gelu_new'" in caught.value.message


def test_a_misspelt_activation_is_refused_with_the_nearest():
    with pytest.raises(CheckpointError) as caught:
        get_activation("quickgelu")

    assert caught.value.hint == "did the checkpoint mean 'quick_gelu'?"


@pytest.mark.parametrize("name", [5, None, ["gelu"], {"gelu": 1}, True])
def test_an_activation_that_is_no_name_is_refused(name):
    with pytest.raises(CheckpointError, match="is not supported") as caught:
        get_activation(name)

    assert caught.value.hint
