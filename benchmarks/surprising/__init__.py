"""What `surprises.py` measures, by where it happens: the bound, drawing, training; and the page it writes."""
