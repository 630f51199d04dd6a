"""Runs tensors: platforms, weights, models, attention, sampling."""
