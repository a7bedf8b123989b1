"""Steps: tokens joined to lines, sentences or numbered steps, and the same flow between them."""
