"""Turns HTTP into requests and tokens into HTTP."""
