"""MoH: Multi-Head Attention as Mixture-of-Head Attention (arXiv:2410.11842)."""
