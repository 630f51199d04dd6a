"""One file per device kind; the only place that knows what a device is."""
