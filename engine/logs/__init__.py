"""What every process writes down: lines, files, levels and the audit log; docs/operations.md, Logs."""

# loggers with a way of their own
REQUESTS = "llm.request"  # what happens to requests
TOKENS = "llm.token"  # steps, at DEBUG
START = "server.start"  # how the start went, which the standard streams are told in a form of its own
NEVER_ON_STDERR = frozenset((REQUESTS, TOKENS, START))
NEVER_ON_STDOUT = frozenset((TOKENS, START))
