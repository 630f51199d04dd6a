"""One file per dialect. An adapter maps bodies to requests and text steps to frames; it knows no ZeroMQ."""
