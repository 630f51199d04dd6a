"""Grammars compiled and masks computed outside the worker, in processes that can be ended."""
