"""What travels between processes: messages over ZeroMQ, arrays over shared-memory rings."""
