"""The model and the medicine of MedDAM: a pure library that never imports Ray."""

__version__ = "0.1.0"
