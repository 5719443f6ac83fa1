"""The machinery that makes runs survive, travel and be known; a reader of the notebooks need not open it."""
