"""Load tests of the credit service."""
