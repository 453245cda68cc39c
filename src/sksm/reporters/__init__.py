"""How results look: text for a terminal, and JSON."""
