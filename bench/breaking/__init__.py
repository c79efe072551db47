"""The parts of bench/breaks.py: what is done to Temper to break it."""
