"""Self-contained HTML pages and the notebook fragment, built from JSON payloads."""
