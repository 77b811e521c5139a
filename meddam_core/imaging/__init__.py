"""Bytes -> pixels and what may be known about them -> 8-bit RGB. See decode.py, render.py, deidentify.py."""
