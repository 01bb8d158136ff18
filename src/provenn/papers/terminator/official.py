"""The authors' checkpoints (hyperevolnet/Terminator, June and July 2024): their parameter names to ours."""

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from provenn.core.errors import UserError

WIDTHS = (3, 12, 36, 72, 144)
_LOCAL = {"1": "local3", "2": "local9", "3": "local5", "4": "local7"}
_NAMES = (
    (r"\.fast_multi_branch\.", "."),
    (r"\.slow_net_g\.Kernel\.", ".kernel."),
    (r"\.slow_net_l(\d)\.Kernel\.", lambda found: f".local.{_LOCAL[found[1]]}.kernel."),
    (r"\.local_interact_conv_(\d)\.channel_mixer\.", lambda found: f".local.{_LOCAL[found[1]]}.mix."),
    (r"\.bias(\d)$", lambda found: f".local.{_LOCAL[found[1]]}.bias"),
    (r"\.channel_mixer_mlp\.", ".mixer."),
    (r"\.bottleneck_layer\.", ".bottleneck."),
    (r"\.Fast_Kernel_rgu\.", ".of_input."),
    (r"\.Fast_Kernel_rgu_2\.", ".of_weights."),
    (r"\.fast_linear_k\.", ".key."),
    (r"\.fast_linear_v\.", ".value."),
    (r"\.fast_linear_q\.", ".query."),
    (r"\.fast_linear_y\.", ".out."),
    (r"\.channel_mixer_hci\.slow_net_gc\.Kernel\.", ".hci.kernel."),
    (r"\.hyper_interact\.slow_net_gc(?:_hi)?\.Kernel\.", ".interaction.by_channel."),
    (r"\.hyper_interact\.slow_net_gs(?:_hi)?\.Kernel\.", ".interaction.by_place."),
    (r"\.filters\.(\d)\.linear\.", r".filters.\1."),
    (r"\.linears\.", ".mixers."),
    (r"\.output_linear\.", ".out."),
    (r"\.fast_reduce\.", ".reduce."),
    (r"\.fast_fc1\.", ".mix."),
    (r"\.fast_linears_x\.", ".contexts."),
    (r"\.(bias_p|bias_pk|fast_bias_p)$", ".plane"),
    (r"^out_layer\.", "head."),
)
_OF_SLOW_NETS = (".kernel.", ".by_channel.", ".by_place.")


def convert(state: Mapping[str, Tensor]) -> tuple[str, dict[str, Any], dict[str, Tensor]]:
    """From the state dict of the authors' model to ours: the preset, its options and what `load_state_dict` takes.

    Theirs must have run once before it was saved, as any that was trained has: at the first forward pass the last layer
    of each slow net is scaled. A `network.` or `module.` before the names is dropped. The names of every revision
    are known: the code of July 2024 calls the interaction's slow nets `slow_net_gc_hi` and `slow_net_gs_hi`.

    Raises:
        UserError: when the parameters are not those of the authors' model.
    """
    plain = {re.sub(r"^(network|module)\.", "", name): value for name, value in state.items()}
    try:
        sizes = tuple(len(plain[f"blocks.{i}.fast_multi_branch.channel_mixer_mlp.weight"]) for i in range(len(WIDTHS)))
        classes = len(plain["out_layer.weight"])
        size = plain["blocks.0.fast_multi_branch.slow_net_g.Kernel.bias_p"].shape[-1]
    except KeyError:
        raise UserError("expected a state dict of Terminator's five blocks, found other parameters") from None
    if sizes != WIDTHS:
        raise UserError(f"no Terminator of the authors has widths of {sizes}, expected {WIDTHS}")
    ours = {}
    for name, value in plain.items():
        if name.endswith("train_length"):  # the size of the grid, which the network knows
            continue
        for pattern, replacement in _NAMES:
            name = re.sub(pattern, replacement, name)
        if name.endswith(".plane"):
            value = value[0, 0]
        elif value.dim() > 2 and any(part in name for part in _OF_SLOW_NETS):  # 1×1 convolutions there
            value = value.flatten(1)
        ours[name] = value
    return (
        "terminator_cifar100" if classes == 100 else "terminator_cifar10",
        {"num_classes": classes, "size": size},
        ours,
    )
