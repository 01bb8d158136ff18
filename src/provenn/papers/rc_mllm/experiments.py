"""What RC-MLLM's abstract says."""

EXPERIMENTS: dict = {}
