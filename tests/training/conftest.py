"""Models that tests of trainings start from."""

import pytest
import torch

from psycopref.models.weights import find_weights, load_causal_lm, load_tokenizer


@pytest.fixture(scope="module")
def tiny(shared_cache):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PSYCOPREF_CACHE", shared_cache)
        return find_weights("random-tiny")


@pytest.fixture(scope="module")
def other(tiny, tmp_path_factory):
    "Another model of the same shape, to be held by."
    folder = tmp_path_factory.mktemp("other")
    model = load_causal_lm(tiny, "float32")
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.2 * torch.randn(parameter.shape, generator=generator)
    model.save_pretrained(folder)
    load_tokenizer(tiny).save_pretrained(folder)
    return find_weights(str(folder))
