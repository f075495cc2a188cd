"""What a run has done, for people and programs: its history, its state, its page. No torch; files of the run alone."""

PAGE = "report.html"
"""Of a run folder."""
