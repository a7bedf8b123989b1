"""Convert graphs to and from other libraries and file formats."""
