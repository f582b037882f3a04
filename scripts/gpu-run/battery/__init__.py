"""Tests and measurements on a machine with a GPU, within a budget of seconds."""
