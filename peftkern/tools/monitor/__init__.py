"""Views of a recorded run, or two: a summary, a terminal, a page."""
