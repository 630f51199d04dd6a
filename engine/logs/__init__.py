"""What every process writes down: lines, files, levels and the audit log; docs/operations.md, Logs."""

# loggers with a way of their own
REQUESTS = "llm.request"  # what happens to requests
TOKENS = "llm.token"  # steps, at DEBUG; not to standard output either
START = "server.start"  # why the start was refused, which standard error is told line by line
FILES_ONLY = frozenset((REQUESTS, TOKENS, START))  # never on standard error
