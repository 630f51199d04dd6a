"""How models write tool calls: one file per format, behind the seam in base.py."""
