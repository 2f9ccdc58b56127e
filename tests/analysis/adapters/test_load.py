"""Models under study from checkpoints."""

from analysis.adapters.load import load


def test_the_identity_follows_the_tensors(checkpoint_of):
    """An expert is pruned by hand, also past autograd's eyes, and comes back."""
    path = checkpoint_of("smoe_share")
    model, loaded = load(path), load(path).identity
    assert model.identity == loaded
    row = model.model.trunk.blocks[0].ffn.stages[0].router.gate.weight.data[2]
    kept = row.clone()
    row.zero_()
    assert model.identity not in (loaded, load(path).identity)
    row.copy_(kept)
    assert model.identity == loaded
