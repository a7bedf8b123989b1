"""The conserved flow: solve, solve_rows and their result."""
