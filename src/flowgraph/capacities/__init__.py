"""What an edge weighs: capacities from attention, from values, or from one backward pass."""
