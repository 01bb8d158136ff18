"""Layers that several papers share, and the hosts that have slots."""
