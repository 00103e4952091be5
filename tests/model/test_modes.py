"""The mode that everything but a training step runs a model in."""

from slimepo.model.modes import scoring
from tests.tiny import tiny_model


def test_every_module_is_again_in_the_mode_that_it_was_in() -> None:
    model = tiny_model().train()
    kept = model.model.layers[0].eval()
    with scoring(model):
        assert not any(module.training for module in model.modules())
    assert model.training
    assert not any(module.training for module in kept.modules())
    assert all(module.training for module in model.model.layers[1].modules())
