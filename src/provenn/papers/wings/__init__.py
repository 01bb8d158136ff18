"""Wings: multimodal models without text-only forgetting (Zhang et al., 2024, arXiv:2406.03496)."""
