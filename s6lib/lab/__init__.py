"""Machinery that resumes runs, sends them to workers and identifies them; a reader of the notebooks can skip it."""
