"""Many answers from one file: batched, resumable, with tables and an index page."""
