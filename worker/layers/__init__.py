"""Building blocks shared by the decoder families."""
