"""Plumbing for every stage (text, devices, progress, run logs) and the learner's tool `stages`."""
