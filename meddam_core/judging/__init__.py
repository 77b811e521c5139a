"""Judges behind one protocol, the public DLC-Bench, MedDLC-score, statistics, budget and verdict cache."""
