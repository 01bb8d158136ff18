"""Transformers models on sequences that are spread over processes."""

import pytest
import torch
import torch.nn.functional as F
from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM

from provenn.core.errors import UserError
from provenn.distributed import ContextParallel, simulate
from provenn.huggingface.context import context_parallel

SIZES = {
    "vocab_size": 31,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SIZES)).double()


@pytest.mark.parametrize(("method", "ranks"), [("ring", 2), ("all_gather", 3), ("ulysses", 4)])
def test_a_llama_over_processes_is_one_llama(method, ranks):
    """Logits of every token, and the gradients summed over the processes."""
    whole = llama()
    tokens = torch.randint(31, (2, 11), generator=torch.Generator().manual_seed(1))
    targets = tokens.roll(-1, 1)
    logits = whole(tokens).logits
    loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum")
    expected = torch.autograd.grad(loss, list(whole.parameters()))
    models = [llama() for _ in range(ranks)]

    def run(comm):
        model, sharing = models[comm.rank], ContextParallel(comm, method)
        with context_parallel(model, sharing, batch=2, tokens=11) as positions:
            ours = model(sharing.dispatch(tokens), position_ids=positions, use_cache=False).logits
            real = sharing.real()
            torch.testing.assert_close(ours[:, real], sharing.dispatch(logits.detach())[:, real], rtol=1e-9, atol=1e-9)
            part = F.cross_entropy(ours.flatten(0, 1), sharing.dispatch(targets, -100).flatten(), reduction="sum")
            grads = torch.autograd.grad(part, list(model.parameters()))
        torch.testing.assert_close(model(tokens).logits, logits)
        return grads

    for parts, theirs in zip(zip(*simulate(ranks, run)), expected):
        torch.testing.assert_close(sum(parts), theirs, rtol=1e-8, atol=1e-8)


def test_what_it_cannot_serve_is_refused():
    sharing = simulate(1, lambda comm: ContextParallel(comm))[0]
    tokens = torch.zeros(1, 5, dtype=torch.long)
    window = MistralForCausalLM(MistralConfig(**SIZES, sliding_window=2))
    with (
        pytest.raises(UserError, match="sliding_window"),
        context_parallel(window, sharing, batch=1, tokens=5) as positions,
    ):
        window(tokens, position_ids=positions, use_cache=False)
    model = llama()
    with (
        pytest.raises(UserError, match="leave attention_mask out"),
        context_parallel(model, sharing, batch=1, tokens=5) as positions,
    ):
        mask = torch.tensor([[0, 1, 1, 1, 1]])
        model(tokens, attention_mask=mask, position_ids=positions, use_cache=False)
    model.config.attention_dropout = 0.1
    with (
        pytest.raises(UserError, match="set attention_dropout to 0"),
        context_parallel(model.train(), sharing, batch=1, tokens=5),
    ):
        pass
