"""Solve the two triangular systems of the method exactly, on edges, matrices or streamed rows."""
