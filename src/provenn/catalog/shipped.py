"""What the weight files that come with a paper say of themselves, read without torch."""

import json
from pathlib import Path
from typing import Any


def label_of_shipped(file: Path) -> dict[str, Any]:
    """What a weight file that comes with a paper says of itself (`provenn.training.weights.Label`), read without
    torch.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(file), framework="numpy") as handle:
            label = json.loads((handle.metadata() or {})["provenn"])
    except (SafetensorError, OSError, ValueError, KeyError):  # which loading it will report
        return {}
    return label if isinstance(label, dict) else {}


def shipped_in_words(file: Path) -> str:
    """What the weights that come with a paper were trained on, and how well they do: "trained on digits, …"."""
    label = label_of_shipped(file)
    trained, metrics = label.get("trained_on", {}), label.get("metrics", {})
    reached = [f"{name.replace('_', ' ')} {value:.4g}" for name, value in metrics.items()]
    return f"trained on {trained.get('data', 'data that it does not name')}" + (
        f" ({', '.join(reached)})" if reached else ""
    )
