"""What several papers' tests ask of a stream."""

import torch


def fold(module, x, state=None):
    """The outputs of `step` over a sequence, and the last state."""
    state = module.init_state(x.shape[0]) if state is None else state
    outputs = []
    for t in range(x.shape[1]):
        y, state = module.step(x[:, t], state)
        outputs.append(y)
    return torch.stack(outputs, dim=1), state
