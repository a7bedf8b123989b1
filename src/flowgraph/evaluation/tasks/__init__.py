"""Tasks of the evaluation; importing this package registers them."""
