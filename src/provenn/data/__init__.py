"""Embedded data sets, and readers of the user's own in the field's formats."""
